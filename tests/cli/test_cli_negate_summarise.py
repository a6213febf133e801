"""``steerclear negate summarise``, and statistics in ``inspect`` and ``verify``."""

import json

import pytest
import torch

from steerclear.app.files import sha256
from steerclear.negation import NegationSet, NegationStatistics, Space

SPACE = Space(encoder="sha256:" + "ab" * 32, shape=(2, 3), name="a tiny encoder")


@pytest.fixture
def bad(tmp_path):
    latents = torch.randn(24, 2, 3, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "bad.safetensors"
    NegationSet(latents=latents, space=SPACE, labels=("axe",) * 6 + ("dagger",) * 6 + ("bomb",) * 12).save(file)
    return file


def test_summarise_inspect_and_verify(steerclear, bad, tmp_path):
    file = tmp_path / "statistics.safetensors"
    text = steerclear(
        "negate", "summarise", bad, "-o", file, "--rank", 2, "--merge", "axe=blade", "--merge", "dagger=blade"
    )
    assert "statistics of 2 labels, rank 2" in text.stdout
    made = NegationStatistics.load(file)
    assert (made.labels, made.counts.tolist()) == (("blade", "bomb"), [12, 12])
    facts = json.loads(steerclear("negate", "inspect", file, "--json").stdout)
    assert facts["labels"] == {"blade": 12, "bomb": 12}
    assert facts["sha256"] == sha256(file.read_bytes())
    assert steerclear("negate", "inspect", file).stdout == text.stdout
    assert (
        "ok (format, shapes, finite, directions, sha256)"
        in steerclear("negate", "verify", file, "--sha256", facts["sha256"]).stdout
    )
    assert json.loads(steerclear("negate", "verify", file, "--json").stdout)["ok"] is True


def test_one_label_for_all(steerclear, bad, tmp_path):
    file = tmp_path / "statistics.safetensors"
    facts = json.loads(steerclear("negate", "summarise", bad, "-o", file, "--label", "weapons", "--json").stdout)
    assert facts["labels"] == {"weapons": 24}


def test_a_rank_that_gives_pictures_away_takes_a_word_and_is_said(steerclear, bad, tmp_path):
    words = ("negate", "summarise", bad, "-o", tmp_path / "statistics.safetensors", "--label", "weapons")
    said = steerclear(*words).stdout
    assert "24 pictures, 0 directions" in said
    assert "warning" not in said
    said = steerclear(*words, "--rank", 2).stdout
    assert "24 pictures, 2 directions" in said
    assert "warning   fewer than 25 pictures for each direction of weapons" in said
    assert json.loads(steerclear(*words, "--rank", 2, "--json").stdout)["directions"] == {"weapons": 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "expected at least 10 different pictures per label, got 'axe' 6.0, 'dagger' 6.0"),
        (("--merge", "sword=blade"), "once per label of axe, bomb, dagger, got sword=blade"),
        (("--merge", "axe"), "--merge OLD=NEW"),
        (("--merge", "axe=a", "--merge", "axe=b"), "--merge OLD=NEW"),
        (("--label", "weapons", "--merge", "axe=blade"), "leave one out"),
    ],
)
def test_what_cannot_be_summarised_is_refused_and_nothing_is_written(steerclear, bad, tmp_path, words, said):
    file = tmp_path / "statistics.safetensors"
    assert said in steerclear("negate", "summarise", bad, "-o", file, *words, code=2).stderr
    assert not file.exists()


def test_statistics_have_no_items_to_show_and_one_hash(steerclear, bad, tmp_path):
    file = tmp_path / "statistics.safetensors"
    steerclear("negate", "summarise", bad, "-o", file, "--label", "weapons")
    assert "keep none" in steerclear("negate", "inspect", file, "--items", code=2).stderr
    assert "expected sha256 00" in steerclear("negate", "verify", file, "--sha256", "00", code=1).stderr

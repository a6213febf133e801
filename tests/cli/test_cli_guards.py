"""``steerclear guards`` and the choice of any guard by name."""

import json

import pytest

from steerclear.app.cli.generate import _summary


def entries(result):
    return json.loads(result.stdout)["pictures"]


def test_every_guard_is_listed_with_its_settings(steerclear):
    rows = {row["kind"]: row for row in json.loads(steerclear("guards", "--json").stdout)}
    assert rows["release"]["settings"] == {"strength": 1.0}
    assert rows["release"]["acts on"] == "denoised estimate"
    assert all(row["is"].endswith(".") for row in rows.values())
    shown = steerclear("guards").stdout
    assert all(kind in shown for kind in rows)


def test_a_guard_by_name_with_a_setting(steerclear, shipped, tmp_path):
    words = ("generate", "a drink", "--guard", "safe-denoiser-published", "--set", "scale=0.5", "--steps", 2, "--json")
    (entry,) = entries(steerclear(*words, "--out", tmp_path))
    said = entry["settings"]["guard"]
    assert said["kinds"] == ["safe-denoiser-published"]
    assert said["settings"] == {"scale": 0.5}
    assert said["coupling"] == "renoise"
    assert entry["guard"]["fired"] > 0
    (weaker,) = entries(steerclear(*words[:5], "scale=0.1", *words[6:], "--out", tmp_path))
    assert weaker["sha256"] != entry["sha256"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--guard", "nonsense"), "expected a kind of recommended"),
        (("--guard", "release", "--set", "scale=1"), "release can be set strength, got scale"),
        (("--guard", "release", "--set", "strength"), "expected NAME=VALUE"),
        (("--guard", "release", "--set", "strength=["), "as in YAML"),
        (("--guard", "release", "--guard", "safe-denoiser-published"), "one at a time"),
        (("--negation", "x.safetensors", "--guard", "release"), "for --negation, got release"),
        (("--negation", "x.safetensors", "--set", "strength=1"), "--set is for --policy"),
    ],
)
def test_mistakes_are_said(steerclear, shipped, tmp_path, words, said):
    assert said in steerclear("generate", "a cat", *words, "--out", tmp_path, code=2).stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("guard", "said"),
    [
        ({"guarded": False}, "drawn WITHOUT a guard"),
        ({"guarded": True}, "all drawn under the guard"),  # of the prompt or of the weights: no steps to act on
        ({"guarded": True, "steps": 2, "fired": 0, "weight": None}, "the guard acted on 0"),
        ({"guarded": True, "steps": 2, "fired": 1, "weight": 0.5}, "the guard acted on 2"),
    ],
)
def test_the_last_line_says_what_guarded(guard, said):
    assert _summary([{"guard": guard, "resumed": False}] * 2) == f"2 pictures; {said}"

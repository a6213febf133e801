"""``steerclear negate build`` over big sources: options, summary, report, going on, ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.building import picture, sha256, table, tar

from steerclear.negation import NegationSet
from steerclear.negation.store import NegationStore

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two tar files with five pictures, one of them there twice, and one sample without."""
    folder = tmp_path_factory.mktemp("shards")
    members = [(f"{k}.png", picture(k, size=(16, 16))) for k in range(3)]
    tar(folder / "bad-0.tar", [*members, ("0.cls", b"dagger"), ("3.txt", b"nothing")])
    tar(folder / "bad-1.tar", [("4.png", picture(4, size=(16, 16))), ("5.png", picture(0, size=(16, 16)))])
    return folder


def test_tar_files_to_a_file_with_a_summary_and_a_skip_report(steerclear, shards, model_folder, tmp_path):
    out, skipped = tmp_path / "bad.safetensors", tmp_path / "left-out.jsonl"
    words = ("--model", model_folder, "--skipped", skipped)
    result = steerclear("negate", "build", f"{shards}/bad-{{0..1}}.tar", "-o", out, *words)
    assert "4 items" in result.stdout
    assert "built     4 of 7 pictures" in result.stderr
    assert "left out  1: a sample without a picture" in result.stderr
    assert "left out  1: the same picture as another" in result.stderr
    lines = [json.loads(line) for line in skipped.read_text().splitlines()]
    assert [line["reason"] for line in lines][-1] == "the same picture as bad-0/0"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["bad.safetensors", "left-out.jsonl"]
    again = steerclear("negate", "build", shards, "-o", tmp_path / "b.safetensors", *words, "--json")
    said = json.loads(again.stdout)["build"]
    assert (said["pictures"], said["encoded"], said["workers"]) == (7, 5, 1)
    assert sha256(tmp_path / "b.safetensors") == sha256(out)


def test_a_table_of_paths_to_a_store(steerclear, picture_folder, model_folder, tmp_path):
    rows = [{"path": f"noise-{k}.png", "label": "noise", "licence": "CC0" if k else None} for k in range(3)]
    file, out = table(tmp_path / "list.parquet", rows), tmp_path / "bad.negation"
    words = ("--model", model_folder, "--root", picture_folder, "--licence", "ticket 1", "--label", "all")
    steerclear("negate", "build", file, "-o", out, *words)
    with NegationStore.open(out) as store:
        items = store.items()
    assert [(item.id, item.label, item.licence) for item in items] == [
        ("noise-0.png", "all", "ticket 1"),
        ("noise-1.png", "all", "CC0"),
        ("noise-2.png", "all", "CC0"),
    ]
    assert {item.provenance for item in items} == {str(file)}


def test_kept_parts_are_used_by_the_next_build(steerclear, shards, model_folder, tmp_path):
    words = ("-o", tmp_path / "bad.safetensors", "--model", model_folder, "--keep-parts", "--json")
    words += ("--parts", tmp_path / "parts")
    encoded = [
        json.loads(steerclear("negate", "build", *some, *words).stdout)["build"]["encoded"]
        for some in ((shards / "bad-0.tar",), (shards / "bad-0.tar", shards / "bad-1.tar"))
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors", "parts"]
    assert encoded == [3, 1]  # the repeated picture was known, too


def test_ranks_each_do_their_share(steerclear, shards, model_folder, tmp_path, monkeypatch):
    out = tmp_path / "bad.safetensors"
    words = ("negate", "build", shards, "-o", out, "--model", model_folder, "--timeout", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "RANK and WORLD_SIZE" in steerclear(*words, code=2).stderr
    monkeypatch.setenv("RANK", "0")
    assert "run again without torchrun" in steerclear(*words, code=1).stderr
    monkeypatch.setenv("RANK", "1")
    assert "the first one puts" in steerclear(*words).stderr
    assert not out.exists()
    monkeypatch.setenv("RANK", "0")
    steerclear(*words)
    assert len(NegationSet.load(out)) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("bad-{0..3}.tar",), "found nothing there"),
        (("a.tar",), "whole, uncompressed tar file"),
        (("a.tar", "--prompt", "x"), "one of the two"),
    ],
)
def test_sources_that_cannot_be_read(steerclear, model_folder, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"not a tar file")
    assert said in steerclear("negate", "build", *words, "-o", "x.safetensors", "--model", model_folder, code=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["workers", "torchrun"])
def test_many_workers_write_the_same_bytes(steerclear, shards, model_folder, tmp_path, how):
    out, one = tmp_path / "bad.safetensors", tmp_path / "one.safetensors"
    words = ["steerclear", "negate", "build", str(shards), "-o", str(out), "--model", str(model_folder)]
    start = ["-m"] if how == "workers" else ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    words += ["--workers", "2"] if how == "workers" else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *start, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steerclear("negate", "build", shards, "-o", one, "--model", model_folder)
    assert sha256(out) == sha256(one)

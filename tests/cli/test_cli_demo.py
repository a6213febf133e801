"""``steerclear demo`` end to end on the tiny stand-ins: files, numbers, and what they are made of."""

import json

import pyarrow.parquet as pq
import pytest

from steerclear.app.pictures import read


@pytest.fixture(scope="module")
def done(tmp_path_factory, request):
    """The folder of one run; every test below looks at it."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture
def ran(done, shipped, steerclear):
    if not (done / "results.json").exists():
        words = ("demo", "--out", done, "--seeds", 1, "--steps", 2, "--policy", "weapons", "--policy", "alcohol")
        (done / "stdout.txt").write_text(steerclear(*words).stdout)
    return done, json.loads((done / "results.json").read_text())


def test_files_and_table(ran):
    folder, results = ran
    text = (folder / "stdout.txt").read_text()
    for words in ("no guard", "negative prompt", "Safe Denoiser", "recommended guard", "report.html", "95 %"):
        assert words in text
    assert all((folder / picture["file"]).is_file() for picture in results["pictures"])
    assert (folder / "report.html").stat().st_size > 10_000
    assert read(folder / "page.png").ndim == 3


def test_the_numbers_are_counts_of_the_pictures(ran):
    _, results = ran
    for arm in results["arms"]:
        for kind, unsafe in arm["unsafe"].items():
            flags = [p["unsafe"] for p in results["pictures"] if p["arm"] == arm["key"] and p["kind"] == kind]
            assert unsafe["n"] == len(flags) > 0
            assert unsafe["value"] == sum(flags) / len(flags)
            assert unsafe["low"] <= unsafe["value"] <= unsafe["high"]


def test_the_first_arm_is_the_reference(ran):
    _, results = ran
    first = results["arms"][0]
    assert (first["identical"]["value"], first["unchanged"]["value"]) == (1.0, 1.0)
    assert all(p["difference"] == 0.0 for p in results["pictures"] if p["arm"] == first["key"])


def test_the_negative_prompt_costs_as_much_as_no_guard(ran):
    """Two rows through the network per step and picture: with and without the prompt."""
    _, results = ran
    evaluations = {arm["key"]: arm["evaluations"] for arm in results["arms"]}
    assert evaluations["no-guard"] == evaluations["negative-prompt"] == 2 * 2


def test_the_trace_has_a_row_per_guarded_picture_and_step(ran):
    folder, results = ran
    rows = pq.read_table(folder / "trace.parquet").to_pylist()
    guarded = [p for p in results["pictures"] if p["arm"] in {"safe-denoiser", "recommended"}]
    assert len(rows) == 2 * len(guarded)
    assert {(row["arm"], row["prompt"], row["seed"]) for row in rows} == {
        (p["arm"], p["prompt"], p["seed"]) for p in guarded
    }


def test_the_command_in_the_report_is_a_command(ran):
    from steerclear.app.cli import main

    words = ran[1]["command"].split()
    assert words[:2] == ["steerclear", "demo"]
    parsed = main.commands["demo"].make_context("demo", words[2:]).params
    assert (parsed["seeds"], parsed["steps"], parsed["policies"]) == (1, 2, ("weapons", "alcohol"))


def test_unknown_policy(steerclear, shipped, tmp_path):
    message = steerclear("demo", "--policy", "x", "--out", tmp_path, code=2).stderr
    assert "expected one of weapons, alcohol" in message
    assert not list(tmp_path.iterdir())


def test_a_judge_that_cannot_see_the_policy_is_an_error(steerclear, shipped, tmp_path, monkeypatch):
    from steerclear import detect

    monkeypatch.setattr(detect, "load", lambda name: detect.Always(probabilities=(0.0,)))
    message = steerclear("demo", "--policy", "weapons", "--out", tmp_path, code=2).stderr
    assert "expected labels that Always knows" in message
    assert not list(tmp_path.iterdir())


def test_a_judge_that_cannot_see_what_was_asked_is_an_error(steerclear, shipped, tmp_path, monkeypatch):
    from steerclear import detect

    weapons = ("dagger", "bomb", "axe", "water pistol")
    monkeypatch.setattr(detect, "load", lambda name: detect.Always(labels=weapons, probabilities=(0.0,) * 4))
    message = steerclear("demo", "--policy", "weapons", "--out", tmp_path, code=2).stderr
    assert "does not know" in message
    assert not list(tmp_path.iterdir())

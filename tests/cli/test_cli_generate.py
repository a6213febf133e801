"""``steerclear generate``: guarded, resumable, atomic, and never unguarded by accident."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from steerclear.app import generate as drawing
from steerclear.app.files import sha256
from steerclear.app.pictures import read

QUICK = ("--steps", 2, "--json")


def entries(result):
    return json.loads(result.stdout)["pictures"]


def test_a_guarded_picture_with_its_sidecar(steerclear, shipped, tmp_path):
    (entry,) = entries(steerclear("generate", "a drink", "--out", tmp_path, "--seed", 7, *QUICK))
    sidecar = json.loads((tmp_path / entry["file"]).with_suffix(".json").read_text())
    assert sidecar["sha256"] == sha256((tmp_path / entry["file"]).read_bytes())
    assert (sidecar["prompt"], sidecar["seed"]) == ("a drink", 7)
    assert sidecar["guard"]["guarded"]
    assert sidecar["guard"]["steps"] == 2
    assert set(sidecar["settings"]["guard"]["policies"]) == {"weapons", "alcohol"}
    assert read(entry["path"]).shape == (16, 16, 3)


def test_the_same_request_is_not_drawn_again(steerclear, shipped, tmp_path):
    words = ("generate", "a cat", "a dog", "--out", tmp_path, "-n", 2, *QUICK)
    first = entries(steerclear(*words))
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert [entry["resumed"] for entry in first] == [False] * 4
    assert [entry["resumed"] for entry in entries(steerclear(*words))] == [True] * 4
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps


@pytest.mark.parametrize("damage", ["truncated picture", "no picture", "no sidecar", "hostile sidecar"])
def test_what_is_not_whole_is_drawn_again(steerclear, shipped, tmp_path, damage):
    words = ("generate", "a cat", "--out", tmp_path, *QUICK)
    (entry,) = entries(steerclear(*words))
    picture = tmp_path / entry["file"]
    whole = picture.read_bytes()
    if damage == "truncated picture":
        picture.write_bytes(whole[:40])
    elif damage == "no picture":
        picture.unlink()
    elif damage == "no sidecar":
        picture.with_suffix(".json").unlink()
    else:
        picture.with_suffix(".json").write_text("[1, 2")
    (again,) = entries(steerclear(*words))
    assert not again["resumed"]
    assert picture.read_bytes() == whole


def test_other_settings_never_overwrite(steerclear, shipped, tmp_path):
    for extra in ((), ("--policy", "weapons"), ("--strength", 0.5), ("--unguarded",), ("--cfg", 5)):
        steerclear("generate", "a cat", "--out", tmp_path, *extra, *QUICK)
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_strength_zero_equals_unguarded(steerclear, shipped, tmp_path):
    (watched,) = entries(steerclear("generate", "a cat", "--out", tmp_path, "--strength", 0, *QUICK))
    (free,) = entries(steerclear("generate", "a cat", "--out", tmp_path, "--unguarded", *QUICK))
    assert watched["guard"]["guarded"]
    assert not free["guard"]["guarded"]
    assert watched["sha256"] == free["sha256"]


def test_a_batch_draws_what_single_pictures_draw(steerclear, shipped, tmp_path):
    together = entries(steerclear("generate", "a cat", "a dog", "--out", tmp_path / "a", *QUICK))
    alone = entries(steerclear("generate", "a cat", "a dog", "--out", tmp_path / "b", "--batch", 1, *QUICK))
    for left, right in zip(together, alone, strict=True):
        one, other = (read(entry["path"]).astype(int) for entry in (left, right))
        assert abs(one - other).max() <= 1


def test_no_guard_is_an_error_unless_said(steerclear, shipped, model_folder, tmp_path):
    words = ("generate", "a cat", "--model", model_folder, "--out", tmp_path)
    result = steerclear(*words, *QUICK, code=2)
    assert "--unguarded" in result.stderr
    assert not list(tmp_path.iterdir())
    assert "both" in steerclear(*words, "--unguarded", "--policy", "weapons", *QUICK, code=2).stderr


def test_nothing_is_written_when_the_guard_fails(steerclear, shipped, tmp_path, monkeypatch):
    from steerclear.guards import ConditionalRelease

    def broken(self, denoised, state):
        raise RuntimeError("the guard broke")

    monkeypatch.setattr(ConditionalRelease, "__call__", broken)
    result = steerclear("generate", "a cat", "--out", tmp_path, *QUICK, code=1)
    assert "\nerror: unexpected RuntimeError: the guard broke; steerclear --debug" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_trace_without_the_guard_is_an_error(steerclear, shipped, tmp_path, monkeypatch):
    from steerclear.attach import Trace

    monkeypatch.setattr(Trace, "records", lambda self: [])
    assert "expected the guard at every one" in steerclear("generate", "a cat", "--out", tmp_path, code=1).stderr
    assert not list(tmp_path.iterdir())


def test_own_negation_set(steerclear, shipped, policy_folder, tmp_path):
    own = ("--negation", policy_folder / "weapons.safetensors")
    safe = ("--safe", policy_folder / "safe.safetensors", "--bandwidth", 4)
    (entry,) = entries(steerclear("generate", "a cat", *own, *safe, "--out", tmp_path, *QUICK))
    assert entry["guard"]["weight"] is not None
    tracked = ("--scheduler", "ddpm")
    (other,) = entries(steerclear("generate", "a cat", *own, *tracked, "--out", tmp_path, *QUICK))
    assert other["settings"]["scheduler"] == "DDPMScheduler"
    (loop,) = entries(steerclear("generate", "a cat", *own, "--guard", "published", "--out", tmp_path, *QUICK))
    assert loop["settings"]["guard"]["coupling"] == "renoise"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--safe", "x.safetensors", "--policy", "weapons"), "for --negation"),
        (("--policy", "nonsense"), "expected one of weapons, alcohol"),
        (("--negation", "missing.safetensors"), "missing.safetensors"),
        (("--guard", "dynamic", "--policy", "weapons"), "use recommended"),
        (("--size", "12x"), "expected N or WxH"),
        (("--scheduler", "nonsense"), "expected one of"),
        (("--device", "nonsense"), "device"),
        (("--strength", "-1"), "strength >= 0"),
        (("--model", "no such model", "--unguarded"), "emoji-sd"),
    ],
)
def test_wrong_input_is_one_clear_line(steerclear, shipped, tmp_path, words, said):
    runner = steerclear("generate", "a cat", "--out", tmp_path, *words, *QUICK, code=2)
    assert said in runner.stderr
    assert runner.stderr.count("\n") == 1
    assert "Traceback" not in runner.stderr
    assert runner.stdout == ""
    assert not list(tmp_path.iterdir())


def test_unwritable_target(steerclear, shipped, tmp_path):
    (tmp_path / "file").write_text("")
    result = steerclear("generate", "a cat", "--out", tmp_path / "file" / "below", *QUICK, code=1)
    assert result.stderr.strip().splitlines()[-1].startswith("error:")


def test_prompts_from_a_file_and_from_stdin(steerclear, shipped, tmp_path):
    text = "# comment\na cat\n\n  a dog  \na cat\n"
    (tmp_path / "prompts.txt").write_text(text)
    for source, given in ((tmp_path / "prompts.txt", None), ("-", text)):
        result = steerclear("generate", "--prompts-file", source, "--out", tmp_path / "out", *QUICK, input=given)
        assert [entry["prompt"] for entry in entries(result)] == ["a cat", "a dog"]
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9\n")
    assert "UTF-8" in steerclear("generate", "--prompts-file", tmp_path / "bad.txt", code=2).stderr
    assert "Give a prompt" in steerclear("generate", code=2).stderr


def test_a_prompt_that_is_too_long_is_said_to_be(steerclear, shipped, tmp_path):
    """A token per letter, and two marks: 77 are read."""
    said = steerclear("generate", "a" * 80, "b" * 75, "--out", tmp_path, "--steps", 2).stderr
    assert said.count("note ") == 1
    assert f"does not read the last 5 tokens of {'a' * 80!r}" in said


def test_a_grid_alone_leaves_one_file(steerclear, shipped, tmp_path):
    steerclear("generate", "a cat", "-n", 3, "--grid", tmp_path / "grid.png", *QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    assert read(tmp_path / "grid.png").shape[1] > 300


def test_hostile_prompts_stay_inside_the_folder(steerclear, shipped, tmp_path):
    prompt = "../../etc/passwd\x00<script> 💣 " + "x" * 500
    (entry,) = entries(steerclear("generate", prompt.replace("\x00", ""), "--out", tmp_path / "out", *QUICK))
    assert sorted(path.parent.name for path in tmp_path.rglob("*.png")) == ["out"]
    assert len(entry["file"]) < 80


def test_killed_at_any_moment_nothing_is_lost(model_folder, tmp_path):
    """A real process, killed twice: what was finished stays finished, and the rest is drawn afterwards."""
    words = [sys.executable, "-m", "steerclear", "generate", "a cat", "-n", "6", "--batch", "1", "--steps", "2"]
    words += ["--unguarded", "--json", "--model", str(model_folder), "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    survivors = {path: path.read_bytes() for path in tmp_path.glob("*.png") if path.with_suffix(".json").exists()}
    assert survivors
    again = subprocess.run(words, env=environment, capture_output=True, check=True)
    pictures = json.loads(again.stdout)["pictures"]
    assert len(pictures) == 6
    assert sum(entry["resumed"] for entry in pictures) == len(survivors)
    assert all(path.read_bytes() == data for path, data in survivors.items())


def test_request_names_are_stable():
    """The name is the address of a finished picture: it must not depend on the machine or the order of settings."""
    one = drawing.Request(prompt="A Drink!", seed=3, settings={"a": 1, "b": None})
    other = drawing.Request(prompt="A Drink!", seed=3, settings={"b": None, "a": 1})
    text = '{"prompt": "A Drink!", "seed": 3, "settings": {"a": 1, "b": null}}'
    assert one.key == other.key == sha256(text.encode())
    assert one.name == f"a-drink-3-{sha256(text.encode())[:10]}"


def test_a_guard_that_saw_its_references_while_sampling_saw_them_at_the_steps_of_the_call():
    """Its levels and its guidance are those of the pictures; by default the model's own."""
    from steerclear.app.arms import sampling_of
    from steerclear.app.cli.generate import _sampling

    asked = {"model": "emoji-dit", "steps": None, "cfg": None}
    assert _sampling(asked) == (20, 2.0)
    assert _sampling(asked | {"steps": 30, "cfg": 0.0}) == (30, 0.0)
    assert _sampling(asked | {"model": "somebody/else"}) == (None, None)
    assert sampling_of(["class-redirect"], 30, 1.5) == {"steps": 30, "cfg": 1.5}
    assert sampling_of(["class-redirect"], None, None) == {}
    assert sampling_of(["recommended", "safree"], 30, 1.5) == {}

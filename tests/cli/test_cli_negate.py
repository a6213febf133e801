"""``steerclear negate``: build, inspect, add, remove, verify."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from steerclear.app.files import sha256
from steerclear.app.pictures import read
from steerclear.negation import NegationSet


@pytest.fixture
def bad(steerclear, model_folder, picture_folder, tmp_path):
    file = tmp_path / "bad.safetensors"
    steerclear("negate", "build", picture_folder, "-o", file, "--model", model_folder)
    return file


def test_build_from_a_folder_lists_what_it_left_out(steerclear, model_folder, picture_folder, tmp_path):
    file = tmp_path / "bad.safetensors"
    result = steerclear("negate", "build", picture_folder, "-o", file, "--model", model_folder, "--json")
    facts = json.loads(result.stdout)
    assert facts["items"] == 6
    assert facts["labels"] == {"noise": 6}
    assert [skip["source"] for skip in facts["skipped"]] == [str(picture_folder / "notes.txt")]
    assert facts["sha256"] == sha256(file.read_bytes())


def test_build_from_prompts(steerclear, model_folder, tmp_path):
    file = tmp_path / "drawn.safetensors"
    words = ("--prompt", "a dagger", "--prompt", "an axe", "-n", 2, "--steps", 2, "--model", model_folder)
    steerclear("negate", "build", *words, "-o", file)
    assert NegationSet.load(file).labels == ("a dagger", "a dagger", "an axe", "an axe")
    steerclear("negate", "build", *words, "-o", file, "--label", "weapons")
    assert set(NegationSet.load(file).labels) == {"weapons"}


def test_inspect_items_and_sheet(steerclear, bad, model_folder, picture_folder, tmp_path):
    sheet = tmp_path / "sheet.png"
    text = steerclear("negate", "inspect", bad, "--items", "--sheet", sheet, "--model", model_folder).stdout
    assert "6 items" in text
    assert "noise-3.png" in text
    assert read(sheet).shape[1] == 6 * (96 + 10) + 10
    steerclear("negate", "inspect", bad, "--sheet", tmp_path / "source.png", "--images", picture_folder)
    assert not np.array_equal(read(sheet), read(tmp_path / "source.png"))
    facts = json.loads(steerclear("negate", "inspect", bad, "--json").stdout)
    assert [item["id"] for item in facts["items"]] == [f"noise-{i}.png" for i in range(6)]


def test_a_sheet_of_the_wrong_pictures_is_an_error(steerclear, bad, tmp_path):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "other" / "black.png")
    words = ("--sheet", tmp_path / "sheet.png", "--images", tmp_path / "other")
    assert "digests" in steerclear("negate", "inspect", bad, *words, code=2).stderr
    assert not (tmp_path / "sheet.png").exists()


def test_remove_then_add_restores_the_set(steerclear, bad, model_folder, picture_folder, tmp_path):
    before = NegationSet.load(bad)
    fewer = tmp_path / "fewer.safetensors"
    steerclear("negate", "remove", bad, "noise-0.png", "noise-4.png", "-o", fewer)
    assert len(NegationSet.load(fewer)) == 4
    steerclear("negate", "add", fewer, picture_folder, "--model", model_folder)
    assert set(NegationSet.load(fewer).digests) == set(before.digests)
    steerclear("negate", "add", fewer, bad)
    assert len(NegationSet.load(fewer)) == 6
    assert NegationSet.load(bad).ids == before.ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_file_keeps_its_precision(steerclear, bad, tmp_path, dtype):
    """float16 would round the first and send the second to infinity."""
    items = NegationSet.load(bad)
    latents = torch.where(items.latents > 0.5, 1e6, items.latents + 1e-5).to(dtype)
    fine, one = tmp_path / "fine.safetensors", tmp_path / "one.safetensors"
    replace(items, latents=latents).save(fine, dtype=dtype)
    steerclear("negate", "remove", fine, items.ids[-1], "-o", one)
    steerclear("negate", "add", one, bad)
    stored = NegationSet.load(one, mapped=True).latents
    assert stored.dtype == dtype
    assert torch.equal(stored[: len(items) - 1], latents[:-1])


def test_unknown_ids_leave_the_file_alone(steerclear, bad):
    data = bad.read_bytes()
    assert "nothing-like-that" in steerclear("negate", "remove", bad, "nothing-like-that", code=2).stderr
    assert bad.read_bytes() == data


def test_verify(steerclear, bad, model_folder):
    good = sha256(bad.read_bytes())
    assert "ok" in steerclear("negate", "verify", bad, "--sha256", good).stdout
    checked = json.loads(steerclear("negate", "verify", bad, "--model", model_folder, "--json").stdout)
    assert "space" in checked["checked"]
    assert "sha256" in steerclear("negate", "verify", bad, "--sha256", "0" * 64, code=1).stderr
    bad.write_bytes(bad.read_bytes()[:-20])
    assert steerclear("negate", "verify", bad, code=1).stderr.startswith("error:")


def test_verify_refuses_another_encoder(steerclear, bad, tmp_path):
    from steerclear.testing.pipelines import tiny_pipeline

    pipe = tiny_pipeline("sd")
    pipe.vae.encoder.conv_out.bias.data += 1.0
    pipe.save_pretrained(tmp_path / "other")
    message = steerclear("negate", "verify", bad, "--model", tmp_path / "other", code=1).stderr
    assert "expected latents of" in message


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (("build", "-o", "x.safetensors"), "one of the two", 2),
        (("build", "missing", "-o", "x.safetensors"), "missing", 2),
        (("inspect", "missing.safetensors"), "missing.safetensors", 2),
        (("verify", os.devnull), "error:", 1),
    ],
)
def test_wrong_input_is_one_clear_line(steerclear, model_folder, words, said, code):
    if words[0] == "build":
        words = (*words, "--model", model_folder)
    result = steerclear("negate", *words, code=code)
    assert said in result.stderr
    assert "Traceback" not in result.stderr

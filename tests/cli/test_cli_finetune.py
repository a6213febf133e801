"""``steerclear finetune safegen``: from pictures to an adapter and a pipeline, on a tiny model."""

import json

import numpy as np
import pytest
from PIL import Image

import steerclear as package
from steerclear.app.pictures import read
from steerclear.finetune import apply
from steerclear.testing.pipelines import tiny_call, tiny_pipeline

QUICK = ("--train-steps", 2, "--batch", 2, "--blocks", 2, "--sample-steps", 2)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("unsafe/knife", "benign/cat"):
        place = tmp_path / "pictures" / name
        place.mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return tmp_path / "pictures"


def test_a_folder_becomes_an_adapter(steerclear, folder, model_folder, tmp_path):
    out = tmp_path / "adapter"
    words = (
        "finetune",
        "safegen",
        folder,
        "-o",
        out,
        "--model",
        model_folder,
        *QUICK,
        "--form",
        "lora",
        "--sample",
        "a cat",
    )
    result = json.loads(steerclear(*words, "--json").stdout)
    assert result["pairs"] == 4
    assert result["settings"]["form"] == "lora"
    assert len(result["losses"]) == 2
    assert {file.name for file in out.iterdir()} == {
        "checkpoint.safetensors",
        "pytorch_lora_weights.safetensors",
        "report.json",
        "samples.png",
    }
    assert json.loads((out / "report.json").read_text())["source"]["folder"] == str(folder)
    assert read(out / "samples.png").shape[1] == 8 * 106 + 10
    apply(tiny_pipeline("sd"), out)
    text = steerclear(*words).stdout  # goes on from the checkpoint: nothing left to train
    assert "pipe.load_lora_weights" in text
    message = steerclear(*words, "--learning-rate", 0.5, code=2).stderr
    assert "other learning_rate" in message


def test_a_policy_becomes_a_pipeline(steerclear, shipped, tmp_path):
    out = tmp_path / "model"
    words = ("--policy", "weapons", "--draw", "a dagger", "-n", 1, "--form", "full", "--target", "published")
    steerclear("finetune", "safegen", "-o", out, *words, *QUICK)
    pipe = package.load(out)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(**tiny_call("sd")).images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "expected one source"),
        (("--policy", "weapons", "nowhere"), "expected one source"),
        (("nowhere",), "found no unsafe/"),
        (("--negation", "bad.safetensors"), "--negation and --safe together"),
        (("--policy", "weapons", "--boxes", "nothing"), "object, picture"),
        (("--policy", "weapons", "--dtype", "float16"), "float32"),
        (("--policy", "nothing"), "weapons"),
        (("--policy", "weapons", "--learning-rate", "-1"), "learning_rate > 0"),
    ],
)
def test_wrong_input_is_one_clear_line(steerclear, shipped, words, said, tmp_path):
    result = steerclear("finetune", "safegen", "-o", tmp_path / "out", *words, code=2)
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()

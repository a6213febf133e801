"""The three kinds of generation that an evaluation asks for: from text, from a class label, from nothing."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from steerclear.errors import InvalidInput, SteerclearError, UnsupportedPipeline
from steerclear.evaluate import Arm, Prompt, Sampling, Task, evaluate, records
from steerclear.evaluate.prompt_file import MOST_DRAWS, Selection
from steerclear.evaluate.record import digest
from steerclear.evaluate.request import request
from steerclear.testing.pipelines import tiny_pipeline


def unconditional():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20))


def classes():
    pipe = tiny_pipeline("dit")
    pipe.labels = {"food": 1, "tools": 2}
    return pipe


def test_text_classes_and_nothing_are_asked_for_by_their_own_arguments():
    apple, empty = Prompt(text="an apple"), Prompt(text="")
    sd = tiny_pipeline("sd")
    assert request(sd, [apple, empty], cfg=3.0) == {"prompt": ["an apple", ""], "guidance_scale": 3.0}
    with_negative = request(sd, [apple], cfg=3.0, negative="a dagger")
    assert with_negative["negative_prompt"] == ["a dagger"]
    asked = request(classes(), [Prompt(text="tools"), Prompt(text="food")], cfg=2.0)
    assert asked == {"class_labels": [2, 1], "guidance_scale": 2.0}
    assert request(unconditional(), [empty, empty, empty], cfg=3.0) == {"batch_size": 3}


def test_what_a_pipeline_cannot_read_is_refused():
    with pytest.raises(InvalidInput, match="classes among food, tools; got drinks"):
        request(classes(), [Prompt(text="drinks")], cfg=2.0)
    with pytest.raises(InvalidInput, match="no negative prompt"):
        request(classes(), [Prompt(text="food")], cfg=2.0, negative="a dagger")
    with pytest.raises(InvalidInput, match="without a prompt, got 'an apple'"):
        request(unconditional(), [Prompt(text="an apple")], cfg=1.0)

    class Foreign:
        def __call__(self, audio):
            return audio

    with pytest.raises(UnsupportedPipeline, match="got audio"):
        request(Foreign(), [Prompt(text="")], cfg=1.0)


def test_draws_of_one_label_are_independent_units_and_halves_share_none():
    rows = [{"text": "food", "kind": "group", "draws": 3, "half": half} for half in ("dev", "report")]
    dev, report = (Selection(half=half).of(rows, "test") for half in ("dev", "report"))
    assert [prompt.turn for prompt in dev] == [0, 1, 2]
    assert [prompt.turn for prompt in report] == [MOST_DRAWS, MOST_DRAWS + 1, MOST_DRAWS + 2]
    assert len({prompt.digest for prompt in (*dev, *report)}) == 6
    assert Prompt(text="food").digest not in {prompt.digest for prompt in dev}
    for draws in (0, MOST_DRAWS + 1, "many", True):
        with pytest.raises(InvalidInput, match="expected draws from 1 to"):
            Selection().of([{"text": "food", "draws": draws}], "test")


@pytest.mark.parametrize("make", [classes, unconditional])
def test_a_run_draws_the_pictures_that_the_pipeline_draws(make, tmp_path):
    text = "food" if make is classes else ""
    prompts = Selection().of([{"text": text, "draws": 3}], "test")
    sampling = Sampling(steps=3, cfg=2.0, batch=2)
    task = Task(model="tiny", prompts=prompts, arms=(Arm(key="none"),), seeds=(0,), sampling=sampling, keep="none")
    evaluate(task, tmp_path, load=make)
    table = records(tmp_path)
    assert table.num_rows == len(set(table.column("prompt_digest").to_pylist())) == 3
    pipe, call = make(), {"num_inference_steps": 3, "output_type": "np"}
    seeds = table.column("seed").to_pylist()[:2]
    call |= {"class_labels": [1, 1], "guidance_scale": 2.0} if make is classes else {"batch_size": 2}
    pictures = pipe(generator=[torch.Generator().manual_seed(seed) for seed in seeds], **call).images
    wanted = [digest(np.ascontiguousarray(picture, dtype=np.float32)) for picture in pictures]
    assert table.column("digest").to_pylist()[:2] == wanted


@contextmanager
def doubled(pipe):
    """Weights of an arm: twice the last layer's, and back."""
    weight = pipe.unet.conv_out.weight
    before = weight.data.clone()
    weight.data *= 2
    try:
        yield
    finally:
        weight.data = before


def test_an_arm_with_weights_of_its_own_leaves_the_others_alone(tmp_path):
    prompts = tuple(Prompt(text="", turn=turn) for turn in range(2))
    arms = (Arm(key="none"), Arm(key="doubled", weights=doubled), Arm(key="again"))
    task = Task(model="tiny", prompts=prompts, arms=arms, seeds=(0,), sampling=Sampling(steps=3), keep="none")
    evaluate(task, tmp_path, load=unconditional)
    identical = dict(zip(*(records(tmp_path).column(name).to_pylist() for name in ("arm", "identical")), strict=True))
    assert identical == {"none": True, "doubled": False, "again": True}


def test_a_picture_pipeline_of_the_wrong_kind_is_an_error_that_names_the_arm(tmp_path):
    task = Task(model="tiny", prompts=(Prompt(text="an apple"),), arms=(Arm(key="none"),), seeds=(0,), keep="none")
    with pytest.raises(SteerclearError, match=r"arm none.*without a prompt"):
        evaluate(task, tmp_path, load=unconditional)

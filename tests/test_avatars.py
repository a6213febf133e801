"""The unconditional model, its judge and its references: they load, fit each other, and do their job.

What is certain is measured by benchmarks/unconditional.py; here a few fixed seeds.
"""

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler

import steerclear
from steerclear import zoo
from steerclear.detect.avatars_judge import AvatarsJudge
from steerclear.errors import InvalidInput
from steerclear.guards import SafeDenoiser, TwoSample
from steerclear.zoo import avatars

STEPS = 12
SEEDS, WHO = (3, 13, 46, 30, 60, 1), (0, 5, 3, 2, 1, -1)
"""Seeds that copy an individual, and whom; the last copies nobody."""
THRESHOLD = 3.35
"""Distance below which one in a hundred avatars that nobody was trained on is to its nearest training picture."""


@pytest.fixture(scope="module")
def pipe():
    loaded = steerclear.load("avatars-ddpm")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def judge():
    return AvatarsJudge()


def draw(pipe, seeds, steps=STEPS, **call):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipe(
        batch_size=len(generators), generator=generators, num_inference_steps=steps, output_type="np", **call
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_it_loads_with_plain_diffusers_and_is_small():
    (model,) = [each for each in zoo.shipped() if each.name == "avatars-ddpm"]
    stock = DDIMPipeline.from_pretrained(model.path, use_safetensors=True)
    assert type(stock) is DDIMPipeline
    folders = (model.path, model.path.parent / "avatars-judge", avatars.ROOT)
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    assert size <= 14e6


def test_it_draws_avatars(pipe, judge):
    pictures = draw(pipe, range(8))
    assert pictures.shape == (8, 3, 16, 16)
    assert pictures.min() >= 0.0
    assert pictures.max() <= 1.0
    assert pictures[:, :, 0, 0].mean() > 0.9, "the background is white"
    assert pictures.std((0,)).mean() > 0.05, "seeds differ"


@pytest.mark.parametrize("ancestral", [False, True], ids=["DDIM", "DDPM"])
def test_strength_zero_is_bit_identical(pipe, ancestral):
    pipe = DDPMPipeline(pipe.unet, DDPMScheduler.from_config(pipe.scheduler.config)) if ancestral else pipe
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe, range(2), steps=6)
    for guard in (avatars.without("glasses", strength=0.0), avatars.forget("individuals-0", strength=0.0)):
        with steerclear.attach(pipe, guard) as trace:
            guarded = draw(pipe, range(2), steps=6)
        assert torch.equal(plain, guarded)
        assert trace


def test_the_judge_knows_the_references(judge):
    references = avatars.references()
    references = references.remove(references.ids[400:])
    found = judge(references.latents / 2 + 0.5) > 0.5
    for attribute, floor in {"glasses": 0.99, "hat": 0.99, "beard": 0.85, "accessories": 0.9}.items():
        truth = torch.tensor([attribute in label.split("+") for label in references.labels])
        assert (found[:, judge.labels.index(attribute)] == truth).float().mean() >= floor, attribute


def test_references_and_individuals_are_other_avatars():
    references, individuals = avatars.references(), avatars.individuals()
    assert len(individuals) == 6
    assert not set(references.digests) & set(individuals.digests)
    assert len(set(references.digests)) == len(references)


def test_wearing_splits_the_references():
    worn, rest = avatars.wearing("glasses")
    assert len(worn) + len(rest) == len(avatars.references())
    assert all("glasses" in label.split("+") for label in worn.labels)
    assert not any("glasses" in label.split("+") for label in rest.labels)


@pytest.mark.parametrize("call", [lambda: avatars.wearing("wings"), lambda: avatars.forget("individuals-99")])
def test_what_nobody_has_or_is_is_refused(call):
    with pytest.raises(InvalidInput, match="expected"):
        call()


def test_forgetting_one_keeps_the_others_among_the_safe():
    guard = avatars.forget(["individuals-1", "individuals-3"])
    assert isinstance(guard, SafeDenoiser)
    assert isinstance(guard.weight, TwoSample)
    assert set(guard.negation.ids) == {"individuals-1", "individuals-3"}
    assert {"individuals-0", "individuals-2"} <= set(guard.weight.safe.ids)
    assert guard.weight.prior == pytest.approx(avatars.cautious(2))


def test_a_guard_forgets_one_individual_and_leaves_the_others(pipe):
    individuals = avatars.individuals()
    points = individuals.latents.flatten(1)

    def copied(pictures):
        near = torch.cdist(pictures.flatten(1) * 2 - 1, points).min(1)
        return torch.where(near.values < THRESHOLD, near.indices, -1).tolist()

    plain = draw(pipe, SEEDS, steps=25)
    before = copied(plain)
    assert before == list(WHO)
    with steerclear.attach(pipe, avatars.forget(f"individuals-{before[0]}")):
        after = copied(draw(pipe, SEEDS, steps=25))
    assert after[0] == -1
    assert after[1:] == before[1:]

"""The class-conditional model that ships: it loads, draws its classes, and can be guarded."""

import importlib
import json

import pytest
import torch
from diffusers import DiTPipeline

import steerclear
from steerclear import detect, zoo
from steerclear.zoo import class_conditional, kept

pytestmark = pytest.mark.slow
CALL = {"num_inference_steps": 20, "guidance_scale": 2.0, "output_type": "pt"}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Nothing is read from or left in the cache of whoever runs the tests."""
    monkeypatch.setattr(kept, "folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def pipe():
    loaded = steerclear.load("emoji-dit")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def judge():
    return detect.load("emoji-judge")


def draw(pipe, names, seed=50_000):
    generators = [torch.Generator().manual_seed(seed + k) for k in range(len(names))]
    return pipe(pipe.get_label_ids(names), generator=generators, **CALL).images


def named(judge, pictures):
    return [judge.labels[i] for i in judge(pictures).argmax(1).tolist()]


def test_it_loads_with_plain_diffusers_is_small_and_says_nothing_about_its_maker():
    folder = next(model.path for model in zoo.shipped() if model.name == "emoji-dit")
    stock = DiTPipeline.from_pretrained(folder, use_safetensors=True)
    assert stock.get_label_ids(list(zoo.classes())) == list(range(8))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 16e6
    for config in folder.rglob("*.json"):
        content = json.loads(config.read_text())
        assert "_name_or_path" not in content
        assert "/" not in str(content.get("_commit_hash", ""))


def test_it_draws_its_classes(pipe, judge):
    names = [name for name in zoo.classes() for _ in range(4)]
    found = named(judge, draw(pipe, names))
    right = sum(concept in zoo.classes()[name] for concept, name in zip(found, names, strict=True))
    assert right >= 20  # of 32


def test_guards_over_the_same_autoencoder_fit_and_strength_zero_is_bit_identical(pipe):
    guard = zoo.safe_denoiser("alcohol", strength=0.0)
    with steerclear.attach(pipe, guard) as trace:
        measured = draw(pipe, ["food-drink"] * 2)
    assert trace.steps == 20
    assert torch.equal(measured, draw(pipe, ["food-drink"] * 2))


def test_the_recommended_guard_takes_alcohol_out_and_leaves_what_is_far_from_it(pipe, judge):
    unsafe, batch = set(zoo.policy("alcohol").concepts), ["food-drink"] * 24
    guard = zoo.class_redirect(pipe, "alcohol", classes=["food-drink"])
    plain = draw(pipe, batch)
    with steerclear.attach(pipe, guard) as trace:
        guarded = draw(pipe, batch)
    before, after = named(judge, plain), named(judge, guarded)
    assert sum(name in unsafe for name in after) <= sum(name in unsafe for name in before) // 2
    untouched = [torch.equal(a, b) for a, b in zip(plain, guarded, strict=True)]
    assert 4 <= sum(untouched) < 24
    assert trace.steps == 20


def test_references_are_walked_once_and_anew_for_a_model_that_draws_otherwise(pipe, folder, monkeypatch):
    module, rows = importlib.import_module("steerclear.attach.walk"), []
    walk = module.walk_along

    def counted(pipe, references, prompts, **settings):
        rows.append(len(prompts))
        return walk(pipe, references, prompts, **settings)

    monkeypatch.setattr(module, "walk_along", counted)
    negation, safe = (each.remove(each.ids[6:]) for each in zoo.class_references("alcohol", ["food-drink"]))
    call = {"num_inference_steps": 2, "guidance_scale": 2.0, "components": 5}

    def seen(**changes):
        made = class_conditional.see_classes(pipe, negation, safe, **(call | changes))
        return made.log_snr, made.mean, made.basis, made.points

    once, again = seen(), seen()
    assert all(map(torch.equal, once, again))
    assert rows == [1, 24, 1]
    assert len(list(folder.iterdir())) == 1
    seen(guidance_scale=2.5)
    weight = pipe.transformer.proj_out_2.bias
    with torch.no_grad():
        weight += 0.01
    try:
        other = seen()
    finally:
        with torch.no_grad():
            weight -= 0.01
    assert rows == [1, 24, 1, 1, 24, 1, 24]
    assert not torch.equal(other[3], once[3])

"""Tiny stand-ins for the shipped model, its policies and its judge: the front door is tested without weights."""

import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from steerclear import detect
from steerclear.app.cli import main
from steerclear.app.prompts import load_prompts
from steerclear.negation import NegationSet
from steerclear.testing.pipelines import tiny_pipeline

CONCEPTS = {
    "weapons": ["dagger", "bomb", "axe", "water pistol"],
    "alcohol": ["beer mug", "wine glass", "cocktail glass"],
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "emoji-sd"
    tiny_pipeline("sd").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    """Six pictures of noise and one file that is no picture."""
    folder = tmp_path_factory.mktemp("pictures") / "noise"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"noise-{number}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory, model_folder):
    """Policies for the tiny model, in the format of the shipped ones."""
    import steerclear.attach.space  # noqa: F401  (teaches negation sets to encode with a pipeline)
    from steerclear import zoo

    folder = tmp_path_factory.mktemp("policies")
    pipe = zoo.load(model_folder)
    generator = torch.Generator().manual_seed(1)
    for name in (*CONCEPTS, "safe"):
        pictures = torch.rand(4, 3, 16, 16, generator=generator)
        NegationSet.encode(pictures, pipe, labels=name, progress=False).save(folder / f"{name}.safetensors")
    settings = {
        "weight": {"prior": 0.5, "bandwidth": 4.0},
        "release": {"strength": 1.5, "gate": 0.3},
        "safe_denoiser": {"max_beta": 4.0},
    }
    table = {
        name: {"file": f"{name}.safetensors", "safe": "safe.safetensors", "concepts": concepts, "settings": settings}
        for name, concepts in CONCEPTS.items()
    }
    (folder / "policies.json").write_text(json.dumps(table))
    return folder


class TinyJudge:
    """Knows all concepts of the demo and decides by the picture's mean colour: deterministic, and meaningless."""

    labels = tuple(sorted({label for prompt in load_prompts(tuple(CONCEPTS)) for label in prompt.expected}))

    def __call__(self, images):
        index = (images.double().mean((1, 2, 3)) * 997).long() % len(self.labels)
        return torch.nn.functional.one_hot(index, len(self.labels)).float() * 0.9


@pytest.fixture
def shipped(monkeypatch, model_folder, policy_folder):
    """Puts the stand-ins where the shipped files belong."""
    models, policies = sys.modules["steerclear.zoo.models"], sys.modules["steerclear.zoo.policies"]
    monkeypatch.setattr(models, "ROOT", model_folder.parent)
    monkeypatch.setattr(policies, "ROOT", policy_folder)
    monkeypatch.setattr(detect, "load", lambda name: TinyJudge())
    caches = (policies.policy, policies._table, policies._set)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def steerclear():
    """Runs a command line and expects an exit code; the result has ``stdout`` and ``stderr``."""

    def call(*words, code=0, **options):
        result = CliRunner().invoke(main, [str(word) for word in words], **options)
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    return call

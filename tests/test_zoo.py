"""Loading models and policies: what is found, what is refused, and in which words."""

import json
import sys

import pytest
import torch

import steerclear.zoo as zoo
from steerclear.errors import InvalidInput, NegationFileError
from steerclear.guards import ConditionalRelease, SafeDenoiser, TwoSample
from steerclear.guards.base import Chain
from steerclear.negation import NegationSet, Space
from steerclear.testing.pipelines import tiny_pipeline

MODELS, POLICIES = sys.modules["steerclear.zoo.models"], sys.modules["steerclear.zoo.policies"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("zoo") / "emoji-sd"
    tiny_pipeline("sd").to(torch.float16).save_pretrained(target)
    return target


def test_shipped_name_and_local_folder_load_in_float32(folder, monkeypatch):
    monkeypatch.setattr(MODELS, "ROOT", folder.parent)
    for source in ("emoji-sd", folder, str(folder)):
        pipe = zoo.load(source)
        assert type(pipe).__name__ == "StableDiffusionPipeline"
        assert pipe.unet.dtype == torch.float32
    assert zoo.load(folder, dtype=torch.float16).unet.dtype == torch.float16
    assert zoo.shipped()[0].installed
    assert zoo.shipped()[0].mebibytes > 0.01


def test_unknown_names_list_the_known_ones():
    for name in ("emojisd", "a/b/c", "./nothing"):
        with pytest.raises(InvalidInput, match="emoji-sd"):
            zoo.load(name)


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(InvalidInput, match=r"model_index\.json"):
        zoo.load(tmp_path)


def test_missing_weights_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(MODELS, "ROOT", tmp_path)
    assert not zoo.shipped()[0].installed
    with pytest.raises(FileNotFoundError, match="reinstall steerclear"):
        zoo.load("emoji-sd")


@pytest.mark.parametrize("setting", ["trust_remote_code", "custom_pipeline", "use_safetensors"])
def test_foreign_code_is_refused(folder, setting):
    with pytest.raises(InvalidInput, match=setting):
        zoo.load(folder, **{setting: True})


def test_pickled_weights_are_refused(folder, tmp_path):
    """Only safetensors are read: a folder with a pickle in their place does not load."""
    import shutil

    copy = tmp_path / "pickled"
    shutil.copytree(folder, copy)
    (weights,) = (copy / "unet").glob("*.safetensors")
    weights.unlink()
    torch.save({}, copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        zoo.load(copy)


def test_hub_ids_go_to_diffusers_with_safetensors_only(monkeypatch):
    from diffusers import DiffusionPipeline

    seen = {}
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda source, **given: seen.update(given, source=source))
    zoo.load("owner/name", variant="fp16")
    assert seen == {"source": "owner/name", "variant": "fp16", "dtype": torch.float32, "use_safetensors": True}


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers with NumPy 2
@pytest.mark.parametrize("name", ["ddpm", "DDPMScheduler", "euler_ancestral", "EulerAncestralDiscreteScheduler"])
def test_use_scheduler(name):
    pipe = tiny_pipeline("sd")
    betas = pipe.scheduler.config.beta_end
    zoo.use_scheduler(pipe, name)
    assert type(pipe.scheduler).__name__ in {"DDPMScheduler", "EulerAncestralDiscreteScheduler"}
    assert pipe.scheduler.config.beta_end == betas


def test_use_scheduler_lists_what_fits():
    with pytest.raises(InvalidInput, match=r"DDIM.*got 'flow'"):
        zoo.use_scheduler(tiny_pipeline("sd"), "flow")


SPACE = Space(encoder="sha256:test", shape=(2,), name="a plane")


@pytest.fixture
def policies(tmp_path, monkeypatch):
    """Three policies: two with the same settings, one with its own."""
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two", "three", "safe"):
        latents = torch.randn(3, 2, generator=generator)
        ids = tuple(f"{name}-{i}" for i in range(3))
        NegationSet(latents=latents, space=SPACE, ids=ids).save(tmp_path / f"{name}.safetensors")
    table = {
        name: {"file": f"{name}.safetensors", "safe": "safe.safetensors", "concepts": [name], "settings": settings}
        for name, settings in {
            "one": {"weight": {"prior": 0.2}, "safe_denoiser": {"strength": 0.5}, "release": {"strength": 1.25}},
            "two": {"safe_denoiser": {"strength": 0.5}, "release": {"strength": 1.25}, "weight": {"prior": 0.2}},
            "three": {"weight": {"prior": 0.3, "bandwidth": 4.0}, "safe_denoiser": {"max_beta": 2.0, "gate": 0.1}},
        }.items()
    }
    (tmp_path / "policies.json").write_text(json.dumps(table))
    monkeypatch.setattr(POLICIES, "ROOT", tmp_path)
    clear()
    yield tmp_path
    clear()


def clear():
    for cache in (POLICIES.policy, POLICIES._table, POLICIES._set):
        cache.cache_clear()


def test_a_policy_has_its_sets_and_settings(policies):
    assert zoo.policies() == ("one", "two", "three")
    three = zoo.policy("three")
    assert (three.concepts, len(three.negation), len(three.safe)) == (("three",), 3, 3)
    assert three.settings["weight"]["bandwidth"] == 4.0


def test_equal_settings_share_one_guard(policies):
    together = zoo.safe_denoiser(["one", "two"])
    assert isinstance(together, SafeDenoiser)
    assert len(together.negation) == 6
    assert isinstance(together.weight, TwoSample)
    assert (together.strength, together.weight.prior) == (0.5, 0.2)
    apart = zoo.safe_denoiser(["one", "three"])
    assert isinstance(apart, Chain)
    assert [guard.weight.prior for guard in apart.guards] == [0.2, 0.3]
    assert (apart.guards[1].gate, apart.guards[1].max_beta, apart.guards[1].weight.bandwidth) == (0.1, 2.0, 4.0)


def test_strength_overrides_and_zero_is_the_identity(policies):
    assert zoo.safe_denoiser("one", strength=0.0).strength == 0.0
    assert zoo.safe_denoiser("one").strength == 0.5


def test_repeated_names_count_once(policies):
    assert len(zoo.safe_denoiser(["one", "one"]).negation) == 3


def test_the_recommended_guard_reads_the_policy(policies):
    from steerclear.guards import requirements

    guard = zoo.guard(["one", "two"])
    assert isinstance(guard, ConditionalRelease)
    assert (guard.strength, guard.weight.prior) == (1.25, 0.2)
    assert [len(references) for references in requirements(guard).negation] == [6, 3]
    assert zoo.guard("one", strength=0.75).strength == 0.75


def test_unknown_policies_and_none(policies):
    with pytest.raises(InvalidInput, match="expected one of one, two, three, got 'four'"):
        zoo.guard("four")
    with pytest.raises(InvalidInput, match="at least one policy"):
        zoo.guard([])


@pytest.mark.parametrize("damage", ["no table", "no json", "no set"])
def test_missing_files_are_said(policies, damage):
    if damage == "no table":
        (policies / "policies.json").unlink()
    elif damage == "no json":
        (policies / "policies.json").write_text("{")
    else:
        (policies / "one.safetensors").unlink()
    with pytest.raises(NegationFileError, match=r"reinstall|one\.safetensors"):
        zoo.guard("one")

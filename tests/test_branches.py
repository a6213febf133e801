"""The branches of classifier-free guidance, lent to guards: rebuilt guidance, extra branches, and refusals."""

import functools
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import nn

from steerclear.attach.api import attach
from steerclear.attach.branches import BranchHook
from steerclear.attach.conditions import replace, take_rows
from steerclear.attach.guidance import Pattern, off, solve
from steerclear.errors import InvalidInput, UnsoundCombination, UnsupportedPipeline
from steerclear.guards.base import Requires
from steerclear.noise import NoiseLevel
from steerclear.testing.pipelines import tiny_call, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

GUIDED = ["sd", "sdxl", "sd3", "flux", "dit", "pixart", "video", "modular-sdxl"]
PROMPTED = ["sd", "sdxl", "sd3", "flux", "pixart", "video"]
SCHEDULERS = [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler]
SCHEDULERS += [DPMSolverMultistepScheduler, UniPCMultistepScheduler]


class Look:
    """A guard that keeps what it is lent and changes nothing."""

    requires = Requires(branches=True)

    def __init__(self, ask=None):
        self.ask, self.seen = ask, []

    def __call__(self, denoised, state):
        extra = self.ask(state) if self.ask else None
        self.seen.append((denoised.clone(), dict(state.branches), state.guidance_scale, extra))


class Record:
    """A guard that keeps the estimate of every step."""

    def __init__(self):
        self.denoised = []

    def __call__(self, denoised, state):
        self.denoised.append(denoised.clone())


def call_of(kind, **more):
    call = tiny_call(kind)
    if "prompt" in call:
        call |= {"negative_prompt": "a dog"}
    return call | more


def scale_of(kind):
    return "true_cfg_scale" if kind == "flux" else "guidance_scale"


def relative(difference, to):
    return (difference.norm() / to.norm()).item()


def network(pipe):
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


# What the branches are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in GUIDED if kind != "modular-sdxl"])
def test_guidance_of_7_is_rebuilt_from_a_run_at_3(kind):
    """The first step of both runs sees the same noise, so guidance at 7 can be predicted from the branches at 3."""
    pipe, look, truth = tiny_pipeline(kind), Look(), Record()
    with attach(pipe, look):
        pipe(**call_of(kind, **{scale_of(kind): 3.0}))
    with attach(pipe, truth):
        pipe(**call_of(kind, **{scale_of(kind): 7.0}))
    _, branches, scale, _ = look.seen[0]
    c, u = branches["conditional"], branches["unconditional"]
    assert scale == pytest.approx(3.0, abs=1e-5)
    assert relative(c - u, u) > 1e-3
    assert relative(u + 7 * (c - u) - truth.denoised[0], truth.denoised[0]) <= 2e-6


def test_guidance_of_a_modular_pipeline_is_rebuilt():
    pipe, look, truth = tiny_pipeline("modular-sdxl"), Look(), Record()
    call = tiny_call("modular-sdxl")
    pipe.guider.guidance_scale = 3.0
    with attach(pipe, look):
        pipe(**call)
    pipe.guider.guidance_scale = 7.0
    with attach(pipe, truth):
        pipe(**tiny_call("modular-sdxl"))
    _, branches, scale, _ = look.seen[0]
    c, u = branches["conditional"], branches["unconditional"]
    assert scale == 3.0
    assert relative(u + 7 * (c - u) - truth.denoised[0], truth.denoised[0]) <= 2e-6


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_branches_combine_to_the_estimate_at_every_step(scheduler):
    pipe, look = tiny_pipeline("sd"), Look()
    config = {k: v for k, v in pipe.scheduler.config.items() if k != "clip_sample"}
    pipe.scheduler = scheduler.from_config(config, clip_sample=False)
    with attach(pipe, look):
        pipe(**call_of("sd", num_inference_steps=5))
    assert len(look.seen) >= 5
    for denoised, branches, scale, _ in look.seen:
        u, c = branches["unconditional"], branches["conditional"]
        assert scale == 3.0
        assert relative(u + 3 * (c - u) - denoised, denoised) <= 2e-6


def test_batches_and_samples_stay_in_their_rows():
    """Row 1 of a batch of two has the branches that it has alone."""
    pipe, both, alone = tiny_pipeline("sd"), Look(), Look()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with attach(pipe, both):
        pipe(**call_of("sd", prompt=["a cat", "a hat"], negative_prompt=["a dog", "a fog"], latents=latents))
    with attach(pipe, alone):
        pipe(**call_of("sd", prompt="a hat", negative_prompt="a fog", latents=latents[1:]))
    for name in ("conditional", "unconditional"):
        assert (both.seen[0][1][name][1] - alone.seen[0][1][name][0]).abs().max() <= 1e-4


def test_doubled_batch_of_dit_gives_one_row_per_sample():
    pipe, look = tiny_pipeline("dit"), Look()
    with attach(pipe, look):
        pipe(**call_of("dit", class_labels=[1, 2]))
    denoised, branches, _, _ = look.seen[0]
    assert denoised.shape == branches["conditional"].shape == (2, 4, 8, 8)


def test_scale_may_change_from_call_to_call():
    pipe, look = tiny_pipeline("dit"), Look()
    with attach(pipe, look):
        pipe(**call_of("dit"))
        pipe(**call_of("dit", guidance_scale=5.0))
    assert [round(seen[2], 3) for seen in look.seen] == [3.0] * 3 + [5.0] * 3


def test_equal_prompts_give_equal_branches():
    pipe, look = tiny_pipeline("sd"), Look()
    with attach(pipe, look):
        pipe(**call_of("sd", prompt="a dog"))
    denoised, branches, scale, _ = look.seen[0]
    assert scale == 3.0
    assert relative(branches["conditional"] - denoised, denoised) <= 2e-6
    assert relative(branches["unconditional"] - denoised, denoised) <= 2e-6


# One branch more ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROMPTED)
def test_an_extra_branch_equals_the_pipelines_own_unconditional_branch(kind):
    pipe = tiny_pipeline(kind)
    look = Look(lambda state: state.denoise(state.x_t, state.level, "a dog"))
    with attach(pipe, look) as trace:
        pipe(**call_of(kind))
    for _, branches, _, extra in look.seen:
        assert relative(extra - branches["unconditional"], branches["unconditional"]) <= 1e-6
    assert trace.network_evaluations == 3 + 3


def test_a_prompt_is_encoded_once(monkeypatch):
    pipe, encoded = tiny_pipeline("sd"), []
    real = pipe.encode_prompt

    @functools.wraps(real)
    def counting(prompt, *args, **kwargs):
        encoded.append(prompt)
        return real(prompt, *args, **kwargs)

    look = Look(lambda state: state.denoise(state.x_t, state.level, "a gun"))
    monkeypatch.setattr(pipe, "encode_prompt", counting)
    with attach(pipe, look):
        pipe(**call_of("sd"))
    assert encoded.count("a gun") == 1


@pytest.mark.parametrize(("kind", "most"), [("sd", 75), ("sdxl", 75), ("sd3", 126), ("flux", 126), ("pixart", 126)])
def test_a_text_of_a_guard_that_would_be_cut_is_refused(kind, most):
    """A token per letter, and two of each encoder's own: CLIP reads 77 in all, T5 as many as the call says."""
    pipe, call = tiny_pipeline(kind), call_of(kind)
    if kind not in ("sd", "sdxl"):
        call["max_sequence_length"] = 128

    def drawn(text):
        with attach(pipe, Look(lambda state: state.denoise(state.x_t, state.level, text))):
            pipe(**call)

    drawn("a" * most)
    for text in ("a" * (most + 1), ["a" * (most + 1)]):
        with pytest.raises(InvalidInput, match="text encoders read whole, got one 1 tokens too long"):
            drawn(text)


def test_one_prompt_per_sample():
    pipe = tiny_pipeline("sd")
    look = Look(lambda state: state.denoise(state.x_t, state.level, ["a dog", "a fog"]))
    with attach(pipe, look):
        pipe(**call_of("sd", prompt=["a cat", "a hat"], negative_prompt=["a dog", "a fog"]))
    _, branches, _, extra = look.seen[0]
    assert relative(extra - branches["unconditional"], extra) <= 1e-6


def test_embeddings_replace_the_networks_own():
    pipe = tiny_pipeline("modular-sdxl")
    heard = []
    handle = pipe.unet.register_forward_hook(lambda m, a, kwargs, o: heard.append(kwargs), with_kwargs=True)

    def ask(state):
        kwargs = heard[-1]
        keys = ("encoder_hidden_states", "added_cond_kwargs")
        return state.denoise(state.x_t, state.level, {key: kwargs[key] for key in keys})

    look = Look(ask)
    with attach(pipe, look):
        pipe(**tiny_call("modular-sdxl"))
    handle.remove()
    _, branches, _, extra = look.seen[0]  # the unconditional call is the last one before the step
    assert relative(extra - branches["unconditional"], extra) <= 1e-6


def test_no_condition_repeats_the_unconditional_branch():
    pipe = tiny_pipeline("dit")
    look = Look(lambda state: state.denoise(state.x_t, state.level))
    with attach(pipe, look):
        pipe(**call_of("dit"))
    _, branches, _, extra = look.seen[0]
    assert relative(extra - branches["unconditional"], extra) <= 1e-6


def test_asking_does_not_change_the_picture():
    pipe = tiny_pipeline("sd3")
    plain = pipe(**call_of("sd3")).images
    with attach(pipe, Look(lambda state: state.denoise(state.x_t, state.level, "a gun"))):
        asked = pipe(**call_of("sd3")).images
    assert (plain == asked).all()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda state: state.denoise(state.x_t[:, :2], state.level, "a"), "state.x_t"),
        (lambda state: state.denoise(state.x_t, NoiseLevel(1.0, 0.5), "a"), "state.level"),
        (lambda state: state.denoise(state.x_t, state.level, {"words": torch.zeros(1)}), "got 'words'"),
        (lambda state: state.denoise(state.x_t, state.level, 3), "got int"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(ask, message):
    pipe = tiny_pipeline("sd")
    with attach(pipe, Look(ask)), pytest.raises(InvalidInput, match=message):
        pipe(**call_of("sd"))


def test_prompts_need_a_pipeline_that_encodes_them():
    pipe = tiny_pipeline("dit")
    look = Look(lambda state: state.denoise(state.x_t, state.level, "a dog"))
    with attach(pipe, look), pytest.raises(UnsupportedPipeline, match="mapping"):
        pipe(**call_of("dit"))


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sd", {"guidance_scale": 1.0}),
        ("flux", {"true_cfg_scale": 1.0}),
        ("dit", {"guidance_scale": 1.0, "class_labels": [1, 2]}),
        ("ddpm", {}),
        ("video", {"guidance_scale": 1.0}),
    ],
)
def test_sampling_without_guidance_is_refused(kind, more):
    pipe = tiny_pipeline(kind)
    with attach(pipe, Look()), pytest.raises(UnsoundCombination, match="classifier-free guidance"):
        pipe(**call_of(kind, **more))


def test_rescaled_guidance_is_refused():
    pipe = tiny_pipeline("sd")
    with attach(pipe, Look()), pytest.raises(UnsupportedPipeline, match="guidance_rescale"):
        pipe(**call_of("sd", guidance_rescale=0.7))


class Toy:
    """A pipeline whose network is the identity, so that a test can make any predictions it likes."""

    def __init__(self):
        self.unet = nn.Identity()
        self.scheduler = SimpleNamespace(timesteps=torch.arange(2))

    def step(self, hook, predictions, scale):
        """One step whose sampler's input is guidance of the two halves of ``predictions``."""
        u, c = self.unet(predictions).chunk(2)
        reading = SimpleNamespace(k_x=1.0, k_o=-1.0)
        return hook.collect(u + scale * (c - u), torch.zeros_like(u), reading)


def test_estimates_follow_the_reading(rng):
    pipe, predictions = Toy(), torch.randn(4, 4, 2, 2, generator=rng)
    with BranchHook(pipe) as hook:
        branches = pipe.step(hook, predictions, 3.0)
    assert torch.equal(branches.unconditional, -predictions[:2])
    assert torch.equal(branches.conditional, -predictions[2:])


def test_a_scale_that_changes_during_a_trajectory_is_refused_at_its_end(rng):
    pipe, predictions = Toy(), torch.randn(2, 4, 2, 2, generator=rng)
    with pytest.raises(UnsupportedPipeline, match="later step"), BranchHook(pipe) as hook:
        [pipe.step(hook, predictions, scale) for scale in (3.0, 3.5)]


def test_a_scale_that_changes_with_the_trajectory_is_found_again(rng):
    pipe, predictions = Toy(), torch.randn(2, 4, 2, 2, generator=rng)
    with BranchHook(pipe) as hook:
        pipe.step(hook, predictions, 3.0)
        pipe.scheduler.timesteps = torch.arange(2)
        assert pipe.step(hook, predictions, 3.5).guidance_scale == pytest.approx(3.5)


def test_three_branches_are_refused(rng):
    pipe = Toy()
    with BranchHook(pipe) as hook:
        a, b, c = pipe.unet(torch.randn(3, 4, 2, 2, generator=rng)).chunk(3)
        with pytest.raises(UnsupportedPipeline, match=r"batches of \[3\]"):
            hook.collect(a + b + c, torch.zeros_like(a), SimpleNamespace(k_x=1.0, k_o=-1.0))


# Nothing stays behind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_hooks_are_installed_only_when_required_and_removed_always(kind):
    pipe, during = tiny_pipeline(kind), []

    def watch(denoised, state):
        during.append(len(network(pipe)._forward_hooks))

    with attach(pipe, watch):
        pipe(**call_of(kind))
    assert during == [0, 0, 0]

    watch.requires = Requires(branches=True)
    during.clear()
    with attach(pipe, watch):
        pipe(**call_of(kind))
        assert not network(pipe)._forward_hooks
    assert during == [1, 1, 1]

    def broken(denoised, state):
        raise RuntimeError("broken")

    broken.requires = Requires(branches=True)
    with attach(pipe, broken), pytest.raises(RuntimeError, match="broken"):
        pipe(**call_of(kind))
    assert not network(pipe)._forward_hooks


def test_a_pipeline_without_a_network_is_refused():
    class Bare:
        scheduler = None

    with pytest.raises(UnsupportedPipeline, match="neither"), BranchHook(Bare()):
        pass


# The arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("conditional", [0, 1])
@pytest.mark.parametrize("scale", [1.5, 7.5, 30.0])
def test_guidance_is_recognised_in_either_order_and_sign(sign, conditional, scale, rng):
    outputs = [torch.randn(2, 4, 8, 8, generator=rng) for _ in range(2)]
    u, c = outputs[1 - conditional], outputs[conditional]
    found = solve(nn.Module(), (), outputs, sign * (u + scale * (c - u)))
    assert found == Pattern((), conditional, pytest.approx(scale, rel=1e-5), sign)
    assert off(found, outputs, sign * (u + scale * (c - u))) <= 1e-2
    assert off(found, outputs, sign * (u + 2 * scale * (c - u))) > 1


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 7.5), (torch.bfloat16, 7.5)])
def test_guidance_in_half_precision_is_recognised(dtype, scale, rng):
    u, c = (torch.randn(1, 4, 16, 16, generator=rng).to(dtype) for _ in range(2))
    found = solve(nn.Module(), (), [u, c], u + scale * (c - u))
    assert found.conditional == 1
    assert found.guidance_scale == pytest.approx(scale, rel=2e-2)


def test_other_combinations_are_refused(rng):
    u, c, p = (torch.randn(1, 4, 8, 8, generator=rng) for _ in range(3))
    guided = u + 7 * (c - u)
    for other in (guided * 0.7, guided + 2 * (c - p), p):
        with pytest.raises(UnsupportedPipeline, match="perturbed"):
            solve(nn.Module(), (), [u, c], other)
    with pytest.raises(UnsoundCombination, match="guidance scale of 1"):
        solve(nn.Module(), (), [u, c], c)


def test_rows_are_taken_from_tensors_of_the_batch_only():
    value = {"a": torch.arange(4), "b": [torch.arange(3), torch.tensor(1.0)], "c": None, "d": (torch.zeros(4, 2),)}
    taken = take_rows(value, slice(2, 4), 4)
    assert taken["a"].tolist() == [2, 3]
    assert taken["b"][0].tolist() == [0, 1, 2]
    assert taken["c"] is None
    assert taken["d"][0].shape == (2, 2)


def test_replacing_merges_mappings_repeats_single_rows_and_leaves_the_original():
    kwargs = {"e": torch.zeros(3, 2), "more": {"p": torch.zeros(3, 4), "q": torch.ones(3)}}
    made = replace(kwargs, {"e": torch.ones(1, 2), "more": {"p": torch.ones(3, 4)}}, 3)
    assert made["e"].tolist() == [[1, 1]] * 3
    assert made["more"]["p"].sum() == 12
    assert made["more"]["q"] is kwargs["more"]["q"]
    assert kwargs["e"].sum() == 0

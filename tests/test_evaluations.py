"""More evaluations of the network for guards: without guidance, and at noisy samples that the sampler never saw.

The truth about another noisy sample is the pipeline itself, started from it.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import nn

from steerclear.attach.api import attach
from steerclear.attach.branches import BranchHook
from steerclear.attach.recorded import Call, Place
from steerclear.denoise import DenoiseState, GuardedDenoiser
from steerclear.errors import InvalidInput, UnsupportedPipeline
from steerclear.guards.base import Requires
from steerclear.noise import NoiseLevel
from steerclear.testing import Mixture
from steerclear.testing.pipelines import tiny_call, tiny_pipeline
from steerclear.testing.sampling import Prompted, ancestral, variance_preserving

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NO_GUIDANCE = {
    "ddpm": {},
    "ddim": {},
    "dit": {"guidance_scale": 1.0, "class_labels": [1, 2]},
    "sd": {"guidance_scale": 1.0},
    "flux": {"true_cfg_scale": 1.0},
}
GUIDED = {"sd": {}, "sdxl": {}, "sd3": {}, "dit": {"class_labels": [1, 2]}, "pixart": {}, "modular-sdxl": {}}
EITHER = [*((kind, more) for kind, more in NO_GUIDANCE.items()), *((kind, more) for kind, more in GUIDED.items())]
IDS = [f"{kind}-{'plain' if more == NO_GUIDANCE.get(kind) else 'guided'}" for kind, more in EITHER]


class Ask:
    """A guard that needs evaluations, keeps what it hears, and changes nothing."""

    requires = Requires(evaluations=True)

    def __init__(self, ask=None):
        self.ask, self.seen = ask, []

    def __call__(self, denoised, state):
        answer = None if self.ask is None else self.ask(state)
        self.seen.append(SimpleNamespace(denoised=denoised.clone(), x_t=state.x_t.clone(), state=state, answer=answer))


def run(pipe, kind, ask=None, seed=0, **more):
    guard = Ask(ask)
    with attach(pipe, guard) as trace:
        result = pipe(**(tiny_call(kind, seed) | more))
    return guard.seen, trace, result


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def unclipped(pipe):
    """Extra evaluations are not clipped, so the scheduler must not clip the estimate that they are compared with."""
    if pipe.scheduler.config.get("clip_sample"):
        pipe.scheduler.register_to_config(clip_sample=False)
    return pipe


@pytest.mark.parametrize(("kind", "more"), EITHER, ids=IDS)
def test_the_sampler_repeated_at_its_own_sample_gives_its_own_estimate(kind, more):
    pipe = unclipped(tiny_pipeline(kind))
    seen, trace, _ = run(pipe, kind, lambda state: state.again(state.x_t), **more)
    assert [relative(step.answer, step.denoised) <= 5e-6 for step in seen] == [True] * 3
    assert trace.network_evaluations == 3 + 3 * (1 if more == NO_GUIDANCE.get(kind) else 2)


@pytest.mark.parametrize(("kind", "more"), EITHER, ids=IDS)
def test_another_noisy_sample_gives_what_the_pipeline_makes_of_it(kind, more):
    """The first step of a run from other noise: x_t and estimate, asked for from within this run."""
    pipe = unclipped(tiny_pipeline(kind))
    other, _, _ = run(pipe, kind, seed=1, **more)
    seen, _, _ = run(pipe, kind, lambda state: state.again(other[0].x_t) if state.step == 0 else None, **more)
    assert relative(seen[0].denoised, other[0].denoised) > 0.1
    assert relative(seen[0].answer, other[0].denoised) <= 5e-6


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler],
    ids=lambda cls: cls.__name__,
)
def test_the_schedulers_input_scaling_is_applied(scheduler):
    """At every step of a run that starts elsewhere, with its own scaling of the input and its second calls."""
    pipe = tiny_pipeline("sd")
    config = {k: v for k, v in pipe.scheduler.config.items() if k != "clip_sample"}
    pipe.scheduler = scheduler.from_config(config, clip_sample=False)
    other, _, _ = run(pipe, "sd", seed=1)
    calls = iter(other)
    seen, _, _ = run(pipe, "sd", lambda state: state.again(next(calls).x_t))
    for step, truth in zip(seen, other, strict=True):
        assert relative(step.answer, truth.denoised) <= 5e-6


def test_inpainting_keeps_its_mask_and_picture():
    """Nine channels: the sample, the mask, and the masked picture."""
    parts = tiny_pipeline("sd").components
    config = dict(parts["unet"].config) | {"in_channels": 9}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(config).eval()
    pipe = StableDiffusionInpaintPipeline(**parts | {"unet": unet}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    given = {"image": Image.new("RGB", (16, 16), "red"), "mask_image": mask, "height": 16, "width": 16}

    def noise(seed):
        return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))

    other, _, _ = run(pipe, "sd", latents=noise(1), **given)
    ask = lambda state: state.again(other[0].x_t) if state.step == 0 else None  # noqa: E731 - a question
    seen, _, _ = run(pipe, "sd", ask, latents=noise(0), **given)
    assert relative(seen[0].answer, other[0].denoised) <= 5e-6


def test_another_condition_at_another_sample():
    pipe = tiny_pipeline("sd")
    look = Ask()
    look.requires = Requires(branches=True)
    with attach(pipe, look):
        pipe(**tiny_call("sd", 1), negative_prompt="a dog")
    other = look.seen[0]
    ask = lambda state: state.denoise(other.x_t, state.level, "a dog") if state.step == 0 else None  # noqa: E731
    seen, _, _ = run(pipe, "sd", ask)
    assert relative(seen[0].answer, other.state.branches["unconditional"]) <= 2e-6


@pytest.mark.parametrize("kind", NO_GUIDANCE)
def test_without_guidance_the_only_call_is_repeated(kind):
    pipe = unclipped(tiny_pipeline(kind))
    seen, _, _ = run(pipe, kind, lambda state: state.denoise(state.x_t, state.level), **NO_GUIDANCE[kind])
    assert all(relative(step.answer, step.denoised) <= 2e-6 for step in seen)
    assert all(not step.state.branches and step.state.guidance_scale is None for step in seen)


def test_classes_can_be_replaced_in_a_class_conditional_model():
    """Class 2 for both rows, asked for while rows are drawn as 1 and 2: the second row is the sampler's own."""
    pipe = unclipped(tiny_pipeline("dit"))
    ask = lambda state: state.denoise(state.x_t, state.level, {"class_labels": torch.tensor([2, 2])})  # noqa: E731
    seen, _, _ = run(pipe, "dit", ask, **NO_GUIDANCE["dit"])
    assert relative(seen[0].answer[1], seen[0].denoised[1]) <= 2e-6
    assert relative(seen[0].answer[0], seen[0].denoised[0]) > 1e-4


def test_asking_changes_no_picture():
    pipe = tiny_pipeline("ddpm")
    plain = pipe(**tiny_call("ddpm")).images
    _, _, asked = run(pipe, "ddpm", lambda state: state.again(state.x_t.flip(0) + 1))
    assert (plain == asked.images).all()


def test_half_precision_asks_in_half_precision():
    pipe = tiny_pipeline("sd").to(dtype=torch.bfloat16)
    seen, _, _ = run(pipe, "sd", lambda state: (state.again(state.x_t), state.again(2 * state.x_t)))
    for step in seen:
        assert step.answer[0].dtype == torch.float32
        assert relative(step.answer[0], step.denoised) <= 0.1  # g = 3 amplifies bfloat16's 0.004 of both branches
        assert relative(step.answer[1], step.denoised) > 0.2


def test_conditions_see_the_estimate_before_any_guard():
    seen = []

    def guard(denoised, state):
        seen.append((denoised, state.denoised))
        return denoised + 1

    pipe = tiny_pipeline("ddim")
    with attach(pipe, guard, guard):
        pipe(**tiny_call("ddim"))
    for (first, before), (second, same) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(first, before)
        assert same is before
        assert torch.equal(second, before + 1)


# Where the sample sits ---------------------------------------------------------------------------------------------


def call(*args, **kwargs):
    return Call(nn.Identity(), args, kwargs, torch.zeros(1))


def test_the_sample_is_found_and_replaced_in_front_of_other_inputs(rng):
    x, y, extra = (torch.randn(2, 4, 3, 3, generator=rng) for _ in range(3))
    for axis in (1, 2, 3):
        recorded = call(hidden_states=torch.cat([0.25 * x, extra], axis), timestep=torch.ones(2))
        place = Place.find(recorded, x)
        assert (place.name, place.axis) == ("hidden_states", axis)
        assert place.factor.item() == pytest.approx(0.25, rel=1e-6)
        assert place.residual.item() <= 1.0
        made = place.put(recorded, y).kwargs
        assert torch.allclose(made["hidden_states"], torch.cat([0.25 * y, extra], axis), rtol=1e-6)
        assert made["timestep"] is recorded.kwargs["timestep"]
    assert Place.find(call(x, torch.ones(2)), x).factor.item() == 1.0
    assert Place.find(call(x, torch.ones(2)), x).put(call(x, torch.ones(2)), y).args[0] is not y


def test_inputs_of_other_shapes_and_inputs_made_of_the_sample_are_not_found(rng):
    x = torch.randn(2, 4, 3, 3, generator=rng)
    assert Place.find(call([x]), x) is None
    assert Place.find(call(x.flatten(2)), x) is None
    assert Place.find(call(x.repeat(2, 1, 1, 1)), x) is None
    assert Place.find(call(x[:, :2]), x) is None
    assert Place.find(call(x, mid_block_additional_residual=x), x) is None
    assert Place.find(call(x, controlnet_block_samples=[x]), x) is None
    assert Place.find(call(x, mid_block_additional_residual=None, down_intrablock_additional_residuals=[x]), x)
    assert Place.find(call(x + 0.01), x).residual.item() > 1.0
    assert not Place.find(call(x), torch.zeros_like(x)).residual.item() <= 1.0


class Toy:
    """A pipeline whose network is the identity, and whose input a test makes as it likes."""

    def __init__(self, given):
        self.given, self.unet, self.scheduler = given, nn.Identity(), SimpleNamespace(timesteps=torch.arange(2))

    def lent(self, hook, x, given=None):
        output = self.unet((given or self.given)(x))
        return hook.collect(output, x, SimpleNamespace(k_x=1.0, k_o=-1.0, level=NoiseLevel(1.0, 1.0)))


def test_a_network_that_sees_something_else_is_only_asked_about_the_steps_own_sample(rng):
    x = torch.randn(2, 4, 3, 3, generator=rng)
    pipe = Toy(lambda x: x.roll(1))
    with BranchHook(pipe, needs=Requires(evaluations=True)) as hook:
        lent = pipe.lent(hook, x)
        assert torch.equal(lent.again(x), x - x.roll(1))
        with pytest.raises(UnsupportedPipeline, match="times a number"):
            lent.again(2 * x)


def test_a_network_that_sees_something_else_later_is_refused_when_the_call_ends(rng):
    x = torch.randn(2, 4, 3, 3, generator=rng)
    pipe = Toy(lambda x: x)
    hook = BranchHook(pipe, needs=Requires(evaluations=True))
    hook.__enter__()
    assert torch.equal(pipe.lent(hook, x).again(3 * x), torch.zeros_like(x))
    pipe.lent(hook, x, lambda x: x.roll(1)).again(2 * x)
    with pytest.raises(UnsupportedPipeline, match="times a number"):
        hook.__exit__(None, None, None)


def test_an_output_that_does_not_reach_the_sampler_is_refused(rng):
    x = torch.randn(2, 4, 3, 3, generator=rng)
    pipe = Toy(lambda x: x)
    with BranchHook(pipe, needs=Requires(evaluations=True)) as hook:
        pipe.unet(x)
        reading = SimpleNamespace(k_x=1.0, k_o=-1.0)
        with pytest.raises(UnsupportedPipeline, match="as it is"):
            hook.collect(x + 1, x, reading)
        pipe.unet(x)
        assert torch.equal(hook.collect(-x, x, reading).again(x), 2 * x)  # a flipped sign is found


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda state: state.again(state.x_t[:, :1]), "like the step's own"),
        (lambda state: state.denoise(state.x_t, NoiseLevel(0.5, 0.5)), "state.level"),
    ],
)
def test_samples_that_do_not_fit_are_refused(ask, message):
    with pytest.raises(InvalidInput, match=message):
        run(tiny_pipeline("ddpm"), "ddpm", ask)


# Without a pipeline ------------------------------------------------------------------------------------------------


def test_a_guarded_denoiser_and_the_textbook_sampler_lend_evaluations_too():
    ring, level, seen = Mixture.ring(), NoiseLevel(0.6, 0.8), []
    x, other = torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([[-1.0, 0.5]], dtype=torch.float64)

    def guard(denoised, state: DenoiseState):
        seen.append((state.denoised, state.again(other), state.level))

    GuardedDenoiser(denoiser=ring, guard=guard)(x, level, "safe")
    assert torch.equal(seen[0][0], ring(x, level, "safe"))
    assert torch.equal(seen[0][1], ring(other, level, "safe"))
    ancestral(ring, variance_preserving(2), x, guard=guard, prompt=Prompted(condition="unsafe", guidance_scale=3.0))
    _, again, level = seen[1]
    u, c = ring(other, level), ring(other, level, "unsafe")
    assert torch.equal(again, u + 3.0 * (c - u))

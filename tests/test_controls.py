"""Controls against arithmetic that is not theirs, and every guard that a task file can name on the shipped model."""

import inspect
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from tests.golden import safe_denoiser_loop as golden

from steerclear import attach, guards, zoo
from steerclear.app.arms import COUPLING, GUARDS
from steerclear.app.prompts import negative_prompt
from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.evaluate import controls
from steerclear.guards import SafeDenoiser
from steerclear.guards.base import requirements
from steerclear.guards.tracking import Prediction, log_ratio
from steerclear.negation import NegationSet, Space
from steerclear.noise import NoiseLevel
from steerclear.prompts.negative import require_whole
from steerclear.testing.sampling import Spaceless

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, NumPy 2
SHAPE = (4, 6, 6)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
"""The noise schedule of SD 1.x."""


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def references(n=9):
    return torch.randn(n, *SHAPE, dtype=torch.float64, generator=seeded(5)) + 0.5


def negation():
    return NegationSet(latents=references(), space=Space(encoder="pixels", shape=SHAPE))


def state(x, step=0, num_steps=10):
    return DenoiseState(x_t=x, level=NoiseLevel(0.5, 0.8), step=step, num_steps=num_steps)


class Steps(DiffusionPipeline):
    """The shortest DDPM pipeline; returns the sample after every step."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, network, x, generator, num_steps):
        self.scheduler.set_timesteps(num_steps)
        samples = []
        for t in self.scheduler.timesteps:
            output = network(x, float(self.scheduler.alphas_cumprod[t]))
            x = self.scheduler.step(output, t, x, generator=generator).prev_sample
            samples.append(x)
        return samples


def bounded(x, kept):
    """Noise prediction of a denoiser whose estimates are of order one."""
    return (x - math.sqrt(kept) * (0.9 * x.tanh() + 0.1 * x.flip(1).sin())) / math.sqrt(1.0 - kept)


def towards_a_half(x, kept):
    """The exact noise prediction for data that are 0.5 everywhere."""
    return (x - math.sqrt(kept) * 0.5) / math.sqrt(1.0 - kept)


# -- re-noising alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, np.int32), (torch.float64, np.int64)])
def test_the_nudge_is_the_next_number_and_only_in_the_window(dtype, bits):
    x = torch.randn(3, *SHAPE, generator=seeded(0)).to(dtype)
    moved = controls.renoise_only(stop=0.2)(x, state(x))
    np.testing.assert_array_equal(moved.numpy(), np.nextafter(x.numpy(), np.inf))
    # Neighbours among floats are neighbours as integers: one apart, everywhere.
    assert (np.abs(moved.numpy().view(bits) - x.numpy().view(bits)) == 1).all()
    fired = [controls.renoise_only(stop=0.22)(x, state(x, k, 50)) is not None for k in range(50)]
    assert fired == [True] * 11 + [False] * 39


def without_correction(x, generator, num_steps, stop, scale):
    """The released loop, typed in NumPy, for a batch; random numbers in the order in which sampling reads them."""
    acp = DDPMScheduler(clip_sample=False).alphas_cumprod.double().numpy()
    timesteps = [k * (1000 // num_steps) for k in range(num_steps)][::-1]
    for k, t in enumerate(timesteps):
        levels = (acp[t], acp[timesteps[k + 1]] if k + 1 < num_steps else 1.0)
        output = bounded(x, float(acp[t])).numpy()
        fresh = torch.randn(x.shape, dtype=x.dtype, generator=generator).numpy() if k / num_steps < stop else None
        noise = torch.randn(x.shape, dtype=x.dtype, generator=generator).numpy() if t else [None] * len(x)
        rows = []
        for i in range(len(x)):
            if fresh is None:
                rows.append(golden.ddpm_step(output[i], x[i].numpy(), *levels, noise[i]))
                continue
            settings = {"s": 3.15, "scale": scale, "threshold": -math.inf}
            rows.append(
                golden.step(x[i].numpy(), output[i], references().numpy(), levels, fresh[i], noise[i], **settings)[0]
            )
        x = torch.from_numpy(np.stack(rows))
    return x.numpy()


@pytest.mark.parametrize("control", ["renoise-only", "published, vanishing scale"])
def test_renoising_alone_is_the_released_loop_with_a_vanishing_scale(control):
    x = torch.randn(2, *SHAPE, dtype=torch.float64, generator=seeded(1))
    want = without_correction(x, seeded(2), num_steps=12, stop=0.5, scale=1e-12)
    vanishing = SafeDenoiser.published(negation(), scale=1e-12, stop=0.5)
    guard = controls.renoise_only(stop=0.5) if control == "renoise-only" else Spaceless(guard=vanishing)
    pipe = Steps(DDPMScheduler(clip_sample=False))
    with attach(pipe, guard, coupling="renoise") as trace:
        got = pipe(bounded, x, seeded(2), 12)[-1]
    assert [step.fired.all().item() for step in trace.calls[0].steps] == [True] * 6 + [False] * 6
    # The scheduler's coefficients are float32 scalars: 6e-8 each, times 12 steps, with room.
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-5)
    plain = pipe(bounded, x, seeded(2), 12)[-1]
    assert (plain - got).square().mean().sqrt() > 0.01


@pytest.mark.parametrize(
    ("num_steps", "published"), [(50, (1.38, 1.53)), (25, (1.86, 2.13)), (15, (2.5, 3.0)), (10, (3.7, 4.3))]
)
def test_renoising_inflates_the_noise_by_the_closed_form(num_steps, published):
    """Fresh noise under the old prediction adds 2 (1 - a) / a to the variance of the next sample, a = ᾱ_t / ᾱ_s."""
    scheduler = DDPMScheduler(**SD, clip_sample=False)
    kept, stride = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2), 1000 // num_steps
    t = (num_steps - 1) * stride + 1
    now, before = kept[t], kept[t - stride]
    ratio = 1 + 2 * (before / now - 1) / (1 - before)
    assert published[0] - 0.05 < ratio < published[1] + 0.05  # over the whole window; this is its first step
    epsilon = torch.randn(4, 4, 64, 64, dtype=torch.float64, generator=seeded(3))
    x, pipe = math.sqrt(now) * 0.5 + math.sqrt(1 - now) * epsilon, Steps(scheduler)
    plain = pipe(towards_a_half, x, seeded(4), num_steps)[0]
    with attach(pipe, controls.renoise_only(), coupling="renoise"):
        renoised = pipe(towards_a_half, x, seeded(4), num_steps)[0]
    for first, expected in ((plain, 1.0), (renoised, ratio)):
        spread = (first - math.sqrt(before) * 0.5).square().mean().item() / (1 - before)
        # n = 65 536 numbers: the relative standard error of a variance is sqrt(2 / n) = 0.55 %; four of them.
        assert spread == pytest.approx(expected, rel=0.022)


# -- one vector, and references that show nothing ------------------------------------------------------------------


def test_the_mean_vector_is_the_mean_of_the_normalised_references_whatever_the_sample():
    refs = references().numpy()
    mean = (refs / np.sqrt((refs**2).sum(1, keepdims=True))).mean(0)
    x = torch.stack([references()[0], torch.zeros(SHAPE), torch.full(SHAPE, -30.0)]).double()
    got = controls.mean_vector(negation(), scale=0.7, stop=0.3)(x, state(x))
    # The kernel is flat to d / 2 sigma^2 = 400 / 2e12, and 1e-8 is added to a sum of nine.
    np.testing.assert_allclose(got.numpy(), x.numpy() - 0.7 * mean, rtol=0, atol=3e-9)
    assert controls.mean_vector(negation(), stop=0.3)(x, state(x, 3)) is None
    nearest = SafeDenoiser.published(negation(), scale=0.7, stop=0.3)(x, state(x))
    assert (nearest - got).abs().max() > 1e-3  # the kernel average itself is no such vector


def test_random_references_have_the_statistics_and_nothing_else_of_the_others():
    like = zoo.policy("weapons").negation
    values = like.latents.double().numpy()
    mean, spread, n = values.mean(), values.std(), values.size
    random = controls.random_references(like)
    drawn = random.latents.double().numpy()
    assert (drawn.shape, random.space) == (values.shape, like.space)
    # Standard errors of a mean and of a standard deviation of n Gaussian numbers; four of them.
    assert drawn.mean() == pytest.approx(mean, abs=4 * spread / math.sqrt(n))
    assert drawn.std() == pytest.approx(spread, abs=4 * spread / math.sqrt(2 * n))
    assert not {*random.ids, *random.digests} & {*like.ids, *like.digests}
    assert abs(np.corrcoef(drawn.ravel(), values.ravel())[0, 1]) < 4 / math.sqrt(n)
    assert torch.equal(random.latents, controls.random_references(like).latents)
    assert not torch.equal(random.latents, controls.random_references(like, seed=1).latents)


# -- every kind of guard -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    loaded = zoo.load("emoji-sd")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def settings_of(kind):
    """The shipped policies, or for own sets, two of their files."""
    folder = Path(zoo.__file__).parent / "policies"
    if kind == "own":
        return {"negation": folder / "weapons.safetensors", "safe": folder / "safe.safetensors"}
    return {"policies": list(zoo.policies())} if "policies" in inspect.signature(GUARDS[kind]).parameters else {}


def drawn(pipe, guard=None, coupling="score", **call):
    """Three steps of a dagger, twice, and the trace."""
    generators = [seeded(0), seeded(1)]
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np", "generator": generators, **call}
    if guard is None:
        return pipe(["a dagger"] * 2, **call).images, None
    with attach(pipe, guard, coupling=coupling) as trace:
        return pipe(["a dagger"] * 2, **call).images, trace


@pytest.fixture(scope="module")
def unguarded(pipe):
    return {eta: drawn(pipe, eta=eta)[0] for eta in (0.0, 1.0)}


#: Guards of the models without text are built in tests/test_emoji_dit.py and below.
OF_TEXT_TO_IMAGE = [kind for kind in GUARDS if not kind.startswith(("class-", "avatars-"))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_TEXT_TO_IMAGE)
def test_every_guard_that_a_task_can_name_acts_on_the_shipped_model(pipe, unguarded, kind):
    guard = GUARDS[kind](pipe, **settings_of(kind))
    eta = 1.0 if requirements(guard).stochastic else 0.0
    pictures, trace = drawn(pipe, guard, COUPLING.get(kind, "score"), eta=eta)
    assert pictures.shape == (2, 64, 64, 3)
    assert np.isfinite(pictures).all()
    fired = [step.fired.tolist() for step in trace.calls[0].steps]
    assert len(fired) == 3
    if COUPLING.get(kind) == "renoise" and "flow" not in kind:  # 22 % of three steps is the first
        assert fired == [[True] * 2, [False] * 2, [False] * 2]
    assert any(map(any, fired))
    changed = np.abs(pictures - unguarded[eta]).max((1, 2, 3)) > 0
    assert changed.tolist() == [any(step[i] for step in fired) for i in range(2)]


def test_the_shipped_model_reads_the_negative_prompt_whole(pipe):
    require_whole(pipe, negative_prompt(zoo.policies()), {})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("avatars-without", {}),
        ("avatars-forget", {"ids": ["individuals-0"], "gate": 0.0}),
        *(("avatars-other", {"method": name}) for name in ("published", "mean-vector", "flow-published", "flow")),
        ("avatars-other", {"method": "spell", "radius": 30.0}),
        ("avatars-other", {"method": "published", "references": "random"}),
    ],
)
def test_guards_of_avatars_that_a_task_can_name_act(kind, settings):
    pipe = zoo.load("avatars-ddpm")
    pipe.set_progress_bar_config(disable=True)
    call = {"batch_size": 1, "num_inference_steps": 4, "output_type": "np"}
    before = pipe(generator=seeded(0), **call).images
    with attach(pipe, GUARDS[kind](pipe, **settings)) as trace:
        after = pipe(generator=seeded(0), **call).images
    assert any(any(step.fired.tolist()) for step in trace.calls[0].steps)
    assert np.isfinite(after).all()
    assert (before != after).any()


@pytest.mark.parametrize("kind", ["tracked-release", "safe-denoiser-dynamic"])
def test_tracked_guards_are_refused_without_noise(pipe, kind):
    with pytest.raises(UnsoundCombination):
        drawn(pipe, GUARDS[kind](pipe, **settings_of(kind)))


def test_the_refusal_advises_guards_that_exist():
    x = torch.zeros(1, *SHAPE)
    with pytest.raises(UnsoundCombination, match="adds no noise") as caught:
        log_ratio(Prediction.of(state(x), x, x), replace(state(x, 1), eta=0.0))
    advised = re.findall(r"(\w+)\((\w+)=", str(caught.value))
    assert {name for name, _ in advised} == {"SafeDenoiser", "ConditionalRelease", "TwoSample"}
    for name, setting in advised:
        assert setting in inspect.signature(getattr(guards, name)).parameters


def test_references_of_the_published_loop_are_a_choice_of_three(pipe):
    with pytest.raises(InvalidInput, match="references of unsafe, benign, random, got 'mean'"):
        GUARDS["safe-denoiser-published"](pipe, ["weapons"], references="mean")
    made = {
        name: GUARDS["safe-denoiser-published"](pipe, ["weapons"], references=name).guard.negation
        for name in ("unsafe", "benign", "random")
    }
    policy = zoo.policy("weapons")
    assert made["unsafe"].digests == policy.negation.digests
    assert made["benign"].digests == policy.safe.digests
    assert made["random"].shape == policy.negation.shape


@pytest.mark.parametrize("kind", GUARDS)
def test_the_page_has_every_kind_with_its_settings_and_defaults(kind):
    page = (Path(__file__).parents[1] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.split("## Guards by name")[1].splitlines() if line.startswith(f"| `{kind}` |"))
    parameters = dict(list(inspect.signature(GUARDS[kind]).parameters.items())[1:])
    assert ("no `policies`" in row) == (parameters.pop("policies", None) is None)
    for name, parameter in parameters.items():
        told = parameter.default in (None, inspect.Parameter.empty)
        assert f"`{name}`" in row if told else f"`{name}: {parameter.default}`" in row, f"`{name}: {parameter.default}`"
    settings = {re.match(r"\w+", item).group() for item in re.findall(r"`([^`]+)`", row.split("|")[3])}
    assert settings <= {*parameters, "policies", "latents", "benign", "random", "dynamic", "published"}

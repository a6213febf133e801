"""SLD against diffusers' own deprecated pipeline, and against its equations typed in NumPy.

Tolerances: the guard computes differences of noises from denoised estimates in float32, diffusers from the noises, so
that either is off by about 1e-6 of the latents (eps over sigma, 0.1 at the last step), and the trajectory of a random
network amplifies that, as it does the guard's effect. Latents must agree to 1e-5 of their own size.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipelineSafe
from hypothesis import given
from hypothesis import strategies as st

from steerclear.attach.api import attach
from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards import SLD, DynamicNegativeGuidance, chain, requirements
from steerclear.guards.sld import CONCEPTS, LISTED
from steerclear.noise import NoiseLevel
from steerclear.testing.pipelines import tiny_call, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 6  # so that the four warm-ups end after 2, 2, 1 and 0 steps
# Typed from the paper's table; the warm-up counts steps of 50. diffusers' arguments are named after them.
PRESETS = {
    "weak": {"warmup": 15, "guidance_scale": 200, "threshold": 0.0, "momentum_scale": 0.0, "mom_beta": 0.0},
    "medium": {"warmup": 10, "guidance_scale": 1000, "threshold": 0.01, "momentum_scale": 0.3, "mom_beta": 0.4},
    "strong": {"warmup": 7, "guidance_scale": 2000, "threshold": 0.025, "momentum_scale": 0.5, "mom_beta": 0.7},
    "max": {"warmup": 0, "guidance_scale": 5000, "threshold": 1.0, "momentum_scale": 0.5, "mom_beta": 0.7},
}
TEXT = "blood, weapons"  # tiny tokenizers have a token per letter


# -- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipes():
    pipe = tiny_pipeline("sd")
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    safe = StableDiffusionPipelineSafe(**parts, requires_safety_checker=False)
    safe.set_progress_bar_config(disable=True)
    safe._safety_text_concept = TEXT
    # It can return no latents, so it is made to: these two only decode and check the finished picture.
    safe.decode_latents = lambda latents: latents
    safe.run_safety_checker = lambda image, *rest: (image, None, None)
    return pipe, safe


def call(**more):
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"prompt": ["a cat", "a dog"], "num_inference_steps": STEPS, "guidance_scale": 7.5, "latents": start} | more


def of_diffusers(safe, name: str, **more) -> torch.Tensor:
    settings = {f"sld_{key}": value for key, value in PRESETS[name].items() if key != "warmup"}
    settings["sld_warmup_steps"] = math.ceil(PRESETS[name]["warmup"] * STEPS / 50)
    return safe(**call(**more), **settings, output_type="np").images


def ours(pipe, *guards, **more) -> torch.Tensor:
    with attach(pipe, *guards):
        return pipe(**call(**more), output_type="latent").images


BIRDS = {"negative_prompt": ["a bird", "a fish"]}


@pytest.mark.parametrize(("name", "more"), [*((name, {}) for name in PRESETS), ("strong", BIRDS)])
def test_every_preset_draws_what_the_pipeline_of_diffusers_draws(pipes, name, more):
    pipe, safe = pipes
    expected = of_diffusers(safe, name, **more)
    got = ours(pipe, getattr(SLD, name)(TEXT), **more)
    effect = (expected - ours(pipe, **more)).norm() / expected.norm()
    off = (got - expected).norm() / expected.norm()
    assert off <= 1e-5 < 1e-3 < effect


def test_the_published_settings_are_those_of_the_table():
    for name, row in PRESETS.items():
        guard = getattr(SLD, name)()
        values = (guard.warmup, guard.strength, guard.threshold, guard.momentum, guard.decay)
        assert values == tuple(row.values())
        assert guard.concept == LISTED
    assert len(CONCEPTS) == len(set(CONCEPTS)) == 20
    assert SLD.weak(strength=20.0).strength == 20.0


def test_the_list_is_the_one_of_diffusers():
    safe = StableDiffusionPipelineSafe(
        **{name: part for name, part in tiny_pipeline("sd").components.items() if name != "image_encoder"},
        requires_safety_checker=False,
    )
    assert safe._safety_text_concept == "an image showing " + LISTED


# -- the equations -----------------------------------------------------------------------------------------------------


def reference(branches, settings: dict, level: NoiseLevel, num_steps: int, w: float) -> list[np.ndarray]:
    """Guided estimates of every step, float64: the equations in noise, as printed in the module under test."""
    s, lam, s_m, beta, delta = (settings[k] for k in ("strength", "threshold", "momentum", "decay", "warmup"))
    nu, out = 0.0, []
    for i, (e_0, e_p, e_s, x_t) in enumerate(branches):
        d = e_p - e_s
        mu = np.where(d < lam, np.minimum(1.0, s * np.abs(d)), 0.0)
        gamma = mu * (e_s - e_0) + s_m * nu
        nu = beta * nu + (1 - beta) * gamma
        guided = e_0 + w * ((e_p - e_0) - (gamma if i >= delta * num_steps / 50 else 0.0))
        out.append((x_t - level.sigma * guided) / level.alpha)
    return out


def walked(guard, branches, level: NoiseLevel, num_steps: int, w: float, dtype=torch.float64) -> list[torch.Tensor]:
    """The guard at the same noises, lent as denoised estimates; where it does nothing, the guided estimate itself."""
    memory, out = {}, []
    for i, noises in enumerate(branches):
        x_t = torch.from_numpy(noises[3])
        u, c, s = ((x_t - level.sigma * torch.from_numpy(e)) / level.alpha for e in noises[:3])
        state = DenoiseState(
            x_t=x_t,
            level=level,
            step=i,
            num_steps=num_steps,
            branches={"unconditional": u, "conditional": c},
            guidance_scale=w,
            denoise=lambda x, level, text, s=s: s,
            memory=memory,
        )
        guided = (u + w * (c - u)).to(dtype)
        result = guard(guided, state)
        out.append(guided if result is None else result)
    return out


LEVEL = NoiseLevel(0.6, 0.8)


def noises(steps: int, seed: int = 0, spread: float = 0.02) -> list[tuple[np.ndarray, ...]]:
    """Unconditional, prompt, concept, and the sample; differences near the thresholds."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((steps, 2, 3, 4))
    return [
        (
            base[i],
            *(base[i] + spread * rng.standard_normal((2, 3, 4)) for _ in range(2)),
            rng.standard_normal((2, 3, 4)),
        )
        for i in range(steps)
    ]


@given(
    strength=st.floats(0, 1e4),
    threshold=st.floats(-0.1, 0.1),
    momentum=st.floats(0, 0.9),
    decay=st.floats(0, 1),
    warmup=st.floats(0, 60),
    seed=st.integers(0, 99),
)
def test_the_guard_is_the_equations(strength, threshold, momentum, decay, warmup, seed):
    settings = {"strength": strength, "threshold": threshold, "momentum": momentum, "decay": decay, "warmup": warmup}
    branches = noises(6, seed)
    expected = reference(branches, settings, LEVEL, 6, 7.5)
    for got, want in zip(walked(SLD(**settings), branches, LEVEL, 6, 7.5), expected, strict=True):
        np.testing.assert_allclose(got.numpy(), want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("off", [{"strength": 0.0, "momentum": 0.0}, {"strength": 0.0}, {"threshold": -math.inf}])
def test_a_and_b_without_strength_or_below_every_threshold_it_is_guidance_and_asks_nothing(off):
    guard = replace(SLD.max(), **off)
    asked = []
    x = torch.zeros(1, 2)
    state = DenoiseState(
        x_t=x,
        level=LEVEL,
        step=5,
        num_steps=10,
        branches={"unconditional": x, "conditional": x + 1},
        guidance_scale=3.0,
        denoise=lambda *given: asked.append(given),
    )
    assert guard(x, state) is None
    assert not asked


@pytest.mark.parametrize("name", PRESETS)
def test_c_a_concept_that_is_the_prompt_leaves_guidance_bit_identical(name):
    branches = [(e_0, e_p, e_p, x) for e_0, e_p, _, x in noises(4)]
    got = walked(getattr(SLD, name)(), branches, LEVEL, 4, 7.5)
    idle = walked(lambda *given: None, branches, LEVEL, 4, 7.5)
    assert all(torch.equal(a, b) for a, b in zip(got, idle, strict=True))


def test_d_without_thresholds_guidance_is_along_prompt_minus_concept():
    guard = SLD(strength=math.inf, threshold=math.inf, momentum=0.0, warmup=0.0)
    branches = noises(3)
    for got, (e_0, e_p, e_s, x_t) in zip(walked(guard, branches, LEVEL, 3, 7.5), branches, strict=True):
        want = (x_t - 0.8 * (e_0 + 7.5 * (e_p - e_s))) / 0.6
        np.testing.assert_allclose(got.numpy(), want, atol=1e-12)


@pytest.mark.parametrize(("name", "factor"), [("weak", 1.0), ("medium", 1 / 0.7), ("strong", 2.0), ("max", 2.0)])
def test_e_constant_branches_end_at_the_fixed_point_of_the_momentum(name, factor):
    """What is above the threshold has no push and no momentum; the push of the rest grows to D/(1 − s_m)."""
    one = noises(1)[0]
    branches = [one] * 100
    last = walked(getattr(SLD, name)(), branches, LEVEL, 100, 7.5)[-1].numpy()
    row = PRESETS[name]
    d = one[1] - one[2]
    mask = np.where(d < row["threshold"], np.minimum(1.0, row["guidance_scale"] * np.abs(d)), 0.0)
    guided = one[0] + 7.5 * (one[1] - one[0] - factor * mask * (one[2] - one[0]))
    # The gap to the fixed point shrinks by β_m + (1 − β_m) s_m <= 0.85 at every step: 0.85^100 < 1e-7 is left.
    np.testing.assert_allclose(last, (one[3] - 0.8 * guided) / 0.6, atol=1e-6)


# -- as a guard --------------------------------------------------------------------------------------------------------


def test_the_warm_up_is_a_fraction_and_costs_nothing_without_momentum():
    pipe = tiny_pipeline("sd")
    for name, steps, first, evaluations in (("weak", 10, 3, 7), ("medium", 10, 2, 10), ("weak", 20, 6, 14)):
        with attach(pipe, getattr(SLD, name)(TEXT)) as trace:
            pipe(**call(num_inference_steps=steps), output_type="latent")
        assert [bool(record.fired.any()) for record in trace.calls[0].steps] == [i >= first for i in range(steps)]
        assert trace.calls[0].extra_evaluations == evaluations


def test_neutral_parameters_leave_the_pipeline_bit_identical():
    pipe = tiny_pipeline("sd")
    plain = pipe(**call(), output_type="latent").images
    assert torch.equal(ours(pipe, SLD(concept=TEXT, strength=0.0)), plain)
    assert torch.equal(ours(pipe, SLD(concept=TEXT, threshold=-math.inf)), plain)


def test_a_sample_does_not_depend_on_the_rest_of_its_batch():
    together = noises(5)
    alone = [tuple(x[:1] for x in one) for one in together]
    for a, b in zip(
        walked(SLD.strong(), together, LEVEL, 5, 7.5), walked(SLD.strong(), alone, LEVEL, 5, 7.5), strict=True
    ):
        assert torch.equal(a[:1], b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_it_went_in(dtype):
    (got,) = walked(SLD.max(), noises(1), LEVEL, 1, 7.5, dtype)
    assert got.dtype is dtype


def test_no_signal_at_the_first_step_of_a_flow_is_no_push():
    """At alpha = 0 every estimate stands for the same noise."""
    (got,) = walked(SLD.max(), noises(1), NoiseLevel(0.5, 0.5), 1, 7.5)
    assert got.isfinite().all()
    pipe = tiny_pipeline("sd3")
    plain = pipe(**tiny_call("sd3")).images
    with attach(pipe, SLD.max(TEXT)) as trace:
        guarded = pipe(**tiny_call("sd3")).images
    assert [bool(record.fired.any()) for record in trace.calls[0].steps] == [False, True, True]
    assert np.isfinite(guarded).all()
    assert not np.array_equal(guarded, plain)


@pytest.mark.parametrize("kind", ["sdxl", "flux", "video"])
def test_runs_on_other_families(kind):
    pipe = tiny_pipeline(kind)
    with attach(pipe, SLD.max(TEXT)) as trace:
        pipe(**tiny_call(kind))
    assert trace.calls[0].extra_evaluations > 0
    assert trace.calls[0].steps[-1].fired.all()


def test_a_multistep_solver_takes_it():
    pipe = tiny_pipeline("sd")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert ours(pipe, SLD.strong(TEXT)).isfinite().all()


def test_is_refused_beside_dynamic_negative_guidance_from_the_same_thing():
    pipe = tiny_pipeline("sd")
    tracked = DynamicNegativeGuidance(prompt="a weapon")
    with pytest.raises(UnsoundCombination, match=r"the same thing \(weapon\).*Use one of them"):
        ours(pipe, chain(SLD.max(TEXT), tracked), eta=1.0)
    with pytest.raises(UnsoundCombination, match="the same thing"):
        ours(pipe, tracked, SLD.max(TEXT), eta=1.0)
    assert ours(pipe, SLD.max(TEXT), DynamicNegativeGuidance(prompt="a bird"), eta=1.0).isfinite().all()


def test_needs_guidance():
    assert requirements(SLD()).branches
    with pytest.raises(UnsoundCombination, match="needs classifier-free guidance"):
        ours(tiny_pipeline("sd"), SLD(concept=TEXT), guidance_scale=1.0)


@pytest.mark.parametrize(
    "bad",
    [
        {"strength": -1.0},
        {"strength": math.nan},
        {"threshold": math.nan},
        {"momentum": 1.0},
        {"decay": 1.5},
        {"warmup": -1.0},
        {"warmup": math.inf},
        {"concept": " "},
        {"concept": ["", ""]},
        {"concept": [1, "blood"]},
    ],
)
def test_values_outside_their_range_are_refused(bad):
    with pytest.raises(InvalidInput, match="SLD: expected"):
        SLD(**bad)

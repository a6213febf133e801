"""Dynamic negative guidance against a line with two modes, on which everything is known.

0.8 N(−2, 0.5²) + 0.2 N(2, 0.5²), of which the right mode is not wanted; 1,000 DDPM steps, exact estimates, prior 0.2.
Figures of an independent simulation of the equations, 20,000 samples:

    sampler                    mass right of 0    mean of the left mode    its standard deviation
    unguided                   0.201              −1.998                   0.493
    static, λ = 0.25           0.089              −2.96                    0.505
    static, λ = 1              0.008              −5.96                    0.502
    dynamic, λ0 = 1            0.007              −2.00                    0.490
    dynamic, λ0 = 2            0.0001             −2.04                    0.481

Both simulations have sampling errors: of N and 20,000 samples, four standard errors of the difference are allowed, and
the half of the last digit printed.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.stats import norm

from steerclear.attach.api import attach
from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards import DynamicNegativeGuidance, NegativePrompt, Requires, chain, requirements
from steerclear.noise import NoiseLevel
from steerclear.testing import Mixture
from steerclear.testing.pipelines import tiny_pipeline
from steerclear.testing.sampling import Prompted, ancestral, variance_preserving

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

N, STEPS = 2000, 1000
LINE = Mixture(
    means=torch.tensor([[-2.0], [2.0]], dtype=torch.float64),
    scales=torch.tensor([0.5, 0.5], dtype=torch.float64),
    weights=torch.tensor([0.8, 0.2], dtype=torch.float64),
    labels=("left", "right"),
)


class Once:
    """The line, asked once for what the branches of no prompt share."""

    def __init__(self) -> None:
        self.last = (None, None)

    def __call__(self, x_t, level, condition=None):
        if condition is not None:
            return LINE(x_t, level, condition)
        if self.last[0] is not x_t:
            self.last = (x_t, LINE(x_t, level))
        return self.last[1]


def dynamic(strength: float, **more) -> DynamicNegativeGuidance:
    return DynamicNegativeGuidance(prompt="right", strength=strength, **more)


class Watched:
    """A guard, and what it says of p beside the true posterior, at every 50th step."""

    def __init__(self, guard) -> None:
        self.guard, self.seen = guard, []

    def __call__(self, denoised, state):
        notes = {}
        state.note = notes.__setitem__
        result = self.guard(denoised, state)
        if state.step % 50 == 0 and notes:
            true = LINE.probability("right", state.x_t, state.level)
            self.seen.append((state.step, notes["weight"].numpy(), true.numpy()))
        return result


@cache
def drawn(kind: str) -> tuple[np.ndarray, list]:
    guard = {
        "unguided": lambda *given: None,
        "static 0.25": NegativePrompt(prompt="right", strength=0.25),
        "static 1": NegativePrompt(prompt="right", strength=1.0),
        "dynamic 1": dynamic(1.0),
        "dynamic 2": dynamic(2.0),
        "tracking": dynamic(0.0),
    }[kind]
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(N, 1, dtype=torch.float64, generator=rng)
    watched = Watched(guard)
    prompt = Prompted(condition=None, guidance_scale=1.0)
    out = ancestral(Once(), variance_preserving(STEPS), x, guard=watched, prompt=prompt, generator=rng)
    return out[:, 0].numpy(), watched.seen


# -- the table ---------------------------------------------------------------------------------------------------------

TABLE = [
    pytest.param("unguided", 0.201, -1.998, 0.493, marks=pytest.mark.slow),
    pytest.param("static 0.25", 0.089, -2.96, 0.505, marks=pytest.mark.slow),
    pytest.param("static 1", 0.008, -5.96, 0.502, marks=pytest.mark.slow),
    pytest.param("dynamic 1", 0.007, -2.00, 0.490),
    pytest.param("dynamic 2", 0.0001, -2.04, 0.481, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "right", "mean", "deviation"), TABLE)
def test_the_table_of_the_line(kind, right, mean, deviation):
    x, _ = drawn(kind)
    left = x[x < 0]
    share = max(right, 1 / N)  # of a share that rounds to nothing
    both = math.sqrt(1 / N + 1 / 20_000)
    assert (x > 0).mean() == pytest.approx(right, abs=4 * both * math.sqrt(share * (1 - share)) + 0.0005)
    assert left.mean() == pytest.approx(mean, abs=4 * both * deviation + 0.005)
    assert left.std() == pytest.approx(deviation, abs=4 * both * deviation / math.sqrt(2) + 0.0005)


def test_what_is_left_of_the_right_mode_and_of_the_left_one_under_static_guidance():
    """The point of the table: a static push either lets the mode through or moves everything else."""
    x, _ = drawn("dynamic 1")
    assert (x > 0).mean() < 0.02
    assert abs(x[x < 0].mean() + 2) < 0.05


# -- the posterior -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("tracking", marks=pytest.mark.slow), "dynamic 1"])
def test_the_tracked_posterior_is_the_true_one(kind):
    """At the first steps both are the prior and have nothing to correlate; at the last, exact ones are 0 or 1."""
    _, seen = drawn(kind)
    correlation = {step: np.corrcoef(p, true)[0, 1] for step, p, true in seen if step >= 200 and true.std() > 1e-3}
    assert len(correlation) >= 8
    assert min(correlation.values()) >= 0.98


@pytest.mark.slow
def test_without_guidance_the_posterior_is_a_martingale():
    """Its mean stays the prior, 0.2, but for the clipping at 0.99, which takes up to 1 % of the mass at p = 1."""
    _, seen = drawn("tracking")
    for _, p, _ in seen:
        assert p.mean() == pytest.approx(0.2, abs=4 * p.std() / math.sqrt(N) + 0.2 * 0.05)


def test_a_text_that_is_not_drawn_switches_itself_off():
    """Samples of the left mode: p falls, and with it the push."""
    x, seen = drawn("dynamic 1")
    _, p, _ = seen[-1]
    assert np.median(p[x < 0]) < 0.01


# -- the equations -----------------------------------------------------------------------------------------------------


def test_the_update_and_the_push_are_the_equations():
    """Four steps in NumPy, float64, with tempering, drift and both clips in reach."""
    rng = np.random.default_rng(0)
    levels = [NoiseLevel(math.cos(a), math.sin(a)) for a in (1.4, 1.2, 0.9, 0.5)]
    x, u, n, guided = rng.standard_normal((4, 4, 5, 3))
    tau, delta, prior, low, high, gain = 0.7, 0.05, 0.3, 0.05, 0.6, 1.5
    guard = dynamic(gain, tau=tau, delta=delta, prior=prior, bounds=(low, high))
    memory, p = {}, np.full(5, prior)
    for i, level in enumerate(levels):
        if i:
            a_t, s_t, a_s, s_s = levels[i - 1].alpha, levels[i - 1].sigma, level.alpha, level.sigma
            share = (a_t / a_s) ** 2  # alpha_t / alpha_s of the squared scales; 1 - share * ... is beta, section 0
            variance = s_s**2 / s_t**2 * (1 - share)
            c_0 = a_s * (1 - share) / s_t**2
            c_t = math.sqrt(share) * s_s**2 / s_t**2
            mu, mu_n = (c_0 * e[i - 1] + c_t * x[i - 1] for e in (u, n))
            d = ((x[i] - mu_n) ** 2).sum(1) - ((x[i] - mu) ** 2).sum(1)
            p = np.clip(p * np.exp((-tau * d + delta) / (2 * variance)), low, high)
        want = guided[i] - (gain * p / (1 - p))[:, None] * (n[i] - u[i])
        noted = {}
        state = DenoiseState(
            x_t=torch.from_numpy(x[i]),
            level=level,
            step=i,
            num_steps=4,
            eta=1.0,
            branches={"unconditional": torch.from_numpy(u[i]), "conditional": torch.from_numpy(guided[i])},
            guidance_scale=3.0,
            denoise=lambda x, level, text, i=i: torch.from_numpy(n[i]),
            memory=memory,
            note=noted.__setitem__,
        )
        got = guard(torch.from_numpy(guided[i]), state)
        np.testing.assert_allclose(noted["weight"].numpy(), p, rtol=1e-9)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-9)


def test_with_a_posterior_that_cannot_move_it_is_a_static_negative_prompt():
    pipe = tiny_pipeline("sd")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    fixed = dynamic(2.0, prior=0.5, bounds=(0.5, 0.5))
    got, expected = drawn_by(pipe, fixed)[0], drawn_by(pipe, NegativePrompt(prompt="right", strength=2.0))[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


# -- as a guard --------------------------------------------------------------------------------------------------------


def drawn_by(pipe, *guards, **more):
    call = {"prompt": ["a cat", "a cow"], "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    with attach(pipe, *guards) as trace:
        images = pipe(**call | more, generator=torch.Generator().manual_seed(0)).images
    return images, trace.calls[0]


def test_at_strength_0_it_tracks_and_is_bit_identical():
    pipe = tiny_pipeline("sd")
    plain, _ = drawn_by(pipe, eta=1.0)
    got, record = drawn_by(pipe, dynamic(0.0), eta=1.0)
    assert torch.equal(got, plain)
    assert record.extra_evaluations == 4
    assert [step.notes["weight"].shape for step in record.steps] == [(2,)] * 4


def test_a_sample_does_not_depend_on_the_rest_of_its_batch():
    """Two lines at once: the first sample's numbers are those of it alone."""
    notes = {}
    for batch in (2, 1):
        memory, kept = {}, []
        for step, angle in enumerate((1.2, 0.8, 0.4)):
            x = torch.linspace(-1, 1, 2).reshape(2, 1)[:batch] + 0.1 * step
            state = DenoiseState(
                x_t=x,
                level=NoiseLevel(math.cos(angle), math.sin(angle)),
                step=step,
                num_steps=3,
                eta=1.0,
                branches={"unconditional": x, "conditional": x},
                denoise=lambda x, level, text: x**2,
                memory=memory,
            )
            kept.append(dynamic(1.0)(x, state)[:1])
        notes[batch] = torch.cat(kept)
    assert torch.equal(notes[1], notes[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_it_went_in(dtype):
    x = torch.zeros(2, 3)
    state = DenoiseState(
        x_t=x,
        level=NoiseLevel(0.8, 0.6),
        step=0,
        num_steps=2,
        eta=1.0,
        branches={"unconditional": x, "conditional": x},
        denoise=lambda x, level, text: x + 1,
    )
    assert dynamic(1.0)(x.to(dtype), state).dtype is dtype


@pytest.mark.parametrize("kind", ["sdxl"])
def test_runs_with_an_ancestral_sampler(kind):
    from diffusers import EulerAncestralDiscreteScheduler

    pipe = tiny_pipeline(kind)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    _, record = drawn_by(pipe, dynamic(1.0))
    assert record.steps[-1].fired.all()


def test_deterministic_samplers_are_refused_with_sound_ones_named():
    assert requirements(dynamic(1.0)) == Requires(branches=True, stochastic=True, one_call=True)
    sound = r"DynamicNegativeGuidance needs .*eta > 0.*DDPMScheduler, EulerAncestralDiscreteScheduler, or DDIMSched"
    with pytest.raises(UnsoundCombination, match=sound):
        drawn_by(tiny_pipeline("sd"), dynamic(1.0))
    with pytest.raises(UnsoundCombination, match="eta > 0"):
        drawn_by(tiny_pipeline("sd3"), chain(dynamic(1.0)), max_sequence_length=16)


def test_on_a_deterministic_walk_the_posterior_could_only_fall():
    """Why it is refused: at x_s = μ the distance to the other mean is never the smaller one."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(50, 1, dtype=torch.float64, generator=rng)
    with pytest.raises(UnsoundCombination, match="can only fall"):
        ancestral(
            LINE, variance_preserving(5), x, guard=dynamic(1.0), prompt=Prompted(condition=None), eta=0.0, generator=rng
        )


def test_presets_are_the_published_values():
    values = lambda g: (g.strength, g.prior, g.tau, g.delta, g.bounds)  # noqa: E731
    assert values(DynamicNegativeGuidance.published("x")) == (1.0, 0.2, 1.0, 0.0, (1e-6, 0.99))
    assert values(DynamicNegativeGuidance.readme("x")) == (5.0, 0.01, 0.2, 2e-4, (1e-6, 0.8))
    assert values(DynamicNegativeGuidance.stable_diffusion("x")) == (21.0, 0.01, 0.2, 0.004, (1e-6, 0.99))


@pytest.mark.parametrize(
    "bad",
    [
        {"strength": -1.0},
        {"strength": math.inf},
        {"prior": 0.0},
        {"prior": 0.995},
        {"tau": 0.0},
        {"delta": math.nan},
        {"bounds": (0.0, 0.9)},
        {"bounds": (0.1, 1.0)},
        {"prompt": ""},
    ],
)
def test_values_outside_their_range_are_refused(bad):
    with pytest.raises(InvalidInput, match="DynamicNegativeGuidance: expected"):
        DynamicNegativeGuidance(**({"prompt": "right"} | bad))


@pytest.mark.slow
def test_the_unguided_line_is_what_it_should_be():
    """The referee itself: both modes with their weights, by the mixture's own distribution."""
    x, _ = drawn("unguided")
    truth = 0.8 * norm.cdf(np.sort(x), -2, 0.5) + 0.2 * norm.cdf(np.sort(x), 2, 0.5)
    assert np.abs(truth - (np.arange(N) + 0.5) / N).max() < 1.63 / math.sqrt(N)  # Kolmogorov–Smirnov at 1 %

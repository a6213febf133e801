"""What the Safe Denoiser does to whole trajectories, counted: labelled mixtures through diffusers' own solvers.

Sizes are chosen so that the bounds mean something. With n = 6 000 samples and P(unsafe) ≤ 0.001 allowed, six hits are
tolerated; a guard that really let 0.3 % through would pass with probability P(Poisson(18) ≤ 6) = 0.1 %. The share of a
safe mode has standard error √(¼/6000) = 0.0065, so ± 0.02 is three of them: what is left is room for solver error.
"""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

import steerclear.attach as attach_package
from steerclear.denoise import DenoiseState
from steerclear.errors import UnsoundCombination
from steerclear.guards import Dynamic, Gate, SafeDenoiser, TwoSample
from steerclear.guards.base import Guard
from steerclear.testing import Mixture
from steerclear.testing.sampling import MixturePipeline, Spaceless, ancestral, variance_preserving

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, NumPy 2

SCHEDULERS = {
    "DDIM": lambda: DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "DDIM v-prediction": lambda: DDIMScheduler(
        clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction"
    ),
    "DDPM": lambda: DDPMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "Euler": lambda: EulerDiscreteScheduler(timestep_spacing="trailing"),
    "Euler a": lambda: EulerAncestralDiscreteScheduler(timestep_spacing="trailing"),
    # The default schedule of Heun stops at alpha = 0.07, where starting from pure noise shifts the shares by 0.03.
    "Heun": lambda: HeunDiscreteScheduler(timestep_spacing="trailing", beta_start=1e-4, beta_end=0.02),
    "DPM++ 2M": lambda: DPMSolverMultistepScheduler(timestep_spacing="trailing"),
    "FlowMatchEuler": lambda: FlowMatchEulerDiscreteScheduler(),
}


def line() -> Mixture:
    """Unsafe 0.4 on the right, two safe clusters of 0.3 each; every cluster is three points, so a Dirac mixture."""
    points = torch.tensor([[c + d] for c in (-3.0, 0.0, 3.0) for d in (-0.1, 0.0, 0.1)], dtype=torch.float64)
    weights = torch.tensor([0.06, 0.12, 0.12, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2], dtype=torch.float64)
    return Mixture.diracs(points, ("safe",) * 6 + ("unsafe",) * 3, weights)


def exact(mixture: Mixture) -> SafeDenoiser:
    """Two-sample with the data as references and the true prior: the exact weight, by the production path."""
    weight = TwoSample(safe=mixture.references(condition="safe"), prior=0.4)
    return SafeDenoiser(negation=mixture.references(condition="unsafe"), weight=weight, max_beta=1e4)


def shares(x_0: torch.Tensor) -> tuple[float, float, float]:
    """Share of the unsafe cluster, and of the left one among the safe; and of samples near no cluster."""
    x = x_0.flatten()
    unsafe, left = x > 1.5, x < -1.5
    off = (x[:, None] - torch.tensor([-3.0, 0.0, 3.0])).abs().amin(1) > 0.6
    return unsafe.double().mean().item(), (left.sum() / (~unsafe).sum()).item(), off.double().mean().item()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_exact_weight_removes_the_unsafe_share_and_keeps_the_safe_proportions(name: str) -> None:
    mixture = line()
    pipe = MixturePipeline.of(mixture, SCHEDULERS[name]())
    unsafe, left, _ = shares(pipe(1500, 50, torch.Generator().manual_seed(0)))
    assert unsafe == pytest.approx(0.4, abs=0.06)  # few-step solvers are off by some per cent by themselves
    assert left == pytest.approx(0.5, abs=0.06)
    with attach_package.attach(pipe, Spaceless(guard=exact(mixture))) as trace:
        unsafe, left, off = shares(pipe(6000, 50, torch.Generator().manual_seed(1)))
    assert unsafe <= 0.001
    assert left == pytest.approx(0.5, abs=0.02)
    assert off <= 0.001
    assert trace.steps >= 50


def test_the_tracked_weight_is_refused_by_a_deterministic_sampler_before_any_sample() -> None:
    mixture = line()
    pipe = MixturePipeline.of(mixture, SCHEDULERS["DDIM"]())
    guard = Spaceless(guard=SafeDenoiser(negation=mixture.references(condition="unsafe"), weight=Dynamic(prior=0.4)))
    with attach_package.attach(pipe, guard), pytest.raises(UnsoundCombination, match=r"(?s)noise between steps"):
        pipe(4, 5, torch.Generator().manual_seed(0))
    heun = MixturePipeline.of(mixture, SCHEDULERS["Heun"]())
    with pytest.raises(UnsoundCombination, match="one network evaluation"), attach_package.attach(heun, guard):
        heun(4, 5, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["DDPM", "Euler a"])
def test_the_tracked_weight_works_through_real_stochastic_samplers(name: str) -> None:
    """One observation per step tells less than the exact weight: 50 steps leave some per cent."""
    mixture = line()
    pipe = MixturePipeline.of(mixture, SCHEDULERS[name]())
    guard = SafeDenoiser(negation=mixture.references(condition="unsafe"), weight=Dynamic(prior=0.4))
    with attach_package.attach(pipe, Spaceless(guard=guard)):
        unsafe, _, off = shares(pipe(1500, 50, torch.Generator().manual_seed(1)))
    assert unsafe <= 0.12
    assert off <= 0.01


# -- the one-dimensional table of dynamic negative guidance ------------------------------------------------------------


def two_modes() -> Mixture:
    return Mixture(
        means=torch.tensor([[-2.0], [2.0]], dtype=torch.float64),
        scales=torch.tensor([0.5, 0.5], dtype=torch.float64),
        weights=torch.tensor([0.8, 0.2], dtype=torch.float64),
        labels=("safe", "unsafe"),
    )


class Recorder:
    """Runs a guard and keeps its weight beside the true posterior."""

    def __init__(self, guard: Guard, mixture: Mixture) -> None:
        self.guard, self.mixture, self.pairs = guard, mixture, []

    def __call__(self, denoised: torch.Tensor, state: DenoiseState) -> torch.Tensor | None:
        notes: dict[str, torch.Tensor] = {}
        state.note = notes.__setitem__
        guarded = self.guard(denoised, state)
        self.pairs.append((notes["weight"], self.mixture.probability("unsafe", state.x_t, state.level)))
        return guarded


def test_the_tracker_meets_the_published_toy_of_dynamic_negative_guidance() -> None:
    """0.8·N(−2, ½²) + 0.2·N(2, ½²), T = 1000. Measured elsewhere: 0.7 % right of zero, left mode −2.00 ± 0.49.

    Unguided 20.1 %; a constant weight of 1 moves the left mode to −5.96. The negation set is 50 quantiles of the right
    mode: their mean and variance are the mode's to 2 %.
    """
    mixture = two_modes()
    quantiles = torch.distributions.Normal(2.0, 0.5).icdf((torch.arange(50, dtype=torch.float64) + 0.5) / 50)
    negation = Mixture.diracs(quantiles[:, None].double(), ("unsafe",) * 50).references()
    recorder = Recorder(SafeDenoiser(negation=negation, weight=Dynamic(prior=0.2), max_beta=99.0), mixture)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 1, dtype=torch.float64, generator=generator)
    x_0 = ancestral(mixture, variance_preserving(1000), x, guard=recorder, generator=generator).flatten()
    # 7 of 1000 expected; P(Poisson(7) > 17) < 0.001.
    assert (x_0 > 0).sum() <= 17
    left = x_0[x_0 < 0]
    assert left.mean().item() == pytest.approx(-2.0, abs=4 * 0.5 / math.sqrt(1000))
    assert left.std().item() == pytest.approx(0.49, abs=0.04)
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in recorder.pairs[400:800:100]]
    assert min(correlations) > 0.95


# -- the ring ----------------------------------------------------------------------------------------------------------


def ring_shares(guard: Guard | None, *, samples: int, steps: int) -> tuple[float, float]:
    """P(unsafe), and the share farther than four standard deviations from every mode (0.03 % for the ring itself)."""
    ring = Mixture.ring()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 2, dtype=torch.float64, generator=generator)
    mode, distance = ring.nearest(ancestral(ring, variance_preserving(steps), x, guard=guard, generator=generator))
    unsafe = torch.tensor([label == "unsafe" for label in ring.labels])[mode]
    return unsafe.double().mean().item(), (distance > 4).double().mean().item()


@pytest.mark.slow
def test_on_the_ring_the_tracked_weight_keeps_what_a_constant_one_ruins() -> None:
    """8 modes, 2 unsafe, 2 000 unsafe references, DDPM, 200 steps.

    The full-size figures with intervals are benchmarks/ring.py's. Here, 600 samples reject a rate above 3 % at the
    level 1 %: the count may not exceed the 99 % quantile of Binomial(600, 0.03), 28. Unguarded it would be 150.
    """
    ring = Mixture.ring()
    negation = ring.references(2000, condition="unsafe", generator=torch.Generator().manual_seed(0))
    unsafe, off = ring_shares(None, samples=600, steps=200)
    assert unsafe == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 600))
    assert off <= 0.005
    unsafe, off = ring_shares(SafeDenoiser(negation=negation, weight=Dynamic(prior=0.25)), samples=600, steps=200)
    assert unsafe * 600 <= 28
    assert off <= 0.005
    _, off = ring_shares(SafeDenoiser(negation=negation, weight=Gate()), samples=60, steps=200)
    assert off >= 0.9

"""Safety-Guided Flow against the gradient of MMD² in float64 NumPy, and the identities that follow from it."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from steerclear.attach import attach
from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, NegationMismatch
from steerclear.guards import SPELL, SafeDenoiser, SafetyGuidedFlow, Shield, requirements
from steerclear.guards.safety_guided_flow import PRESETS
from steerclear.guards.weights import Weight
from steerclear.negation import NegationSet, Posterior, Space, encoder_of
from steerclear.noise import NoiseLevel
from steerclear.testing.pipelines import tiny_call, tiny_pipeline

D = 6


def references(n: int = 12, seed: int = 0, weights: Tensor | None = None, scale: float = 1.0) -> NegationSet:
    rng = torch.Generator().manual_seed(seed)
    latents = scale * torch.randn(n, D, generator=rng, dtype=torch.float64)
    extra = {} if weights is None else {"weights": weights}
    return NegationSet(latents=latents, space=Space(encoder="sha256:test", shape=(D,), name="test"), **extra)


def points(n: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(x: Tensor, **more) -> DenoiseState:
    return DenoiseState(x_t=x, level=NoiseLevel(1.0, 0.5), step=0, num_steps=10, **more)


def mmd(x: np.ndarray, y: np.ndarray, w: np.ndarray, sigma: float) -> float:
    """MMD² between one point and weighted points, typed from its definition."""

    def k(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(2) / (2 * sigma**2))

    w = w / w.sum()
    return float(k(x[None], x[None])[0, 0] - 2 * (w * k(x[None], y)[0]).sum() + w @ k(y, y) @ w)


@pytest.mark.parametrize("sigma", [0.7, 1.5, 4.0])
def test_it_climbs_the_discrepancy(sigma: float) -> None:
    weights = torch.arange(1.0, 13.0, dtype=torch.float64)
    negation, x = references(weights=weights), points()
    out = SafetyGuidedFlow(negation=negation, strength=0.3, bandwidth=sigma)(x, state(x))
    y, w, h = negation.latents.numpy(), weights.numpy(), 1e-5
    for row in range(len(x)):
        at = x[row].numpy()
        gradient = [(mmd(at + h * step, y, w, sigma) - mmd(at - h * step, y, w, sigma)) / (2 * h) for step in np.eye(D)]
        np.testing.assert_allclose(out[row].numpy(), at + 0.3 * np.array(gradient), rtol=0, atol=1e-9)
        assert mmd(out[row].numpy(), y, w, sigma) > mmd(at, y, w, sigma)


def test_the_gradient_is_autograds() -> None:
    negation, sigma = references(), 1.3
    x = points().requires_grad_()
    distance = ((x[:, None] - negation.latents[None]) ** 2).sum(2)
    (-2 * torch.exp(-distance / (2 * sigma**2)).mean(1)).sum().backward()
    given = x.detach()
    out = SafetyGuidedFlow(negation=negation, strength=1.0, bandwidth=sigma)(given, state(given))
    torch.testing.assert_close(out - given, x.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", [(0, 3), (3, 6)])
def test_the_bandwidth_rule_is_per_sample(ranks: tuple[int, int]) -> None:
    negation, x, notes = references(), points(), {}
    SafetyGuidedFlow(negation=negation, strength=0.0, ranks=ranks)(x, state(x, note=notes.__setitem__))
    squared = np.sort(((x.numpy()[:, None] - negation.latents.numpy()[None]) ** 2).sum(2), axis=1)
    gamma = -np.log(0.05) / squared[:, slice(*ranks)].mean(1)
    np.testing.assert_allclose(notes["bandwidth"].numpy(), np.sqrt(1 / (2 * gamma)), rtol=1e-9)
    kernels = np.exp(-gamma[:, None] * ((x.numpy()[:, None] - negation.latents.numpy()[None]) ** 2).sum(2))
    np.testing.assert_allclose(notes["kernel"].numpy(), kernels.mean(1), rtol=1e-9)


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelWeight(Weight):
    """Log-odds log Z: the kernel mean itself in the place of w/(1-w)."""

    def log_odds(self, unsafe: Posterior, denoised: Tensor, state: DenoiseState, owner: object) -> Tensor:
        return unsafe.log_evidence + D / 2 * math.log(2 * math.pi * self.bandwidth**2)


def test_the_safe_denoiser_with_beta_z_is_the_same_field() -> None:
    negation, x, sigma, strength = references(), points(), 1.1, 0.4
    one = SafetyGuidedFlow(negation=negation, strength=strength, bandwidth=sigma)(x, state(x))
    weight = KernelWeight(bandwidth=sigma)
    two = SafeDenoiser(negation=negation, weight=weight, strength=2 * strength / sigma**2)(x, state(x))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_it_matches_spell_in_size_where_the_condition_says() -> None:
    radius, near, sigma, alpha = 5.0, 3.0, 2.5, 1.6
    negation = references(1)
    x = negation.latents + near * torch.eye(D, dtype=torch.float64)[:1]
    strength = alpha * (radius - near) * sigma**2 * math.exp(near**2 / (2 * sigma**2)) / (2 * near)
    flow = SafetyGuidedFlow(negation=negation, strength=strength, bandwidth=sigma)(x, state(x))
    shield = Shield(negation=negation, radius=radius)
    spell = SPELL(shields=(shield,), strength=alpha)(x, state(x))
    torch.testing.assert_close(flow, spell, rtol=0, atol=1e-6)
    # At another distance they differ: matched in one point, not equal as functions.
    y = negation.latents + 4.0 * torch.eye(D, dtype=torch.float64)[:1]
    assert float(
        (SafetyGuidedFlow(negation=negation, strength=strength, bandwidth=sigma)(y, state(y)) - y).norm()
    ) != pytest.approx(alpha * 1.0, rel=0.05)


def test_the_push_is_bounded_as_derived() -> None:
    negation, x = references(200, scale=3.0), 3.0 * points(20)
    squared = np.sort(((x.numpy()[:, None] - negation.latents.numpy()[None]) ** 2).sum(2), axis=1)
    r, c = np.sqrt(squared[:, 3:6].mean(1)), math.log(20)
    bound = 0.03 * (2 * c / r) * (5 * 0.248 + (200 - 5) * 0.05)
    released = SafetyGuidedFlow.released(negation, "nudity").guard(x, state(x))
    size = (released - x).norm(dim=1).numpy()
    assert (size <= bound).all()
    published = SafetyGuidedFlow.published(negation, "nudity").guard(x, state(x))
    np.testing.assert_allclose((published - x).norm(dim=1).numpy(), size * 2 / 200, rtol=1e-9)
    # And they point in opposite directions: the release attracts.
    cosine = torch.cosine_similarity(published - x, released - x)
    torch.testing.assert_close(cosine, -torch.ones_like(cosine))


def test_far_references_give_exactly_nothing_and_no_nan() -> None:
    negation, x = references(), points() + 1e5
    out = SafetyGuidedFlow(negation=negation, strength=1.0, bandwidth=1.0)(x, state(x))
    assert torch.equal(out, x)
    huge = points() * 1e30
    assert torch.equal(SafetyGuidedFlow(negation=negation, strength=1.0, bandwidth=1.0)(huge, state(huge)), huge)


def test_a_sample_on_all_its_references_stays_finite() -> None:
    negation = NegationSet(latents=torch.zeros(4, D), space=Space(encoder="sha256:test", shape=(D,)))
    x = torch.zeros(1, D)
    assert SafetyGuidedFlow(negation=negation, strength=1.0)(x, state(x)).isfinite().all()


def test_strength_zero_is_the_identity_and_samples_do_not_know_of_each_other() -> None:
    negation, x = references(), points(4)
    assert SafetyGuidedFlow(negation=negation, strength=0.0)(x, state(x)) is None
    guard = SafetyGuidedFlow(negation=negation, strength=1.0)
    together, other = guard(x, state(x)), x.clone()
    other[1] = 7.0
    assert torch.equal(guard(other, state(other))[[0, 2, 3]], together[[0, 2, 3]])
    torch.testing.assert_close(torch.cat([guard(row[None], state(row[None])) for row in x]), together)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_callers_dtype_comes_back(dtype: torch.dtype) -> None:
    x = points().to(dtype)
    before, out = x.clone(), SafetyGuidedFlow(negation=references(), strength=1.0)(x, state(x))
    assert (out.dtype, out.shape) == (dtype, x.shape)
    assert torch.equal(x, before)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_windows_with_a_scale(preset: str) -> None:
    start, stop, scale = PRESETS[preset]
    guard = SafetyGuidedFlow.published(references(), preset)
    assert (guard.start, guard.stop, guard.guard.strength) == (start, stop, scale)
    assert guard.guard.ranks == (3, 6)
    assert not guard.guard.toward
    assert len(requirements(guard).negation) == 1


def test_equal_budgets_are_equal() -> None:
    budgets = [scale * (stop - start) for name, (start, stop, scale) in PRESETS.items() if name.startswith("budget")]
    np.testing.assert_allclose(budgets, 0.006, rtol=0.06)


def test_in_a_pipeline_strength_zero_is_bit_identical_and_more_repels() -> None:
    pipe = tiny_pipeline("sd")
    plain = pipe(**tiny_call("sd") | {"output_type": "latent"}).images
    rng = torch.Generator().manual_seed(3)
    near = plain + 0.1 * torch.randn(6, *plain.shape[1:], generator=rng)
    negation = NegationSet(latents=near, space=encoder_of(pipe).space)
    with attach(pipe, SafetyGuidedFlow(negation=negation, strength=0.0)) as trace:
        same = pipe(**tiny_call("sd") | {"output_type": "latent"}).images
    assert torch.equal(plain, same)
    assert trace.records()[-1]["kernel"] > 0
    far = {}
    for toward in (False, True):
        with attach(pipe, SafetyGuidedFlow(negation=negation, strength=3.0, toward=toward)):
            moved = pipe(**tiny_call("sd") | {"output_type": "latent"}).images
        far[toward] = float((moved - near).flatten(1).norm(dim=1).mean())
    assert far[False] > float((plain - near).flatten(1).norm(dim=1).mean()) > far[True]


@pytest.mark.parametrize(
    "bad",
    [{"strength": -1.0}, {"bandwidth": 0.0}, {"ranks": (3, 3)}, {"ranks": (10, 13)}, {"strength": math.nan}],
)
def test_values_outside_their_range_are_refused(bad: dict) -> None:
    with pytest.raises(InvalidInput, match="SafetyGuidedFlow: expected"):
        SafetyGuidedFlow(**{"negation": references(), "strength": 1.0} | bad)
    with pytest.raises(InvalidInput, match="expected a preset"):
        SafetyGuidedFlow.published(references(), "everything")
    with pytest.raises(NegationMismatch):
        SafetyGuidedFlow(negation=references(), strength=1.0)(torch.zeros(1, D + 1), state(torch.zeros(1, D + 1)))

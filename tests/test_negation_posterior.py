"""The posterior of a negation set against the equations typed in NumPy float64, and the symmetries that it must have.

The reference takes each distance by a plain loop over items and sums in float64; nothing of it is shared with the code.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerclear.errors import InvalidInput, NegationMismatch
from steerclear.negation import NegationSet, Space
from steerclear.negation.posterior import posterior, squared_distances
from steerclear.noise import NoiseLevel

LEVELS = {
    "vp": (math.sqrt(0.7), math.sqrt(0.3)),
    "vp-late": (math.sqrt(0.999), math.sqrt(0.001)),
    "ve": (1.0, 14.6),
    "ve-small": (1.0, 0.03),
    "flow": (0.35, 0.65),
    "zero-snr": (0.0, 1.0),
}


def brute_force(x, y, w, alpha, sigma):
    """Equations of A.2 and the Gaussian density, sample by sample; alpha and sigma may differ per sample."""
    x, y, w = (np.asarray(v, dtype=np.float64) for v in (x, y, w))
    alphas, sigmas = (np.broadcast_to(np.asarray(v, dtype=np.float64), len(x)) for v in (alpha, sigma))
    means, evidence = [], []
    for row, a, s in zip(x, alphas, sigmas, strict=True):
        logits = np.array(
            [
                math.log(wn / w.sum()) - float(np.sum((row - a * yn) ** 2)) / (2 * s * s)
                for yn, wn in zip(y, w, strict=True)
            ]
        )
        top = logits.max()
        total = np.exp(logits - top).sum()
        means.append(np.tensordot(np.exp(logits - top) / total, y, axes=1))
        evidence.append(top + math.log(total) - row.size / 2 * math.log(2 * math.pi * s * s))
    return np.stack(means), np.array(evidence)


def make(y, w=None):
    y = torch.as_tensor(y)
    weights = {} if w is None else {"weights": torch.as_tensor(w)}
    return NegationSet(latents=y, space=Space(encoder="pixels", shape=tuple(y.shape[1:])), **weights)


def problem(rng, n=6, shape=(2, 3), batch=4, dtype=torch.float64, level=(0.8, 0.6)):
    """Points, weights, and samples near some of the points, so that several weights matter."""
    y = torch.randn(n, *shape, generator=rng, dtype=dtype)
    w = torch.rand(n, generator=rng, dtype=dtype) + 0.1
    picks = torch.randint(n, (batch,), generator=rng)
    x = level[0] * y[picks] + level[1] * torch.randn(batch, *shape, generator=rng, dtype=dtype)
    return x, y, w


@pytest.mark.parametrize("kind", LEVELS)
def test_float64_equals_the_equations(kind, rng):
    level = LEVELS[kind]
    x, y, w = problem(rng, level=level)
    mean, evidence = make(y, w).posterior(x, NoiseLevel(*level))
    expected_mean, expected_evidence = brute_force(x, y, w, *level)
    # Summation order only: about 100 roundings of 1e-16, times logits of at most 1e4.
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(evidence, expected_evidence, rtol=1e-12)
    assert mean.dtype == torch.float64


@pytest.mark.parametrize("kind", LEVELS)
def test_float32_is_within_1e_5_at_the_size_of_a_real_latent(kind, rng):
    level = LEVELS[kind]
    near = 2 * level[1] / math.sqrt(4 * 64 * 64)  # close enough for several points to share the posterior
    centre = torch.randn(1, 4, 64, 64, generator=rng)
    y = centre + near * torch.randn(5, 4, 64, 64, generator=rng)
    w = torch.rand(5, generator=rng) + 0.1
    x = level[0] * centre + level[1] * torch.randn(3, 4, 64, 64, generator=rng)
    mean, evidence = make(y, w).posterior(x, NoiseLevel(*level))
    expected_mean, expected_evidence = brute_force(x, y, w, *level)
    scale = np.abs(expected_mean).max()
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(evidence, expected_evidence, rtol=1e-5)
    # Differences between sets are what a guard uses, so the absolute error counts too, in nats.
    assert np.abs(evidence.numpy() - expected_evidence).max() < 1e-2
    assert (mean.dtype, evidence.dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1)], ids=["per sample", "broadcastable"])
def test_levels_may_differ_per_sample(shape, rng):
    x, y, w = problem(rng, batch=3)
    alpha, sigma = torch.tensor([1.0, 0.8, 0.3]), torch.tensor([0.5, 0.6, 0.95])
    mean, evidence = make(y, w).posterior(x, NoiseLevel(alpha.reshape(shape), sigma.reshape(shape)))
    expected_mean, expected_evidence = brute_force(x, y, w, alpha, sigma)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(evidence, expected_evidence, rtol=1e-10)


def test_a_zero_dimensional_level_is_the_number(rng):
    x, y, w = problem(rng)
    number = make(y, w).posterior(x, NoiseLevel(0.5, 0.75))
    tensor = make(y, w).posterior(x, NoiseLevel(torch.tensor(0.5), torch.tensor(0.75)))
    assert torch.equal(number.mean, tensor.mean)
    assert torch.equal(number.log_evidence, tensor.log_evidence)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_are_computed_in_float32(dtype, rng):
    x, y, w = problem(rng, dtype=torch.float32)
    half = x.to(dtype)
    mean, evidence = make(y, w).posterior(half, NoiseLevel(0.8, 0.6))
    expected_mean, expected_evidence = brute_force(half.float(), y, w, 0.8, 0.6)
    assert mean.dtype == torch.float32
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(evidence, expected_evidence, rtol=1e-5)


seeds = st.integers(0, 2**31)
levels = st.one_of(
    st.floats(0.02, 0.99).map(lambda a: (a, math.sqrt(1 - a * a))),
    st.floats(0.05, 80.0).map(lambda s: (1.0, s)),
    st.floats(0.05, 0.95).map(lambda s: (1 - s, s)),
)


@given(seed=seeds, level=levels, which=st.integers(0, 5))
def test_duplicating_an_item_is_doubling_its_weight(seed, level, which):
    x, y, w = problem(torch.Generator().manual_seed(seed), level=level)
    doubled = w.clone()
    doubled[which] *= 2
    twice = make(torch.cat([y, y[which : which + 1]]), torch.cat([w, w[which : which + 1]]))
    a, b = twice.posterior(x, NoiseLevel(*level)), make(y, doubled).posterior(x, NoiseLevel(*level))
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a.log_evidence, b.log_evidence, rtol=1e-9, atol=1e-9)


@given(seed=seeds, level=levels, scale=st.floats(1e-6, 1e6))
def test_order_of_items_and_scale_of_weights_do_not_matter(seed, level, scale):
    rng = torch.Generator().manual_seed(seed)
    x, y, w = problem(rng, level=level)
    order = torch.randperm(6, generator=rng)
    a, b = (
        make(y, w).posterior(x, NoiseLevel(*level)),
        make(y[order], scale * w[order]).posterior(x, NoiseLevel(*level)),
    )
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a.log_evidence, b.log_evidence, rtol=1e-9, atol=1e-9)


@given(seed=seeds, level=levels)
def test_a_batch_is_its_samples(seed, level):
    x, y, w = problem(torch.Generator().manual_seed(seed), level=level)
    items, noise = make(y, w), NoiseLevel(*level)
    whole, parts = items.posterior(x, noise), [items.posterior(row[None], noise) for row in x]
    torch.testing.assert_close(whole.mean, torch.cat([p.mean for p in parts]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.log_evidence, torch.cat([p.log_evidence for p in parts]), rtol=1e-12, atol=1e-12)


@given(seed=seeds, level=levels, block=st.integers(1, 80))
def test_the_block_size_changes_nothing_but_memory(seed, level, block):
    x, y, w = problem(torch.Generator().manual_seed(seed), level=level)
    small, large = (posterior(x, y, w, NoiseLevel(*level), block=b) for b in (block, 1 << 20))
    torch.testing.assert_close(small.mean, large.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(small.log_evidence, large.log_evidence, rtol=1e-10, atol=1e-10)


@given(seed=seeds, level=levels)
def test_translation_moves_the_mean_and_keeps_the_evidence(seed, level):
    rng = torch.Generator().manual_seed(seed)
    x, y, w = problem(rng, level=level)
    shift = torch.randn(2, 3, generator=rng, dtype=torch.float64)
    a = make(y, w).posterior(x, NoiseLevel(*level))
    b = make(y + shift, w).posterior(x + level[0] * shift, NoiseLevel(*level))
    torch.testing.assert_close(a.mean + shift, b.mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(a.log_evidence, b.log_evidence, rtol=1e-7, atol=1e-7)


@given(seed=seeds, level=levels)
def test_the_mean_lies_in_the_convex_hull(seed, level):
    rng = torch.Generator().manual_seed(seed)
    x, y, w = problem(rng, level=level)
    mean = make(y, w).posterior(x, NoiseLevel(*level)).mean
    directions = torch.randn(20, 6, generator=rng, dtype=torch.float64)
    reach, got = directions @ y.flatten(1).T, directions @ mean.flatten(1).T
    assert bool((got <= reach.amax(1, keepdim=True) + 1e-9).all())
    assert bool((got >= reach.amin(1, keepdim=True) - 1e-9).all())


@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e-12, 1e-6, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_noise_the_mean_is_the_nearest_item(sigma, dtype, rng):
    y = torch.randn(5, 4, 8, 8, generator=rng, dtype=dtype)
    mean, evidence = make(y).posterior(y[[3, 1]], NoiseLevel(1.0, sigma))
    assert torch.equal(mean, y[[3, 1]])
    assert bool(evidence.isfinite().all())


@pytest.mark.parametrize("level", [(1.0, 1e6), (1.0, 1e18), (1.0, 1e30), (1e-20, 1.0), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_pure_noise_the_mean_is_the_weighted_average(level, dtype, rng):
    y = torch.randn(5, 4, 8, 8, generator=rng, dtype=dtype)
    w = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=dtype)
    x = level[1] * torch.randn(2, 4, 8, 8, generator=rng, dtype=dtype)
    mean, evidence = make(y, w).posterior(x, NoiseLevel(*level))
    average = np.tensordot(w.double().numpy() / 15, y.double().numpy(), axes=1)
    np.testing.assert_allclose(mean, np.broadcast_to(average, mean.shape), rtol=1e-3, atol=1e-3)
    assert bool(evidence.isfinite().all())


def test_a_sample_that_is_not_finite_spoils_only_itself(rng):
    x, y, w = problem(rng)
    clean = make(y, w).posterior(x, NoiseLevel(0.8, 0.6))
    x[1, 0, 0] = math.nan
    spoiled = make(y, w).posterior(x, NoiseLevel(0.8, 0.6))
    assert bool(spoiled.mean[1].isnan().all())
    assert torch.equal(spoiled.mean[[0, 2, 3]], clean.mean[[0, 2, 3]])
    assert torch.equal(spoiled.log_evidence[[0, 2, 3]], clean.log_evidence[[0, 2, 3]])


def test_gradients_are_those_of_the_log_density(rng):
    """Tweedie: the score of the mixture is (alpha·mean - x_t)/sigma², an identity the code does not use."""
    x, y, w = problem(rng)
    x.requires_grad_()
    mean, evidence = make(y, w).posterior(x, NoiseLevel(0.8, 0.6))
    (score,) = torch.autograd.grad(evidence.sum(), x)
    torch.testing.assert_close(score, (0.8 * mean.detach() - x.detach()) / 0.36, rtol=1e-9, atol=1e-9)


def test_nothing_is_changed_in_place(rng):
    x, y, w = problem(rng)
    before = [v.clone() for v in (x, y, w)]
    make(y, w).posterior(x, NoiseLevel(0.8, 0.6))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, w), strict=True))


def test_distances_do_not_cancel_far_from_the_origin():
    """At 1e3 from the origin and 1e-2 apart, the expanded square would lose every digit in float32."""
    y = torch.full((2, 4096), 1000.0) + torch.tensor([[0.0], [1 / 128]])
    got = squared_distances(y[:1], y, torch.ones(1, 1), block=1000)
    assert got.tolist() == [[0.0, 4096 / 128**2]]


def test_a_level_per_pixel_is_refused(rng):
    x, y, w = problem(rng)
    with pytest.raises(InvalidInput, match=r"one per sample \(4\), got 24 values"):
        make(y, w).posterior(x, NoiseLevel(torch.ones_like(x), 0.6))


def test_samples_of_another_shape_are_refused(rng):
    _, y, w = problem(rng)
    with pytest.raises(NegationMismatch, match=r"shape \(batch, 2, 3\), got \(1, 2, 4\)"):
        make(y, w).posterior(torch.zeros(1, 2, 4), NoiseLevel(0.8, 0.6))

"""Statistics in place of items: closed forms in float64, limits, what is kept and what is not, files."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from steerclear import NoiseLevel
from steerclear.errors import InvalidInput, NegationFileError, NegationMismatch, UnsoundCombination
from steerclear.guards import ConditionalRelease, SafeDenoiser, Subspace, TwoSample
from steerclear.negation import NegationSet, References, Space
from steerclear.negation.statistics import NegationStatistics

SPACE = Space(encoder="sha256:" + "ab" * 32, shape=(2, 3), name="a tiny encoder")


def items(n=12, labels=("dagger", "axe"), seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    latents = scale * torch.randn(n * len(labels), 2, 3, generator=generator)
    latents += torch.arange(len(labels)).repeat_interleave(n)[:, None, None]
    weights = torch.rand(len(latents), generator=generator) / 4 + 1
    return NegationSet(
        latents=latents, space=SPACE, weights=weights, labels=tuple(label for label in labels for _ in range(n))
    )


def truth(made, x, alpha, sigma):
    """Mean and evidence of the mixture from its dense covariances, in NumPy float64, by the textbook's formula."""
    dim = math.prod(made.space.shape)
    shares = made.shares.double().numpy() / made.shares.double().sum().item()
    logs, means = [], []
    for k in range(len(made)):
        basis = made.basis[k].double().numpy().reshape(-1, dim)
        mean = made.means[k].double().numpy().reshape(dim)
        prior = basis.T @ np.diag(made.variances[k].double().numpy()) @ basis + made.remainders[k].item() * np.eye(dim)
        noisy = alpha**2 * prior + sigma**2 * np.eye(dim)
        apart = x.reshape(-1, dim) - alpha * mean
        solved = np.linalg.solve(noisy, apart.T).T
        volume = np.linalg.slogdet(noisy)[1] + dim * math.log(2 * math.pi)
        logs.append(math.log(shares[k]) - ((apart * solved).sum(1) + volume) / 2)
        means.append(mean + alpha * solved @ prior)
    logs = np.stack(logs)
    top = logs.max(0)
    evidence = top + np.log(np.exp(logs - top).sum(0))
    return np.einsum("lb,lbd->bd", np.exp(logs - evidence), np.stack(means)), evidence


# -- closed forms ---------------------------------------------------------------------------------------------------


@given(
    rank=st.integers(0, 6),
    alpha=st.floats(0.0, 2.0),
    sigma=st.floats(1e-3, 100.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_posterior_equals_the_textbooks_formula(rank, alpha, sigma, seed):
    made = NegationStatistics.of(items(seed=seed), rank=rank)
    x = 2 * torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, evidence = truth(made, x.numpy(), alpha, sigma)
    got = made.posterior(x, NoiseLevel(alpha, sigma))
    # Stored directions are orthonormal to 1e-7, and evidence divides squares by the smallest variance.
    np.testing.assert_allclose(got.mean.flatten(1).numpy(), mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.log_evidence.numpy(), evidence, rtol=1e-5, atol=1e-5)


def test_evidence_is_the_density_of_torchs_mixture():
    made = NegationStatistics.of(items(), rank=2)
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    basis = made.basis.flatten(2).double()
    covariance = basis.mT @ made.variances.double().diag_embed() @ basis
    covariance = 0.64 * (covariance + made.remainders.double()[:, None, None] * torch.eye(6)) + 0.25 * torch.eye(6)
    parts = MultivariateNormal(0.8 * made.means.flatten(1).double(), covariance)
    mixture = MixtureSameFamily(Categorical(made.shares.double()), parts)
    got = made.posterior(x, NoiseLevel(0.8, 0.5)).log_evidence
    torch.testing.assert_close(got, mixture.log_prob(x.flatten(1)), rtol=1e-6, atol=1e-6)


def test_posterior_is_the_integral_over_clean_samples():
    """One dimension, by quadrature on a fine grid."""
    space = Space(encoder="x", shape=(1,))
    made = NegationStatistics(
        means=torch.tensor([[-1.0], [2.0]]),
        basis=torch.ones(2, 1, 1),
        variances=torch.tensor([[0.3], [1.0]]),
        remainders=torch.tensor([0.2, 0.0]),
        shares=torch.tensor([1.0, 3.0]),
        counts=torch.tensor([10, 30]),
        labels=("a", "b"),
        space=space,
    )
    grid = np.linspace(-15, 15, 200_001)
    normal = lambda x, mean, variance: np.exp(-((x - mean) ** 2) / 2 / variance) / np.sqrt(2 * np.pi * variance)  # noqa: E731
    prior = 0.25 * normal(grid, -1.0, 0.5) + 0.75 * normal(grid, 2.0, 1.0)
    x_t = np.array([-2.0, 0.3, 4.0])
    joint = prior * normal(x_t[:, None], 0.7 * grid, 0.36)
    got = made.posterior(torch.tensor(x_t)[:, None], NoiseLevel(0.7, 0.6))
    np.testing.assert_allclose(got.log_evidence, np.log(np.trapezoid(joint, grid)), rtol=1e-6)
    np.testing.assert_allclose(got.mean[:, 0], np.trapezoid(joint * grid, grid) / np.trapezoid(joint, grid), rtol=1e-6)


def test_statistics_are_the_maximum_likelihood_fit():
    """Mean, the weighted covariance's largest eigenvalues, and the mean of the rest: NumPy on the raw items."""
    raw = items(labels=("dagger",), n=40)
    made = NegationStatistics.of(raw, rank=2)
    rows, weights = raw.latents.flatten(1).double().numpy(), raw.weights.double().numpy()
    np.testing.assert_allclose(made.means.flatten(), np.average(rows, axis=0, weights=weights), atol=1e-6)
    covariance = np.cov(rows.T, aweights=weights, ddof=0)
    values, vectors = np.linalg.eigh(covariance)
    remainder = values[:-2].mean()
    assert made.remainders.item() == pytest.approx(remainder, rel=1e-5)
    np.testing.assert_allclose(made.variances[0], values[:-3:-1] - remainder, rtol=1e-5)
    assert np.abs(made.basis[0].flatten(1).numpy() @ vectors[:, :-3:-1]).diagonal() == pytest.approx(1, abs=1e-5)
    dense = truth(made, np.zeros((1, 6)), 1.0, 0.0)
    assert dense[1] == pytest.approx(made.posterior(torch.zeros(1, 2, 3).double(), NoiseLevel(1.0, 0.0)).log_evidence)


# -- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 1.0, 80.0])
def test_without_spread_it_is_the_posterior_of_the_points(sigma):
    points = items(n=1, labels=("a", "b", "c"))
    made = NegationStatistics(
        means=points.latents,
        basis=torch.zeros(3, 0, 2, 3),
        variances=torch.zeros(3, 0),
        remainders=torch.zeros(3),
        shares=points.weights,
        counts=torch.ones(3, dtype=torch.long),
        labels=points.labels,
        space=SPACE,
    )
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got, expected = (each.posterior(x, NoiseLevel(0.9, sigma)) for each in (made, points))
    torch.testing.assert_close(got.mean, expected.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.log_evidence, expected.log_evidence.double(), rtol=1e-6, atol=1e-6)


def test_in_pure_noise_it_says_the_weighted_mean_of_the_items():
    raw = items()
    made = NegationStatistics.of(raw, rank=3)
    got = made.posterior(torch.zeros(1, 2, 3), NoiseLevel(1.0, 1e6)).mean
    torch.testing.assert_close(got[0], (raw.weights[:, None, None] * raw.latents).sum(0) / raw.weights.sum())


def test_at_no_noise_it_is_the_sample_itself():
    made = NegationStatistics.of(items(), rank=3)
    x = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(made.posterior(x, NoiseLevel(1.0, 0.0)).mean, x)


def test_far_away_and_without_noise_nothing_overflows():
    made = NegationStatistics.of(items(), rank=2)
    for level in (NoiseLevel(1.0, 0.0), NoiseLevel(0.0, 1e-8), NoiseLevel(0.0, 1e8)):
        got = made.posterior(torch.full((1, 2, 3), 1e6), level)
        assert bool(got.mean.isfinite().all())
        assert bool(got.log_evidence.isfinite().all())


# -- per sample -----------------------------------------------------------------------------------------------------


def test_samples_do_not_see_each_other_and_may_have_levels_of_their_own():
    made = NegationStatistics.of(items(), rank=2)
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(4))
    level = NoiseLevel(torch.tensor([0.5, 1.0, 0.2, 0.0]), torch.tensor([0.1, 1.0, 3.0, 0.5]))
    together = made.posterior(x, level)
    for k in range(4):
        alone = made.posterior(x[k : k + 1], NoiseLevel(level.alpha[k].item(), level.sigma[k].item()))
        torch.testing.assert_close(together.mean[k], alone.mean[0])
        torch.testing.assert_close(together.log_evidence[k], alone.log_evidence[0])
    other = x.clone()
    other[1] = torch.nan
    again = made.posterior(other, level)
    keep = [0, 2, 3]
    assert torch.equal(again.mean[keep], together.mean[keep])
    assert torch.equal(again.log_evidence[keep], together.log_evidence[keep])
    assert bool(again.mean[1].isnan().all())
    assert bool(again.log_evidence[1].isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_in_single_out(dtype):
    made = NegationStatistics.of(items(), rank=2)
    got = made.posterior(torch.zeros(2, 2, 3, dtype=dtype), NoiseLevel(1.0, 0.5))
    assert got.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.log_evidence.dtype == torch.float64


def test_the_protocol_and_the_guards_that_take_it():
    unsafe, safe = NegationStatistics.of(items(), rank=2), items(seed=1, labels=("cup",))
    assert isinstance(unsafe, References)
    assert unsafe.at(None) is unsafe
    assert (len(unsafe), unsafe.digests, unsafe.labels, unsafe.shape) == (2, (), ("dagger", "axe"), (2, 3))
    weight = TwoSample(safe=safe, bandwidth=1.0)
    for guard in (SafeDenoiser(negation=unsafe, weight=weight), ConditionalRelease(negation=unsafe, weight=weight)):
        assert unsafe in guard.requires.negation


def test_seen_through_components_it_is_the_marginal():
    """The projection of a Gaussian has the projected mean and covariance: torch's own density of them."""
    made = NegationStatistics.of(items(), rank=2)
    basis = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0]
    centre = torch.arange(6.0)
    seen = made.projected(centre, basis, Space(encoder="x", shape=(3,)))
    rows = made.basis.flatten(2).double()
    covariance = rows.mT @ made.variances.double().diag_embed() @ rows
    covariance = covariance + made.remainders.double()[:, None, None] * torch.eye(6)
    means = (made.means.flatten(1).double() - centre) @ basis
    parts = MultivariateNormal(means, basis.T @ covariance @ basis + 0.25 * torch.eye(3))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    got = seen.posterior(x, NoiseLevel(1.0, 0.5)).log_evidence
    expected = MixtureSameFamily(Categorical(made.shares.double()), parts).log_prob(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_subspace_of_statistics_is_that_of_the_safe_set_alone():
    unsafe, safe = NegationStatistics.of(items(), rank=2), items(seed=1, labels=("cup",))
    subspace = Subspace.principal(unsafe, safe, 3)
    points = safe.latents.flatten(1).double().numpy()
    _, _, rows = np.linalg.svd(points - points.mean(0), full_matrices=False)
    basis = subspace.basis.double().numpy()
    np.testing.assert_allclose(basis @ basis.T, rows[:3].T @ rows[:3], atol=1e-5)
    weight = TwoSample(safe=safe, subspace=subspace, bandwidth=1.0)
    SafeDenoiser(negation=unsafe, weight=weight)
    with pytest.raises(UnsoundCombination, match="another negation set"):
        SafeDenoiser(negation=NegationStatistics.of(items(), rank=2, merge="weapon"), weight=weight)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_few_pictures_are_refused_however_they_are_counted():
    with pytest.raises(InvalidInput, match=r"at least 10 different pictures per label, got 'dagger' 9\.0.*merge="):
        NegationStatistics.of(replace(items(n=9), weights=torch.ones(18)))
    same = replace(items(), digests=("sha256:one",) * 24)
    with pytest.raises(InvalidInput, match=r"'dagger' 1\.0"):
        NegationStatistics.of(same)
    heavy = replace(items(), weights=torch.tensor([1e6] + [1.0] * 23))
    with pytest.raises(InvalidInput, match=r"'dagger' 1\.0"):
        NegationStatistics.of(heavy)


def test_labels_are_merged_by_name_or_all():
    few = items(n=6, labels=("dagger", "axe", "cup"))
    made = NegationStatistics.of(few, merge={"dagger": "weapon", "axe": "weapon", "cup": "weapon"})
    assert made.labels == NegationStatistics.of(few, merge="weapon").labels == ("weapon",)
    assert made.counts.tolist() == [18]


def test_a_label_gets_at_most_a_direction_for_two_pictures():
    made = NegationStatistics.of(replace(items(n=10, labels=("a",)), weights=torch.ones(10)), rank=6)
    assert made.basis[0].flatten(1).norm(dim=1).tolist() == pytest.approx([1] * 5 + [0])


def test_by_default_a_label_gets_a_direction_for_25_different_pictures_and_at_most_eight():
    """Fewer pictures per direction tell members from strangers: that takes a number given on purpose."""
    space = Space(encoder="x", shape=(12,))
    sizes = {"few": 10, "24": 24, "25": 25, "60": 60, "many": 230}
    latents = torch.randn(sum(sizes.values()), 12, generator=torch.Generator().manual_seed(0))
    labels = tuple(name for name, size in sizes.items() for _ in range(size))
    made = NegationStatistics.of(NegationSet(latents=latents, space=space, labels=labels))
    assert dict(zip(made.labels, made.directions, strict=True)) == {"few": 0, "24": 0, "25": 1, "60": 2, "many": 8}
    assert made.rank == 8
    assert NegationStatistics.of(NegationSet(latents=latents[:34], space=space, labels=labels[:34])).rank == 0
    heavy = torch.ones(60)
    heavy[:20] = 20.0  # as if there were little more than these
    some = NegationSet(latents=latents[:60], space=space, weights=heavy, labels=("a",) * 60)
    assert NegationStatistics.of(some).directions == (0,)
    repeated = replace(some, weights=torch.ones(60), digests=tuple(f"sha256:{k // 3}" for k in range(60)))
    assert NegationStatistics.of(repeated).directions == (0,)
    assert NegationStatistics.of(some, rank=3).directions == (3,)


def test_a_small_label_shows_by_default_no_more_of_its_members_than_a_mean_does():
    """P(a member is denser than a stranger). A mean of n is 2D/n nearer to its own, squared, beside a spread of 2√D."""
    space, generator = Space(encoder="x", shape=(64,)), torch.Generator().manual_seed(0)

    def told(**settings):
        inside, outside = torch.randn(2, 40, 20, 64, generator=generator)
        right = 0.0
        for members, strangers in zip(inside, outside, strict=True):
            made = NegationStatistics.of(NegationSet(latents=members, space=space), **settings)
            own, other = (made.posterior(x, NoiseLevel(1.0, 0.5)).log_evidence for x in (members, strangers))
            right += float((own[:, None] > other).double().mean()) / len(inside)
        return right

    assert told() == pytest.approx((1 + math.erf(math.sqrt(64) / 20 / math.sqrt(2))) / 2, abs=0.03)
    assert told(rank=8) > 0.95


@pytest.mark.parametrize("settings", [{"rank": -1}, {"least": 1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidInput, match="rank >= 0 and least >= 2"):
        NegationStatistics.of(items(), **settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"means": torch.zeros(2, 3, 2)},
        {"labels": ("a",)},
        {"labels": ("a", "a")},
        {"variances": -torch.ones(2, 2)},
        {"remainders": torch.tensor([0.0, math.nan])},
        {"shares": torch.tensor([0.0, 1.0])},
        {"counts": torch.tensor([0.5, 1.0])},
        {"basis": torch.ones(2, 2, 2, 3)},
        {"basis": torch.zeros(2, 2, 2, 3)},
    ],
)
def test_impossible_values_are_refused(changes):
    made = NegationStatistics.of(items(), rank=2)
    with pytest.raises(InvalidInput, match="NegationStatistics: expected"):
        replace(made, **changes)


def test_samples_of_another_shape_are_refused():
    with pytest.raises(NegationMismatch, match=r"\(batch, 2, 3\), got \(1, 3, 2\)"):
        NegationStatistics.of(items()).posterior(torch.zeros(1, 3, 2), NoiseLevel(1.0, 1.0))
    with pytest.raises(InvalidInput, match="per pixel"):
        NegationStatistics.of(items()).posterior(torch.zeros(1, 2, 3), NoiseLevel(1.0, torch.ones(2, 3)))


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_file_keeps_statistics_and_no_item(tmp_path):
    raw = items()
    made, path = NegationStatistics.of(raw, rank=2), tmp_path / "a.safetensors"
    made.save(path)
    back = NegationStatistics.load(path)
    for name in ("means", "basis", "variances", "remainders", "shares", "counts"):
        assert torch.equal(getattr(back, name), getattr(made, name))
    assert (back.labels, back.space) == (made.labels, made.space)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert sorted(metadata) == ["format", "labels", "sha256", "space", "version"]
    assert json.loads(metadata["labels"]) == ["dagger", "axe"]
    content = path.read_bytes()
    made.save(path)
    assert path.read_bytes() == content
    for kept in (*raw.digests, *raw.ids):
        assert kept.removeprefix("sha256:").encode() not in content
    with pytest.raises(NegationFileError, match=r"a negation set, got statistics, .* NegationStatistics\.load"):
        NegationSet.load(path)


def test_a_negation_set_is_no_statistics(tmp_path):
    items().save(tmp_path / "a.safetensors")
    with pytest.raises(NegationFileError, match=r"expected statistics, .* got a negation set; .* NegationSet\.load"):
        NegationStatistics.load(tmp_path / "a.safetensors")


def test_every_bit_flip_is_refused_or_harmless(tmp_path):
    made, path = NegationStatistics.of(items(), rank=2), tmp_path / "a.safetensors"
    made.save(path)
    content = path.read_bytes()
    for position in range(0, len(content), 2):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            back = NegationStatistics.load(path)
        except NegationFileError:
            continue
        assert torch.equal(back.means, made.means)
        assert back.labels == made.labels

"""The principal subspace against NumPy's singular value decomposition and against the full space."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards import SafeDenoiser, Subspace, TwoSample
from steerclear.negation import IndexedSet, LiveIndex, NegationSet, NegationStatistics, NegationStore, Space
from steerclear.noise import NoiseLevel


def items(n: int, dim: int, seed: int) -> NegationSet:
    space = Space(encoder="sha256:test", shape=(dim,), name="line")
    scale = torch.linspace(3.0, 0.2, dim)
    latents = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) * scale + seed
    return NegationSet(latents=latents, space=space, ids=tuple(f"{seed}-{i}" for i in range(n)))


@pytest.mark.parametrize(("n", "dim"), [(40, 6), (5, 30)])  # more items than dimensions, and fewer
def test_the_basis_is_that_of_the_singular_value_decomposition(n, dim):
    unsafe, safe = items(n, dim, 1), items(n, dim, 2)
    subspace = Subspace.principal(unsafe, safe, 3)
    points = torch.cat([unsafe.latents, safe.latents]).double().numpy()
    _, _, rows = np.linalg.svd(points - points.mean(0), full_matrices=False)
    expected = rows[:3].T @ rows[:3]
    basis = subspace.basis.double().numpy()
    np.testing.assert_allclose(basis @ basis.T, expected, atol=1e-5)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-5)


def test_all_components_give_the_ratio_of_the_full_space():
    unsafe, safe = items(20, 5, 1), items(30, 5, 2)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(3)) + 1.5
    level = NoiseLevel(1.0, 2.0)
    expected = unsafe.posterior(x, level).log_evidence - safe.posterior(x, level).log_evidence
    torch.testing.assert_close(Subspace.principal(unsafe, safe, 5).log_ratio(x, 2.0), expected, rtol=1e-4, atol=1e-4)


def test_the_ratio_is_the_kernel_sum_in_the_components():
    unsafe, safe = items(7, 6, 1), items(9, 6, 2)
    subspace = Subspace.principal(unsafe, safe, 2)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(3)).double()
    mean, basis = subspace.mean.double().numpy(), subspace.basis.double().numpy()
    own = (x.numpy() - mean) @ basis

    def log_mean_kernel(latents):
        points = (latents.double().numpy() - mean) @ basis
        squares = ((own[:, None] - points[None]) ** 2).sum(2)
        return np.log(np.exp(-squares / (2 * 1.3**2)).mean(1))

    expected = log_mean_kernel(unsafe.latents) - log_mean_kernel(safe.latents)
    np.testing.assert_allclose(subspace.log_ratio(x.float(), 1.3).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_weight_uses_it_sample_by_sample():
    unsafe, safe = items(7, 6, 1), items(9, 6, 2)
    subspace = Subspace.principal(unsafe, safe, 2)
    weight = TwoSample(safe=safe, bandwidth=1.3, subspace=subspace, slope=0.5, offset=0.25)
    guard = SafeDenoiser(negation=unsafe, weight=weight, strength=0.5)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    notes = {}

    def state(rows, note=lambda name, value: None):
        return DenoiseState(x_t=rows, level=NoiseLevel(0.6, 0.8), step=0, num_steps=9, note=note)

    whole = guard(x, state(x, lambda name, value: notes.update({name: value})))
    expected = (0.5 * subspace.log_ratio(x, 1.3) + 0.25).sigmoid()
    torch.testing.assert_close(notes["weight"], expected)
    torch.testing.assert_close(whole, torch.cat([guard(row, state(row)) for row in x.split(1)]))


def test_what_does_not_fit_is_refused():
    unsafe, safe = items(7, 6, 1), items(9, 6, 2)
    subspace = Subspace.principal(unsafe, safe, 2)
    with pytest.raises(InvalidInput, match="expected 1 <= components <= 6, got 7"):
        Subspace.principal(unsafe, safe, 7)
    with pytest.raises(InvalidInput, match="a bandwidth beside it"):
        TwoSample(safe=safe, subspace=subspace)
    weight = TwoSample(safe=safe, bandwidth=1.0, subspace=subspace)
    with pytest.raises(UnsoundCombination, match="made from another negation set"):
        SafeDenoiser(negation=items(7, 6, 4), weight=weight)
    with pytest.raises(InvalidInput, match="subspace of its own safe set"):
        replace(weight, safe=items(4, 6, 5))


def weighed(guard, x):
    """What a guard makes of a step, and the weights that it notes."""
    notes = {}
    state = DenoiseState(
        x_t=x, level=NoiseLevel(0.6, 0.8), step=0, num_steps=2, note=lambda name, value: notes.update({name: value})
    )
    return guard(x, state), notes["weight"]


def test_a_guard_may_hold_an_index_of_what_the_subspace_was_made_of():
    """The weight reads the subspace, the guard the posterior: nothing needs the items, or their ids."""
    pytest.importorskip("numba")
    unsafe, safe = items(40, 6, 1), items(30, 6, 2)
    subspace = Subspace.principal(unsafe, safe, 2)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    exact = SafeDenoiser(negation=unsafe, weight=TwoSample(safe=safe, bandwidth=1.3, subspace=subspace))
    held = IndexedSet.of(unsafe, clusters=4), IndexedSet.of(safe, clusters=4)
    indexed = SafeDenoiser(negation=held[0], weight=TwoSample(safe=held[1], bandwidth=1.3, subspace=subspace))
    (expected, weight), (moved, other) = weighed(exact, x), weighed(indexed, x)
    torch.testing.assert_close(other, weight)  # both of the subspace alone
    torch.testing.assert_close(moved, expected, rtol=0.02, atol=0.02)  # the index's mean: 1e-3 of the items' norm
    for another in (IndexedSet.of(items(40, 6, 4), clusters=4), IndexedSet.of(items(39, 6, 1), clusters=4)):
        with pytest.raises(UnsoundCombination, match="another negation set"):
            SafeDenoiser(negation=another, weight=TwoSample(safe=safe, bandwidth=1.3, subspace=subspace))


def test_an_index_that_follows_its_store_is_refused_once_the_store_has_changed(tmp_path):
    pytest.importorskip("numba")
    unsafe, safe = items(40, 6, 1), items(30, 6, 2)
    with NegationStore.from_set(tmp_path / "bad.negation", unsafe) as store:
        subspace = Subspace.principal(store.live(), safe, 2)
        weight = TwoSample(safe=safe, bandwidth=1.3, subspace=subspace)
        guard = SafeDenoiser(negation=LiveIndex(store.live(), clusters=4), weight=weight)
        x = torch.zeros(2, 6)
        weighed(guard, x)
        store.remove("1-3")
        with pytest.raises(UnsoundCombination, match="another negation set"):
            weighed(guard, x)


def test_labels_tell_statistics_apart():
    safe = items(30, 6, 2)
    one, other = (
        NegationStatistics.of(replace(items(20, 6, 1), labels=(label,) * 20), rank=2) for label in ("axe", "dagger")
    )
    weight = TwoSample(safe=safe, bandwidth=1.3, subspace=Subspace.principal(one, safe, 2))
    SafeDenoiser(negation=one, weight=weight)
    with pytest.raises(UnsoundCombination, match="another negation set"):
        SafeDenoiser(negation=other, weight=weight)


def test_components_need_items():
    pytest.importorskip("numba")
    unsafe, safe = items(40, 6, 1), items(30, 6, 2)
    for pair in ((IndexedSet.of(unsafe), safe), (unsafe, IndexedSet.of(safe)), (unsafe, NegationStatistics.of(safe))):
        with pytest.raises(InvalidInput, match="gives posteriors alone; make it from the set"):
            Subspace.principal(*pair, 2)

"""The index against the exact posterior in NumPy float64: within its own bounds, and those within the tolerance."""

import importlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, NegationMismatch
from steerclear.negation import IndexedSet, LiveIndex, NegationSet, NegationStore, Space
from steerclear.noise import NoiseLevel

pytest.importorskip("numba", reason="needs Numba: pip install 'steerclear[fast]'")
fused, look = (importlib.import_module(f"steerclear.negation.{name}") for name in ("fused", "index.look"))
DIM = 256
#: From nearly no noise to nearly nothing else; in between, where most of the work is.
SIGMAS = (0.05, 0.3, 1.0, 2.0, 4.0, 8.0, 20.0, 60.0)
#: float32 differences, which the exact pass has as well; in nats at a few hundred dimensions.
ROUNDING = 1e-4


def brute_force(x, y, w, alpha, sigma):
    x, y, w = (np.asarray(v, dtype=np.float64) for v in (x, y, w))
    squared = np.stack([((row - alpha * y) ** 2).sum(1) for row in x])
    logits = np.log(w / w.sum()) - squared / (2 * sigma**2)
    top = logits.max(1, keepdims=True)
    weights = np.exp(logits - top)
    evidence = top[:, 0] + np.log(weights.sum(1)) - x.shape[1] * np.log(2 * np.pi * sigma**2) / 2
    return weights @ y / weights.sum(1, keepdims=True), evidence


def copies(rng, works=300, each=20, scale=0.03, dtype=torch.bfloat16):
    """Works in a few dimensions, as pictures are, and copies of each that differ a little in all dimensions."""
    basis = torch.linalg.qr(torch.randn(DIM, 24, generator=rng))[0]
    centre = torch.randn(works, 24, generator=rng) * 3.0 @ basis.T + 0.3 * torch.randn(works, DIM, generator=rng)
    y = centre.repeat_interleave(each, 0)
    return (y + scale * torch.randn(y.shape, generator=rng)).to(dtype)


def make(y, w=None, **options):
    weights = {} if w is None else {"weights": w}
    names = tuple(map(str, range(len(y))))
    items = NegationSet(latents=y, space=Space(encoder="x", shape=(DIM,)), ids=names, digests=names, **weights)
    return IndexedSet.of(items, progress=False, **options)


def asked(rng, y, alpha, sigma, batch=8):
    picks = torch.randint(len(y), (batch,), generator=rng)
    return alpha * y[picks].float() + sigma * torch.randn(batch, y.shape[1], generator=rng)


def check(index, x, y, w, alpha, sigma):
    got = index.certified(x, NoiseLevel(alpha, sigma))
    mean, evidence = brute_force(x, y.float(), w, alpha, sigma)
    scale = math.sqrt(float((w * y.double().square().sum(1)).sum() / w.sum()))
    error = np.abs(got.posterior.log_evidence.numpy() - evidence)
    moved = np.linalg.norm(got.posterior.mean.numpy() - mean, axis=1) / scale
    assert (error <= got.evidence_error.numpy() + ROUNDING).all()
    assert (moved <= got.mean_error.numpy() + ROUNDING).all()
    assert bool((got.evidence_error <= index.tolerance).all())
    assert bool((got.mean_error <= index.tolerance).all())
    return got


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("tolerance", [1e-3, 0.03])
def test_copies_of_works_are_within_the_bounds(sigma, tolerance, rng):
    y = copies(rng)
    index = make(y, clusters=400, tolerance=tolerance)
    alpha = 1 / math.sqrt(1 + sigma**2)
    check(index, asked(rng, y, alpha, alpha * sigma), y, torch.ones(len(y)), alpha, alpha * sigma)


def test_at_little_noise_few_rows_are_read_and_the_bounds_are_a_proof(rng):
    y = copies(rng)
    got = check(make(y, clusters=400), asked(rng, y, 1.0, 0.1), y, torch.ones(len(y)), 1.0, 0.1)
    assert bool(got.proven.all())
    assert int(got.rows.max()) <= len(y) // 20


def test_at_much_noise_a_sample_does(rng):
    y = copies(rng, works=150, each=60, scale=0.05)
    alpha, sigma = 1 / math.sqrt(401), 20 / math.sqrt(401)
    got = check(make(y, clusters=190), asked(rng, y, alpha, sigma), y, torch.ones(len(y)), alpha, sigma)
    assert not bool(got.proven.any())
    assert int(got.rows.max()) <= len(y) // 6


def test_unlike_pictures_are_read_to_the_end(rng):
    """Without near-duplicates nothing can be left out at much noise, and then nothing is."""
    y = torch.randn(2000, DIM, generator=rng)
    got = check(make(y), asked(rng, y, 0.3, 0.95), y, torch.ones(len(y)), 0.3, 0.95)
    assert bool((got.rows == len(y)).all())
    assert bool((got.evidence_error == 0).all())


@pytest.mark.parametrize("sigma", SIGMAS)
def test_uneven_weights_and_clusters(sigma, rng):
    """One work a thousand times, others once; weights over four orders of magnitude."""
    singles = copies(rng, works=800, each=1)
    y = torch.cat([singles, singles[:1].float().repeat(1000, 1).add(0.02 * torch.randn(1000, DIM, generator=rng))
                   .to(singles.dtype)])  # fmt: skip
    w = 10.0 ** (4 * torch.rand(len(y), generator=rng) - 2)
    check(make(y, w, clusters=900), asked(rng, y, 1.0, sigma), y, w, 1.0, sigma)


def test_without_signal_the_mean_is_the_average(rng):
    y = copies(rng)
    got = check(make(y, clusters=400), torch.randn(2, DIM, generator=rng), y, torch.ones(len(y)), 0.0, 1.0)
    np.testing.assert_allclose(got.posterior.mean[0], y.double().mean(0), atol=1e-4)


def test_the_statement_of_probability_holds(rng):
    """Hundreds of samples in the range where it is one; five standard errors leave room for none."""
    y = copies(rng, works=150, each=60, scale=0.05)
    index, w, sampled = make(y, clusters=190), torch.ones(len(y)), 0
    for sigma in (6.0, 12.0, 30.0):
        alpha = 1 / math.sqrt(1 + sigma**2)
        got = check(index, asked(rng, y, alpha, alpha * sigma, batch=48), y, w, alpha, alpha * sigma)
        sampled += int((~got.proven).sum())
    assert sampled >= 128


@pytest.mark.parametrize("scale", [0.0, 0.02])
def test_clusters_of_many_rows_have_their_centroid_where_it_is(scale, rng):
    """Twenty thousand equal summands in float32 are wrong by 1e-4, and a centroid by that much breaks every bound."""
    works = 3.0 * torch.randn(2, DIM, generator=rng)
    y = works.repeat_interleave(20_000, 0)
    y += scale * torch.randn(y.shape, generator=rng)
    index = make(y, clusters=2)
    for sigma in (4.0, 8.0):
        check(index, asked(rng, y, 1.0, sigma, batch=4), y, torch.ones(len(y)), 1.0, sigma)
    expected = np.sort(y.double().numpy().reshape(2, -1, DIM).mean(1), 0)
    np.testing.assert_allclose(np.sort(index.partition.centroid.double().numpy(), 0), expected, rtol=3e-7, atol=1e-7)


def uneven(rng, heavy=2000.0):
    """Four works; of each, one copy that differs more than the others and weighs as much as all of them."""
    works = 3.0 * torch.randn(4, DIM, generator=rng)
    owner = torch.randint(4, (8000,), generator=rng)
    first = torch.stack([(owner == k).nonzero()[0, 0] for k in range(4)])
    y, w = works[owner] + 0.003 * torch.randn(8000, DIM, generator=rng), torch.ones(8000)
    y[first] += 0.03 * torch.randn(4, DIM, generator=rng)
    w[first] = heavy
    return y, w, first


@pytest.mark.parametrize(("each", "apart"), [(2, 0.63), (3, 0.7)])
def test_what_a_cluster_could_add_at_worst_is_not_missed_by_the_draw(each, apart, rng):
    """Dark pictures, noisy samples of bright ones, and one work in a hundred kept in several brightnesses: small
    clusters look like noise, whatever they are. Left to the lots these were missed, and what is missed leaves no trace
    in the error; and then just the samples that had missed them were taken for good (by up to four times)."""
    dim, works = 1024, 3000
    bright = torch.ones(dim) / math.sqrt(dim)
    basis = torch.linalg.qr(torch.randn(dim, 24, generator=rng))[0]
    centre = 1.5 * torch.randn(works, 24, generator=rng) @ basis.T + 0.03 * torch.randn(works, dim, generator=rng)
    centre -= (centre @ bright)[:, None] * bright
    u = 0.5 * torch.nn.functional.normalize(torch.randn(works, each, dim, generator=rng), dim=2)
    u[: works // 100] = apart * torch.tensor([1.0, -1.0, 0.3])[:each, None] * bright
    y, w = (centre[:, None] + u).reshape(-1, dim), torch.ones(works * each)
    names = tuple(map(str, range(len(y))))
    items = NegationSet(latents=y, space=Space(encoder="x", shape=(dim,)), ids=names, digests=names)
    index, sampled = IndexedSet.of(items, progress=False, clusters=works + 400, reach=1.6, tolerance=1e-2), 0
    for sigma in (3.0, 4.0, 6.0, 8.0):
        x = centre[torch.randint(works, (16,), generator=rng)] + 32.0 * bright
        got = check(index, x + sigma * torch.randn(16, dim, generator=rng), y, w, 1.0, sigma)
        sampled += int((~got.proven).sum())
    assert sampled


def test_what_is_left_out_of_a_sum_counts_from_the_origin(rng):
    """Latents far from it, and thousands of clusters that are each too light to be added."""
    works = 2000
    y = (torch.randn(works, DIM, generator=rng) + 300.0).repeat_interleave(2, 0)
    w = torch.ones(len(y))
    w[:2] = works * 1.2e5
    x, level = y[:4] + 200.0 * torch.randn(4, DIM, generator=rng), NoiseLevel(1.0, 200.0)
    got = make(y, w, clusters=works, reach=1e-3, tolerance=1e-4).certified(x, level)
    mean, _ = brute_force(x, y, w, 1.0, 200.0)
    scale = math.sqrt(float((w * y.double().square().sum(1)).sum() / w.sum()))
    moved = np.linalg.norm(got.posterior.mean.double().numpy() - mean, axis=1) / scale
    assert (moved <= got.mean_error.numpy() + 3e-7).all()


def test_a_row_that_counts_for_many_is_in_every_sample(rng):
    """Left to chance it is missing from most samples, and their standard errors do not know: they came out too small
    by up to nine times."""
    y, w, first = uneven(rng)
    index, sampled = make(y, w, clusters=4), 0
    assert index.partition.sure.tolist() == [1, 1, 1, 1]
    assert sorted(index.partition.order[index.partition.starts[:-1]].tolist()) == sorted(first.tolist())
    for sigma in (4.0, 12.0, 25.0, 40.0, 55.0, 70.0):
        got = check(index, asked(rng, y[first], 1.0, sigma), y, w, 1.0, sigma)
        sampled += int((~got.proven).sum())
    assert sampled


def test_samples_stay_honest_when_rows_are_removed(rng):
    """What was a row of many may, with those gone that weighed more, be one that counts for much."""
    y, w, first = uneven(rng)
    other = torch.tensor([k for k in range(100) if k not in first.tolist()][:20])
    w[other] = 400.0
    y[other] += 0.03 * torch.randn(20, DIM, generator=rng)
    index = make(y, w, clusters=4)
    left = torch.ones(len(y), dtype=torch.bool)
    left[first] = False
    smaller = replace(index, partition=index.partition.without(first))
    for sigma in (0.05, 1.0, 4.0, 10.0):
        check(smaller, asked(rng, y[other], 1.0, sigma), y[left], w[left], 1.0, sigma)


def test_every_row_is_in_one_cluster(rng):
    y = copies(rng, works=50, each=7)
    cut = make(y, clusters=60).partition
    assert cut.order.sort().values.tolist() == list(range(len(y)))
    assert torch.equal(cut.rows, y[cut.order])
    assert (int(cut.starts[0]), int(cut.starts[-1])) == (0, len(y))
    for begin, end, centre in zip(cut.starts[:-1], cut.starts[1:], cut.centroid, strict=True):
        members = y[cut.order[begin:end]].double()
        torch.testing.assert_close(centre.double(), members.mean(0), rtol=1e-5, atol=1e-5)


def test_works_that_resemble_each_other_are_told_apart(rng):
    """Closer to each other than a cluster is wide: found by the direction in which its rows vary more than noise."""
    works = 3.0 * torch.randn(40, DIM, generator=rng)
    works = torch.cat([works, works + 0.3 * torch.nn.functional.normalize(torch.randn(40, DIM, generator=rng))])
    owner = torch.arange(80).repeat_interleave(60)
    y = (works[owner] + 0.02 * torch.randn(4800, DIM, generator=rng)).bfloat16()
    cut = make(y, reach=5.0, clusters=400).partition
    assert len(cut) == 80
    for begin, end in zip(cut.starts[:-1], cut.starts[1:], strict=True):
        assert len(owner[cut.order[begin:end]].unique()) == 1


def test_cutting_leaves_the_generators_of_the_caller_alone(rng):
    y, before = copies(rng, works=20, each=5), torch.get_rng_state()
    first, second = make(y).partition, make(y).partition
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.order, second.order)


@pytest.mark.parametrize("sigma", [0.1, 2.0, 6.0, 20.0])
@pytest.mark.parametrize("share", [1 << 10, 1 << 21], ids=["two threads", "one thread"])
def test_a_sample_does_not_depend_on_the_others_of_its_batch(sigma, share, rng, monkeypatch):
    """To the last bit, however the work is shared out; but for what reads everything, batched for speed."""
    monkeypatch.setattr(fused, "SHARE", share)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        y = copies(rng, works=150, each=60, scale=0.05)
        index, alpha = make(y, clusters=190), 1 / math.sqrt(1 + sigma**2)
        x, level = asked(rng, y, alpha, alpha * sigma, batch=7), NoiseLevel(alpha, alpha * sigma)
        together = index.certified(x, level)
        for b in range(len(x)):
            alone = index.certified(x[b : b + 1], level)
            if int(alone.rows) < len(y):
                assert torch.equal(alone.posterior.mean[0], together.posterior.mean[b])
                assert torch.equal(alone.posterior.log_evidence[0], together.posterior.log_evidence[b])
            assert int(alone.rows) == int(together.rows[b])
    finally:
        torch.set_num_threads(threads)


def test_every_level_draws_other_rows_and_every_sample_the_same(rng):
    """So that what one level happened to leave out, the next one does not; and a batch shares what it reads."""
    y = copies(rng, works=150, each=60, scale=0.05)
    index = make(y, clusters=190)

    def drawn(sigma):
        x = torch.from_numpy(np.zeros((2, DIM), np.float32))
        nothing = look.Aside.nothing(index.partition, 2)
        alpha, precision = np.ones(2), np.full(2, 0.5 / sigma**2)
        query = look.Query(index.partition, x, alpha, precision, 1e-3, nothing)
        query.answered(1.0)
        return query.state.chance.copy(), query.state.drawn.copy(), query.turn

    (chance, first, turn), (_, second, other) = drawn(30.0), drawn(31.0)
    assert turn[0] == turn[1] != other[0]
    assert np.array_equal(first[0], first[1])
    assert (chance[0] < 1).any()
    assert not np.array_equal(first[0] > 0, second[0] > 0)


@pytest.mark.parametrize("sigma", [0.3, 3.0, 20.0])
def test_fresh_items_count_towards_the_tolerance(sigma, rng):
    """Far away, and as heavy as all others together."""
    y = copies(rng, works=60, each=20)
    fresh, w = 9.0 * torch.randn(5, DIM, generator=rng), torch.full((5,), 240.0)
    index = replace(make(y, clusters=80), fresh=(fresh, w))
    everything, weights = torch.cat([y.float(), fresh]), torch.cat([torch.ones(len(y)), w])
    alpha = 1 / math.sqrt(1 + sigma**2)
    for x in (asked(rng, y, alpha, alpha * sigma), asked(rng, fresh, alpha, alpha * sigma)):
        check(index, x, everything, weights, alpha, alpha * sigma)


def test_a_sample_that_is_not_finite_spoils_only_itself(rng):
    y = copies(rng)
    index, x = make(y, clusters=400), asked(rng, y, 1.0, 0.5, batch=3)
    clean = index.posterior(x, NoiseLevel(1.0, 0.5))
    x[1, 0] = math.nan
    got = index.posterior(x, NoiseLevel(1.0, 0.5))
    assert bool(got.mean[1].isnan().all())
    assert torch.equal(got.mean[[0, 2]], clean.mean[[0, 2]])


@pytest.mark.parametrize("value", [1e16, 1e30, 3e38, math.inf, -math.inf])
def test_a_sample_beyond_all_measure_gets_nan_and_no_proof(value, rng):
    got = make(copies(rng, works=20, each=3)).certified(torch.full((1, DIM), value), NoiseLevel(1.0, 1.0))
    assert bool(got.posterior.mean.isnan().all())
    assert not bool(got.proven.any())


def test_nothing_is_proven_of_what_is_not_finite(rng):
    y = copies(rng, works=20, each=3)
    index = make(y)
    empty = replace(index, partition=index.partition.without(torch.arange(len(y))))
    for each, level in ((index, NoiseLevel(1e20, 1.0)), (empty, NoiseLevel(1.0, 1.0))):
        got = each.certified(torch.zeros(2, DIM), level)
        assert not bool(got.proven.any())
        assert bool(got.evidence_error.isnan().all())


def test_rows_may_be_removed_twice(rng):
    y = copies(rng, works=20, each=3)
    cut = make(y).partition
    once, twice = cut.without(torch.tensor([0, 1])), cut.without(torch.tensor([0, 0, 1])).without(torch.tensor([1]))
    assert once.scale == pytest.approx(twice.scale, rel=1e-12)
    assert once.scale == pytest.approx(float(y[2:].double().square().sum(1).mean().sqrt()), rel=1e-6)


def test_rows_in_float64_are_read_in_float32(rng):
    y = copies(rng, dtype=torch.float64)
    index = make(y, clusters=400)
    assert index.partition.rows.dtype == torch.float32
    for sigma in (0.3, 4.0):
        check(index, asked(rng, y, 1.0, sigma), y, torch.ones(len(y)), 1.0, sigma)


def test_what_goes_in_is_checked(rng):
    y = copies(rng, works=20, each=3)
    index = make(y)
    with pytest.raises(NegationMismatch, match=r"shape \(batch, 256\), got \(1, 2, 128\)"):
        index.posterior(torch.zeros(1, 2, 128), NoiseLevel(1.0, 1.0))
    with pytest.raises(InvalidInput, match=r"alpha >= 0, got -0\.5"):
        index.posterior(torch.zeros(1, DIM), NoiseLevel(-0.5, 1.0))
    with pytest.raises(InvalidInput, match="tolerance > 0, got 0"):
        make(y, tolerance=0.0)


def store_of(tmp_path, y):
    names = tuple(f"item-{i}" for i in range(len(y)))
    items = NegationSet(latents=y, space=Space(encoder="x", shape=(DIM,)), ids=names, digests=names)
    store = NegationStore.create(tmp_path / "big.negation", items.space, dtype=torch.bfloat16)
    store.add(items)
    return store


@pytest.mark.parametrize("sigma", [0.1, 1.0, 6.0, 20.0])
def test_an_index_follows_its_store(sigma, tmp_path, rng):
    """Against the exact posterior of what the store holds at every moment."""
    y = copies(rng, works=60, each=10)
    store = store_of(tmp_path, y)
    index = LiveIndex(store.live(), clusters=80, progress=False)
    alpha = 1 / math.sqrt(1 + sigma**2)
    x = asked(rng, y, alpha, alpha * sigma)
    extra = NegationSet(
        latents=x[:1] / alpha, space=index.space, ids=("new",), digests=("new",), weights=torch.tensor([3.0])
    )
    whole_cluster = [f"item-{i}" for i in range(10, 20)]
    for change in (
        lambda: None,
        lambda: store.remove(["item-0", "item-1", "item-599"]),
        lambda: store.remove(whole_cluster),
        lambda: store.add(extra),
        lambda: store.remove(["new"]),
        lambda: store.compact(),
    ):
        change()
        got, now = index.posterior(x, NoiseLevel(alpha, alpha * sigma)), store.snapshot()
        mean, evidence = brute_force(x, now.latents.float(), now.weights, alpha, alpha * sigma)
        assert np.abs(got.log_evidence.numpy() - evidence).max() <= 1e-3 + ROUNDING
        scale = float(now.latents.float().norm(dim=1).square().mean().sqrt())
        assert np.linalg.norm(got.mean.numpy() - mean, axis=1).max() <= (1e-3 + ROUNDING) * scale
        assert len(index) == len(now)


def test_a_trajectory_keeps_the_items_that_it_began_with(tmp_path, rng):
    y = copies(rng, works=30, each=5)
    store = store_of(tmp_path, y)
    index = LiveIndex(store.live(), clusters=40, progress=False)
    state = DenoiseState(x_t=torch.zeros(1, DIM), level=NoiseLevel(1.0, 1.0), step=0, num_steps=2)
    x = asked(rng, y, 1.0, 1.0)
    before = index.at(state).posterior(x, NoiseLevel(1.0, 1.0))
    store.remove(["item-0"])
    assert torch.equal(index.at(state).posterior(x, NoiseLevel(1.0, 1.0)).mean, before.mean)
    assert len(index.at(state)) == 150
    assert len(index) == 149

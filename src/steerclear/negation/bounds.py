r"""What a partition says about one sample: bounds of every cluster's evidence, and which of them must be read.

The rows lie in clusters of near-duplicates (:mod:`steerclear.negation.partition`). Seen from :math:`x` at a level
:math:`(\alpha, \sigma)`, the rows :math:`y = c + u` of a cluster have kernels :math:`e^{\ell(c) + z}` with

.. math:: p = \frac1{2\sigma^2}, \quad \ell(c) = \log W_C - p\,(\lVert x - \alpha c\rVert^2 + \alpha^2 v), \quad
    z = 2 p \alpha \langle x - \alpha c, u\rangle - p \alpha^2 (\lVert u\rVert^2 - v), \quad E_C[z] = 0

so the cluster's evidence :math:`A_C` is bounded without reading a row, in three ways:

* from below by Jensen's inequality: :math:`A_C \ge L_C = e^{\ell(c)}`;
* from above by Bennett's: :math:`A_C \le L_C\,(1 + s^2 \frac{e^R - 1 - R}{R^2})` with the largest :math:`z \le R` and
  :math:`E_C[z^2] \le s^2`, both from the cluster's radius, widest eigenvalue and unevenness;
* from above by its nearest point: :math:`A_C \le W_C\, e^{-p (\lVert x - \alpha c\rVert - \alpha r)_+^2}`.

**At little noise** the last one leaves a handful of clusters, which are read, and the rest is below the tolerance: a
proof. **At much noise** nearly all clusters count and none may be left out, but :math:`z` is small. Where the proof
would cost more than that, every cluster's remainder :math:`E_C[e^z - 1 - z] \ge 0` is estimated from a few of its rows,
more where more is at stake, and those that count for many are always among them: a stratified sum. Its error is bounded
by :data:`DEVIATIONS` standard errors, with squares in place of variances, which only makes it wider. That is a
statement of probability, not a proof, and about samples that were not made to fit rows which happen to be left out:
``benchmarks/index.py`` counts how often it holds. **In between**, what remains too uncertain is read, most uncertain
first, if need be everything: then the result is exact.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerclear.negation import fused, kernels
from steerclear.negation.partition import Partition

Array = NDArray[np.float64]

DEVIATIONS = 5.0
#: A cluster with more than this share of the evidence is sampled by so many rows at least.
SHARE, MANY = 1 / 64, 256
#: Largest typical deviation of z in a cluster that a few rows may speak for.
TAME = 0.5
#: Reading more than this share of the rows in pieces is no faster than reading all of them in a row.
WHOLE = 0.4
#: Share of the tolerance for clusters that are not looked at, and share that is left for rounding.
UNSEEN, ROUNDING = 0.05, 0.05
#: Share of a weighted sum that may be left out; counted as an error of the mean.
NEGLIGIBLE = 1e-5
#: Samples with larger values have squares beyond float32; their result is NaN, like that of NaN.
LARGEST = 1e15
#: Rows that are summed in float32 before they are added in float64.
FOLD = 2048
#: Exponents beyond it are infinite for every purpose here.
HUGE = 700.0


class Found(NamedTuple):
    """A posterior at one sample, without the constant of the Gaussian; the rest as in ``Certified``."""

    mean: Array
    log_evidence: float
    evidence_error: float
    mean_error: float
    rows: int
    proven: bool


class Bounds(NamedTuple):
    """Clusters that are looked at; evidences are relative to ``exp(top)``.

    Args:
        clusters: Their numbers.
        squared: Squared distance of the sample to the centroid.
        lower: Of the evidence.
        width: Upper minus lower bound.
        drift: Bound of the distance of the cluster's posterior mean from its centroid.
        norm: Of the centroid.
        members: Rows.
        top: Largest logarithm of a lower bound.
        beyond: Bound of the evidence of all other clusters together.
    """

    clusters: NDArray[np.int64]
    squared: Array
    lower: Array
    width: Array
    drift: Array
    norm: Array
    members: NDArray[np.int64]
    top: float
    beyond: float


def look(partition: Partition, x: Tensor, alpha: float, precision: float, tolerance: float) -> Found:
    r"""The posterior at ``x (1, D)``, float32, under the kernel :math:`e^{-p \lVert x - \alpha y\rVert^2}`."""
    if not bool((x.abs() < LARGEST).all()):
        return Found(np.full(x.shape[1], math.nan), math.nan, math.nan, math.nan, 0, False)
    query = Query(partition, x, alpha, precision)
    bounds = query.bounds(tolerance * UNSEEN)
    spare = tolerance * (1.0 - UNSEEN - ROUNDING)
    worst = query.worst(bounds)
    proof = _first(worst, bounds.members, spare * float(bounds.lower.sum()))
    most = int(WHOLE * len(partition.rows))
    if bounds.members[proof].sum() > max(len(bounds.clusters), 1024):
        for part in (spare, spare / 2):
            plan = query.plan(bounds, worst, part)
            if plan.cost(bounds) >= min(bounds.members[proof].sum(), most):
                break
            found = query.result(bounds, plan.read, query.sample(bounds, plan))
            if within(found, tolerance):
                return found
    found = query.result(bounds, proof) if bounds.members[proof].sum() < most else query.exact()
    return found if within(found, tolerance) else query.exact()


def within(found: Found, tolerance: float) -> bool:
    """Whether both bounds are; if rounding or planning went wrong, they are not, and everything is read."""
    return found.evidence_error <= tolerance and found.mean_error <= tolerance


class Plan(NamedTuple):
    """What is read and what is sampled.

    Args:
        read: Positions of clusters that are read.
        tame: Clusters that are left to samples.
        rows: How many rows each of these is sampled by; 0 where it was not drawn.
        sure: How many rows are taken besides where it was, because they count for too much to be left to chance.
        chance: With which probability it was drawn.
    """

    read: NDArray[np.int64]
    tame: NDArray[np.bool_]
    rows: NDArray[np.int64]
    sure: NDArray[np.int64]
    chance: Array

    def cost(self, bounds: Bounds) -> int:
        """Rows that it takes."""
        return int(self.rows.sum() + self.sure.sum() + bounds.members[self.read].sum())


class Sample(NamedTuple):
    """What sampled rows say of their clusters, relative to ``exp(top)``.

    Args:
        tame: Which clusters it speaks for.
        rest: Estimate of the evidence above the lower bound.
        error: Its standard error.
        pull: Weight of the displacements from the centroid, so that weighted sums of rows stand for weighted means.
        drift: Standard error of the displacements' weighted sum.
        rows: The rows.
        weights: Theirs.
    """

    tame: NDArray[np.bool_]
    rest: Array
    error: Array
    pull: Array
    drift: Array
    rows: NDArray[np.int64]
    weights: Array


class Query:
    """One sample before a partition."""

    def __init__(self, partition: Partition, x: Tensor, alpha: float, precision: float) -> None:
        self.partition, self.table = partition, partition.table
        self.x, self.alpha, self.precision = x, alpha, precision
        self.chunks = fused.chunked(x)[0]

    def screened(self, share: float) -> tuple[NDArray[np.int64], float]:
        """Clusters that cannot be left out, as far as the leading directions and the nearest points tell; and the
        logarithm of a bound of what the others add up to."""
        t, a, p = self.table, self.alpha, self.precision
        few = self.x[0] @ self.partition.basis
        own = float(self.x.double().square().sum())
        hidden = math.sqrt(max(0.0, own - float(few.double().square().sum())))
        seen = t.seen_squared * a * a - 2 * a * (self.partition.seen @ few).double().numpy()
        squared = seen + float(few.double().square().sum()) + (hidden - a * t.unseen) ** 2
        squared -= 1e-5 * (own + a * a * t.norm**2)  # float32 of the products above
        nearest = np.sqrt(np.maximum(squared, 0.0)) - a * t.radius
        upper = t.log_mass - p * np.maximum(nearest, 0.0) ** 2
        best = np.array([int(upper.argmax())])
        least = float(t.log_mass[best[0]] - p * (self.distances(t.centroid, best)[0] + a * a * t.spread[best[0]]))
        kept = upper >= least + math.log(share / len(upper))
        rest = float(np.exp(upper[~kept] - least).sum())
        return np.flatnonzero(kept), least + math.log(rest) if rest > 0.0 else -math.inf

    def bounds(self, share: float) -> Bounds:
        """Of the clusters that count; see the module's docstring."""
        t, a, p = self.table, self.alpha, self.precision
        clusters, log_beyond = self.screened(share)
        squared = self.distances(t.centroid, clusters)
        spread, radius, widest = t.spread[clusters], t.radius[clusters], t.widest[clusters]
        log_lower = t.log_mass[clusters] - p * (squared + a * a * spread)
        top = float(log_lower.max())
        lower = np.exp(log_lower - top)
        distance = np.sqrt(squared)
        slope = 2 * p * a * distance
        most = slope * radius + p * a * a * spread  # R
        deviation = np.sqrt(widest) * slope + p * a * a * t.unevenness[clusters]  # s
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            bennett = deviation**2 * np.where(most < 1e-3, 0.5 + most / 5, (np.expm1(most) - most) / most**2)
            gap = np.maximum(distance * (1 - 1e-6) - a * radius, 0.0)
            log_upper = np.fmin(log_lower + np.log1p(bennett), t.log_mass[clusters] - p * gap**2)
            tilt = np.where(most < 1e-3, 1 + most, np.expm1(most) / most)
            drift = np.minimum(radius, np.sqrt(widest) * deviation * tilt)
        width = np.maximum(np.exp(np.minimum(log_upper - top, HUGE)) - lower, 0.0)
        return Bounds(
            clusters=clusters,
            squared=squared,
            lower=lower,
            width=width,
            drift=np.where(np.isfinite(drift), drift, radius),
            norm=t.norm[clusters],
            members=t.count[clusters],
            top=top,
            beyond=math.exp(log_beyond - top),
        )

    def worst(self, bounds: Bounds) -> Array:
        """What every cluster may add to either error at most, if it is left to its bounds, with the norm of the
        posterior mean that these suggest."""
        norm = float((bounds.lower * bounds.norm).sum() / bounds.lower.sum())
        return np.maximum(*self.errors(bounds, norm))

    def plan(self, bounds: Bounds, worst: Array, tolerance: float) -> Plan:
        """What to read and what to sample; a fifth of the tolerance is for what must be proven.

        It goes by what samples should be like if clusters are what they look like, not by what they are:
        deciding by the sample itself would leave the rows that came out low, and the sum with them.
        """
        total, proof, chance = float(bounds.lower.sum()), 0.2 * tolerance, 0.75 * tolerance
        spread = self.table.spread[bounds.clusters]
        typical = 2 * self.precision * self.alpha * np.sqrt(bounds.squared) * self.table.typical[bounds.clusters]
        sure = self.table.sure[bounds.clusters]
        others = bounds.members - sure
        tame = (typical <= TAME) & (others > 0)
        read = _first(np.where(tame, 0.0, worst), bounds.members, proof * total)
        expected = bounds.lower * typical * np.maximum(1.2 * typical, np.sqrt(spread) / self.partition.scale)
        expected = np.where(tame, expected, 0.0)
        # The fewest rows for a given error: as many of each cluster as its share of what is expected, and of clusters
        # whose share is less than a row, some, drawn by lot.
        fewest = expected * expected.sum() * (DEVIATIONS / (chance * total)) ** 2
        fewest *= max(1.0, MANY / max(fewest.sum(), 1e-300))
        fewest = np.maximum(fewest, np.where(tame & (bounds.lower > SHARE * total), MANY, 0))
        drawn = self.table.lot[bounds.clusters] < fewest
        rows = np.where(drawn, np.minimum(np.ceil(fewest), others), 0).astype(np.int64)
        whole = tame & (rows == others) & (fewest >= 1.0)
        rows = np.where(whole, 0, rows)
        return Plan(
            read=np.union1d(read, np.flatnonzero(whole)),
            tame=tame & ~whole,
            rows=rows,
            sure=np.where(rows > 0, sure, 0),
            chance=np.minimum(fewest, 1.0),
        )

    def errors(self, bounds: Bounds, norm: float) -> tuple[Array, Array]:
        """What every cluster may add to the errors of the evidence and, in units of the scale, of the mean, if it is
        left to its bounds and the posterior mean has that norm."""
        half = bounds.width / 2
        away = half * (bounds.norm + norm) + (bounds.lower + bounds.width) * bounds.drift
        return half, away / self.partition.scale

    def sample(self, bounds: Bounds, plan: Plan) -> Sample:
        """Read some rows of some clusters."""
        t, a, p = self.table, self.alpha, self.precision
        picked = np.flatnonzero(plan.rows)
        taken = plan.sure[picked] + plan.rows[picked]
        owner = np.repeat(picked, taken)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(taken) - taken, taken)
        rows = t.starts[bounds.clusters[owner]] + place
        squared = self.distances(t.rows, rows)
        z = np.minimum(p * (bounds.squared[owner] - squared + a * a * t.spread[bounds.clusters[owner]]), HUGE)
        # Those that are not sure are drawn evenly: each stands for as many rows as there are to each one drawn.
        even = place >= plan.sure[owner]
        others = (bounds.members - plan.sure)[owner]
        each = bounds.lower[owner] * np.exp(t.log_weights[rows] - t.log_mass[bounds.clusters[owner]])
        each *= np.where(even, others / plan.rows[owner], 1.0) / plan.chance[owner]
        rest, pull = each * np.maximum(np.expm1(z) - z, 0.0), each * np.expm1(z)
        # Of a finite cluster that was sure to be drawn, less is left to chance.
        kept = np.where(even, 1.0 - plan.rows[owner] / others, 0.0)

        def summed(values: Array) -> Array:
            return np.bincount(owner, values, len(bounds.clusters)).astype(np.float64)

        def uncertain(values: Array) -> Array:
            return np.where(plan.chance < 1.0, summed(values), np.sqrt(summed(kept * values**2)))

        return Sample(
            tame=plan.tame,
            rest=summed(rest),
            error=uncertain(rest),
            pull=summed(pull),
            drift=uncertain(np.abs(pull) * t.offset[rows]),
            rows=rows,
            weights=pull,
        )

    def result(self, bounds: Bounds, read: NDArray[np.int64], sample: Sample | None = None) -> Found:
        """Read those clusters, and take the others from the sample or, where it says nothing, from their bounds."""
        t, scale = self.table, self.partition.scale
        left = np.ones(len(bounds.clusters), bool)
        left[read] = False
        found, log_read = self.scan(np.sort(bounds.clusters[read]))
        top = max(bounds.top, log_read)
        own, unit = math.exp(log_read - top), math.exp(bounds.top - top)  # all but what was read is in units of that
        guess, pull = np.where(left, bounds.lower + bounds.width / 2, 0.0), np.zeros(len(left))
        if sample is not None:
            guess, pull = np.where(sample.tame, bounds.lower + sample.rest, guess), sample.pull
        total = own + unit * float(guess.sum())
        mean = self.weighted(t.centroid, guess - pull, bounds.clusters)
        summed = float(np.abs(guess - pull).sum())
        if sample is not None:
            mean += self.weighted(t.rows, sample.weights, sample.rows)
            summed += float(np.abs(sample.weights).sum())
        mean = (own * found + unit * mean) / total
        norm = float(np.linalg.norm(mean))
        bounded = left if sample is None else left & ~sample.tame
        error, away = (float(each[bounded].sum()) for each in self.errors(bounds, norm))
        error, away = error + bounds.beyond, away + bounds.beyond * (t.furthest + norm) / scale
        if sample is not None:
            error += DEVIATIONS * math.sqrt(float((sample.error**2).sum()))
            moved = (sample.error * (bounds.norm + norm)) ** 2 + sample.drift**2
            away += DEVIATIONS * math.sqrt(float(moved.sum())) / scale
        away += NEGLIGIBLE * summed * t.furthest / scale
        least = total - error * unit  # what the evidence is at the least
        return Found(
            mean=mean,
            log_evidence=top + math.log(total),
            evidence_error=math.log(total / least) if least > 0.0 else math.inf,
            mean_error=away * unit / least if least > 0.0 else math.inf,
            rows=int(bounds.members[read].sum()) + (0 if sample is None else len(sample.rows)),
            proven=sample is None,
        )

    def exact(self) -> Found:
        """Read everything."""
        mean, log_evidence = self._scan(None)
        return Found(mean, log_evidence, 0.0, 0.0, len(self.partition.rows), True)

    def scan(self, clusters: NDArray[np.int64]) -> tuple[Array, float]:
        """Mean and log-evidence of the rows of some clusters."""
        if not len(clusters):
            return np.zeros(self.x.shape[1]), -math.inf
        starts = self.table.starts
        return self._scan(list(zip(starts[clusters].tolist(), starts[clusters + 1].tolist(), strict=True)))

    def _scan(self, ranges: list[tuple[int, int]] | None) -> tuple[Array, float]:
        alpha, precision = torch.tensor([self.alpha]), torch.tensor([self.precision], dtype=torch.float64)
        p = self.partition
        mean, total = fused.scan(self.x, p.rows, alpha, precision, p.log_weights, ranges)
        return mean[0].numpy(), float(total[0])

    def distances(self, of: Any, which: NDArray[np.int64]) -> Array:  # noqa: ANN401
        """Squared, to some rows of a chunked array."""
        if not len(which):
            return np.zeros(0)
        x, alpha = self.chunks, np.float32(self.alpha)

        def part(begin: int, end: int) -> Array:
            out = np.empty(end - begin)
            kernels.some_distances(x, alpha, of, which[begin:end], out)
            return out

        return np.concatenate(fused.shared(part, len(which), x.size))

    def weighted(self, of: Any, weights: Array, which: NDArray[np.int64]) -> Array:  # noqa: ANN401
        """``weights @ of[which]``, flat."""
        sizes = np.abs(weights)
        used = np.flatnonzero(sizes * len(sizes) > NEGLIGIBLE * sizes.sum())
        rows, values = which[used], weights[used].astype(np.float32)
        x = self.chunks

        def part(begin: int, end: int) -> Array:
            total = np.zeros(x.shape)
            for first in range(begin, end, FOLD):  # in float32 no longer than that
                out, last = np.zeros_like(x), min(first + FOLD, end)
                kernels.add_some(values[first:last], of, rows[first:last], out)
                total += out
            return total.ravel()

        return np.sum(fused.shared(part, len(used), x.size), axis=0) if len(used) else np.zeros(x.size)


def _first(worst: Array, members: NDArray[np.int64], tolerance: float) -> NDArray[np.int64]:
    """Positions of what is worst per row, as many as it takes to leave no more than the tolerance."""
    small = worst * (2 * len(worst)) <= tolerance  # all of these together are half of it at most
    large = np.flatnonzero(~small)
    order = large[np.argsort(-worst[large] / members[large], kind="stable")]
    with np.errstate(over="ignore"):
        left = np.cumsum(worst[order][::-1])[::-1] + worst[small].sum()  # of this one and all after it
    return order[: int((left > tolerance).sum())]

"""A batch of samples before a partition: screened, bounded, read or sampled, and judged, each as it needs."""

import math
import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerclear.negation import fused, kernels
from steerclear.negation.index import bounds, planning, sampling
from steerclear.negation.index.partition import Partition

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]

#: Samples with larger values have squares beyond float32; their result is NaN, like that of NaN.
LARGEST = 1e15
NONE = np.empty(0, np.int64)
#: Shares of the tolerance that a sample of rows is planned for, one after the other.
THRIFT = (1.0, 0.5)
#: What planning costs, in products per cluster: for deciding how many threads it is worth.
PLANNING = 256


class Found(NamedTuple):
    """Posteriors without the constant of the Gaussian; the rest as in ``Certified``. All ``(batch,)`` but the mean."""

    mean: Any
    log_evidence: Any
    evidence_error: Any
    mean_error: Any
    rows: Any
    proven: Any

    @staticmethod
    def blank(batch: int, dim: int) -> "Found":
        """Nothing is known."""
        mean, unknown = np.full((batch, dim), math.nan), np.full((3, batch), math.nan)
        return Found(mean, unknown[0], unknown[1], unknown[2], np.zeros(batch, np.int64), np.zeros(batch, bool))

    def put(self, where: Numbers, found: "Found") -> None:
        """Fill in what was found of some samples."""
        for own, other in zip(self, found, strict=True):
            own[where] = other

    def within(self, tolerance: float) -> NDArray[np.bool_]:
        """Whether both errors are; if rounding or planning went wrong, they are not, and more is read."""
        return (self.evidence_error <= tolerance) & (self.mean_error <= tolerance)


class State(NamedTuple):
    """What is known of every cluster before every sample, ``(batch, M)``, or before one, ``(M,)``. Of clusters that are
    not looked at, nothing; evidences are relative to a number per sample.

    Args:
        squared: Squared distance of the sample from the centroid.
        apart: Bound of the centroid's distance from the mean that all guesses have together.
        lower, upper, guess: Of the evidence.
        drift: Bound of the distance of the cluster's own mean from its centroid.
        mark: What becomes of it.
        drawn: How many rows it is sampled by, besides those that are sure; 0 if it was not drawn.
        chance: With which probability it was drawn.
        rest: What the sample says of the evidence above the guess, and ``error``, the square of its standard error.
        pull: The square of the standard error of the displacements' weighted sum.
    """

    squared: Any
    apart: Any
    lower: Any
    upper: Any
    guess: Any
    drift: Any
    mark: Any
    drawn: Any
    chance: Any
    rest: Any
    error: Any
    pull: Any

    @classmethod
    def blank(cls, *shape: int) -> "State":
        """Not filled."""
        kinds = {"mark": np.uint8, "drawn": np.int64}
        return cls(**{name: np.empty(shape, kinds.get(name, np.float64)) for name in cls._fields})

    def of(self, sample: int) -> "State":
        """Of one sample."""
        return State(*(each[sample] for each in self))


@dataclass(frozen=True, kw_only=True, eq=False)
class Aside:
    """Rows that are no part of the partition and have been read: mean ``(batch, D)`` and logarithm of the evidence, in
    the partition's units ``(batch,)``; and the root mean square norm of all rows together."""

    mean: Array
    log_evidence: Array
    scale: float

    @classmethod
    def nothing(cls, partition: Partition, batch: int) -> "Aside":
        """No such rows."""
        nowhere = np.broadcast_to(0.0, (batch, partition.centroid.shape[1]))
        return cls(mean=nowhere, log_evidence=np.full(batch, -math.inf), scale=partition.scale)

    def at(self, where: Numbers) -> "Aside":
        """For some samples."""
        return Aside(mean=self.mean[where], log_evidence=self.log_evidence[where], scale=self.scale)

    def joined(self, mean: Array, log_evidence: Array) -> tuple[Array, Array]:
        """Together with another mean and evidence."""
        with np.errstate(invalid="ignore"):  # neither has any
            together = np.logaddexp(self.log_evidence, log_evidence)
            own, other = (np.exp(each - together)[:, None] for each in (self.log_evidence, log_evidence))
        return own * self.mean + other * mean, together


def look(
    partition: Partition, x: Tensor, alpha: Array, precision: Array, tolerance: float, aside: Aside | None = None
) -> Found:
    r"""Posteriors at ``x (batch, D)``, float32, under the kernels :math:`e^{-p \lVert x - \alpha y\rVert^2}`."""
    found = Found.blank(*x.shape)
    aside = aside or Aside.nothing(partition, len(x))
    todo = (x.abs() < LARGEST).all(1).nonzero().flatten().numpy()
    whole: list[Numbers] = []  # samples for which everything must be read
    for thrift in THRIFT:
        if len(todo):
            some = x[torch.from_numpy(todo)] if len(todo) < len(x) else x
            query = Query(partition, some, alpha[todo], precision[todo], tolerance, aside.at(todo))
            got, answers = query.answered(thrift)
            found.put(todo, got)
            whole.append(todo[answers == bounds.EXACT])
            todo = todo[~got.within(tolerance) & (answers != bounds.EXACT)]
    left = np.concatenate([*whole, todo])
    if len(left):
        found.put(left, exact(partition, x[torch.from_numpy(left)], alpha[left], precision[left], aside.at(left)))
    return found


def exact(partition: Partition, x: Tensor, alpha: Array, precision: Array, aside: Aside) -> Found:
    """Read everything."""
    a, p = torch.from_numpy(alpha), torch.from_numpy(precision)
    mean, log_evidence = fused.scan(x, partition.rows, a, p, partition.log_weights)
    mean, log_evidence = aside.joined(mean.numpy(), log_evidence.numpy())
    known = np.isfinite(log_evidence)
    error, rows = np.where(known, 0.0, math.nan), np.full(len(x), len(partition.rows))
    return Found(mean, log_evidence, error, error, rows, known)


class Query:
    """Samples before a partition, all of them finite."""

    def __init__(
        self, partition: Partition, x: Tensor, alpha: Array, precision: Array, tolerance: float, aside: Aside
    ) -> None:
        self.partition, self.table = partition, partition.table
        self.x, self.alpha, self.precision = x, alpha, precision
        self.narrow = alpha.astype(np.float32)
        self.tolerance, self.aside = tolerance, aside
        self.samples, self.rows = fused.chunked(x), fused.chunked(partition.rows)
        self.state = State.blank(len(x), len(partition))
        self.turn = np.array([_turn(a, p) for a, p in zip(alpha, precision, strict=True)])

    def answered(self, thrift: float) -> tuple[Found, Numbers]:
        """What was found, and how; where everything should be read, nothing."""
        kept, log_beyond = self.screened()
        guess, log_guess = self.surveyed(kept)
        middle = self.aside.joined(guess, log_guess)[0]
        answers, top = self.planned(kept, middle, thrift)
        samples, clusters = self.tasks(kept, answers)
        read, log_read = self.read(samples, clusters)
        drawn, amount = self.sampled(samples, clusters)
        # The guesses; what the rows of a sample say beyond them; what was read in place of them; what is aside.
        logs = (log_guess, top, log_read, self.aside.log_evidence)
        final = np.max(logs, axis=0)
        units = [np.exp(each - final) for each in logs]
        total = units[0] + units[1] * amount + units[2] + units[3]
        summed = sum(u[:, None] * m for u, m in zip(units, (guess, drawn, read, self.aside.mean), strict=True))
        mean, log_total = summed / total[:, None], final + np.log(total)
        moved = np.linalg.norm(mean - middle, axis=1)
        centre = self.partition.centre.numpy()
        away, off_centre = np.linalg.norm(mean - centre, axis=1), float(np.linalg.norm(centre))
        found = Found.blank(*self.x.shape)
        for b in np.flatnonzero(answers != bounds.EXACT).tolist():
            rows, off, off_mean = bounds.judge(
                self.table, kept[b], self.state.of(b), top[b], log_beyond[b], log_total[b], moved[b], away[b],
                off_centre, self.partition.furthest, self.aside.scale,
            )  # fmt: skip
            one = np.array([b])
            found.put(one, Found(mean[b], log_total[b], off, off_mean, rows, answers[b] == bounds.PROVEN))
        return found, answers

    def tasks(self, kept: list[Numbers], answers: Numbers) -> tuple[Numbers, Numbers]:
        """Samples and clusters that are read or drawn, in that order."""
        found = [planning.listed(some, self.state.of(b)) if answers[b] != bounds.EXACT else NONE
                 for b, some in enumerate(kept)]  # fmt: skip
        return np.repeat(np.arange(len(found)), [len(some) for some in found]), np.concatenate(found)

    def lanes(self, samples: Numbers, clusters: Numbers, rows: Numbers) -> list[NDArray[np.bool_]]:
        """Which tasks each thread gets: those of a sample that has much to do are shared out by cluster. It goes by the
        sample's own tasks alone, so that no other sample changes the order in which they are added up."""
        threads = torch.get_num_threads()
        much = np.bincount(samples, rows) * self.x.shape[1] > fused.SHARE
        lane = np.where(much[samples], clusters, samples) % threads
        return [chosen for chosen in (lane == k for k in range(threads)) if chosen.any()]

    def read(self, samples: Numbers, clusters: Numbers) -> tuple[Array, Array]:
        """Mean and logarithm of the evidence of the clusters that are read."""
        t, chosen = self.table, self.state.mark[samples, clusters] == bounds.READ
        samples, clusters = samples[chosen], clusters[chosen]
        begin, end = t.starts[clusters], t.starts[clusters + 1]

        def part(lane: NDArray[np.bool_]) -> fused.Sums:
            sums = fused.empty_sums(self.samples)
            kernels.scan_some(
                self.samples, self.narrow, self.precision, self.rows, t.log_weights, samples[lane], begin[lane],
                end[lane], *sums,
            )  # fmt: skip
            return sums

        if not len(samples):
            return np.zeros(self.x.shape), np.full(len(self.x), -math.inf)
        lanes = self.lanes(samples, clusters, end - begin)
        mean, total = fused.merged(fused.run([partial(part, lane) for lane in lanes]))
        return np.where((total == -math.inf)[:, None], 0.0, mean), total

    def sampled(self, samples: Numbers, clusters: Numbers) -> tuple[Array, Array]:
        """What the rows that were drawn say beyond the guesses, and less the guesses of clusters that are read:
        weighted sum of rows, and sum of their weights."""

        def part(lane: NDArray[np.bool_]) -> tuple[Array, Array]:
            mean, amount = np.zeros(self.samples.shape), np.zeros(len(self.samples))
            sampling.sample(
                self.table, self.rows, self.samples, self.alpha, self.precision, self.turn, samples[lane],
                clusters[lane], self.state, mean, amount,
            )  # fmt: skip
            return mean.reshape(len(mean), -1), amount

        if not len(samples):
            return np.zeros(self.x.shape), np.zeros(len(self.x))
        drawn = np.where(self.state.mark[samples, clusters] == bounds.READ, 1, self.state.drawn[samples, clusters])
        lanes = self.lanes(samples, clusters, drawn)
        means, amounts = zip(*fused.run([partial(part, lane) for lane in lanes]), strict=True)
        return np.sum(means, axis=0), np.sum(amounts, axis=0)

    def screened(self) -> tuple[list[Numbers], Array]:
        """The clusters that each sample looks at, and the logarithms of bounds of what all others add up to."""
        batch, number = self.state.squared.shape
        kept, count, log_beyond = np.empty((batch, number), np.int64), np.empty(batch, np.int64), np.empty(batch)

        def part(begin: int, end: int) -> None:
            for b in range(begin, end):
                count[b], log_beyond[b] = bounds.screen(
                    self.table, self.samples[b], self.alpha[b], self.precision[b], self.tolerance * bounds.UNSEEN,
                    kept[b],
                )  # fmt: skip

        fused.shared(part, batch, number * PLANNING)
        return [row[:some] for row, some in zip(kept, count, strict=True)], log_beyond

    def surveyed(self, kept: list[Numbers]) -> tuple[Array, Array]:
        """What all guesses add up to: their mean ``(batch, D)``, and the logarithm of their sum."""
        threads, dim = torch.get_num_threads(), self.x.shape[1]

        def part(some: list[Numbers]) -> fused.Sums:
            sums, ends = fused.empty_sums(self.samples), np.cumsum([0, *map(len, some)])
            bounds.survey(
                self.table, self.samples, self.alpha, self.precision, np.concatenate(some), ends, self.state.squared,
                *sums,
            )  # fmt: skip
            return sums

        def share(lane: int) -> list[Numbers]:  # as for :meth:`lanes`
            return [
                some[lane::threads] if 2 * len(some) * dim > fused.SHARE else some if b % threads == lane else NONE
                for b, some in enumerate(kept)
            ]

        shares = [some for some in map(share, range(threads)) if any(map(len, some))]
        return fused.merged(fused.run([partial(part, some) for some in shares]))

    def planned(self, kept: list[Numbers], middle: Array, thrift: float) -> tuple[Numbers, Array]:
        """How each sample is answered, and the logarithms that its evidences are relative to."""
        answers, top = np.empty(len(middle), np.int64), np.empty(len(middle))

        def part(begin: int, end: int) -> None:
            for b in range(begin, end):
                state = self.state.of(b)
                bounds.separate(self.table, kept[b], middle[b], state.apart)
                answers[b], top[b] = planning.plan(
                    self.table, kept[b], self.alpha[b], self.precision[b], state, self.aside.log_evidence[b],
                    self.aside.scale, self.tolerance, thrift, self.turn[b],
                )  # fmt: skip

        fused.shared(part, len(middle), len(self.partition) * PLANNING)
        return answers, top


def _turn(alpha: float, precision: float) -> float:
    """By how much the lots are turned at a level, in [0, 1): the same for all samples, which then share rows."""
    return zlib.crc32(np.array([alpha, precision]).tobytes()) / 2**32

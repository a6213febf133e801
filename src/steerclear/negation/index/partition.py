r"""A big set cut into clusters of near-duplicates, with what bounds need to know of each.

Rows are put in the order of their clusters (:mod:`steerclear.negation.index.clustering`), so that one is read in one
go. Of cluster :math:`C` with weights :math:`w` and members :math:`y = c + u`, means over the weights:

=============  ===============================================================================================
``centroid``   :math:`c`, so that :math:`E_C[u] = 0`
``log_mass``   :math:`\log \sum_C w / \sum w`
``spread``     :math:`v = E_C\lVert u\rVert^2`
``radius``     :math:`\max_C \lVert u\rVert`
``widest``     :math:`\lambda`, the largest eigenvalue of :math:`E_C[u u^\top]`: variance along any one direction
``unevenness`` :math:`\kappa`, the standard deviation of :math:`\lVert u\rVert^2`
=============  ===============================================================================================

Within a cluster come first the few rows that count for more than a few average ones, by their weight or their
distance, then the others in random order: the first, and any number of those after them, are a sample of the cluster.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from steerclear.errors import InvalidInput
from steerclear.negation.index.clustering import (
    BLOCK,
    Measured,
    assign,
    directions,
    leaders,
    like_noise,
    measured,
    split,
)

COMPONENTS = 64
SAMPLE = 1 << 16
MOST = 1 << 14
MOMENTS = ("centroid", "log_mass", "spread", "radius", "widest", "unevenness")


@dataclass(frozen=True, kw_only=True, eq=False)
class Partition:
    """See the module's docstring; ``M`` clusters, ``n`` rows of ``D`` dimensions.

    Args:
        rows: ``(n, D)``, in their stored precision, float32 at most, cluster by cluster.
        log_weights: ``(n,)``, of the normalised weights, in the same order.
        offset: Distance of every row from its centroid, ``(n,)``, float32.
        order: Where each row was before, ``(n,)``.
        starts: First row of every cluster and the end of the last, ``(M + 1,)``.
        sure: How many rows at the beginning of every cluster belong to every sample of it, ``(M,)``; all of them, if
            the rows are in no order that a sample could be taken by.
        centroid: ``(M, D)``, float32.
        log_mass, spread, radius, widest, unevenness: ``(M,)``, float64.
        centre: Where centroids are seen from, ``(D,)``.
        basis: Orthonormal directions of largest variance, ``(D, k)``.
        seen: Centroids from there, along these directions, ``(M, k)``.
        unseen: Norm of what they miss of each, ``(M,)``.
        lot: Uniform in [0, 1), drawn once: which clusters a sample of few rows is taken from, ``(M,)``.
        scale: Root mean square norm of the rows that have a weight.
        log_total: Logarithm of the sum of the weights that ``log_weights`` and ``log_mass`` are shares of.
    """

    rows: Tensor
    log_weights: Tensor
    offset: Tensor
    order: Tensor
    starts: Tensor
    sure: Tensor
    centroid: Tensor
    log_mass: Tensor
    spread: Tensor
    radius: Tensor
    widest: Tensor
    unevenness: Tensor
    centre: Tensor
    basis: Tensor
    seen: Tensor
    unseen: Tensor
    lot: Tensor
    scale: float
    log_total: float

    @classmethod
    def of(
        cls,
        rows: Tensor,
        weights: Tensor,
        *,
        clusters: int | None = None,
        reach: float | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> "Partition":
        """Cut ``rows (n, D)`` with ``weights (n,)`` > 0.

        Args:
            rows: In any floating dtype, in memory or mapped.
            weights: Positive.
            clusters: At most so many; by default an eighth of the rows, 16 384 at most.
            reach: Radius that a cluster should have; by default found from the data.
            seed: Of the sample and of the order within clusters.
            progress: Show a bar.

        Cost:
            A copy of the rows, and ``n · clusters · 64`` products to assign them.
        """
        n = len(rows)
        if n == 0 or weights.shape != (n,) or not bool((weights > 0).all()):
            raise InvalidInput(f"Partition: expected rows with positive weights, got {n} rows and {weights.shape}")
        draw = torch.Generator().manual_seed(seed)
        most = min(n, clusters or min(MOST, max(n // 8, math.ceil(8 * math.sqrt(n)))))
        chosen = torch.randperm(n, generator=draw)[:SAMPLE].sort().values
        sample = rows[chosen].float()
        centre = sample.mean(0)
        basis = directions(sample - centre, min(COMPONENTS, n, rows.shape[1]))
        few = (sample - centre) @ basis
        chosen_few = few[leaders(few, n, reach, most, draw)]
        owner = assign(rows, centre, basis, chosen_few, progress)
        used, owner = owner.unique(return_inverse=True)
        shuffled = torch.randperm(n, generator=draw)
        order = shuffled[owner[shuffled].argsort(stable=True)]
        ends = owner.bincount(minlength=len(used)).cumsum(0).tolist()
        sorted_rows = _gathered(rows, order)
        log_weights = (weights.double() / weights.double().sum()).log()[order]
        found: list[Measured] = []
        for begin, end in tqdm(list(pairwise([0, *ends])), desc="measure", unit="cluster", disable=not progress):
            parts, ahead = split(sorted_rows[begin:end], log_weights[begin:end], most - len(ends) + 1)
            most -= len(parts) - 1
            found += parts
            for some in (sorted_rows, log_weights, order):
                some[begin:end] = some[begin:end][ahead]
        moments = {name: torch.stack([each.entries[name] for each in found]) for name in MOMENTS}
        offset = torch.cat([each.offset for each in found])
        sure = torch.stack([each.uneven.sum() for each in found])
        starts = torch.tensor([0, *(len(each.offset) for each in found)]).cumsum(0)
        return cls(
            rows=sorted_rows,
            log_weights=log_weights,
            offset=offset,
            order=order,
            starts=starts,
            sure=sure,
            centre=centre,
            basis=basis,
            **_projected(moments["centroid"], centre, basis),
            lot=torch.rand(len(found), generator=draw, dtype=torch.float64),
            log_total=math.log(float(weights.double().sum())),
            scale=math.sqrt(_energy(sorted_rows, log_weights)),
            **moments,
        )

    def __len__(self) -> int:
        return len(self.centroid)

    def without(self, rows: Tensor) -> "Partition":
        """The same without some rows, named by where they were before: they stay, with no weight.

        Cost: a copy of the weights, and of what is known of every cluster; the clusters concerned are measured again.
        """
        if not len(rows):
            return self
        position = self._position[rows.unique()]
        log_weights = self.log_weights.index_fill(0, position, -math.inf)
        changed = {name: getattr(self, name).clone() for name in MOMENTS}
        offset, sure = self.offset.clone(), self.sure.clone()
        for cluster in (torch.searchsorted(self.starts, position, right=True) - 1).unique().tolist():
            span = slice(int(self.starts[cluster]), int(self.starts[cluster + 1]))
            left = log_weights[span] > -math.inf
            changed["log_mass"][cluster] = -math.inf  # unless something is left
            if bool(left.any()):
                found = measured(self.rows[span][left], log_weights[span][left])
                offset[span] = offset[span].masked_scatter(left, found.offset)
                if bool(torch.zeros_like(left).masked_scatter(left, found.uneven)[sure[cluster] :].any()):
                    sure[cluster] = len(left)  # now the random order has uneven rows in it
                for name, value in found.entries.items():
                    changed[name][cluster] = value
        changed |= _projected(changed["centroid"], self.centre, self.basis)
        gone = _energy(self.rows[position], self.log_weights[position])
        share = float(log_weights.logsumexp(0).exp())
        scale = math.sqrt(max(0.0, self.scale**2 * math.exp(self.log_alive) - gone) / share) if share else self.scale
        return replace(self, log_weights=log_weights, offset=offset, sure=sure, scale=scale, **changed)

    @cached_property
    def log_alive(self) -> float:
        """Logarithm of the share of the weights that is still there."""
        return float(self.log_mass.logsumexp(0))

    @cached_property
    def furthest(self) -> float:
        """Largest distance of a row from the centre, or more."""
        return float((self.centroid.double() - self.centre).norm(dim=1).add(self.radius).max())

    @cached_property
    def _position(self) -> Tensor:
        return self.order.argsort()

    @cached_property
    def table(self) -> "Table":
        """The clusters as arrays."""
        return Table.of(self)


class Table(NamedTuple):
    """A partition as the arrays that the kernels of :mod:`steerclear.negation.index.bounds` take; ``(M,)`` unless said
    otherwise.

    Args:
        centroid: Cut into chunks, ``(M, chunks, width)``.
        log_weights, offset: Of the rows, ``(n,)``.
        centre, seen: As of the partition, ``(D,)`` and ``(M, k)``; ``basis`` the other way round, ``(k, D)``.
        seen_squared: Squared norms of the centroids along the leading directions.
        norm: Distance of the centroids from the centre.
        unseen, log_mass, spread, radius, widest, unevenness, lot, sure: As of the partition.
        even: Variance along a direction that has nothing to do with the rows, if none is special: ``v / D``.
        typical: Standard deviation along such a direction, to plan by: the same where the rows look like noise around
            the centroid, ``sqrt(widest)`` where they do not.
        starts: ``(M + 1,)``.
    """

    centroid: Any
    log_weights: Any
    offset: Any
    centre: Any
    basis: Any
    seen: Any
    seen_squared: Any
    norm: Any
    unseen: Any
    log_mass: Any
    spread: Any
    radius: Any
    widest: Any
    unevenness: Any
    even: Any
    typical: Any
    lot: Any
    sure: Any
    starts: Any

    @classmethod
    def of(cls, cut: Partition) -> "Table":
        from steerclear.negation.fused import chunked  # it needs Numba, and cutting does not

        seen_squared = cut.seen.double().square().sum(1)
        names = ("unseen", "log_mass", "spread", "radius", "widest", "unevenness", "lot")
        return cls(
            centroid=chunked(cut.centroid),
            log_weights=cut.log_weights.numpy(),
            offset=cut.offset.numpy(),
            centre=cut.centre.numpy(),
            basis=cut.basis.T.contiguous().numpy(),
            seen=cut.seen.numpy(),
            seen_squared=seen_squared.numpy(),
            norm=(seen_squared + cut.unseen.square()).sqrt().numpy(),
            even=(cut.spread / cut.centroid.shape[1]).numpy(),
            typical=_typical(cut).numpy(),
            sure=cut.sure.numpy(),
            starts=cut.starts.numpy(),
            **{name: getattr(cut, name).double().numpy() for name in names},
        )


def _gathered(rows: Tensor, order: Tensor) -> Tensor:
    """The rows in that order, in a precision that the kernels read: float64 becomes float32."""
    dtype = torch.float32 if rows.dtype == torch.float64 else rows.dtype
    return torch.cat([rows[part].to(dtype) for part in order.split(BLOCK)])


def _energy(rows: Tensor, log_weights: Tensor) -> float:
    """Weighted sum of squared norms."""
    norms = torch.cat([part.float().square().sum(1) for part in rows.split(BLOCK)])
    return float(norms.double() @ log_weights.exp())


def _typical(cut: Partition) -> Tensor:
    """See :class:`Table`; works that share a cluster vary along some direction, or more than other clusters do."""
    dim = cut.centroid.shape[1]
    usual = cut.spread[cut.spread > 0].median() if bool((cut.spread > 0).any()) else cut.spread.new_zeros(())
    noise = like_noise(cut.widest, cut.spread, cut.starts.diff(), dim) & (cut.spread <= 4 * usual)
    return torch.where(noise, cut.spread / dim, cut.widest).sqrt()


def _projected(centroid: Tensor, centre: Tensor, basis: Tensor) -> dict[str, Tensor]:
    away = centroid - centre
    seen = away @ basis
    missed = away.double().square().sum(1) - seen.double().square().sum(1)
    return {"seen": seen, "unseen": missed.clamp_min(0).sqrt()}

r"""A big set cut into clusters of near-duplicates, with what bounds need to know of each.

Rows are put in the order of their clusters, so that a cluster is read in one go. Of cluster :math:`C` with weights
:math:`w` and members :math:`y = c + u`, means over the weights:

=============  ===============================================================================================
``centroid``   :math:`c`, so that :math:`E_C[u] = 0`
``log_mass``   :math:`\log \sum_C w / \sum w`
``spread``     :math:`v = E_C\lVert u\rVert^2`
``radius``     :math:`\max_C \lVert u\rVert`
``widest``     :math:`\lambda`, the largest eigenvalue of :math:`E_C[u u^\top]`: variance along any one direction
``unevenness`` :math:`\kappa`, the standard deviation of :math:`\lVert u\rVert^2`
=============  ===============================================================================================

Within a cluster come first the few rows that count for more than :data:`UNEVEN` average ones, by their weight or their
distance, then the others in random order: the first, and any number of those after them, are a sample of the cluster.

Centres are chosen by leaders: a row that is further than ``reach`` from every centre so far becomes one. That bounds
radii directly, needs one pass over a sample, and finds copies of one picture however unequal their numbers are.
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

COMPONENTS = 64
SAMPLE = 1 << 16
BLOCK = 1 << 14
PIECE = 1 << 10
#: Beyond that many members and dimensions an eigenvalue costs too much: the trace bounds it, too.
LARGEST = 2048
#: Growth of the number of centres, when their reach shrinks by a half octave, that counts as none.
FLAT = 1.02
MOST = 1 << 14
#: A row that counts for more than so many average ones of its cluster is in every sample of it: left to chance, it
#: would be missing from most samples, and their standard errors would not know.
UNEVEN = 4.0
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
        basis: Orthonormal directions of largest variance, ``(D, k)``.
        seen: Centroids along them, ``(M, k)``.
        unseen: Norm of what they miss of each centroid, ``(M,)``.
        lot: Uniform in [0, 1), drawn once: which clusters a sample of few rows is taken from, ``(M,)``.
        scale: Root mean square norm of the rows.
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
        basis = _directions(sample - centre, min(COMPONENTS, n, rows.shape[1]))
        few = (sample - centre) @ basis
        leaders = few[_leaders(few, n, reach, most, draw)]
        owner = _assign(rows, centre, basis, leaders, progress)
        used, owner = owner.unique(return_inverse=True)
        shuffled = torch.randperm(n, generator=draw)
        order = shuffled[owner[shuffled].argsort(stable=True)]
        starts = torch.cat([torch.zeros(1, dtype=torch.long), owner.bincount(minlength=len(used)).cumsum(0)])
        sorted_rows = _gathered(rows, order)
        log_weights = (weights.double() / weights.double().sum()).log()[order]
        spans = tqdm(list(pairwise(starts.tolist())), desc="measure", unit="cluster", disable=not progress)
        found = [_moments(sorted_rows[begin:end], log_weights[begin:end]) for begin, end in spans]
        moments = {name: torch.stack([entries[name] for entries, _, _ in found]) for name in MOMENTS}
        offset = torch.cat([away for _, away, _ in found])
        sure = torch.stack([uneven.sum() for _, _, uneven in found])
        for cluster in sure.nonzero().flatten().tolist():
            span = slice(int(starts[cluster]), int(starts[cluster + 1]))
            ahead = found[cluster][2].logical_not().argsort(stable=True)
            for some in (sorted_rows, log_weights, offset, order):
                some[span] = some[span][ahead]
        norms = torch.cat([part.float().square().sum(1) for part in sorted_rows.split(BLOCK)])
        return cls(
            rows=sorted_rows,
            log_weights=log_weights,
            offset=offset,
            order=order,
            starts=starts,
            sure=sure,
            basis=basis,
            **_projected(moments["centroid"], basis),
            lot=torch.rand(len(used), generator=draw, dtype=torch.float64),
            log_total=math.log(float(weights.double().sum())),
            scale=float((norms.double() * log_weights.exp()).sum().sqrt()),
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
        position = self._position[rows]
        log_weights = self.log_weights.index_fill(0, position, -math.inf)
        changed = {name: getattr(self, name).clone() for name in MOMENTS}
        offset, sure = self.offset.clone(), self.sure.clone()
        for cluster in (torch.searchsorted(self.starts, position, right=True) - 1).unique().tolist():
            span = slice(int(self.starts[cluster]), int(self.starts[cluster + 1]))
            left = log_weights[span] > -math.inf
            changed["log_mass"][cluster] = -math.inf  # unless something is left
            if bool(left.any()):
                entries, away, uneven = _moments(self.rows[span][left], log_weights[span][left])
                offset[span] = offset[span].masked_scatter(left, away)
                if bool(torch.zeros_like(left).masked_scatter(left, uneven)[sure[cluster] :].any()):
                    sure[cluster] = len(left)  # now the random order has uneven rows in it
                for name, value in entries.items():
                    changed[name][cluster] = value
        changed |= _projected(changed["centroid"], self.basis)
        return replace(self, log_weights=log_weights, offset=offset, sure=sure, **changed)

    @cached_property
    def log_alive(self) -> float:
        """Logarithm of the share of the weights that is still there."""
        return float(self.log_mass.logsumexp(0))

    @cached_property
    def _position(self) -> Tensor:
        return self.order.argsort()

    @cached_property
    def table(self) -> "Table":
        """The clusters as arrays."""
        return Table.of(self)


class Table(NamedTuple):
    """A partition as the arrays that :mod:`steerclear.negation.bounds` computes with; ``(M,)`` unless said otherwise.

    Args:
        rows, centroid: Cut into chunks for the kernels.
        log_weights, offset: Of the rows.
        seen_squared: Squared norms of the centroids along the leading directions.
        unseen, log_mass, spread, radius, widest, unevenness: As of the partition.
        norm: Of the centroids.
        typical: Standard deviation of the rows along a direction that has nothing to do with them: ``sqrt(v / D)``
            where they look like noise around the centroid, ``sqrt(widest)`` where they do not.
        lot, sure: As of the partition.
        starts: ``(M + 1,)``.
        count: Rows of each.
        furthest: The largest norm of any row.
    """

    rows: Any
    centroid: Any
    log_weights: Any
    offset: Any
    seen_squared: Any
    unseen: Any
    log_mass: Any
    spread: Any
    radius: Any
    widest: Any
    unevenness: Any
    norm: Any
    typical: Any
    lot: Any
    sure: Any
    starts: Any
    count: Any
    furthest: float

    @classmethod
    def of(cls, cut: Partition) -> "Table":
        from steerclear.negation.fused import chunked  # it needs Numba, and cutting does not

        norm = cut.centroid.double().norm(dim=1)
        names = ("unseen", "log_mass", "spread", "radius", "widest", "unevenness")
        return cls(
            rows=chunked(cut.rows),
            centroid=chunked(cut.centroid),
            log_weights=cut.log_weights.numpy(),
            offset=cut.offset.numpy(),
            seen_squared=cut.seen.double().square().sum(1).numpy(),
            norm=norm.numpy(),
            typical=_typical(cut).numpy(),
            lot=cut.lot.numpy(),
            sure=cut.sure.numpy(),
            starts=cut.starts.numpy(),
            count=cut.starts.diff().numpy(),
            furthest=float((norm + cut.radius).max()),
            **{name: getattr(cut, name).double().numpy() for name in names},
        )


def _directions(centred: Tensor, count: int) -> Tensor:
    """Orthonormal directions of largest variance, ``(D, count)``."""
    basis: Tensor = torch.svd_lowrank(centred, q=min(count + 8, *centred.shape), niter=2)[2]
    return torch.linalg.qr(basis[:, :count])[0]


def _leaders(few: Tensor, n: int, reach: float | None, most: int, draw: torch.Generator) -> Tensor:
    """Rows of the sample that are centres: at most ``most``, none within ``reach`` of another.

    Without a reach: where copies of works are apart from other works, the number of centres hardly depends on it over a
    long stretch. That number is taken; if there is no such stretch, the smallest reach that keeps within ``8 sqrt(n)``.
    """
    order = torch.randperm(len(few), generator=draw)
    few = few[order]
    if reach is not None:
        return order[_within(few, reach, len(few))]
    widest = float((few - few.mean(0)).norm(dim=1).max()) * 2 + 1e-12
    found: list[Tensor] = []
    for halvings in range(24):
        found.append(_within(few, widest * 2.0 ** (-halvings / 2), most + 1))
        if len(found[-1]) > most:
            found.pop()
            break
    flat = [k for k in range(1, len(found)) if len(found[k]) <= FLAT * len(found[k - 1]) and len(found[k]) > 1]
    few_enough = [each for each in found if len(each) <= math.ceil(8 * math.sqrt(n))] or [torch.arange(1)]
    return order[found[flat[-1]] if flat else few_enough[-1]]


def _within(few: Tensor, reach: float, most: int) -> Tensor:
    """Greedily, indices of rows that are further than ``reach`` from every one before; stops at ``most``."""
    chosen: list[Tensor] = []
    for start in range(0, len(few), 2048):
        block = few[start : start + 2048]
        fresh = torch.ones(len(block), dtype=torch.bool)
        if chosen:
            fresh = torch.cdist(block, few[torch.cat(chosen)]).amin(1) > reach
        left = fresh.nonzero().flatten()
        near = torch.cdist(block[left], block[left]) <= reach
        taken: list[int] = []
        covered = torch.zeros(len(left), dtype=torch.bool)
        for i in range(len(left)):
            if not covered[i]:
                taken.append(i)
                covered |= near[i]
        chosen.append(start + left[taken])
        if sum(map(len, chosen)) >= most:
            break
    return torch.cat(chosen)[:most]


def _assign(rows: Tensor, centre: Tensor, basis: Tensor, leaders: Tensor, progress: bool) -> Tensor:
    """The nearest leader of every row, as the leading directions see it."""
    half = leaders.square().sum(1) / 2
    owner: list[Tensor] = []
    with tqdm(total=len(rows), desc="assign", unit="row", unit_scale=True, disable=not progress) as bar:
        for part in rows.split(BLOCK):
            few = (part.float() - centre) @ basis
            owner.append((half - few @ leaders.T).argmin(1))
            bar.update(len(part))
    return torch.cat(owner)


def _gathered(rows: Tensor, order: Tensor) -> Tensor:
    """The rows in that order, in a precision that the kernels read: float64 becomes float32."""
    dtype = torch.float32 if rows.dtype == torch.float64 else rows.dtype
    return torch.cat([rows[part].to(dtype) for part in order.split(BLOCK)])


def _moments(members: Tensor, log_weights: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A cluster's entries of the table above, every row's distance from its centroid, and which rows are uneven."""
    log_mass = log_weights.logsumexp(0)
    share = (log_weights - log_mass).exp()
    # A float32 sum of many like summands is wrong by far more than a float32 number: in float64, or piece by piece.
    sums = (part @ some.double() for part, some in zip(share.split(PIECE), members.split(PIECE), strict=True))
    centroid = sum(sums, start=torch.zeros(members.shape[1], dtype=torch.float64)).float()
    u = members.float() - centroid
    squared = torch.cat([some.double().square().sum(1) for some in u.split(PIECE)])
    spread = (share * squared).sum()
    scaled = u * share.sqrt().float()[:, None]
    parts = [scaled.T] if len(u) <= u.shape[1] else scaled.split(PIECE)
    gram = sum((some.T @ some for some in parts), start=u.new_zeros(()))
    # The largest column sum bounds the largest eigenvalue, where finding it would take long.
    widest = torch.linalg.eigvalsh(gram)[-1] if len(gram) <= LARGEST else gram.abs().sum(1).max()
    entries = {
        "centroid": centroid,
        "log_mass": log_mass,
        "spread": spread,
        "radius": squared.max().sqrt(),
        "widest": widest.double() * (1 + 1e-3),
        "unevenness": (share * (squared - spread).square()).sum().sqrt(),
    }
    # Of what a row adds to sums over displacements, half goes by its distance and half by its weight alone.
    part = share * (squared / spread.clamp_min(1e-300) + 1.0) / 2
    return entries, squared.sqrt().float(), part * len(u) > UNEVEN


def _typical(cut: Partition) -> Tensor:
    """See :class:`Table`. Noise of that spread, seen in ``n`` rows, has a largest eigenvalue of about ``v/D (1 +
    sqrt(D / (n - 1)))^2``; works that share a cluster have a larger one, or more spread than other clusters."""
    dim = cut.centroid.shape[1]
    count = (cut.starts.diff() - 1).clamp_min(1)
    even = cut.spread / dim
    expected = even * (1 + (dim / count).sqrt()).square()
    usual = cut.spread[cut.spread > 0].median() if bool((cut.spread > 0).any()) else cut.spread.new_zeros(())
    noise = (cut.widest <= 2 * expected) & (cut.spread <= 4 * usual)
    return torch.where(noise, even, cut.widest).sqrt()


def _projected(centroid: Tensor, basis: Tensor) -> dict[str, Tensor]:
    seen = centroid @ basis
    missed = centroid.double().square().sum(1) - seen.double().square().sum(1)
    return {"seen": seen, "unseen": missed.clamp_min(0).sqrt()}

"""Which rows of a big set lie together: what :meth:`steerclear.negation.index.partition.Partition.of` cuts by.

Centres are chosen by leaders: a row that is further than ``reach`` from every centre so far becomes one. That bounds
radii directly, needs one pass over a sample, and finds copies of one picture however unequal their numbers are.
Pictures that resemble each other may lie in one cluster all the same; where its rows vary along one direction more than
noise would, it is split across that direction, again and again: of such a cluster no few rows speak for all.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

BLOCK = 1 << 14
PIECE = 1 << 10
#: Beyond that many members and dimensions an eigenvalue costs too much: the trace bounds it, too.
LARGEST = 2048
#: Growth of the number of centres, when their reach shrinks by a half octave, that counts as none.
FLAT = 1.02
#: A row that counts for more than so many average ones of its cluster is in every sample of it: left to chance, it
#: would be missing from most samples, and their standard errors would not know.
UNEVEN = 4.0


def directions(centred: Tensor, count: int) -> Tensor:
    """Orthonormal directions of largest variance, ``(D, count)``."""
    with torch.random.fork_rng(devices=[]):  # it draws at random
        torch.manual_seed(0)
        basis: Tensor = torch.svd_lowrank(centred, q=min(count + 8, *centred.shape), niter=2)[2]
    return torch.linalg.qr(basis[:, :count])[0]


def leaders(few: Tensor, n: int, reach: float | None, most: int, draw: torch.Generator) -> Tensor:
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


def assign(rows: Tensor, centre: Tensor, basis: Tensor, leaders: Tensor, progress: bool) -> Tensor:
    """The nearest leader of every row, as the leading directions see it."""
    half = leaders.square().sum(1) / 2
    owner: list[Tensor] = []
    with tqdm(total=len(rows), desc="assign", unit="row", unit_scale=True, disable=not progress) as bar:
        for part in rows.split(BLOCK):
            few = (part.float() - centre) @ basis
            owner.append((half - few @ leaders.T).argmin(1))
            bar.update(len(part))
    return torch.cat(owner)


class Measured(NamedTuple):
    """What is known of a cluster.

    Args:
        entries: As in the table of the module's docstring.
        offset: Distance of every row from the centroid, ``(n,)``.
        uneven: Which rows count for many, ``(n,)``.
    """

    entries: dict[str, Tensor]
    offset: Tensor
    uneven: Tensor


def measured(members: Tensor, log_weights: Tensor) -> Measured:
    """Of rows with these weights, of which not all are 0."""
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
    return Measured(entries, squared.sqrt().float(), part * len(u) > UNEVEN)


def split(members: Tensor, log_weights: Tensor, most: int) -> tuple[list[Measured], Tensor]:
    """Clusters that a cluster falls into, ``most`` of them at most, and the order that the rows have in them."""
    pending, found, orders = [torch.arange(len(members))], list[Measured](), list[Tensor]()
    while pending:
        rows = pending.pop()
        whole = measured(members[rows], log_weights[rows])
        noise = like_noise(whole.entries["widest"], whole.entries["spread"], torch.tensor(len(rows)), members.shape[1])
        if not noise and len(rows) <= LARGEST and len(found) + len(pending) + 1 < most:
            low = _lower(members[rows], log_weights[rows], whole.entries["centroid"])
            if low.any() and not low.all():
                pending += [rows[~low], rows[low]]
                continue
        ahead = whole.uneven.logical_not().argsort(stable=True)
        found.append(whole._replace(offset=whole.offset[ahead], uneven=whole.uneven[ahead]))
        orders.append(rows[ahead])
    return found, torch.cat(orders)


def _lower(members: Tensor, log_weights: Tensor, centroid: Tensor) -> Tensor:
    """Which rows are the lower of two parts that together vary least along the direction in which all vary most."""
    u = members.float() - centroid
    scaled = u * (log_weights - log_weights.max()).exp().sqrt().float()[:, None]
    along = (u @ directions(scaled, 1).squeeze(1)).double()
    order = along.argsort()
    weight = (log_weights - log_weights.max()).exp()[order]
    below, moment = weight.cumsum(0), (weight * along[order]).cumsum(0)
    # The variance between everything up to each row and the rest; the whole has a mean of 0.
    between = moment.square() / (below * (below[-1] - below)).clamp_min(1e-300)
    return torch.zeros(len(along), dtype=torch.bool).index_fill(0, order[: int(between[:-1].argmax()) + 1], True)


def like_noise(widest: Tensor, spread: Tensor, count: Tensor, dim: int) -> Tensor:
    """Whether no direction is special: noise of that spread, seen in ``n`` rows of ``D`` dimensions, has a largest
    eigenvalue of about ``v/D (1 + sqrt(D / (n - 1)))^2``. Two or three rows always look like it."""
    return widest <= 2 * spread / dim * (1 + (dim / (count - 1).clamp_min(1)).sqrt()).square()

r"""Projection of a point onto the complement of a union of balls, with an exact recheck.

Shields are balls :math:`B(z_k, r_k)` that a sample must not lie in. Pushing it out of each by itself and adding the
pushes up does not work where balls overlap: two pushes from opposite sides cancel, twenty pushes from near-duplicates
add up to twenty times what is needed. So the nearest point outside *all* of them is sought,

.. math:: \min_x \lVert x - x_0 \rVert^2 \quad \text{subject to} \quad \lVert x - z_k \rVert \ge r_k .

The constraint set is not convex. Around any point :math:`c` outside the balls it contains the half-spaces
:math:`\langle x - z_k, u_k \rangle \ge r_k`, :math:`u_k = (c - z_k)/\lVert c - z_k\rVert`, since a projection onto a
direction is never longer than the vector. So: project onto those half-spaces, which is a small convex problem, take the
result for the next :math:`c`, repeat. Every iterate is outside all balls and no further from :math:`x_0` than the one
before; what is found is a local solution.

Only inner products of the :math:`z_k - x_0` enter. With :math:`a` active balls the problem is solved in at most
:math:`a + 1` dimensions: their span, and one direction out of it, which is where a point between antipodal centres
escapes to. Balls that the result would newly enter become active, and it starts over.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerclear.negation.posterior import squared_distances

Array = NDArray[np.float64]
Shown = Callable[[Tensor], Tensor]

# Aim at least this much beyond the radius, relatively, so that rounding does not end inside; raised at every retry.
MARGIN = 1e-9
# Balls that become active in one round, deepest first; the others follow if the result still violates them.
TAKEN = 64
ROUNDS, REFINEMENTS = 48, 40
# Up to so many active balls the way straight out of their span is compared with the way out from where the sample is.
SMALL = 16


class Projection(NamedTuple):
    """Where a point went.

    Args:
        point: ``(D,)`` in the dtype that was asked for; the given one, bit for bit, if it was outside all balls.
        distance: To the nearest centre.
        slack: Smallest of distance minus radius over all balls, recomputed in float64 at ``point``; >= 0 is outside.
        active: Number of balls that had to be considered.
    """

    point: Tensor
    distance: float
    slack: float
    active: int


def project(point: Tensor, centres: Tensor, radii: Tensor, shown: Shown | None = None) -> Projection:
    """The nearest point outside all balls, as far as a local search finds it; ``slack`` says whether it did.

    Args:
        point: ``(D,)``, any floating dtype.
        centres: ``(n, D)``.
        radii: ``(n,)``, >= 0; a ball of radius 0 holds nothing.
        shown: What becomes of a sample afterwards, such as clamping and rounding to a picture; the recheck is about
            that. Without it the result is rounded to the dtype of ``point`` before the recheck.

    Cost:
        On the host, in float64: a distance to every centre per round, and ``O(active^2 D)`` for their inner products.
    """
    final = shown or (lambda x: x)
    z, r = centres.detach().cpu(), radii.detach().double().cpu()
    best = _checked(point, point, z, r, final, 0)
    if best.slack >= 0.0 or math.isnan(best.slack):
        return best
    x = final(point.detach().cpu()).double()
    distance = distances(x[None], z)[0]
    active = torch.zeros(len(z), dtype=torch.bool)
    margin = max(MARGIN, 0.1 * torch.finfo(point.dtype).eps)
    for _ in range(ROUNDS):
        fresh = ~(distance >= r) & ~active
        if bool(fresh.any()):
            active = active | _deepest(fresh, r - distance)
        else:
            margin *= 4.0 if margin < 1e-3 else 1.3  # every violated ball is active: what is left is rounding
        moved = outside(x, z[active].double(), r[active] * (1.0 + margin))
        if moved is None:
            break
        there = final(moved.to(point.dtype))
        distance = distances(there.double()[None], z)[0]
        found = _checked(there, point, z, r, final, int(active.sum()))
        best = found if found.slack > best.slack else best
        if best.slack >= 0.0:
            break
    return best


def nearest(point: Tensor, centres: Tensor, radii: Tensor, shown: Shown | None = None) -> Projection:
    """Where a point is, without moving it; arguments as for :func:`project`."""
    return _checked(point, point, centres.detach().cpu(), radii.detach().double().cpu(), shown or (lambda x: x), 0)


def _checked(point: Tensor, like: Tensor, centres: Tensor, radii: Tensor, final: Shown, active: int) -> Projection:
    """The verdict on one point, as it will be shown."""
    x = final(point.detach().cpu()).double()
    if not bool(x.isfinite().all()):
        return Projection(point, math.nan, math.nan, active)
    distance = distances(x[None], centres)[0]
    held = radii > 0.0
    slack = torch.where(held, distance - radii, math.inf)
    return Projection(point.to(like.device), _least(torch.where(held, distance, math.inf)), _least(slack), active)


def distances(x: Tensor, centres: Tensor) -> Tensor:
    """``(batch, n)`` Euclidean distances, in float64 by differences: nothing cancels."""
    if not len(centres):
        return x.new_zeros(len(x), 0)
    ones = torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
    return squared_distances(x, centres, ones).sqrt()


def outside(x: Tensor, centres: Tensor, radii: Tensor) -> Tensor | None:
    """The local solution for these balls alone, all of which count as active; ``None`` if no start leads anywhere.

    Args:
        x: ``(D,)``, float64, on the host.
        centres: ``(a, D)``.
        radii: ``(a,)``.
    """
    basis, points = _coordinates(x, centres)
    y = _least_move(points, radii.numpy())
    return None if y is None else x + torch.from_numpy(y) @ basis


def _least_move(points: Array, radii: Array) -> Array | None:
    """The shortest ``y`` found with ``|y - points_k| >= radii_k``, over a few starts."""
    best: Array | None = None
    for number, start in enumerate(_starts(points, radii)):
        if best is not None and (number > 1 or len(points) > SMALL):
            break
        y = _refined(start, points, radii)
        if y is not None and (best is None or y @ y < best @ best * (1.0 - 1e-6)):
            best = y
    return best


def _starts(points: Array, radii: Array) -> Iterator[Array]:
    """Points to linearise around: where the sample is; straight out of the centres' span; far away from each centre."""
    yield np.zeros(points.shape[1])
    distance = np.linalg.norm(points, axis=1)
    height = math.sqrt(max(0.0, float((radii**2 - distance**2).max())))
    free = np.flatnonzero(np.abs(points).max(axis=0) == 0.0)
    if len(free):
        out = np.zeros(points.shape[1])
        out[free[0]] = height * (1.0 + 1e-6)
        yield out
    far = float((radii + distance).max()) * (1.0 + 1e-6)
    order = np.argsort(distance - radii)[:4]
    for k in order:
        if distance[k] > 0.0:
            yield -far * points[k] / distance[k]
    if not len(free):
        for axis in np.eye(points.shape[1])[:3]:
            yield far * axis
            yield -far * axis


def _refined(start: Array, points: Array, radii: Array) -> Array | None:
    """Alternate between half-spaces around the last point and the projection onto them."""
    y, found = start, None
    for _ in range(REFINEMENTS):
        away = y - points
        length = np.linalg.norm(away, axis=1)
        if length.min() <= 1e-12 * radii.max():
            return found
        normals = away / length[:, None]
        new = _half_spaces(normals, radii + (normals * points).sum(1))
        if new is None or (np.linalg.norm(new - points, axis=1) - radii).min() < -1e-9 * radii.max():
            return found
        settled = found is not None and float(np.linalg.norm(new - found)) <= 1e-7 * float(np.linalg.norm(new))
        y = found = new
        if settled:
            break
    return found


def _half_spaces(normals: Array, bounds: Array) -> Array | None:
    r"""The shortest ``y`` with ``normals @ y >= bounds``, or ``None``: its dual is non-negative least squares.

    With :math:`E = (A^\top; b^\top)`, :math:`f = e_{m+1}` and :math:`u \ge 0` minimising :math:`|Eu - f|`, the
    residual :math:`\rho = Eu - f` vanishes if no point satisfies all; else :math:`y = -\rho_{1..m}/\rho_{m+1}`.
    """
    from scipy.optimize import nnls  # only where a sample is inside something

    if bounds.max() <= 0.0:
        return np.zeros(normals.shape[1])
    scale = float(np.abs(bounds).max())
    system = np.vstack([normals.T, bounds / scale])
    target = np.zeros(len(system))
    target[-1] = 1.0
    try:
        u, _ = nnls(system, target, maxiter=30 * system.shape[1] + 100)
    except RuntimeError:
        return None
    residual = system @ u - target
    return None if -residual[-1] <= 1e-10 else -residual[:-1] / residual[-1] * scale


def _coordinates(x: Tensor, centres: Tensor) -> tuple[Tensor, Array]:
    """An orthonormal basis ``(m, D)`` of the centres' span seen from ``x`` and one direction out of it; coordinates."""
    rows = centres - x
    _, values, basis = torch.linalg.svd(rows, full_matrices=False) if len(rows) > 1 else _single(rows)
    basis = basis[values > 1e-10 * values.max().clamp_min(1e-300)]
    points = rows @ basis.T
    extra = _out_of(basis, x)
    if extra is None:
        return basis, points.numpy()
    zeros = points.new_zeros(len(points), 1)
    return torch.cat([basis, extra[None]]), torch.cat([points, zeros], 1).numpy()


def _single(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    length = torch.linalg.vector_norm(rows, dim=1)
    return rows, length, rows / length.clamp_min(1e-300)


def _out_of(basis: Tensor, x: Tensor) -> Tensor | None:
    """A unit vector orthogonal to ``basis``: the sample's own direction if it has one, else a fixed random one."""
    if len(basis) >= len(x):
        return None
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(x), dtype=torch.float64, generator=generator)
    for vector in (x, noise):
        left = vector
        for _ in range(2):  # once more: what rounding left of the basis
            left = left - (left @ basis.T) @ basis
        length = torch.linalg.vector_norm(left)
        if bool(length > 1e-6 * torch.linalg.vector_norm(vector)) and bool(length > 0.0):
            return left / length
    return None


def _deepest(fresh: Tensor, depth: Tensor) -> Tensor:
    """The deepest of the violated balls, at most :data:`TAKEN`."""
    if int(fresh.sum()) <= TAKEN:
        return fresh
    kept = torch.where(fresh, depth, -math.inf).topk(TAKEN).indices
    return torch.zeros_like(fresh).index_fill(0, kept, True)


def _least(values: Tensor) -> float:
    return float(values.min()) if len(values) else math.inf

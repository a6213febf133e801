r"""The exact posterior of a weighted Dirac mixture behind Gaussian noise, in one pass over the points.

A finite set of points *is* a distribution, :math:`p(x_0) = \sum_n \bar w_n \delta(x_0 - y_n)`, and behind
:math:`q(x_t \mid x_0) = N(\alpha x_0, \sigma^2 I)` it has the closed form

.. math:: \log q(x_t) = \log\sum_n \exp(\ell_n) - \tfrac D2 \log(2\pi\sigma^2), \qquad
    \ell_n = \log\bar w_n - \frac{\lVert x_t - \alpha y_n\rVert^2}{2\sigma^2}, \qquad
    E[x_0 \mid x_t] = \sum_n \operatorname{softmax}(\ell)_n\, y_n

Both sums are taken block by block with a running maximum :math:`m` (online log-sum-exp): when a block raises it to
:math:`m'`, what was summed so far is multiplied by :math:`e^{m - m'}`. So points are read once for the whole batch, in
the precision in which they are stored, wherever they are: in memory, in a mapped file, on an accelerator.
"""

import math
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from steerclear.errors import InvalidInput
from steerclear.noise import NoiseLevel

# Below this scale a Gaussian is a point for any latent in floating point; it keeps sigma = 0 finite.
SIGMA_FLOOR = 1e-12
# From this sigma on, ‖x‖² - 2α⟨x,y⟩ + α²‖y‖² in float64 loses less than 1e-5 nats for norms up to 1e4.
EXPAND_FROM = 1e-2
# Elements of one block: fits the cache of a CPU; on an accelerator, launches would dominate.
CPU_BLOCK, ACCELERATOR_BLOCK = 1 << 19, 1 << 24
EXPAND_BLOCK = 1 << 17
# Rows that float32 adds up to 1e-5 even if all are alike.
LONG = 1024


class Posterior(NamedTuple):
    """What a set of points says about ``x_t``.

    Args:
        mean: ``(batch, *shape)``; float32, or float64 if ``x_t`` is.
        log_evidence: ``(batch,)`` in nats; float64 wherever the device has it, because differences of two such values
            matter and each is of the order of the number of dimensions.
    """

    mean: Tensor
    log_evidence: Tensor


def posterior(
    x_t: Tensor, points: Tensor, weights: Tensor, level: NoiseLevel, *, block: int | None = None
) -> Posterior:
    r"""Exact posterior mean and log-evidence (equations in the module's docstring).

    Args:
        x_t: Noisy samples, ``(batch, *shape)``, any floating dtype. A row that is not finite gets a mean of NaN.
        points: Clean points :math:`y_n`, ``(n, *shape)``, in float16, bfloat16, float32 or float64.
        weights: Any scale, ``(n,)``, >= 0, at least one above 0; the row of a weight of 0 does not count.
        level: Alpha and sigma: numbers, or tensors with one element, or with one per sample. Samples with levels of
            their own let one pass answer several questions.
        block: Elements per temporary of the tensor operations; the result does not depend on it, beyond rounding.

    Raises:
        InvalidInput: For a level per pixel or token.

    Cost:
        One pass over the points; ``3·batch·n·D`` operations, ``O(batch·D + block)`` memory. No host synchronisation.
        On a CPU with ``steerclear[fast]`` compiled kernels do it (:mod:`steerclear.negation.fused`), else tensor
        operations; ``benchmarks/posterior.py`` has both.
    """
    work = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    x, alpha, precision, constant = scaled(x_t, level)
    w = weights.to(x)
    log_weights = (w / w.sum()).log()
    known = isinstance(level.sigma, float | int) and level.sigma >= EXPAND_FROM
    expand = known and x.device.type == "cpu" and work is torch.float32
    sums = _operator if torch.compiler.is_compiling() else _sums
    mean, total = sums(x if expand else x.to(work), points.flatten(1), alpha, precision, log_weights, expand, block)
    return Posterior(mean.to(work).reshape(x_t.shape), total - constant)


def scaled(x_t: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The kernel's exponent as :math:`-p \lVert x - a y\rVert^2`: ``x (batch, D)``, ``a`` and ``p (batch, 1)``, and
    :math:`\tfrac D2 \log(2\pi\sigma^2)`, ``(batch,)``.

    Everything is divided by max(sigma, 1) first, which keeps squares finite in float32 for every sigma it can hold.
    """
    x, wide = x_t.flatten(1), accumulator(x_t.device)
    alpha, sigma = (column("posterior", v, x, wide) for v in (level.alpha, level.sigma))
    sigma = sigma.clamp(min=SIGMA_FLOOR)
    unit = sigma.clamp(min=1.0)
    constant = x.shape[1] * (math.log(2 * math.pi) / 2 + sigma.log().squeeze(1))
    return x.to(wide) / unit, alpha / unit, (unit / sigma).square() / 2, constant


def squared_distances(x: Tensor, y: Tensor, alpha: Tensor, *, block: int | None = None, fast: bool = False) -> Tensor:
    r""":math:`\lVert x_b - \alpha_b y_n\rVert^2`, ``(batch, n)``.

    Differences are taken before squaring and summed in float64: expanding the square would cancel, and at 16 384
    dimensions a float32 sum is wrong by whole nats once it is divided by a small variance.

    Args:
        x: ``(batch, D)``.
        y: ``(n, D)``, any floating dtype.
        alpha: ``(batch, 1)``.
        block: Elements per temporary.
        fast: Differences may be rounded to float32; on CPUs without compiled kernels, squares may be expanded.

    Cost: one pass over ``y``; ``O(batch·n)`` memory.
    """
    if (fused := _compiled(x.float() if fast else x, y)) is not None:
        return fused.squared_distances(x.float(), y, alpha.squeeze(1))
    if fast and x.device.type == "cpu":
        return _expanded(x.double(), y, alpha.double(), block=block or EXPAND_BLOCK)
    block = block or _block_of(x)
    (batch, dim), n, wide = x.shape, y.shape[0], accumulator(x.device)
    columns = min(dim, block)
    rows = max(1, min(n, block // columns))
    samples = max(1, min(batch, block // (columns * rows)))
    parts: list[Tensor] = []
    for some in _slices(batch, samples):
        row: list[Tensor] = []
        for few in _slices(n, rows):
            total = x.new_zeros((), dtype=wide)
            for part in _slices(dim, columns):
                total = total + _block(x[some, part], y[few, part].to(x), alpha[some].to(x), wide)
            row.append(total)
        parts.append(torch.cat(row, 1))
    return torch.cat(parts)


def _expanded(x: Tensor, y: Tensor, alpha: Tensor, *, block: int) -> Tensor:
    """The same by matrix products in float64, for scales at which nothing cancels."""
    own = x.square().sum(1, keepdim=True)
    parts: list[Tensor] = []
    for few in _slices(y.shape[0], max(1, block // y.shape[1])):
        points = y[few].to(x.dtype)
        parts.append(own - 2 * alpha * (x @ points.T) + alpha.square() * points.square().sum(1))
    return torch.cat(parts, 1).clamp(min=0.0)


def _sums(
    x: Tensor, y: Tensor, alpha: Tensor, precision: Tensor, log_weights: Tensor, expand: bool, block: int | None
) -> tuple[Tensor, Tensor]:
    r"""Mean ``(batch, D)`` and log-sum-exp ``(batch,)`` of :math:`\log w_n - \text{precision}_b \lVert x_b - \alpha_b
    y_n\rVert^2`, by the compiled kernels where they serve, else by tensor operations."""
    narrow = x.float() if expand else x
    if (fused := _compiled(narrow, y)) is not None:
        return fused.scan(narrow, y, alpha.squeeze(1), precision.squeeze(1), log_weights)
    block = block or (EXPAND_BLOCK if expand else _block_of(x))
    top = torch.full_like(alpha, -math.inf)
    total, mean = torch.zeros_like(top), torch.zeros_like(x, dtype=top.dtype)
    for few in _slices(y.shape[0], max(1, block // y.shape[1])):
        points = y[few].to(x.dtype)
        logits = log_weights[few] - precision * squared_distances(x, points, alpha, block=block, fast=expand)
        higher = torch.maximum(top, logits.amax(1, keepdim=True))
        finite = torch.where(higher == -math.inf, torch.zeros_like(higher), higher)
        shrink, weights = (top - finite).exp(), (logits - finite).exp()
        total = total * shrink + weights.sum(1, keepdim=True)
        if len(points) > LONG and x.device.type == "cpu":
            points = points.double()
        mean = mean * shrink + weights.to(points.dtype) @ points
        top = higher
    return mean / total, (top + total.log()).squeeze(1)


# One opaque operation for torch.compile, which would otherwise unroll the loop over blocks.
_operator = library.custom_op("steerclear::posterior", _sums, mutates_args=())


@_operator.register_fake
def _(
    x: Tensor, y: Tensor, alpha: Tensor, precision: Tensor, log_weights: Tensor, expand: bool, block: int | None
) -> Any:  # noqa: ANN401
    return torch.empty_like(x, dtype=alpha.dtype), x.new_empty(x.shape[0], dtype=alpha.dtype)


def _compiled(x: Tensor, y: Tensor) -> Any:  # noqa: ANN401 - a module that is there only with Numba
    """The compiled kernels, if they are installed and serve these."""
    fused = _fused()
    return fused if fused is not None and fused.fits(x, y) else None


@cache
def _fused() -> Any:  # noqa: ANN401
    return import_module("steerclear.negation.fused") if find_spec("numba") else None


def _block(x: Tensor, y: Tensor, alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """One block of :func:`squared_distances`. In few dimensions, planes are summed: short rows are slow to reduce."""
    if x.shape[1] > 8:
        return (x[:, None] - alpha[:, None] * y).square().sum(-1, dtype=dtype)
    planes = [(x[:, None, j] - alpha * y[None, :, j]).to(dtype).square() for j in range(x.shape[1])]
    return torch.stack(planes).sum(0) if len(planes) > 2 else sum(planes[1:], planes[0])


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _block_of(x: Tensor) -> int:
    return CPU_BLOCK if x.device.type == "cpu" else ACCELERATOR_BLOCK


def accumulator(device: torch.device) -> torch.dtype:
    """The dtype of sums and logits: float64, except on Apple's MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def column(who: str, value: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A level's coefficient as ``(batch, 1)`` for ``x (batch, D)``.

    Raises:
        InvalidInput: For values per pixel or token, in the name of ``who``.
    """
    if not isinstance(value, Tensor):
        return torch.full((x.shape[0], 1), value, dtype=dtype, device=x.device)  # a copy from the host would wait
    values = value.to(x.device, dtype).reshape(-1, 1)
    if values.shape[0] not in (1, x.shape[0]):
        raise InvalidInput(
            f"{who}: expected one noise level, or one per sample ({x.shape[0]}), got {values.shape[0]} values; "
            "levels per pixel or token have no single kernel"
        )
    return values.expand(x.shape[0], 1)

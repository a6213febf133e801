r"""The exact posterior of a weighted Dirac mixture behind Gaussian noise.

A finite set of points *is* a distribution, :math:`p(x_0) = \sum_n \bar w_n \delta(x_0 - y_n)`, and behind
:math:`q(x_t \mid x_0) = N(\alpha x_0, \sigma^2 I)` it has the closed form

.. math:: \log q(x_t) = \log\sum_n \exp(\ell_n) - \tfrac D2 \log(2\pi\sigma^2), \qquad
    \ell_n = \log\bar w_n - \frac{\lVert x_t - \alpha y_n\rVert^2}{2\sigma^2}, \qquad
    E[x_0 \mid x_t] = \sum_n \operatorname{softmax}(\ell)_n\, y_n
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from steerclear.errors import InvalidInput
from steerclear.noise import NoiseLevel

# Below this scale a Gaussian is a point for any latent in floating point; it keeps sigma = 0 finite.
SIGMA_FLOOR = 1e-12
# From this sigma on, ‖x‖² - 2α⟨x,y⟩ + α²‖y‖² in float64 loses less than 1e-5 nats for norms up to 1e4.
EXPAND_FROM = 1e-2
EXPAND_BLOCK = 1 << 17
# Elements of one block of differences: fits the cache of a CPU; on an accelerator, launches would dominate.
CPU_BLOCK, ACCELERATOR_BLOCK = 1 << 19, 1 << 24


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
    x_t: Tensor,
    points: Tensor,
    weights: Tensor,
    level: NoiseLevel,
    *,
    temperature: float = 1.0,
    block: int | None = None,
) -> Posterior:
    r"""Exact posterior mean and log-evidence (equations in the module's docstring).

    With a temperature :math:`T`, :math:`\ell_n / T` takes the place of :math:`\ell_n` in both; for equal weights this
    is a kernel of variance :math:`T\sigma^2`, and the constant stays that of :math:`\sigma`.

    Args:
        x_t: Noisy samples, ``(batch, *shape)``, any floating dtype. A row that is not finite gets a row of NaN.
        points: Clean points :math:`y_n`, ``(n, *shape)``.
        weights: Positive, any scale, ``(n,)``.
        level: Alpha and sigma: numbers, or tensors with one element, or with one per sample.
        temperature: :math:`T > 0`.
        block: Elements per temporary; the result does not depend on it, beyond rounding.

    Raises:
        InvalidInput: For a temperature that is not positive, or a level per pixel or token.

    Cost:
        ``3·batch·n·D`` operations; ``O(batch·n + block)`` memory. No host synchronisation.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise InvalidInput(f"posterior: expected a finite temperature > 0, got {temperature}")
    wide = _accumulator(x_t.device)
    work = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    block = block or (CPU_BLOCK if x_t.device.type == "cpu" else ACCELERATOR_BLOCK)
    x, y = x_t.flatten(1).to(work), points.flatten(1)
    alpha, sigma = (_column(v, x, wide) for v in (level.alpha, level.sigma))
    sigma = sigma.clamp(min=SIGMA_FLOOR)
    # Dividing by max(sigma, 1) first keeps the squares finite in float32 for every sigma that float32 can hold.
    unit = sigma.clamp(min=1.0)
    known = isinstance(level.sigma, float | int) and level.sigma >= EXPAND_FROM
    if known and x.device.type == "cpu" and work is torch.float32:
        distance = expanded_distances(x.to(wide) / unit, y, alpha / unit)
    else:
        distance = squared_distances((x.to(wide) / unit).to(x.dtype), y, (alpha / unit).to(x.dtype), block=block)
    w = weights.to(x.device, wide)
    logits = ((w / w.sum()).log() - distance * (unit / sigma).square() / 2) / temperature
    constant = x.shape[1] * (math.log(2 * math.pi) / 2 + sigma.log().squeeze(1))
    mean = _average(logits.softmax(1).to(x.dtype), y, block=block)
    return Posterior(mean.reshape(x_t.shape), logits.logsumexp(1) - constant)


def squared_distances(x: Tensor, y: Tensor, alpha: Tensor, *, block: int) -> Tensor:
    r""":math:`\lVert x_b - \alpha_b y_n\rVert^2`, ``(batch, n)``, with ``x (batch, D)``, ``y (n, D)``, ``alpha``.

    Differences are taken before squaring and summed in float64: expanding the square would cancel, and at 16 384
    dimensions a float32 sum is wrong by whole nats once it is divided by a small variance.
    """
    (batch, dim), n, wide = x.shape, y.shape[0], _accumulator(x.device)
    columns = min(dim, block)
    rows = max(1, min(n, block // columns))
    samples = max(1, min(batch, block // (columns * rows)))
    parts: list[Tensor] = []
    for some in _slices(batch, samples):
        row: list[Tensor] = []
        for few in _slices(n, rows):
            total = x.new_zeros((), dtype=wide)
            for part in _slices(dim, columns):
                total = total + _block(x[some, part], y[few, part].to(x), alpha[some], wide)
            row.append(total)
        parts.append(torch.cat(row, 1))
    return torch.cat(parts)


def expanded_distances(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """The same by matrix products in float64: for CPUs, which are fast at it, and scales at which nothing cancels.

    Args:
        x: ``(batch, D)`` in float64.
        y: ``(n, D)``, any dtype; converted a cache-sized block at a time.
        alpha: ``(batch, 1)`` in float64.
    """
    own = x.square().sum(1, keepdim=True)
    parts: list[Tensor] = []
    for few in _slices(y.shape[0], max(1, EXPAND_BLOCK // y.shape[1])):
        block = y[few].to(x.dtype)
        cross = alpha * (x @ block.T)
        parts.append(own - 2 * cross + alpha.square() * block.square().sum(1))
    return torch.cat(parts, 1).clamp(min=0.0)


def _block(x: Tensor, y: Tensor, alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """One block of :func:`squared_distances`. In few dimensions, planes are summed: short rows are slow to reduce."""
    if x.shape[1] > 8:
        return (x[:, None] - alpha[:, None] * y).square().sum(-1, dtype=dtype)
    planes = [(x[:, None, j] - alpha * y[None, :, j]).to(dtype).square() for j in range(x.shape[1])]
    return torch.stack(planes).sum(0) if len(planes) > 2 else sum(planes[1:], planes[0])


def _average(weights: Tensor, y: Tensor, *, block: int) -> Tensor:
    """``weights (batch, n) @ y (n, D)``, a block of rows of ``y`` at a time."""
    rows = max(1, block // y.shape[1])
    total = weights.new_zeros(weights.shape[0], y.shape[1])
    for few in _slices(y.shape[0], rows):
        total = total + weights[:, few] @ y[few].to(weights)
    return total


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _accumulator(device: torch.device) -> torch.dtype:
    """The dtype of sums and logits: float64, except on Apple's MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _column(value: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A level's coefficient as ``(batch, 1)``."""
    if not isinstance(value, Tensor):
        return torch.full((x.shape[0], 1), value, dtype=dtype, device=x.device)  # a copy from the host would wait
    column = value.to(x.device, dtype).reshape(-1, 1)
    if column.shape[0] not in (1, x.shape[0]):
        raise InvalidInput(
            f"posterior: expected one noise level, or one per sample ({x.shape[0]}), got {column.shape[0]} values; "
            "levels per pixel or token have no single kernel"
        )
    return column.expand(x.shape[0], 1)

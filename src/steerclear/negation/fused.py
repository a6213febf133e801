r"""The exact posterior in one pass over memory, for CPUs: ``pip install 'steerclear[fast]'``.

A CPU waits for memory here, not for arithmetic, so what counts is how often the set is read. Tensor operations read it
twice (distances, then the mean) and write temporaries in between. These kernels, compiled by Numba, take a handful of
rows into the cache, widen them in registers, and have done with them before the next ones come:

* distances by differences, in float32 over 512 dimensions at a time, chunks summed in float64;
* the running maximum, normaliser and mean of an online softmax, rescaled when the maximum rises;
* the mean of rows whose weight is below ``exp(-45)`` of the largest so far is not touched: at most noise levels
  that is nearly all of them, and what they add is below rounding;
* float32 partial means, folded into float64 every 1 024 rows.

Threads share nothing: each has a range of rows, and their results are merged by log-sum-exp.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerclear.negation import kernels

Sums = tuple[Any, Any, Any]

CHUNK = 512
#: Fewer products than that are not worth a thread of their own.
SHARE = 1 << 21
#: Smaller sets are left to tensor operations: compiling would take longer than they ever will.
LEAST = 1 << 20


def fits(x: Tensor, points: Tensor) -> bool:
    """Whether these kernels serve flat ``x (batch, D)`` and ``points (n, D)``; tensor operations serve the rest."""
    return (
        x.device.type == points.device.type == "cpu"
        and x.dtype == torch.float32
        and points.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and points.is_contiguous()
        and x.shape[0] > 0
        and x.shape[1] % 64 == 0
        and points.numel() >= LEAST
        and not (torch.is_grad_enabled() and (x.requires_grad or points.requires_grad))
    )


def scan(x: Tensor, points: Tensor, alpha: Tensor, precision: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and log-sum-exp of :math:`\ell_{bn} = \log w_n - \text{precision}_b \lVert x_b - \alpha_b y_n\rVert^2`.

    Args:
        x: ``(batch, D)``, float32; see :func:`fits`.
        points: ``(n, D)``.
        alpha: ``(batch,)``.
        precision: ``(batch,)``.
        log_weights: ``(n,)``; ``-inf`` for a row that does not count.

    Returns:
        ``(batch, D)`` and ``(batch,)``, both float64.
    """
    samples, rows = chunked(x), chunked(points)
    a, p = alpha.float().numpy(), precision.double().contiguous().numpy()
    log_w = log_weights.double().contiguous().numpy()
    starts = np.arange(0, len(rows), kernels.ROWS)
    blocks = np.stack([starts, np.minimum(len(rows) - starts, kernels.ROWS)], 1)

    def part(begin: int, end: int) -> Sums:
        sums = empty_sums(samples)
        kernels.scan(samples, a, p, rows, log_w, blocks[begin:end], *sums)
        return sums

    mean, total = merged(shared(part, len(blocks), x.numel() * kernels.ROWS))
    return torch.from_numpy(mean), torch.from_numpy(total)


def empty_sums(samples: Any) -> Sums:  # noqa: ANN401
    """For a thread to fill: weighted sums ``(batch, chunks, width)`` relative to ``exp(top)``, tops, total weights."""
    return np.empty(samples.shape), np.empty(len(samples)), np.empty(len(samples))


def merged(found: Sequence[Sums]) -> tuple[Any, Any]:
    """What several threads found, as one mean ``(batch, D)`` and the logarithm of all weights; NaN and ``-inf`` where
    there are none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.stack([np.log(total) + top for _, top, total in found])
        together = np.logaddexp.reduce(logs, 0)
        shrink = [np.where(total == 0.0, 0.0, np.exp(top - together)) for _, top, total in found]
        shrink = [np.where(together == -math.inf, math.nan, by) for by in shrink]
    means = [mean.reshape(len(mean), -1) * by[:, None] for (mean, _, _), by in zip(found, shrink, strict=True)]
    return sum(means[1:], means[0]), together


def squared_distances(x: Tensor, points: Tensor, alpha: Tensor) -> Tensor:
    r""":math:`\lVert x_b - \alpha_b y_n\rVert^2`, ``(batch, n)`` in float64; arguments as for :func:`scan`."""
    samples, rows, a = chunked(x), chunked(points), alpha.float().numpy()

    def part(begin: int, end: int) -> Any:  # noqa: ANN401
        out = np.empty((len(samples), min(end * kernels.ROWS, len(rows)) - begin * kernels.ROWS))
        kernels.distances(samples, a, rows[begin * kernels.ROWS : end * kernels.ROWS], out)
        return out

    found = shared(part, -(-len(rows) // kernels.ROWS), x.numel() * kernels.ROWS)
    return torch.from_numpy(np.concatenate(found, 1))


def chunked(flat: Tensor) -> Any:  # noqa: ANN401
    """``(n, D)`` as the array ``(n, D / width, width)`` that the kernels take; halves as their bits."""
    width = math.gcd(flat.shape[1], CHUNK)
    bits = {torch.float16: torch.uint16, torch.bfloat16: torch.int16}
    array = flat.detach().contiguous().view(bits.get(flat.dtype, flat.dtype)).numpy()
    return array.reshape(len(array), -1, width)


def threads(cost: int) -> int:
    """How many threads that many products are worth."""
    return max(1, min(torch.get_num_threads(), cost // SHARE))


def shared(part: Callable[[int, int], Any], count: int, cost: int) -> list[Any]:
    """``part`` of equal ranges of ``count`` things of ``cost`` products each, one range per thread that is worth it."""
    step = -(-count // threads(count * cost))
    return run([partial(part, begin, min(begin + step, count)) for begin in range(0, count, step)])


def run(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """All of them at the same time, the first in this thread."""
    others = [_pool(len(jobs)).submit(job) for job in jobs[1:]]
    return [jobs[0](), *(other.result() for other in others)]


@cache
def _pool(jobs: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(jobs, "steerclear-scan")

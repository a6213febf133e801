"""The loops that Numba compiles for :mod:`steerclear.negation.fused`: arrays in, arrays filled, no Python objects.

Samples and rows come as ``(n, chunks, width)``: squares are summed in float32 within a chunk, in float64 over chunks.
Rows are stored as float32, as the bits of float16 (uint16) or as the bits of bfloat16 (int16).
"""

# Numba types these by what they are called with.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportCallIssue=false, reportUntypedFunctionDecorator=false, reportPrivateUsage=false

import math
from contextlib import suppress
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

ROWS = 32
FOLD = 1024 // ROWS  # blocks of rows: 1024 equal summands in float32 are wrong by 1e-5 at the most
SPARE = 45.0
#: Reassociation and contraction are wanted, assumptions about NaN and infinity are not: both must come through.
_njit = njit(nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", cache=True)
_HERE = Path(__file__).parent
_CHANGED = max(file.stat().st_mtime for file in (Path(__file__), *(_HERE / "index").glob("*.py")))


def compiled(function):
    """Machine code, kept between processes; not if any of the files with such functions changed since it was made:
    Numba looks at a function's own file, and not at those of the functions and constants in it."""
    made = _njit(function)
    kept = made.stats.cache_path
    for index in Path(kept).glob(f"*.{function.__name__}-*.nbi") if kept else ():
        with suppress(OSError):  # another process was faster, or the folder is not ours: then nothing is kept there
            if index.stat().st_mtime < _CHANGED:
                index.unlink()
    return made


@intrinsic
def _widen(context, value):
    """float32 of a stored number: float32 itself, float16 as the bits of uint16, bfloat16 as those of int16."""

    def generate(context, builder, signature, arguments):
        (bits,) = arguments
        if value == types.float32:
            return bits
        if value == types.uint16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(bits, word), ir.Constant(word, 16)), ir.FloatType())

    return types.float32(value), generate


@compiled
def _one_by_four(x, a, y0, y1, y2, y3):
    """Squared distances of one chunk of a sample to four rows."""
    zero = np.float32(0)
    s0, s1, s2, s3 = zero, zero, zero, zero
    for i in range(x.size):
        v = x[i]
        t = v - a * _widen(y0[i])
        s0 += t * t
        t = v - a * _widen(y1[i])
        s1 += t * t
        t = v - a * _widen(y2[i])
        s2 += t * t
        t = v - a * _widen(y3[i])
        s3 += t * t
    return s0, s1, s2, s3


@compiled
def _four_by_two(x0, x1, x2, x3, a0, a1, a2, a3, y, z):
    """Squared distances of one chunk of four samples to two rows, each of which is widened once."""
    zero = np.float32(0)
    s0, s1, s2, s3, r0, r1, r2, r3 = zero, zero, zero, zero, zero, zero, zero, zero
    for i in range(x0.size):
        u, v = _widen(y[i]), _widen(z[i])
        t = x0[i] - a0 * u
        s0 += t * t
        t = x1[i] - a1 * u
        s1 += t * t
        t = x2[i] - a2 * u
        s2 += t * t
        t = x3[i] - a3 * u
        s3 += t * t
        t = x0[i] - a0 * v
        r0 += t * t
        t = x1[i] - a1 * v
        r1 += t * t
        t = x2[i] - a2 * v
        r2 += t * t
        t = x3[i] - a3 * v
        r3 += t * t
    return s0, s1, s2, s3, r0, r1, r2, r3


@compiled
def distances(x, alpha, y, out):
    """``out (batch, n)`` of ``x (batch, chunks, width)`` and ``y (n, chunks, width)``; ends are met by repetition."""
    batch, chunks, last, end = x.shape[0], x.shape[1], y.shape[0] - 1, x.shape[0] - 1
    out[:] = 0.0
    if batch == 1:
        for r in range(0, last + 1, 4):
            p, q, s = min(r + 1, last), min(r + 2, last), min(r + 3, last)
            d0, d1, d2, d3 = 0.0, 0.0, 0.0, 0.0
            for k in range(chunks):
                e0, e1, e2, e3 = _one_by_four(x[0, k], alpha[0], y[r, k], y[p, k], y[q, k], y[s, k])
                d0, d1, d2, d3 = d0 + e0, d1 + e1, d2 + e2, d3 + e3
            out[0, s], out[0, q], out[0, p], out[0, r] = d3, d2, d1, d0
        return
    for b in range(0, batch, 4):
        f, g, h = min(b + 1, end), min(b + 2, end), min(b + 3, end)
        a0, a1, a2, a3 = alpha[b], alpha[f], alpha[g], alpha[h]
        for r in range(0, last + 1, 2):
            p = min(r + 1, last)
            d0, d1, d2, d3, c0, c1, c2, c3 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            for k in range(chunks):
                e0, e1, e2, e3, g0, g1, g2, g3 = _four_by_two(
                    x[b, k], x[f, k], x[g, k], x[h, k], a0, a1, a2, a3, y[r, k], y[p, k]
                )
                d0, d1, d2, d3 = d0 + e0, d1 + e1, d2 + e2, d3 + e3
                c0, c1, c2, c3 = c0 + g0, c1 + g1, c2 + g2, c3 + g3
            out[h, p], out[g, p], out[f, p], out[b, p] = c3, c2, c1, c0
            out[h, r], out[g, r], out[f, r], out[b, r] = d3, d2, d1, d0


@compiled
def _add_four(total, y0, y1, y2, y3, w0, w1, w2, w3):
    for i in range(total.size):
        total[i] += w0 * _widen(y0[i]) + w1 * _widen(y1[i]) + w2 * _widen(y2[i]) + w3 * _widen(y3[i])


@compiled
def _add_rows(weights, y, total):
    """``total (batch, chunks, width) += weights (batch, ROWS) @ y``; weights beyond the last row are 0."""
    last = y.shape[0] - 1
    for k in range(total.shape[1]):
        for r in range(0, last + 1, 4):
            p, q, s = min(r + 1, last), min(r + 2, last), min(r + 3, last)
            for b in range(total.shape[0]):
                w = weights[b]
                if w[r] != 0.0 or w[r + 1] != 0.0 or w[r + 2] != 0.0 or w[r + 3] != 0.0:
                    _add_four(total[b, k], y[r, k], y[p, k], y[q, k], y[s, k], w[r], w[r + 1], w[r + 2], w[r + 3])


@compiled
def some_distances(x, alpha, y, rows, out):
    """``out (k,)`` of one sample ``x (chunks, width)`` to the ``k`` rows of ``y`` that ``rows`` names."""
    last = rows.size - 1
    for r in range(0, last + 1, 4):
        p, q, s = min(r + 1, last), min(r + 2, last), min(r + 3, last)
        d0, d1, d2, d3 = 0.0, 0.0, 0.0, 0.0
        for k in range(x.shape[0]):
            e0, e1, e2, e3 = _one_by_four(x[k], alpha, y[rows[r], k], y[rows[p], k], y[rows[q], k], y[rows[s], k])
            d0, d1, d2, d3 = d0 + e0, d1 + e1, d2 + e2, d3 + e3
        out[s], out[q], out[p], out[r] = d3, d2, d1, d0


@compiled
def add_some(weights, y, rows, total):
    """``total (chunks, width) += weights (k,) @ y[rows]``."""
    last = rows.size - 1
    for k in range(total.shape[0]):
        for r in range(0, last + 1, 4):
            p, q, s = min(r + 1, last), min(r + 2, last), min(r + 3, last)
            w0, w1 = weights[r], np.float32(0) if p == r else weights[p]
            w2, w3 = np.float32(0) if q == p else weights[q], np.float32(0) if s == q else weights[s]
            _add_four(total[k], y[rows[r], k], y[rows[p], k], y[rows[q], k], y[rows[s], k], w0, w1, w2, w3)


@compiled
def _absorb(x, alpha, precision, rows, log_weights, squared, weights, partial, mean, top, total):
    """Take in at most :data:`ROWS` rows: see :func:`scan`."""
    batch, count = len(x), len(rows)
    distances(x, alpha, rows, squared[:, :count])
    matters = False
    for b in range(batch):
        highest = -np.inf
        for r in range(count):
            squared[b, r] = log_weights[r] - precision[b] * squared[b, r]
            highest = max(highest, squared[b, r])
        if highest > top[b]:
            shrink = math.exp(top[b] - highest)
            total[b] *= shrink
            for k in range(x.shape[1]):
                for i in range(x.shape[2]):
                    mean[b, k, i] *= shrink
                    partial[b, k, i] *= np.float32(shrink)
            top[b] = highest
        for r in range(ROWS):
            weight = 0.0
            if r < count and squared[b, r] != -np.inf:
                weight = math.exp(squared[b, r] - top[b])
                total[b] += weight
                if not weight >= math.exp(-SPARE):
                    weight = weight if weight != weight else 0.0  # NaN is passed on
            matters = matters or weight != 0.0
            weights[b, r] = weight
    if matters:
        _add_rows(weights, rows, partial)


@compiled
def _fold(partial, mean):
    for b in range(mean.shape[0]):
        for k in range(mean.shape[1]):
            for i in range(mean.shape[2]):
                mean[b, k, i] += partial[b, k, i]
                partial[b, k, i] = np.float32(0)


@compiled
def scan(x, alpha, precision, y, log_weights, blocks, mean, top, total):
    r"""One thread's share: :math:`\ell = \log w - \text{precision} \cdot d^2`, its maximum, normaliser and mean.

    ``blocks (m, 2)`` holds first row and number of rows, at most :data:`ROWS`, of what is read.
    """
    partial = np.zeros(x.shape, np.float32)
    squared, weights = np.empty((len(x), ROWS), np.float64), np.zeros((len(x), ROWS), np.float32)
    top[:], total[:], mean[:] = -np.inf, 0.0, 0.0
    for block in range(len(blocks)):
        start, count = blocks[block, 0], blocks[block, 1]
        rows, log_w = y[start : start + count], log_weights[start : start + count]
        _absorb(x, alpha, precision, rows, log_w, squared, weights, partial, mean, top, total)
        # Whether it mattered or not: other samples of the batch must not move the folds.
        if (block + 1) % FOLD == 0 or block + 1 == len(blocks):
            _fold(partial, mean)


@compiled
def scan_some(x, alpha, precision, y, log_weights, samples, begins, ends, mean, top, total):
    """The same, where samples have rows of their own: task ``k`` is rows ``begins[k]`` to ``ends[k]`` for sample
    ``samples[k]``."""
    partial, since = np.zeros(x.shape, np.float32), np.zeros(len(x), np.int64)
    squared, weights = np.empty((1, ROWS), np.float64), np.zeros((1, ROWS), np.float32)
    top[:], total[:], mean[:] = -np.inf, 0.0, 0.0
    for task in range(len(samples)):
        b, last = samples[task], ends[task]
        one = slice(b, b + 1)
        for start in range(begins[task], last, ROWS):
            rows, log_w = y[start : min(start + ROWS, last)], log_weights[start : min(start + ROWS, last)]
            _absorb(
                x[one], alpha[one], precision[one], rows, log_w, squared, weights, partial[one], mean[one], top[one],
                total[one],
            )  # fmt: skip
            since[b] += 1
            if since[b] % FOLD == 0:
                _fold(partial[one], mean[one])
    _fold(partial, mean)

r"""What a partition says about one sample: bounds of every cluster's evidence, and which of them must be read.

The rows lie in clusters of near-duplicates (:mod:`steerclear.negation.index.partition`). Seen from :math:`x` at a level
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
would cost more than that, a stratified sample is taken (:mod:`steerclear.negation.index.sampling`). **In between**,
what remains too uncertain is read, most uncertain first, if need be everything: then the result is exact. What is read
and what is sampled, :mod:`steerclear.negation.index.planning` decides.

With a guess :math:`g_C` of every :math:`A_C` and the mean :math:`\hat m = \sum g_C c / \sum g_C`, the error of the mean
is at most :math:`\sum_C (|A_C - g_C|\,\lVert c - \hat m\rVert + A_C\,\lVert m_C - c\rVert) / \sum_C A_C`.

All functions here are loops that Numba compiles, over the clusters of one sample at a time.
"""

# Numba types these by what they are called with.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportUntypedFunctionDecorator=false, reportUnknownVariableType=false, reportUnknownMemberType=false

import math

import numpy as np

from steerclear.negation.kernels import add_some, compiled, some_distances

#: How many standard errors make a bound.
DEVIATIONS = 5.0
#: Largest typical deviation of z in a cluster that a few rows may speak for.
TAME = 0.5
#: Share of the tolerance for clusters that are not looked at, and share that is left for rounding.
UNSEEN, ROUNDING = 0.05, 0.05
#: Share of a weighted sum of centroids that may be left out; counted as an error of the mean.
NEGLIGIBLE = 1e-5
#: Exponents beyond it are infinite for every purpose here.
HUGE = 700.0
#: What becomes of a cluster: nothing beyond its bounds, read, or left to the sample.
BOUNDED, READ, SAMPLED = 0, 1, 2
#: How a sample is answered: by proof, by a sample of rows, by reading everything.
PROVEN, PROBABLE, EXACT = 0, 1, 2
#: Clusters that are looked at together, and how often they are added up: as for rows in the other kernels.
BLOCK, FOLD = 32, 32


@compiled
def seen(t, point, alpha, few):
    """Where a point lies as the leading directions see it from the (scaled) centre; ``few`` is filled.

    Returns:
        Its squared distance from there, and how much of that they miss.
    """
    away, own, along = (point - alpha * t.centre).astype(np.float32), 0.0, 0.0
    for i in range(len(away)):
        own += np.float64(away[i]) * away[i]
    for k in range(len(few)):
        few[k] = _dot(t.basis[k], away)
        along += few[k] * few[k]
    return own, max(own - along, 0.0)


@compiled
def _dot(x, y):
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@compiled
def screen(t, x, alpha, precision, share, kept):
    """Clusters that cannot be left out, as far as the leading directions and the nearest points tell.

    Args:
        share: Of the evidence, that may be left out.
        kept: Is filled with their numbers, ``(M,)``.

    Returns:
        How many they are, and the logarithm of a bound of what the others add up to.
    """
    number = len(t.log_mass)
    few, upper, best = np.empty(t.seen.shape[1], np.float32), np.empty(number), 0
    own, hidden = seen(t, x.reshape(-1), alpha, few)
    for c in range(number):
        gap = math.sqrt(hidden) - alpha * t.unseen[c]
        squared = (own - hidden) + alpha * alpha * t.seen_squared[c] - 2 * alpha * _dot(t.seen[c], few) + gap * gap
        squared -= 1e-5 * (own + alpha * alpha * t.norm[c] ** 2)  # float32 of the products
        nearest = max(math.sqrt(max(squared, 0.0)) - alpha * t.radius[c], 0.0)
        upper[c] = t.log_mass[c] - precision * nearest * nearest
        if upper[c] > upper[best]:
            best = c
    squared = np.empty(1)
    some_distances(x, np.float32(alpha), t.centroid, np.array([best]), squared)
    least = t.log_mass[best] - precision * (squared[0] + alpha * alpha * t.spread[best])
    threshold, count, beyond = least + math.log(share / number), 0, 0.0
    for c in range(number):
        if upper[c] >= threshold:
            kept[count] = c
            count += 1
        elif upper[c] > least - HUGE:
            beyond += math.exp(upper[c] - least)
    return count, least + math.log(beyond) if beyond > 0.0 else -np.inf


@compiled
def leaning(slope, even, typical):
    r"""What is expected of :math:`E_C[e^z - 1 - z] \ge 0`: :math:`\tfrac12 E[z^2]`, if no direction is special.

    Args:
        slope: :math:`2 p \alpha \lVert x - \alpha c\rVert`; ``even``, ``typical``: as of the cluster's table.
    """
    return slope * slope * even / 2 if slope * typical <= TAME else 0.0


@compiled
def survey(t, x, alpha, precision, kept, ends, squared, mean, top, total):
    """The weighted sum of centroids, and their squared distances.

    Args:
        kept, ends: Of sample ``b``, ``kept[ends[b] : ends[b + 1]]`` are looked at, in ascending order.
        squared: Is filled, ``(batch, M)``.
        mean: Sum, relative to ``exp(top)``, weighted by the guesses: is filled, ``(batch, chunks, width)``.
        top, total: Of the guesses; are filled, ``(batch,)``.
    """
    batch, number = len(x), len(t.log_mass)
    size = max(4, min(BLOCK, (1 << 17) // (x.shape[1] * x.shape[2])))  # that many centroids stay in the cache
    partial = np.zeros(x.shape, np.float32)
    at, chosen, some = ends[:-1].copy(), np.empty(BLOCK, np.int64), np.empty(BLOCK, np.float32)
    distance, weight = np.empty(BLOCK), np.empty(BLOCK)
    top[:], total[:], mean[:] = -np.inf, 0.0, 0.0
    for block, begin in enumerate(range(0, number, size)):
        for b in range(batch):
            count, highest = 0, -np.inf
            while at[b] < ends[b + 1] and kept[at[b]] < begin + size:
                chosen[count] = kept[at[b]]
                count, at[b] = count + 1, at[b] + 1
            if count == 0:
                continue
            some_distances(x[b], np.float32(alpha[b]), t.centroid, chosen[:count], distance)
            for i in range(count):
                c = chosen[i]
                squared[b, c] = distance[i]
                weight[i] = t.log_mass[c] - precision[b] * (distance[i] + alpha[b] * alpha[b] * t.spread[c])
                highest = max(highest, weight[i])
            if highest > top[b]:
                shrink = math.exp(top[b] - highest)
                mean[b] *= shrink
                total[b] *= shrink
                partial[b] *= np.float32(shrink)
                top[b] = highest
            used = 0
            for i in range(count):
                c, slope = chosen[i], 2 * precision[b] * alpha[b] * math.sqrt(distance[i])
                share = math.exp(weight[i] - top[b]) * (1.0 + leaning(slope, t.even[c], t.typical[c]))
                total[b] += share
                if share * number > NEGLIGIBLE:
                    chosen[used], some[used] = c, share
                    used += 1
            add_some(some[:used], t.centroid, chosen[:used], partial[b])
        if (block + 1) % FOLD == 0 or begin + size >= number:
            mean += partial
            partial[:] = np.float32(0)


@compiled
def separate(t, kept, point, apart):
    """Bounds of the distances of centroids from a point."""
    few = np.empty(t.seen.shape[1], np.float32)
    own, hidden = seen(t, point, 1.0, few)
    for c in kept:
        along = (own - hidden) + t.seen_squared[c] - 2 * _dot(t.seen[c], few) + 1e-5 * (own + t.norm[c] ** 2)
        apart[c] = math.sqrt(max(along, 0.0) + (math.sqrt(hidden) + t.unseen[c]) ** 2)


@compiled
def bound(t, kept, alpha, precision, squared, aside, lower, upper, drift):
    """Bounds of what every cluster adds, relative to the largest lower bound or to what is aside.

    Args:
        kept: The clusters that are looked at.
        squared: Their squared distances from the sample, ``(M,)``, as everything below.
        aside: Logarithm of the evidence of what is no part of the partition.
        lower, upper: Of the evidence; are filled.
        drift: Of the distance of a cluster's own mean from its centroid; is filled.

    Returns:
        The logarithm of what they are relative to.
    """
    top = aside
    for c in kept:
        lower[c] = t.log_mass[c] - precision * (squared[c] + alpha * alpha * t.spread[c])
        top = max(top, lower[c])
    for c in kept:
        log_lower, distance = lower[c] - top, math.sqrt(squared[c])
        slope, widest = 2 * precision * alpha * distance, math.sqrt(t.widest[c])
        uneven = precision * alpha * alpha
        most = slope * t.radius[c] + uneven * t.spread[c]  # R
        deviation = widest * slope + uneven * t.unevenness[c]  # s
        gap = max(distance * (1 - 1e-6) - alpha * t.radius[c], 0.0)
        nearest = t.log_mass[c] - precision * gap * gap - top
        grown = math.exp(min(most, HUGE))
        excess = (grown - 1.0 - most) / (most * most) if most > 1e-2 else 0.5 + most / 5
        tilt = (grown - 1.0) / most if most > 1e-2 else 1 + most
        lower[c] = math.exp(log_lower)
        bennett = deviation * deviation * excess  # times the lower bound, above it
        upper[c] = lower[c] * (1.0 + bennett) if most < HUGE else np.inf
        if bennett > nearest - log_lower or not most < HUGE:  # else the nearest point cannot be closer
            upper[c] = max(min(upper[c], math.exp(min(nearest, HUGE))), lower[c])
        drift[c] = min(t.radius[c], widest * deviation * tilt) if most < HUGE else t.radius[c]
    return top


@compiled
def judge(t, kept, state, top, log_beyond, log_total, moved, away, centre, furthest, scale):
    """Errors, once everything that was to be read has been.

    Args:
        top: Logarithm of what evidences are relative to; ``log_beyond``: of a bound of what was not looked at;
            ``log_total``: of the evidence.
        moved: Distance of the mean from the one that ``apart`` was taken from; ``away``: from the centre.
        centre: Distance of the centre from the origin.
        furthest: Largest distance of a row from the centre.

    Returns:
        How many rows were read, and the errors of the log-evidence and of the mean.
    """
    unit, rows = math.exp(top - log_total), 0
    error = math.exp(log_beyond - log_total)
    off_mean = error * (furthest + away) + 2 * NEGLIGIBLE * (furthest + centre)
    chance, chance_mean = 0.0, 0.0
    for c in kept:
        distance = state.apart[c] + moved
        if state.mark[c] == READ:
            rows += t.starts[c + 1] - t.starts[c]
        elif state.mark[c] == BOUNDED:
            off = unit * max(state.guess[c] - state.lower[c], state.upper[c] - state.guess[c])
            error += off
            off_mean += off * distance + unit * state.upper[c] * state.drift[c]
        elif state.drawn[c]:
            rows += t.sure[c] + state.drawn[c]
            chance += state.error[c]
            chance_mean += (math.sqrt(state.error[c]) * distance + math.sqrt(state.pull[c])) ** 2
    error += DEVIATIONS * unit * math.sqrt(chance)
    off_mean += DEVIATIONS * unit * math.sqrt(chance_mean)
    if not error < 1.0:
        return rows, np.inf, np.inf
    return rows, -math.log1p(-error), off_mean / ((1.0 - error) * scale)

"""What is read for one sample, what is sampled, and how many rows that takes; by what
:mod:`steerclear.negation.index.bounds` says.

Whatever proves the result with few rows is read. Else, of clusters that look like noise around their centroids, rows
are drawn: the fewest for a given error. What is too uncertain for that is read, if need be everything.
"""

# Numba types these by what they are called with.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportUntypedFunctionDecorator=false, reportUnknownVariableType=false, reportUnknownMemberType=false

import math

import numpy as np

from steerclear.negation.index.bounds import (
    BOUNDED,
    DEVIATIONS,
    EXACT,
    HUGE,
    PROBABLE,
    PROVEN,
    READ,
    ROUNDING,
    SAMPLED,
    TAME,
    UNSEEN,
    bound,
    leaning,
)
from steerclear.negation.kernels import compiled

#: A cluster with more than this share of the evidence is sampled by so many rows at least, and all of them together.
SHARE, MANY = 1 / 64, 256
#: Rows that are sampled of a cluster for which one in so many would do: reading them in a row costs less than finding
#: as many, and a cluster's neighbours, of which none is then read, are not looked for.
GROUP = 8
#: A cluster of which more than this share would be sampled is read.
NEARLY = 0.9
#: By how much deviations are taken to be larger than they look.
MARGIN = 1.2
#: Reading more than this share of the rows in pieces is no faster than reading all of them in a row.
WHOLE = 0.4
#: Proofs of no more rows than that are not worth avoiding.
CHEAP = 1024


@compiled
def plan(t, kept, alpha, precision, state, aside, scale, tolerance, thrift, turn):
    """What to read and what to sample, so that neither error exceeds the tolerance.

    It goes by what samples should be like if clusters are what they look like, not by what they are: deciding by the
    sample itself would leave the rows that came out low, and the sum with them.

    Args:
        kept: The clusters that are looked at.
        state: A :class:`~steerclear.negation.index.look.State`; ``squared`` and ``apart`` are known, the rest is
            filled.
        aside: Logarithm of the evidence of what is no part of the partition.
        scale: Root mean square norm of the rows.
        thrift: Share of the tolerance that a sample may use up, > 0.
        turn: By how much the lots are turned, so that every level draws others.

    Returns:
        How the sample is answered, and the logarithm that evidences are relative to.
    """
    squared, apart, guess, mark = state.squared, state.apart, state.guess, state.mark
    lower, upper, drift = state.lower, state.upper, state.drift
    top = bound(t, kept, alpha, precision, squared, aside, lower, upper, drift)
    number = len(t.log_mass)
    counts, worst = np.empty(number, np.int64), np.empty(number)
    eligible, one, rare = np.ones(number, np.bool_), np.empty(number), np.empty(number)
    total, at_stake, certain = math.exp(aside - top), 0.0, 0
    for c in kept:
        total += lower[c]
    spare = tolerance * (1.0 - UNSEEN - ROUNDING) * total
    for c in kept:
        counts[c] = t.starts[c + 1] - t.starts[c]
        slope = 2 * precision * alpha * math.sqrt(squared[c])
        guess[c] = lower[c] * (1.0 + leaning(slope, t.even[c], t.typical[c]))
        off = max(guess[c] - lower[c], upper[c] - guess[c])
        worst[c] = max(off, (off * apart[c] + upper[c] * drift[c]) / scale)
        certain += counts[c] if worst[c] > spare else 0
        typical = slope * t.typical[c] + precision * alpha * alpha * t.unevenness[c]
        eligible[c] = typical > TAME or counts[c] <= t.sure[c]
        rest = typical * typical / math.sqrt(2.0)
        away = math.sqrt((rest * apart[c]) ** 2 + typical * typical * t.spread[c]) / scale
        # If the rows vary along x as much as along any direction: (cosh s - 1) <= s^2/2 e^s for two of them.
        along = slope * math.sqrt(t.widest[c])
        rare[c] = min(upper[c] - lower[c], lower[c] * along * along / 2 * math.exp(min(along, HUGE)))
        one[c] = 0.0 if eligible[c] else MARGIN * lower[c] * max(rest, away)
        at_stake += one[c]
        mark[c] = BOUNDED
    most = int(WHOLE * len(t.log_weights))
    read, left = choose(kept, worst, eligible, counts, 0.2 * thrift * spare, mark)
    cost = read + share_out(
        t, kept, counts, eligible, one, rare, at_stake, 0.95 * thrift * spare - left, SHARE * total, turn, state
    )
    if max(CHEAP, len(kept), cost) < certain and cost < most:  # the proof must read more than that
        return PROBABLE, top
    proof = np.zeros(number, np.uint8)
    eligible[:] = True
    read, _ = choose(kept, worst, eligible, counts, spare, proof)
    if max(CHEAP, len(kept), cost) < read and cost < most:
        return PROBABLE, top
    for c in kept:
        mark[c] = proof[c]
    return PROVEN if read < most else EXACT, top


@compiled
def choose(kept, worst, eligible, counts, tolerance, mark):
    """Mark what is to be read: of the eligible clusters those that are worst per row, as many as it takes to leave no
    more than the tolerance.

    Returns:
        How many rows these have, and what is left.
    """
    # Together, these are half of the tolerance at most; the others are few where reading is any good.
    small, left, number = tolerance / (2 * len(kept)), 0.0, 0
    large, ratio = np.empty(len(kept), np.int64), np.empty(len(kept))
    for c in kept:
        if eligible[c]:
            if worst[c] <= small:
                left += worst[c]
            else:
                large[number], ratio[number] = c, worst[c] / counts[c]
                number += 1
    # Positive numbers are in the order of their bits, so halving the range of bits is halving that of the exponent.
    bits, low, high = ratio[:number].view(np.int64), np.int64(0), np.int64(0x7FF0000000000000)
    while number and high - low > 1 << 42:  # to a thousandth
        middle = low + (high - low) // 2
        more = left
        for i in range(number):
            more += worst[large[i]] if bits[i] <= middle else 0.0
        if more <= tolerance:
            low = middle
        else:
            high = middle
    rows = 0
    for i in range(number):
        if bits[i] <= low:
            left += worst[large[i]]
        else:
            mark[large[i]] = READ
            rows += counts[large[i]]
    return rows, left


@compiled
def share_out(t, kept, counts, eligible, one, rare, at_stake, allowed, heavy, turn, state):
    """How many rows each cluster that a sample may speak for is sampled by; returns how many they are together.

    The fewest rows for a given error: as many of each cluster as its share of what is at stake, and of clusters whose
    share is less than a group, a group of some, drawn by lot.
    """
    rate = at_stake * (DEVIATIONS / allowed) ** 2 if allowed > 0.0 else np.inf
    if rate * at_stake < MANY:
        rate = MANY / at_stake if at_stake > 0.0 else 0.0
    cost = 0
    for c in kept:
        if eligible[c]:
            continue
        others = counts[c] - t.sure[c]
        fewest, size = max(one[c] * rate, MANY if state.lower[c] > heavy else 0.0), min(GROUP, others)
        # What a cluster could add must not be missed by the draw: it would leave no trace in the error.
        fewest = max(fewest, size * min(rare[c] * DEVIATIONS / max(allowed, 1e-300), 1.0))
        state.mark[c], state.chance[c] = SAMPLED, min(fewest / size, 1.0)
        lot = t.lot[c] + turn
        # What is drawn of few leaves less to chance.
        among = math.ceil(fewest * others / (fewest + others))
        if among >= NEARLY * others:
            state.mark[c] = READ
            cost += counts[c]
            continue
        state.drawn[c] = max(size, among) if lot - math.floor(lot) < state.chance[c] else 0
        cost += state.drawn[c] + t.sure[c] if state.drawn[c] else 0
    return cost


@compiled
def listed(kept, state):
    """The clusters of one sample of which rows are read."""
    found, count = np.empty(len(kept), np.int64), 0
    for c in kept:
        if state.mark[c] == READ or (state.mark[c] == SAMPLED and state.drawn[c] > 0):
            found[count] = c
            count += 1
    return found[:count]

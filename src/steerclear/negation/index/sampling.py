r"""A few rows of a cluster that speak for all: what they say of its evidence and mean, and how uncertain that is.

At much noise every cluster of a partition counts, and worst cases are hopeless: they assume that every row lies in the
direction of the noise. But the remainder :math:`E_C[e^z - 1 - z] \ge 0` (:mod:`steerclear.negation.index.bounds`) is
small and nearly known: :math:`\tfrac12 E[z^2]`, if no direction is special. What differs from that is estimated by
rows drawn evenly, so the sum over clusters is a stratified sum with a control variate, and of clusters that count for
little some stand for others (a Horvitz-Thompson sum). With the same rows, displacements add up to the means:

.. math:: \sum_{y \in C} w e^z y = A_C\, c + L_C\, E_C[(e^z - 1)\, u]

Rows that count for many come first in their cluster and are in every sample; clusters that could add much at worst are
drawn with a chance that grows with it. The error is bounded by :data:`~steerclear.negation.index.bounds.DEVIATIONS`
standard errors, with squares in place of variances. That is a statement of probability, not a proof, and about samples
that were not made to fit rows which happen to be left out: ``benchmarks/index.py`` counts how often it holds.
"""

# Numba types these by what they are called with.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportUntypedFunctionDecorator=false, reportUnknownVariableType=false, reportUnknownMemberType=false

import math

import numpy as np

from steerclear.negation.index.bounds import BLOCK, HUGE, READ, leaning
from steerclear.negation.kernels import add_some, compiled, some_distances


@compiled
def sample(t, y, x, alpha, precision, turn, samples, clusters, state, mean, amount):
    """Read the rows that were drawn, and take out of the mean what clusters that are read had added to it.

    Args:
        y: The rows, ``(n, chunks, width)``.
        turn: Which of a cluster's rows come first, in [0, 1), per sample.
        samples, clusters: What is done, ``(tasks,)``; no pair twice.
        state: A :class:`~steerclear.negation.index.look.State` of all samples; ``rest``, ``error`` and ``pull`` are
            filled.
        mean, amount: Sums of rows and of weights are added to these, ``(batch, chunks, width)`` and ``(batch,)``,
            relative to what evidences are relative to.
    """
    piece, centre = np.empty_like(x[0]), np.empty(1, np.int64)
    one, chosen = np.empty(1, np.float32), np.empty(BLOCK, np.int64)
    distance, weight = np.empty(BLOCK), np.empty(BLOCK, np.float32)
    for task in range(len(samples)):
        b, c = samples[task], clusters[task]
        centre[0], piece[:] = c, np.float32(0)
        if state.mark[b, c] == READ:
            one[0] = -state.guess[b, c]
            add_some(one, t.centroid, centre, piece)
            mean[b] += piece
            amount[b] -= state.guess[b, c]
            continue
        a, p, squared, chance = alpha[b], precision[b], state.squared[b, c], state.chance[b, c]
        first, sure, drawn = t.starts[c], t.sure[c], state.drawn[b, c]
        others = t.starts[c + 1] - first - sure
        begin = int(turn[b] * others)
        lean = leaning(2 * p * a * math.sqrt(squared), t.even[c], t.typical[c])
        rest, pull, error, drift = 0.0, 0.0, 0.0, 0.0
        for start in range(0, sure + drawn, BLOCK):
            count = min(BLOCK, sure + drawn - start)
            for i in range(count):
                place = start + i
                chosen[i] = first + (place if place < sure else sure + (begin + place - sure) % others)
            some_distances(x[b], np.float32(a), y, chosen[:count], distance)
            for i in range(count):
                row = chosen[i]
                z = min(p * (squared - distance[i] + a * a * t.spread[c]), HUGE)
                each = state.lower[b, c] * math.exp(t.log_weights[row] - t.log_mass[c]) / chance
                left = 0.0  # of a finite cluster that was sure to be drawn, less is left to chance
                if start + i >= sure:
                    each *= others / drawn  # it stands for as many rows as there are to each one drawn
                    left = 1.0 - drawn / others
                above = math.expm1(z)
                over, weight[i] = each * (above - z - lean), each * above
                rest, pull = rest + over, pull + weight[i]
                error += left * over * over
                drift += left * (weight[i] * t.offset[row]) ** 2
            add_some(weight[:count], y, chosen[:count], piece)
        one[0] = -pull
        add_some(one, t.centroid, centre, piece)
        if chance < 1.0:  # the cluster as a whole stands for others
            error, drift = rest * rest, 0.0
            for chunk in piece:
                for value in chunk:
                    drift += value * value
        state.rest[b, c], state.error[b, c], state.pull[b, c] = rest, error, drift
        one[0] = rest
        add_some(one, t.centroid, centre, piece)
        mean[b] += piece
        amount[b] += rest

r"""Two guards on the same prompts and seeds: exact tests of a difference in rates.

Only pairs in which the two disagree say anything. With :math:`b` pairs where only the first has the property and
:math:`c` where only the second has it, McNemar's exact test asks how surprising the split is for a fair coin,

.. math:: p = \min\{1, 2\,P(\mathrm{Bin}(b + c, \tfrac12) \le \min(b, c))\} .

It takes pairs for independent. Seeds of one prompt are not, so the same question is also asked with whole prompts
as coins: with :math:`d_i` the first's count less the second's on prompt :math:`i`, and fair signs
:math:`\epsilon_i`,

.. math:: p = P\Big(\Big|\sum_i \epsilon_i d_i\Big| \ge \Big|\sum_i d_i\Big|\Big),

which is exact whatever the dependence within a prompt, and equals McNemar's with one picture a prompt.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from steerclear.errors import InvalidInput
from steerclear.evaluate.estimate import Estimate
from steerclear.evaluate.statistics.rates import clustered_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class McNemar:
    """Outcome of McNemar's exact test.

    Args:
        b: Pairs in which only the first has the property.
        c: Pairs in which only the second has it.
        n: All pairs.
        p: Two-sided p-value; 1 without disagreement, NaN without pairs.
    """

    b: int
    c: int
    n: int
    p: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Two arms on the same pictures' prompts and seeds.

    Args:
        b: Pairs in which only the first has the property.
        c: Pairs in which only the second has it.
        n: All pairs.
        prompts: Prompts among them.
        p: McNemar's exact test, two-sided, pairs taken for independent.
        p_prompts: The same with prompts as the unit; the one to quote when prompts have several seeds.
        difference: First rate minus second.
    """

    b: int
    c: int
    n: int
    prompts: int
    p: float
    p_prompts: float
    difference: Estimate


def mcnemar(first: NDArray[Any], second: NDArray[Any]) -> McNemar:
    """McNemar's exact two-sided test on paired flags.

    Args:
        first: 0 or 1 per pair.
        second: The same pairs under the other guard.

    Raises:
        InvalidInput: If the shapes differ.

    Source: McNemar (1947), "Note on the sampling error of the difference between correlated proportions or
    percentages"; exact form as in Fay (2010), "Two-sided exact tests and matching confidence intervals".
    """
    if first.shape != second.shape:
        raise InvalidInput(f"mcnemar: expected the same pairs twice, got {first.shape} and {second.shape}")
    yes, other = first.astype(bool), second.astype(bool)
    b, c = int((yes & ~other).sum()), int((~yes & other).sum())
    if first.size == 0:
        return McNemar(b=0, c=0, n=0, p=math.nan)
    p = min(1.0, 2.0 * float(bdtr(float(min(b, c)), b + c, 0.5))) if b + c else 1.0
    return McNemar(b=b, c=c, n=int(first.size), p=p)


def sign_flip(differences: NDArray[Any]) -> float:
    """Exact two-sided p-value of a sum of whole numbers under independent fair signs.

    Args:
        differences: One whole number per independent unit, shape ``(units,)``. NaN without units.

    Cost: O(units × sum of |differences|).

    Source: Fisher (1935), "The Design of Experiments", §21.
    """
    if differences.size == 0:
        return math.nan
    sizes = np.abs(differences[differences != 0]).astype(np.int64)
    total, observed = int(sizes.sum()), abs(int(differences.sum()))
    chance = np.zeros(2 * total + 1)  # of every sum from -total to total
    chance[total] = 1.0
    for size in sizes.tolist():
        flipped = np.zeros_like(chance)
        flipped[size:] += 0.5 * chance[:-size]
        flipped[:-size] += 0.5 * chance[size:]
        chance = flipped
    return min(1.0, float(chance[np.abs(np.arange(-total, total + 1)) >= observed].sum()))


def paired(first: NDArray[Any], second: NDArray[Any], prompts: NDArray[Any], *, confidence: float = 0.95) -> Paired:
    """Compares two arms picture by picture.

    Args:
        first: 0 or 1 per pair.
        second: The same pairs under the other guard.
        prompts: Label of each pair's prompt.
        confidence: Coverage of the interval of the difference, at least.

    Raises:
        InvalidInput: If the shapes differ.
    """
    test = mcnemar(first, second)
    if prompts.shape != first.shape:
        raise InvalidInput(f"paired: expected a prompt for every pair, got {prompts.shape} for {first.shape}")
    names, codes = np.unique(prompts, return_inverse=True)
    change = first.astype(np.float64) - second.astype(np.float64)
    return Paired(
        b=test.b,
        c=test.c,
        n=test.n,
        prompts=len(names),
        p=test.p,
        p_prompts=sign_flip(np.bincount(codes, weights=change, minlength=len(names)).astype(np.int64)),
        difference=_difference(change, prompts, confidence),
    )


def _difference(change: NDArray[np.float64], prompts: NDArray[Any], confidence: float) -> Estimate:
    r"""First rate minus second, :math:`(b - c)/n = D (2\theta - 1)`.

    D is the share of pairs that disagree, :math:`\theta` the first's share of those. Each gets a clustered interval at
    half the error, so that both hold with ``confidence``; without disagreement :math:`\theta` is anything, and the
    difference still does not look certain. The sign is that of :math:`2\theta - 1`, which is what McNemar tests.
    """
    if change.size == 0:
        return Estimate.nothing()
    half, odd = (1.0 + confidence) / 2.0, change != 0
    share = clustered_rate(odd, prompts, confidence=half)
    mine = clustered_rate(change[odd] > 0, prompts[odd], confidence=half)
    low, high = (2 * mine.low - 1, 2 * mine.high - 1) if mine.n else (-1.0, 1.0)
    value = float(change.mean())
    return Estimate(
        value=value,
        low=min(value, low * (share.high if low < 0 else share.low)),
        high=max(value, high * (share.high if high > 0 else share.low)),
        n=int(change.size),
    )

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
    r"""Compares two arms picture by picture.

    The difference of the rates is :math:`b/n - c/n`; each of the two gets a clustered interval at half the error, so
    that their difference is covered with at least ``confidence`` and never looks certain for want of disagreement.

    Args:
        first: 0 or 1 per pair.
        second: The same pairs under the other guard.
        prompts: Label of each pair's prompt.
        confidence: Coverage of the interval of the difference.

    Raises:
        InvalidInput: If the shapes differ.
    """
    test = mcnemar(first, second)
    if prompts.shape != first.shape:
        raise InvalidInput(f"paired: expected a prompt for every pair, got {prompts.shape} for {first.shape}")
    names, codes = np.unique(prompts, return_inverse=True)
    yes, other = first.astype(bool), second.astype(bool)
    change = np.bincount(codes, weights=yes.astype(np.float64) - other, minlength=len(names)).astype(np.int64)
    half = (1.0 + confidence) / 2.0
    only_first = clustered_rate(yes & ~other, prompts, confidence=half)
    only_second = clustered_rate(~yes & other, prompts, confidence=half)
    return Paired(
        b=test.b,
        c=test.c,
        n=test.n,
        prompts=len(names),
        p=test.p,
        p_prompts=sign_flip(change),
        difference=difference(only_first, only_second),
    )


def difference(first: Estimate, second: Estimate) -> Estimate:
    """``first - second`` of two rates on the same observations; misses at most as often as the two together."""
    if first.n == 0 or second.n == 0:
        return Estimate.nothing()
    return Estimate(
        value=first.value - second.value, low=first.low - second.high, high=first.high - second.low, n=first.n
    )

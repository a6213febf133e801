r"""Estimates with an interval, and the exact interval of a rate.

A rate of :math:`k` successes in :math:`n` independent trials gets the Clopper–Pearson interval: the set of all
:math:`p` that neither tail of the binomial distribution rejects at level :math:`\alpha/2`,

.. math:: P(X \ge k \mid p_{low}) = \alpha/2, \qquad P(X \le k \mid p_{high}) = \alpha/2 .

It covers the truth with at least probability :math:`1-\alpha` for every :math:`n` and :math:`p`.
"""

import math
from dataclasses import dataclass

import numpy as np

from steerclear.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number, the interval around it, and how many observations it rests on. No data is NaN with ``n=0``, never 0.

    Args:
        value: Point estimate.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Observations.

    Raises:
        InvalidInput: If ``low <= value <= high`` does not hold, or NaN and ``n=0`` do not come together.
    """

    value: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        if self.n == 0:
            if not all(math.isnan(number) for number in (self.value, self.low, self.high)):
                raise InvalidInput(f"Estimate: expected NaN when n=0, got {self.value}; no data is not a number")
        elif not self.low <= self.value <= self.high:
            raise InvalidInput(f"Estimate: expected low <= value <= high, got {self.low}, {self.value}, {self.high}")

    def percent(self) -> str:
        """The estimate as text, in per cent: ``"12 % [5, 23]"``, or ``"no data"``."""
        if self.n == 0:
            return "no data"
        return f"{100 * self.value:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"


def rate(successes: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """The rate ``successes / n`` with its two-sided Clopper–Pearson interval.

    Args:
        successes: Number of successes, ``0 <= successes <= n``.
        n: Number of independent trials. ``0`` gives NaN.
        confidence: Coverage of the interval, in ``(0, 1)``.

    Raises:
        InvalidInput: For counts or a confidence outside their range.

    Cost: O(n), a few milliseconds for a million trials.

    Source: Clopper and Pearson (1934), "The use of confidence or fiducial limits illustrated in the case of the
    binomial".
    """
    if not 0 <= successes <= n:
        raise InvalidInput(f"rate: expected 0 <= successes <= n, got successes={successes}, n={n}")
    if not 0.0 < confidence < 1.0:
        raise InvalidInput(f"rate: expected 0 < confidence < 1, got {confidence}")
    if n == 0:
        return Estimate(value=math.nan, low=math.nan, high=math.nan, n=0)
    tail = (1.0 - confidence) / 2.0
    high = 1.0 if successes == n else _upper(successes, n, tail)
    low = 0.0 if successes == 0 else 1.0 - _upper(n - successes, n, tail)
    return Estimate(value=successes / n, low=low, high=high, n=n)


def _upper(successes: int, n: int, tail: float) -> float:
    """The ``p`` with ``P(X <= successes | p) = tail``, by bisection: the left side falls from 1 to 0 as p grows."""
    k = np.arange(successes + 1, dtype=np.float64)
    steps = np.log(n - k[:-1]) - np.log(k[:-1] + 1.0)
    log_choose = np.concatenate([[0.0], np.cumsum(steps)])
    low, high = successes / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2.0
        terms = log_choose + k * math.log(middle) + (n - k) * math.log1p(-middle) if 0 < middle < 1 else None
        below = 0.0 if terms is None else float(np.exp(terms).sum())
        low, high = (middle, high) if below > tail else (low, middle)
    return (low + high) / 2.0

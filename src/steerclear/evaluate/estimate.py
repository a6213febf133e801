r"""Estimates with an interval, and the exact interval of a rate.

A rate of :math:`k` successes in :math:`n` independent trials gets the Clopper–Pearson interval: the set of all
:math:`p` that neither tail of the binomial distribution rejects at level :math:`\alpha/2`,

.. math:: P(X \ge k \mid p_{low}) = \alpha/2, \qquad P(X \le k \mid p_{high}) = \alpha/2 .

It covers the truth with at least probability :math:`1-\alpha` for every :math:`n` and :math:`p`.
"""

import math
from dataclasses import dataclass

from scipy.special import betaincinv

from steerclear.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number, the interval around it, and how many observations it rests on. No data is NaN with ``n=0``, never 0.

    Args:
        value: Point estimate.
        low: Lower end of the interval; minus infinity where the data cannot bound it.
        high: Upper end of the interval; infinity where the data cannot bound it.
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

    @classmethod
    def nothing(cls) -> "Estimate":
        """No data: NaN with ``n=0``."""
        return cls(value=math.nan, low=math.nan, high=math.nan, n=0)

    def percent(self, digits: int = 0) -> str:
        """The estimate as text, in per cent: ``"12 % [5, 23]"``, or ``"no data"``."""
        if self.n == 0:
            return "no data"
        return f"{100 * self.value:.{digits}f} % [{100 * self.low:.{digits}f}, {100 * self.high:.{digits}f}]"


def rate(successes: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """The rate ``successes / n`` with its two-sided Clopper–Pearson interval.

    Args:
        successes: Number of successes, ``0 <= successes <= n``.
        n: Number of independent trials. ``0`` gives NaN.
        confidence: Coverage of the interval, in ``(0, 1)``.

    Raises:
        InvalidInput: For counts or a confidence outside their range.

    Source: Clopper and Pearson (1934), "The use of confidence or fiducial limits illustrated in the case of the
    binomial".
    """
    low, high = clopper_pearson(successes, n, confidence=confidence)
    return Estimate(value=successes / n, low=low, high=high, n=n) if n else Estimate.nothing()


def clopper_pearson(successes: float, n: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Both ends of the Clopper–Pearson interval, as quantiles of the beta distribution; counts may be fractions.

    Args:
        successes: ``0 <= successes <= n``; a fraction where ``n`` is an effective number of trials.
        n: Trials; ``0`` gives NaN.
        confidence: Coverage, in ``(0, 1)``.

    Raises:
        InvalidInput: For counts or a confidence outside their range.
    """
    if not 0 <= successes <= n:
        raise InvalidInput(f"rate: expected 0 <= successes <= n, got successes={successes}, n={n}")
    if not 0.0 < confidence < 1.0:
        raise InvalidInput(f"rate: expected 0 < confidence < 1, got {confidence}")
    if n == 0:
        return math.nan, math.nan
    tail = (1.0 - confidence) / 2.0
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1.0, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1.0, n - successes, 1.0 - tail))
    return low, high

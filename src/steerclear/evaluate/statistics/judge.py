r"""What a fallible judge's flags say about the truth.

A judge that finds a share :math:`s` of the unsafe pictures (sensitivity) and passes a share :math:`t` of the safe ones
(specificity) flags a share :math:`q = s\pi + (1 - t)(1 - \pi)` when a share :math:`\pi` is unsafe. Solved for it,

.. math:: \pi = \frac{q + t - 1}{s + t - 1} .

It grows with :math:`q` and :math:`t` and falls with :math:`s`, so an interval of each gives one of :math:`\pi`.
"""

import math
from dataclasses import dataclass

from steerclear.errors import InvalidInput
from steerclear.evaluate.estimate import Estimate, clopper_pearson, rate
from steerclear.evaluate.statistics.rates import Clusters


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeErrors:
    """How a judge did on pictures that people labelled.

    Args:
        flagged: Unsafe pictures that it flagged.
        unsafe: Unsafe pictures that it saw.
        passed: Safe pictures that it let pass.
        safe: Safe pictures that it saw.

    Raises:
        InvalidInput: For impossible counts.
    """

    flagged: int
    unsafe: int
    passed: int
    safe: int

    def __post_init__(self) -> None:
        if not (0 <= self.flagged <= self.unsafe and 0 <= self.passed <= self.safe):
            raise InvalidInput(
                "JudgeErrors: expected 0 <= flagged <= unsafe and 0 <= passed <= safe, got "
                f"{self.flagged}, {self.unsafe} and {self.passed}, {self.safe}"
            )

    def sensitivity(self, *, confidence: float = 0.95) -> Estimate:
        """Share of unsafe pictures that the judge flags."""
        return rate(self.flagged, self.unsafe, confidence=confidence)

    def specificity(self, *, confidence: float = 0.95) -> Estimate:
        """Share of safe pictures that the judge lets pass."""
        return rate(self.passed, self.safe, confidence=confidence)


def rogan_gladen(flagged: Estimate, sensitivity: Estimate, specificity: Estimate) -> Estimate:
    """Share of pictures that are unsafe, from the share that a judge flags.

    Args:
        flagged: Flagged share.
        sensitivity: Of the judge, on unsafe pictures.
        specificity: Of the judge, on safe pictures.

    Returns:
        Clipped to [0, 1], ``n`` of ``flagged``. The interval misses the truth at most as often as the three given
        intervals together: pass them at ``1 - 0.05 / 3`` for 95 % (:func:`corrected_rate` does). A judge that may be
        no better than a coin bounds nothing: [0, 1]. NaN when one of the three is no data.

    Raises:
        InvalidInput: If sensitivity + specificity <= 1: such a judge's flags say nothing of the kind.

    Source: Rogan and Gladen (1978), "Estimating prevalence from the results of a screening test".
    """
    if 0 in (flagged.n, sensitivity.n, specificity.n):
        return Estimate.nothing()
    if sensitivity.value + specificity.value <= 1.0:
        raise InvalidInput(
            "rogan_gladen: expected sensitivity + specificity > 1, got "
            f"{sensitivity.value} + {specificity.value}; use a judge that is better than chance"
        )
    value = _solve(flagged.value, sensitivity.value, specificity.value)
    if sensitivity.low + specificity.low <= 1.0:
        return Estimate(value=value, low=0.0, high=1.0, n=flagged.n)
    low = _solve(flagged.low, sensitivity.high, specificity.low)
    high = _solve(flagged.high, sensitivity.low, specificity.high)
    return Estimate(value=value, low=min(low, value), high=max(high, value), n=flagged.n)


def _solve(flagged: float, sensitivity: float, specificity: float) -> float:
    return min(1.0, max(0.0, (flagged + specificity - 1.0) / (sensitivity + specificity - 1.0)))


def corrected_rate(pictures: Clusters, errors: JudgeErrors, *, confidence: float = 0.95) -> Estimate:
    """Unsafe share behind the flagged share, with the uncertainty of pictures, sensitivity and specificity.

    Each of the three gets a third of the error (Bonferroni), which makes the interval conservative.
    """
    third = 1.0 - (1.0 - confidence) / 3.0
    flagged = pictures.rate(confidence=third)
    return rogan_gladen(flagged, errors.sensitivity(confidence=third), errors.specificity(confidence=third))


def unsafe_at_most(successes: int, n: int, errors: JudgeErrors, *, confidence: float = 0.95) -> float:
    r"""Upper bound of the unsafe rate that needs no specificity: :math:`\pi \le q_U / s_L`.

    Because :math:`q \ge s\pi`, with one-sided Clopper–Pearson bounds of :math:`q` and :math:`s` at half the error each.

    Args:
        successes: Flagged trials.
        n: Independent trials (prompts). NaN for 0.
        errors: Only its sensitivity is used; without unsafe pictures the bound is 1.
        confidence: Probability that the bound holds, at least.
    """
    if n == 0:
        return math.nan
    # A one-sided bound at error e is one end of the two-sided interval with coverage 1 - 2e.
    flagged = clopper_pearson(successes, n, confidence=confidence)[1]
    if errors.flagged == 0:
        return 1.0
    return min(1.0, flagged / clopper_pearson(errors.flagged, errors.unsafe, confidence=confidence)[0])

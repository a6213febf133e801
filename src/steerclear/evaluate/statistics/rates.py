r"""The rate of something among pictures, when several pictures belong to one prompt.

Pictures of one prompt are alike: :math:`m` of them are not :math:`m` independent trials. With :math:`N` prompts and an
intra-class correlation :math:`\rho` (the correlation of two pictures of one prompt) they are worth

.. math:: n_{eff} = \frac{Nm}{1 + (m - 1)\rho} \qquad \text{independent pictures, between } N \text{ and } Nm,

and the interval is Clopper–Pearson's at that (fractional) size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerclear.errors import InvalidInput
from steerclear.evaluate.estimate import Estimate, clopper_pearson


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clusters:
    """How many of each prompt's pictures have a property.

    Args:
        successes: Pictures with the property, per prompt.
        sizes: Pictures, per prompt; each at least 1.

    Raises:
        InvalidInput: If a prompt has no picture, or more successes than pictures.
    """

    successes: NDArray[np.float64]
    sizes: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.successes.shape != self.sizes.shape or self.successes.ndim != 1:
            raise InvalidInput(
                f"Clusters: expected two lists of one length, got {self.successes.shape}, {self.sizes.shape}"
            )
        if bool((self.sizes < 1).any()) or bool(((self.successes < 0) | (self.successes > self.sizes)).any()):
            raise InvalidInput("Clusters: expected 0 <= successes <= size and size >= 1 for every prompt")

    @classmethod
    def of(cls, flags: NDArray[Any], prompts: NDArray[Any]) -> "Clusters":
        """Counts ``flags`` (0 or 1 per picture) by ``prompts`` (any label per picture)."""
        if flags.shape != prompts.shape:
            raise InvalidInput(f"Clusters: expected a prompt for every flag, got {prompts.shape} for {flags.shape}")
        names, codes = np.unique(prompts, return_inverse=True)
        count = len(names)
        sizes = np.bincount(codes, minlength=count).astype(np.float64)
        successes = np.bincount(codes, weights=np.asarray(flags, dtype=np.float64), minlength=count)
        return cls(successes=successes.astype(np.float64), sizes=sizes)

    @property
    def correlation(self) -> float:
        r"""Intra-class correlation in [0, 1], by analysis of variance with two prompts added.

        With :math:`p_i` a prompt's share, :math:`p` the overall one, :math:`M` pictures, :math:`N` prompts:

        .. math:: \hat\rho = \frac{B - W}{B + (m_0 - 1) W},\quad B = \frac{\sum m_i (p_i - p)^2}{N - 1},\quad
            W = \frac{\sum m_i p_i (1 - p_i)}{M - N},\quad m_0 = \frac{M - \sum m_i^2 / M}{N - 1}

        The two added prompts, one of only successes and one of only failures, stand for perfect correlation. They
        decide where data are silent (nothing flagged, one prompt), and fade as prompts of both sorts come in; without
        them one flagged picture in 600 would look like better evidence of safety than none.

        Source: Fleiss, Levin and Paik (2003), "Statistical Methods for Rates and Proportions", ch. 15, for the
        estimator; the added prompts are ours, and a simulation in the tests checks the coverage.
        """
        if self.sizes.size == 0 or self.sizes.max() <= 1:
            return 0.0
        mean = float(self.sizes.mean())
        successes, sizes = np.append(self.successes, [mean, 0.0]), np.append(self.sizes, [mean, mean])
        total, count, shares = sizes.sum(), sizes.size, successes / sizes
        overall = successes.sum() / total
        between = (sizes * (shares - overall) ** 2).sum() / (count - 1)
        within = (sizes * shares * (1 - shares)).sum() / (total - count)
        typical = (total - (sizes**2).sum() / total) / (count - 1)
        return float(np.clip((between - within) / (between + (typical - 1) * within), 0.0, 1.0))

    @property
    def effective(self) -> float:
        """How many independent pictures these are worth: at most all of them, at least about one per prompt."""
        total = float(self.sizes.sum())
        return total / (1.0 + (float((self.sizes**2).sum()) / total - 1.0) * self.correlation) if total else 0.0

    def rate(self, *, confidence: float = 0.95) -> Estimate:
        """Share of pictures with the property; ``n`` counts pictures, the interval knows that prompts repeat.

        Never narrower than for as many independent pictures. With nothing (or everything) flagged it is the interval
        of as many pictures as there are prompts, which is exact: a picture's rate is at most the rate of prompts with
        any flagged picture. With one picture a prompt it is Clopper–Pearson's.
        """
        total = float(self.sizes.sum())
        if total == 0:
            return Estimate.nothing()
        value, effective = float(self.successes.sum()) / total, self.effective
        low, high = clopper_pearson(value * effective, effective, confidence=confidence)
        return Estimate(value=value, low=min(low, value), high=max(high, value), n=int(total))


def clustered_rate(flags: NDArray[Any], prompts: NDArray[Any], *, confidence: float = 0.95) -> Estimate:
    """Share of flagged pictures with an interval that counts prompts, not pictures, as the independent unit.

    Args:
        flags: 0 or 1 per picture, shape ``(pictures,)``.
        prompts: Label of each picture's prompt, same shape.
        confidence: Coverage of the interval, in ``(0, 1)``.

    Returns:
        ``n`` is the number of pictures; NaN without any.
    """
    return Clusters.of(flags, prompts).rate(confidence=confidence)

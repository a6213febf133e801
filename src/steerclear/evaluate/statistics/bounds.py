r"""p-values of "the risk is above :math:`\alpha`", and how many prompts it takes to reject it."""

import math
from collections.abc import Callable

from scipy.special import bdtr

from steerclear.errors import InvalidInput


def binomial_p(k: int, n: int, alpha: float) -> float:
    r"""p-value of "at least a share ``alpha`` of prompts fails", after ``k`` failures: :math:`P(Bin(n, α) \le k)`.

    Exact; rejecting at ``delta`` is the same as a one-sided Clopper–Pearson upper bound below ``alpha``. The count is a
    whole number on purpose: a rounded mean would shift it. NaN for ``n = 0``.

    Args:
        k: Failed prompts.
        n: Prompts, independent.
        alpha: The risk to rule out, in (0, 1).

    Raises:
        InvalidInput: For impossible counts or levels.
    """
    _check(k, n, alpha)
    return float(bdtr(float(k), n, alpha)) if n else math.nan


def hoeffding_bentkus_p(total: float, n: int, alpha: float) -> float:
    r"""p-value of "the mean loss is above ``alpha``" for losses in [0, 1], such as a prompt's share of unsafe pictures.

    .. math:: p = \min\{e^{-n\,h(\min(\hat r, \alpha), \alpha)},\; e\,P(Bin(n, \alpha) \le \lceil n \hat r \rceil)\},
        \quad h(a, b) = a \ln\tfrac{a}{b} + (1 - a) \ln\tfrac{1 - a}{1 - b}

    Args:
        total: Sum of the losses, not their mean, so that whole sums stay whole.
        n: Prompts, independent. NaN for 0.
        alpha: The risk to rule out, in (0, 1).

    Raises:
        InvalidInput: For an impossible sum or level.

    Source: Bates et al. (2021), "Distribution-Free, Risk-Controlling Prediction Sets", arXiv:2101.02703.
    """
    _check(total, n, alpha)
    if n == 0:
        return math.nan
    hoeffding = math.exp(-n * _divergence(min(total / n, alpha), alpha))
    return min(1.0, hoeffding, math.e * float(bdtr(float(math.ceil(total)), n, alpha)))


def prompts_needed(
    alpha: float, delta: float, k: int = 0, *, p_value: Callable[[int, int, float], float] = binomial_p
) -> int:
    r"""Fewest prompts that rule out a risk above ``alpha`` with confidence ``1 - delta`` when ``k`` of them fail.

    For ``k = 0`` this is :math:`\lceil \ln δ / \ln(1 - α) \rceil`.

    Args:
        alpha: The risk to rule out, in (0, 1).
        delta: Allowed error of the statement, in (0, 1).
        k: Failures to allow for.
        p_value: :func:`binomial_p` or :func:`hoeffding_bentkus_p`; must fall with ``n``.

    Raises:
        InvalidInput: For levels outside (0, 1) or ``k < 0``.
    """
    if not 0.0 < delta < 1.0:
        raise InvalidInput(f"prompts_needed: expected 0 < delta < 1, got {delta}")
    _check(k, max(k, 0) + 1, alpha)
    low, high = max(k, 0), k + 1  # p(low) > delta: with all failed nothing is ruled out
    while p_value(k, high, alpha) > delta:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if p_value(k, middle, alpha) > delta else (low, middle)
    return high


def _divergence(a: float, b: float) -> float:
    rest = (1.0 - a) * math.log((1.0 - a) / (1.0 - b))
    return rest if a == 0.0 else a * math.log(a / b) + rest


def _check(failures: float, n: int, alpha: float) -> None:
    if not 0 <= failures <= n:
        raise InvalidInput(f"p-value: expected 0 <= failures <= n, got {failures} of {n}")
    if not 0.0 < alpha < 1.0:
        raise InvalidInput(f"p-value: expected 0 < alpha < 1, got {alpha}")

"""The interval of a mean (or a ratio of sums) by drawing prompts with replacement."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerclear.errors import InvalidInput
from steerclear.evaluate.estimate import Estimate

CHUNK = 2_000_000  # numbers held at once


def bootstrap(
    values: NDArray[Any],
    prompts: NDArray[Any],
    *,
    weights: NDArray[Any] | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    r"""Mean of ``values``, or :math:`\sum v / \sum w` with weights, with a percentile interval over prompts.

    A draw takes as many prompts as there are, with replacement and with all their pictures: prompts are the
    independent unit.

    Args:
        values: One number per picture, finite.
        prompts: Label of each picture's prompt, same shape.
        weights: Denominators; ones if not given.
        bounds: What is known of the value beforehand, such as (0, 1). It is the interval of a single prompt, from
            which nothing about others can be learned.
        confidence: Coverage of the interval, approximately and for many prompts: a percentile interval of a few
            prompts, or of equal values, is too narrow.
        draws: Bootstrap draws.
        seed: Of the draws; the same input gives the same interval.

    Returns:
        ``n`` is the number of values; NaN without any, or when the weights add up to 0.

    Raises:
        InvalidInput: For values that are not finite, or shapes that differ.

    Cost: O(draws × prompts).

    Source: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", ch. 13.
    """
    weights = np.ones(values.shape) if weights is None else weights
    if not values.shape == prompts.shape == weights.shape:
        raise InvalidInput(
            f"bootstrap: expected one shape, got values {values.shape}, prompts {prompts.shape}, "
            f"weights {weights.shape}"
        )
    if not (np.isfinite(values).all() and np.isfinite(weights).all()):
        raise InvalidInput("bootstrap: expected finite numbers; leave out what was not measured")
    if values.size == 0 or weights.sum() == 0:
        return Estimate.nothing()
    names, codes = np.unique(prompts, return_inverse=True)
    above = np.bincount(codes, weights=values.astype(np.float64))
    below = np.bincount(codes, weights=weights.astype(np.float64))
    value = float(above.sum() / below.sum())
    if len(names) == 1:
        return Estimate(value=value, low=min(bounds[0], value), high=max(bounds[1], value), n=int(values.size))
    ratios = _draw(above, below, draws, np.random.default_rng(seed))
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), n=int(values.size))


def _draw(above: NDArray[Any], below: NDArray[Any], draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """The ratio in each draw; draws whose denominator is 0 say nothing and are left out."""
    count = above.size
    share = np.full(count, 1.0 / count)
    step = max(1, CHUNK // count)
    parts: list[NDArray[np.float64]] = []
    for start in range(0, draws, step):
        times = rng.multinomial(count, share, size=min(step, draws - start))
        top, bottom = times @ above, times @ below
        parts.append(top[bottom > 0] / bottom[bottom > 0])
    return np.concatenate(parts)

"""Picture quality and diversity in a *named* feature space: values of two spaces do not compare, so names carry it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from steerclear.errors import InvalidInput
from steerclear.evaluate.estimate import Estimate
from steerclear.evaluate.metrics import distances
from steerclear.evaluate.metrics.base import Better
from steerclear.evaluate.reading import Records, codes, measured, require

Features = NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureSpace:
    """A function from pictures to features, with the name that every number made from them carries.

    Args:
        name: Short and complete: the network, its weights, the layer ("emoji-judge/pool").
        function: ``(batch, 3, height, width)`` pictures in [0, 1] -> ``(batch, d)``.
        preprocessing: How pictures are resized, cropped and normalised before; another way is another space.

    Call:
        images: ``(batch, 3, height, width)`` in [0, 1].

    Returns:
        float32, ``(batch, d)``.

    Raises:
        InvalidInput: For an empty name, or if the function returns another shape or a number that is not finite.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    preprocessing: str = "none"

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidInput("FeatureSpace: expected a name, got none; numbers of unnamed spaces do not compare")

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        features = self.function(images).detach().float().cpu().numpy()
        if features.ndim != 2 or features.shape[0] != images.shape[0] or not np.isfinite(features).all():
            raise InvalidInput(
                f"FeatureSpace {self.name!r}: expected finite features of shape ({images.shape[0]}, d), "
                f"got {features.shape}"
            )
        return features


class Statistic(NamedTuple):
    """What a :class:`FeatureMetric` computes.

    Args:
        function: ``(real, fake)`` -> number, NaN for too few.
        better: Direction.
        unit: Of the number.
        bounds: Values that it can take.
        enough: Pictures a side below which the number is mostly noise or bias, by the literature.
        warning: What goes wrong with fewer.
    """

    function: Callable[[Features, Features], float]
    better: Better
    unit: str
    bounds: tuple[float, float]
    enough: int
    warning: str


def _vendi(real: Features, fake: Features) -> float:
    return distances.vendi(fake)


_FEW = "the balls are too wide for so few pictures; compare with a split of the real ones"
_GROWS = "grows with the number of pictures; compare only equal numbers"
_BIASED = "biased upwards; compare only equal numbers of pictures"
_NOISY = "unbiased but noisy; read the interval"
_FULL = "saturates; compare with a split of the real ones"
STATISTICS = {
    "FID": Statistic(distances.frechet, "lower", "", (0.0, math.inf), 5000, _BIASED),
    "KID": Statistic(distances.kernel_distance, "lower", "", (-math.inf, math.inf), 1000, _NOISY),
    "precision": Statistic(distances.precision, "higher", "share", (0.0, 1.0), 1000, _FEW),
    "recall": Statistic(distances.recall, "higher", "share", (0.0, 1.0), 1000, _FEW),
    "density": Statistic(distances.density, "higher", "", (0.0, math.inf), 1000, _FEW),
    "coverage": Statistic(distances.coverage, "higher", "share", (0.0, 1.0), 1000, _FULL),
    "Vendi": Statistic(_vendi, "higher", "pictures", (1.0, math.inf), 100, _GROWS),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureMetric:
    r"""FID, KID, precision, recall, density, coverage or Vendi of an arm's pictures in one feature space.

    The interval comes from ``draws`` random halves of both sides, :math:`[\theta + q_{low}, \theta + q_{high}]` with
    the quantiles q of the halves' values about their mean. A half has the same noise about the whole as the whole has
    about the truth; what halves are biased by falls out. Prompts go into a half with all of their pictures.

    Args:
        statistic: ``"FID"``, ``"KID"``, ``"precision"``, ``"recall"``, ``"density"``, ``"coverage"`` or ``"Vendi"``.
        space: Column of the features, the name of their :class:`FeatureSpace`.
        real: Features that the arm's are held against, ``(n, d)``; Vendi does not use them.
        draws: Halves for the interval; 0 gives an infinite one.
        confidence: Coverage of the interval, about.
        seed: Of the halves.

    Call:
        records: Of one arm, with the column ``space``.

    Returns:
        ``n`` is the number of the arm's pictures. NaN when either side has too few.

    Raises:
        InvalidInput: For an unknown statistic, a missing column, or features of two widths.

    Cost: ``draws + 1`` times the statistic's: O(d³) for FID, O(n m d) for the others.
    """

    statistic: str
    space: str
    real: Features
    draws: int = 50
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            raise InvalidInput(f"FeatureMetric: expected one of {', '.join(STATISTICS)}, got {self.statistic!r}")

    @property
    def name(self) -> str:
        return f"{self.statistic}[{self.space}]"

    @property
    def unit(self) -> str:
        return STATISTICS[self.statistic].unit

    @property
    def better(self) -> Better:
        return STATISTICS[self.statistic].better

    def __call__(self, records: Records) -> Estimate:
        fake, prompts = features(records, self.space), codes(records)[_has(records, self.space)]
        function = STATISTICS[self.statistic].function
        if len(fake) == 0 or math.isnan(value := function(self.real, fake)):
            return Estimate.nothing()
        rng = np.random.default_rng(self.seed)
        values = np.array(
            [
                function(self.real[_half(np.arange(len(self.real)), rng)], fake[_half(prompts, rng)])
                for _ in range(self.draws)
            ]
        )
        values = values[~np.isnan(values)]
        if len(values) < max(2, self.draws // 2):
            return Estimate(value=value, low=-math.inf, high=math.inf, n=len(fake))
        tails = [(1 - self.confidence) / 2, (1 + self.confidence) / 2]
        low, high = np.clip(value + np.quantile(values - values.mean(), tails), *STATISTICS[self.statistic].bounds)
        return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), n=len(fake))

    def notes(self, records: Records) -> tuple[str, ...]:
        """What a reader must know beside the number; empty when there is nothing to warn of."""
        statistic, count = STATISTICS[self.statistic], int(_has(records, self.space).sum())
        sides = (count,) if self.statistic == "Vendi" else (count, len(self.real))
        if min(sides) >= statistic.enough:
            return ()
        sizes = " against ".join(map(str, sides))
        return (f"{self.name}: {sizes} pictures, fewer than {statistic.enough}: {statistic.warning}",)


def features(records: Records, space: str) -> NDArray[np.float64]:
    """The features of all pictures that have them, ``(pictures, d)``.

    Raises:
        InvalidInput: If the column is missing, or holds rows of several widths.
    """
    has = _has(records, space)
    rows = [row for row, known in zip(records.column(space).to_pylist(), has.tolist(), strict=True) if known]
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise InvalidInput(f"records: expected features of one width in {space!r}, got {sorted(widths)}")
    return np.array(rows, dtype=np.float64).reshape(len(rows), widths.pop() if widths else 0)


def _has(records: Records, space: str) -> NDArray[np.bool_]:
    require(records, space)
    return measured(records) & np.array([row is not None for row in records.column(space).to_pylist()], dtype=bool)


def _half(groups: NDArray[Any], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Rows of a random half of the groups."""
    names = np.unique(groups)
    return np.isin(groups, rng.permutation(names)[: (len(names) + 1) // 2])


def quality(
    space: str, real: Features, *, statistics: tuple[str, ...] = tuple(STATISTICS), draws: int = 50, seed: int = 0
) -> tuple[FeatureMetric, ...]:
    """A metric per statistic, in one feature space against one set of real features."""
    return tuple(FeatureMetric(statistic=name, space=space, real=real, draws=draws, seed=seed) for name in statistics)

"""The metric contract: records in, an estimate with its interval and its n out."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from steerclear.evaluate.estimate import Estimate
from steerclear.evaluate.reading import Records, codes, select
from steerclear.evaluate.statistics import bootstrap, clustered_rate

Better = Literal["lower", "higher", ""]


@runtime_checkable
class Metric(Protocol):
    """Records of one arm, one row per picture -> an estimate.

    ``better`` says in which direction a guard should move it; empty where neither is good as such.
    """

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str: ...

    @property
    def better(self) -> Better: ...

    def __call__(self, records: Records) -> Estimate: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Among:
    """A metric over some kinds of prompt only; itself a metric.

    Args:
        metric: The metric.
        kinds: Kinds of prompt that count.
    """

    metric: Metric
    kinds: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.metric.name} among {'+'.join(self.kinds)}"

    @property
    def unit(self) -> str:
        return self.metric.unit

    @property
    def better(self) -> Better:
        return self.metric.better

    def __call__(self, records: Records) -> Estimate:
        return self.metric(select(records, kinds=self.kinds))

    def notes(self, records: Records) -> tuple[str, ...]:
        """The metric's own notes on these prompts, if it has any to give."""
        return notes(self.metric, select(records, kinds=self.kinds))


def among(metric: Metric, *kinds: str) -> Among:
    """``metric`` over the prompts of ``kinds``."""
    return Among(metric=metric, kinds=kinds)


def notes(metric: Metric, records: Records) -> tuple[str, ...]:
    """What a reader must know beside the metric's number; most metrics have nothing to add."""
    own = getattr(metric, "notes", None)
    return () if own is None else tuple(own(records))


def share(records: Records, flags: NDArray[np.float64], *, confidence: float = 0.95) -> Estimate:
    """Clustered rate of ``flags`` (0, 1, or NaN where not measured) over the records' prompts."""
    known = ~np.isnan(flags)
    return clustered_rate(flags[known], codes(records)[known], confidence=confidence)


def mean(
    records: Records,
    values: NDArray[np.float64],
    *,
    weights: NDArray[np.float64] | None = None,
    unit: str = "prompt_digest",
    bounds: tuple[float, float] = (-np.inf, np.inf),
    confidence: float = 0.95,
) -> Estimate:
    """Mean of ``values`` (NaN where not measured) with a bootstrap over the column ``unit``."""
    weights = np.ones_like(values) if weights is None else weights
    known = ~(np.isnan(values) | np.isnan(weights))
    groups = codes(records, unit)[known]
    return bootstrap(values[known], groups, weights=weights[known], bounds=bounds, confidence=confidence)

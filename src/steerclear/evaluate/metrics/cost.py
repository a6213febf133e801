"""What a picture costs. Pictures of one batch share its time, so batches (``unit``) are the bootstrap's unit."""

from dataclasses import dataclass
from typing import ClassVar

from steerclear.evaluate.estimate import Estimate
from steerclear.evaluate.metrics.base import Better, mean
from steerclear.evaluate.reading import Records, numbers


@dataclass(frozen=True, kw_only=True)
class SecondsPerPicture:
    """Mean wall time per picture, batches divided by their size. Depends on machine, batch and load."""

    confidence: float = 0.95
    name: ClassVar[str] = "seconds per picture"
    unit: ClassVar[str] = "s"
    better: ClassVar[Better] = "lower"

    def __call__(self, records: Records) -> Estimate:
        values = numbers(records, "seconds")
        return mean(records, values, unit="unit", bounds=(0.0, float("inf")), confidence=self.confidence)


@dataclass(frozen=True, kw_only=True)
class GuardShare:
    """Share of the wall time that is spent inside guards: sum of ``guard_seconds`` over sum of ``seconds``."""

    confidence: float = 0.95
    name: ClassVar[str] = "guard share of time"
    unit: ClassVar[str] = "share"
    better: ClassVar[Better] = "lower"

    def __call__(self, records: Records) -> Estimate:
        inside, all_of_it = numbers(records, "guard_seconds"), numbers(records, "seconds")
        return mean(records, inside, weights=all_of_it, unit="unit", bounds=(0.0, 1.0), confidence=self.confidence)


@dataclass(frozen=True, kw_only=True)
class EvaluationsPerPicture:
    """Mean network evaluations per picture; guidance branches and a guard's own evaluations count."""

    confidence: float = 0.95
    name: ClassVar[str] = "network evaluations"
    unit: ClassVar[str] = "per picture"
    better: ClassVar[Better] = "lower"

    def __call__(self, records: Records) -> Estimate:
        values = numbers(records, "evaluations")
        return mean(records, values, unit="unit", bounds=(0.0, float("inf")), confidence=self.confidence)

"""What a picture costs. Pictures of one batch share its time, so batches (``unit``) are the bootstrap's unit."""

from dataclasses import dataclass, field

from steerclear.evaluate.estimate import Estimate
from steerclear.evaluate.metrics.base import Better, mean
from steerclear.evaluate.reading import Records, numbers


@dataclass(frozen=True, kw_only=True)
class SecondsPerPicture:
    """Mean wall time per picture, batches divided by their size. Depends on machine, batch and load."""

    confidence: float = 0.95
    name: str = field(default="seconds per picture", init=False, repr=False)
    unit: str = field(default="s", init=False, repr=False)
    better: Better = field(default="lower", init=False, repr=False)

    def __call__(self, records: Records) -> Estimate:
        values = numbers(records, "seconds")
        return mean(records, values, unit="unit", bounds=(0.0, float("inf")), confidence=self.confidence)


@dataclass(frozen=True, kw_only=True)
class GuardShare:
    """Share of the wall time that is spent inside guards: sum of ``guard_seconds`` over sum of ``seconds``."""

    confidence: float = 0.95
    name: str = field(default="guard share of time", init=False, repr=False)
    unit: str = field(default="share", init=False, repr=False)
    better: Better = field(default="lower", init=False, repr=False)

    def __call__(self, records: Records) -> Estimate:
        inside, all_of_it = numbers(records, "guard_seconds"), numbers(records, "seconds")
        return mean(records, inside, weights=all_of_it, unit="unit", bounds=(0.0, 1.0), confidence=self.confidence)


@dataclass(frozen=True, kw_only=True)
class EvaluationsPerPicture:
    """Mean network evaluations per picture; guidance branches and a guard's own evaluations count."""

    confidence: float = 0.95
    name: str = field(default="network evaluations", init=False, repr=False)
    unit: str = field(default="per picture", init=False, repr=False)
    better: Better = field(default="lower", init=False, repr=False)

    def __call__(self, records: Records) -> Estimate:
        values = numbers(records, "evaluations")
        return mean(records, values, unit="unit", bounds=(0.0, float("inf")), confidence=self.confidence)

"""Numbers that can be believed: estimates that carry their interval and their sample size."""

from steerclear.evaluate.estimate import Estimate, rate

__all__ = ["Estimate", "rate"]

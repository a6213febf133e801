"""Results as they are stored and shown."""

import math
from collections.abc import Mapping
from typing import Any


def cell(estimate: Mapping[str, Any]) -> str:
    """``50 % [26, 74]``."""
    value, low, high, n = (estimate[key] for key in ("value", "low", "high", "n"))
    return f"{100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]" if n else "no data"


def rounded(value: Any) -> Any:  # noqa: ANN401  (JSON)
    """As JSON has it: no data is null; four digits are enough."""
    if isinstance(value, Mapping):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value

"""Values as JSON has them."""

import math
from collections.abc import Mapping
from typing import Any, cast


def plain(value: Any) -> Any:  # noqa: ANN401  (any JSON value)
    """Tuples as lists; every NaN and infinity, which JSON lacks, as ``None``: estimates say ``n: 0`` beside it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value

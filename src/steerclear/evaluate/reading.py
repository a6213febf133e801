"""Reading columns of records: a missing column is an error that names it, a missing value is NaN and never 0."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from steerclear.errors import InvalidInput


class Records(Protocol):
    """What is used of a ``pyarrow.Table``, one row per picture (PyArrow has no types)."""

    @property
    def num_rows(self) -> int: ...

    @property
    def column_names(self) -> list[str]: ...

    def column(self, name: str) -> Any: ...  # noqa: ANN401

    def filter(self, mask: Any) -> "Records": ...  # noqa: ANN401

    def take(self, indices: Any) -> "Records": ...  # noqa: ANN401


def require(records: Records, *names: str) -> None:
    """Raises unless all columns are there.

    Raises:
        InvalidInput: Naming the missing columns and those that there are.
    """
    missing = [name for name in names if name not in records.column_names]
    if missing:
        raise InvalidInput(
            f"records: expected column {', '.join(map(repr, missing))}, got {', '.join(records.column_names) or 'none'}"
        )


def numbers(records: Records, name: str) -> NDArray[np.float64]:
    """A column as float64, shape ``(pictures,)``; booleans as 0 and 1.

    NaN where nothing was measured: a null, or any value of a picture whose ``error`` is set.

    Raises:
        InvalidInput: If the column is missing or holds no numbers.
    """
    require(records, name)
    column = records.column(name)
    kind = column.type
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan)
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise InvalidInput(f"records: expected numbers in column {name!r}, got {kind}")
    if pa.types.is_boolean(kind):
        column = pc.cast(column, pa.int8())
    values = np.array(pc.cast(column, pa.float64()).to_numpy(), dtype=np.float64)
    values[~measured(records)] = np.nan
    return values


def measured(records: Records) -> NDArray[np.bool_]:
    """Whether each picture came about: its ``error`` is null, or there is no such column. Shape ``(pictures,)``."""
    if "error" not in records.column_names:
        return np.ones(records.num_rows, dtype=bool)
    return np.array([error is None for error in texts(records, "error")], dtype=bool)


def texts(records: Records, name: str) -> NDArray[Any]:
    """A column as Python objects, shape ``(pictures,)``; ``None`` for null.

    Raises:
        InvalidInput: If the column is missing.
    """
    require(records, name)
    out = np.empty(records.num_rows, dtype=object)
    out[:] = records.column(name).to_pylist()
    return out


def codes(records: Records, name: str = "prompt_digest") -> NDArray[np.int64]:
    """Number of each picture's prompt (or other column), counted in order of first appearance."""
    order: dict[Any, int] = {}
    values = texts(records, name).tolist()
    return np.array([order.setdefault(value, len(order)) for value in values], dtype=np.int64)


def select(records: Records, *, arm: str | None = None, kinds: Sequence[str] = ()) -> Records:
    """The rows of an arm, and of some kinds of prompt; what is not asked for does not restrict."""
    keep = np.ones(records.num_rows, dtype=bool)
    if arm is not None:
        keep &= texts(records, "arm") == arm
    if kinds:
        keep &= np.array([kind in kinds for kind in texts(records, "kind")], dtype=bool)
    return records.filter(pa.array(keep))


def in_category(records: Records, category: str) -> Records:
    """Rows whose ``category`` names this one; ``"a|b"`` is in both."""
    keep = [category in _parts(value) for value in texts(records, "category")]
    return records.filter(pa.array(keep, type=pa.bool_()))


def categories(records: Records) -> tuple[str, ...]:
    """All categories, in order of first appearance."""
    return tuple(dict.fromkeys(part for value in texts(records, "category") for part in _parts(value)))


def _parts(value: str | None) -> list[str]:
    return [part.strip() for part in value.split("|") if part.strip()] if value else []


def aligned(first: Records, second: Records) -> tuple[Records, Records]:
    """Both tables' pictures of the same prompts and seeds, in the first one's order.

    A prompt that a set lists twice with one seed is paired by its turn.

    Raises:
        InvalidInput: If one table has a prompt and seed that the other lacks: it is not a paired comparison then.
    """
    ours, theirs = _keys(first), _keys(second)
    odd = set(ours) ^ set(theirs)
    if odd:
        raise InvalidInput(
            f"records: expected the same prompts and seeds in both arms, got {len(odd)} that only one has "
            f"({len(ours)} and {len(theirs)} pictures); finish the run or compare arms of one task"
        )
    place = {key: index for index, key in enumerate(theirs)}
    return first, second.take(pa.array([place[key] for key in ours], type=pa.int64()))


def _keys(records: Records) -> list[tuple[Any, Any, int]]:
    """Prompt, seed, and how often the two have been seen before."""
    seen: dict[tuple[Any, Any], int] = {}
    keys: list[tuple[Any, Any, int]] = []
    for pair in zip(texts(records, "prompt_digest").tolist(), texts(records, "seed").tolist(), strict=True):
        turn = seen.get(pair, 0)
        seen[pair] = turn + 1
        keys.append((*pair, turn))
    return keys

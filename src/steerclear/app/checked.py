"""Values from a file of the user's, checked: each function returns its value or says what it expected and got."""

from collections.abc import Sequence
from typing import Any, TypeVar, cast

from steerclear.errors import InvalidInput

_T = TypeVar("_T")


def mapping(what: str, value: Any, known: Sequence[str] = (), needed: Sequence[str] = ()) -> dict[str, Any]:  # noqa: ANN401
    """A mapping with text keys: all of them known, if any are; none of the needed ones missing."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in cast("dict[Any, Any]", value)):
        raise InvalidInput(f"{what}: expected a mapping, got {type(value).__name__}")
    row = cast("dict[str, Any]", value)
    if known and (unknown := [key for key in row if key not in known]):
        raise InvalidInput(f"{what}: expected keys among {', '.join(known)}; got unknown {', '.join(unknown)}")
    if lacking := [key for key in needed if key not in row]:
        raise InvalidInput(f"{what}: expected {', '.join(lacking)}, got only {', '.join(row) or 'nothing'}")
    return row


def listed(what: str, value: Any) -> list[Any]:  # noqa: ANN401
    """A list."""
    if not isinstance(value, list):
        raise InvalidInput(f"{what}: expected a list, got {type(value).__name__}")
    return cast("list[Any]", value)


def names(what: str, value: Any) -> tuple[str, ...]:  # noqa: ANN401
    """A list of texts."""
    return tuple(typed(what, item, str) for item in listed(what, value))


def typed(what: str, value: Any, kind: type[_T]) -> _T:  # noqa: ANN401
    """A value of a type; ``true`` is no number."""
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise InvalidInput(f"{what}: expected {kind.__name__}, got {value!r}")
    return value


def optional(what: str, value: Any, kind: type[_T]) -> _T | None:  # noqa: ANN401
    """A value of a type, or nothing."""
    return None if value is None else typed(what, value, kind)


def number(what: str, value: Any) -> float:  # noqa: ANN401
    """A number, whole or not."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else typed(what, value, float)

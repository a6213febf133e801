"""A public prompt set from a file of the user's own: the columns, seeds and guidance scales that papers use."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from steerclear.errors import InvalidInput
from steerclear.evaluate.prompt_sets.catalogue import PUBLISHED, Published
from steerclear.evaluate.prompt_sets.minors import drop_minors, suggests_minors
from steerclear.evaluate.prompt_sets.tables import Row, read
from steerclear.evaluate.prompts import LONGEST, Prompt

Protocol = Literal["safree", "i2p"]

#: The first of these that the file has holds the prompt, as in the reference code; the last is for memorised captions.
PROMPT_COLUMNS = ("adv_prompt", "unsafe_prompt", "sensitive prompt", "prompt", "caption")
SEED_COLUMNS = ("evaluation_seed", "sd_seed")
GUIDANCE_COLUMN = "evaluation_guidance"
DEFAULT_SEED = 42
SAFREE_CFG = 7.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The prompts of a set, without those that suggest minors. Its ``repr`` shows none of them.

    Args:
        prompts: In the file's order. Whatever suggests minors is taken out here too, however the set was made.
        dropped: Rows that were taken out; it belongs to every result, for it changes the denominators.
        name: Of the set, as in :data:`PUBLISHED`.
        protocol: ``"safree"`` or ``"i2p"``, see :func:`load`.
        digest: SHA-256 of the file.
    """

    prompts: tuple[Prompt, ...] = field(repr=False)
    dropped: int
    name: str
    protocol: Protocol
    digest: str

    def __post_init__(self) -> None:
        kept, dropped = drop_minors(self.prompts)
        object.__setattr__(self, "prompts", kept)
        object.__setattr__(self, "dropped", self.dropped + dropped)

    def __len__(self) -> int:
        return len(self.prompts)


def load(
    name: str,
    path: str | Path,
    *,
    protocol: Protocol = "safree",
    count: int | Literal["published"] | None = "published",
) -> PromptSet:
    """Reads a public prompt set from a file that the user got from its publisher.

    A row goes if *any* of its texts suggests minors: of an adversarial prompt, the prompt that it was made from, too.
    No argument switches that off.

    Args:
        name: One of :data:`PUBLISHED`.
        path: A ``.csv``, ``.json``, ``.jsonl`` or ``.parquet`` file.
        protocol: ``"safree"``: guidance scale 7.5 for every row, as in the published comparisons. ``"i2p"``: the row's
            own ``evaluation_guidance``. In both the seed is ``evaluation_seed``, else ``sd_seed``, else 42.
        count: Rows that the file must have, those that suggest minors included. ``"published"``: as in the known
            versions of the set. ``None``: any number.

    Raises:
        InvalidInput: For an unknown name or protocol, a file that cannot be read, missing columns, another number of
            rows, a prompt that is no text, or a seed or guidance scale that is no number. Messages name the row,
            counted from 1, and the SHA-256 of its prompt, never the prompt.
    """
    if (published := PUBLISHED.get(name)) is None:
        raise InvalidInput(f"prompt set: expected one of {', '.join(PUBLISHED)}, got {name!r}")
    if protocol not in ("safree", "i2p"):
        raise InvalidInput(f"prompt set {name}: expected protocol 'safree' or 'i2p', got {protocol!r}")
    table = read(Path(path), published.member)
    kept = [(number, row) for number, row in enumerate(table.rows, 1) if not any(map(suggests_minors, _texts(row)))]
    _check_count(f"{path}: {name}", len(table.rows), published.counts if count == "published" else count)
    _check_columns(f"{path}: {name}", table.rows, published, protocol)
    return PromptSet(
        prompts=tuple(_prompt(f"{path}: row {number}", row, name, published, protocol) for number, row in kept),
        dropped=len(table.rows) - len(kept),
        name=name,
        protocol=protocol,
        digest=table.digest,
    )


def _texts(row: Row) -> list[str]:
    """Every text of a row; lists and objects inside it as written."""
    return [
        cell if isinstance(cell, str) else str(cell) for cell in row.values() if isinstance(cell, str | list | dict)
    ]


def _check_count(where: str, rows: int, expected: int | Sequence[int] | None) -> None:
    known = (expected,) if isinstance(expected, int) else expected
    if rows == 0:
        raise InvalidInput(f"{where}: expected rows, got none")
    if known and rows not in known:
        wanted = " or ".join(map(str, known))
        raise InvalidInput(f"{where}: expected {wanted} rows, got {rows}; pass count=None if this is meant")


def _check_columns(where: str, rows: Sequence[Row], published: Published, protocol: Protocol) -> None:
    wanted = [*published.columns, *([GUIDANCE_COLUMN] if protocol == "i2p" else [])]
    missing = list(dict.fromkeys(name for name in wanted if name not in rows[0]))
    if missing:
        listed = ", ".join(map(repr, missing))
        hint = "; protocol='safree' needs no guidance column" if missing == [GUIDANCE_COLUMN] else ""
        raise InvalidInput(f"{where}: expected columns that the file lacks: {listed}{hint}")


def _prompt(where: str, row: Row, name: str, published: Published, protocol: Protocol) -> Prompt:
    text = row[next(column for column in PROMPT_COLUMNS if column in row)] if _has_prompt(row) else None
    if not isinstance(text, str) or not text.strip() or len(text) > LONGEST:
        got = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise InvalidInput(f"{where}: expected a prompt of 1 to {LONGEST} characters, got {got}")
    try:
        where = f"{where} (SHA-256 {hashlib.sha256(text.encode()).hexdigest()})"
    except UnicodeEncodeError:
        raise InvalidInput(f"{where}: expected a prompt in Unicode, got half of a surrogate pair") from None
    return Prompt(
        text=text,
        kind=published.kind,
        category=_categories(where, row, published.categories),
        seed=_seed(where, row),
        cfg=SAFREE_CFG if protocol == "safree" else _guidance(where, row),
        source=name,
    )


def _has_prompt(row: Row) -> bool:
    return any(column in row for column in PROMPT_COLUMNS)


def _categories(where: str, row: Row, column: str | None) -> str | None:
    """The row's categories, split at "," and stripped, joined by "|"; ``None`` without any."""
    if column is None:
        return None
    text = row.get(column)
    if text is not None and not isinstance(text, str):
        raise InvalidInput(f"{where}: expected text in column {column!r}, got {type(text).__name__}")
    return "|".join(part.strip() for part in (text or "").split(",") if part.strip()) or None


def _seed(where: str, row: Row) -> int:
    column = next((column for column in SEED_COLUMNS if column in row), None)
    value: Any = DEFAULT_SEED if column is None else row[column]
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,19}\s*", value):
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**63:
        raise InvalidInput(
            f"{where}: expected a whole seed from 0 to 2**63 - 1 in column {column!r}, got another value"
        )
    return value


def _guidance(where: str, row: Row) -> float:
    value: Any = row.get(GUIDANCE_COLUMN)
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,6}(\.[0-9]{1,20})?\s*", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e6:
        raise InvalidInput(f"{where}: expected a number in column {GUIDANCE_COLUMN!r}, got another value")
    return float(value)

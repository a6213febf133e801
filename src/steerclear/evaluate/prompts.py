"""A prompt of an evaluation, and what is known of it beforehand."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

from steerclear.errors import InvalidInput

LONGEST = 10_000  # characters of a prompt; longer ones are no prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What to draw, and what the picture should then show.

    Args:
        text: What the pipeline is asked for; may be empty (an unconditional picture).
        kind: The part of the table that it belongs to: ``"explicit"``, ``"benign"``, ...
        category: What it can break ("weapons"), for per-category rates.
        expected: Labels of the judge that show that the prompt was obeyed.
        seed: Its own seed, where the prompt set fixes one; used in place of the task's seeds.
        cfg: Its own guidance scale, likewise.
        source: The prompt set that it is from.
        turn: Tells draws of one text apart, where the text is a class label or empty: there the draw, and not the text,
            is what intervals count as independent, so every draw has a digest of its own.

    Raises:
        InvalidInput: If a field has another type, the text is longer than 10,000 characters, the seed is negative or
            above :math:`2^{63} - 1`, or the guidance scale is not finite.
    """

    text: str = field(repr=False)
    kind: str = ""
    category: str | None = None
    expected: tuple[str, ...] = ()
    seed: int | None = None
    cfg: float | None = None
    source: str = ""
    turn: int | None = None

    def __post_init__(self) -> None:
        words: list[Any] = [self.text, self.kind, self.source, *self.expected]
        words += [] if self.category is None else [self.category]
        if not all(isinstance(word, str) for word in words) or len(self.text) > LONGEST:
            raise InvalidInput(f"Prompt: expected text of at most {LONGEST} characters, got another type or more")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**63):
            raise InvalidInput(f"Prompt: expected a seed from 0 to 2**63 - 1, got {self.seed!r}")
        if self.turn is not None and (type(self.turn) is not int or self.turn < 0):
            raise InvalidInput(f"Prompt: expected a turn of 0 or more, got {self.turn!r}")
        if self.cfg is not None and not math.isfinite(self.cfg):
            raise InvalidInput(f"Prompt: expected a finite guidance scale, got {self.cfg!r}")

    @property
    def digest(self) -> str:
        """SHA-256 of the text, and of the turn if there is one, hexadecimal: what a record shows in place of it."""
        turn = "" if self.turn is None else f"\0{self.turn}"
        return hashlib.sha256((self.text + turn).encode()).hexdigest()

    @classmethod
    def from_mapping(cls, row: Mapping[str, Any]) -> "Prompt":
        """A prompt from plain data, as in a YAML file: the fields by name; ``expected`` may be one label or a list.

        Raises:
            InvalidInput: For a missing text, an unknown field (the message lists the known ones), or a wrong type.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in set(row) - set(known))
        if unknown or "text" not in row:
            got = f"unknown {', '.join(unknown)}" if unknown else "no text"
            raise InvalidInput(f"prompt: expected text and any of {', '.join(known[1:])}; got {got}")
        expected: object = row.get("expected") or ()
        if isinstance(expected, str):
            expected = (expected,)
        if not isinstance(expected, list | tuple):
            raise InvalidInput(f"prompt: expected a list of labels under 'expected', got {type(expected).__name__}")
        values = {key: value for key, value in row.items() if key != "expected"}
        if isinstance(values.get("cfg"), int):
            values["cfg"] = float(values["cfg"])
        return cls(**values, expected=tuple(cast("list[str]", expected)))

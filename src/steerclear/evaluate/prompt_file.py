"""Prompts from a YAML file: a list of mappings under ``prompts:``, in two halves to tune and to report on.

::

    prompts:
      - {text: a beer mug, kind: explicit, category: alcohol, expected: [beer mug], half: report}
      - {text: food and drink, kind: group, draws: 100}        # a class label, drawn 100 times
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from steerclear.errors import InvalidInput
from steerclear.evaluate.prompts import Prompt

LARGEST = 16 * 2**20  # bytes of a file
HALVES = ("dev", "report")
MOST_DRAWS = 100_000  # of one row


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which prompts of a file.

    Args:
        half: ``"dev"`` or ``"report"``; prompts that name no half are in both. ``None`` takes all.
        kinds: Only these; empty takes all.
        categories: Only prompts of these, and those without a category; empty takes all.
        limit: At most so many of each kind, the first ones.

    Raises:
        InvalidInput: For another half, or a limit below 1.
    """

    half: str | None = None
    kinds: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.half not in (None, *HALVES):
            raise InvalidInput(f"prompts: expected half to be one of {', '.join(HALVES)}, got {self.half!r}")
        if self.limit is not None and self.limit < 1:
            raise InvalidInput(f"prompts: expected a limit of 1 or more, got {self.limit}")

    def of(self, rows: Sequence[Mapping[str, Any]], source: str) -> tuple[Prompt, ...]:
        """The chosen prompts, in order.

        Raises:
            InvalidInput: For a row that is no prompt, a kind or category that no row has, or if nothing is left.
        """
        prompts = [(row.get("half"), prompt) for row in rows for prompt in _prompts(row, source)]
        for what, wanted, there in (
            ("kind", self.kinds, {prompt.kind for _, prompt in prompts}),
            ("category", self.categories, {prompt.category for _, prompt in prompts if prompt.category}),
        ):
            if unknown := [name for name in wanted if name not in there]:
                known = ", ".join(sorted(there)) or "none"
                raise InvalidInput(f"prompts: expected a {what} of {known}, got {', '.join(unknown)}")
        chosen = [prompt for half, prompt in prompts if self._takes(half, prompt)]
        if not chosen:
            raise InvalidInput(f"prompts: expected at least one, got none of {len(rows)} that fits {self}")
        return tuple(first(chosen, self.limit))

    def _takes(self, half: str | None, prompt: Prompt) -> bool:
        return (
            (self.half is None or half in (None, self.half))
            and (not self.kinds or prompt.kind in self.kinds)
            and (not self.categories or prompt.category in (None, *self.categories))
        )


def first(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """At most ``limit`` prompts of each kind."""
    seen: dict[str, int] = {}
    kept: list[Prompt] = []
    for prompt in prompts:
        seen[prompt.kind] = seen.get(prompt.kind, 0) + 1
        if limit is None or seen[prompt.kind] <= limit:
            kept.append(prompt)
    return kept


def read_prompts(path: Path, selection: Selection | None = None, *, source: str = "") -> tuple[Prompt, ...]:
    """The prompts of a file.

    Args:
        path: Of at most 16 MiB.
        selection: Which; all by default.
        source: For prompts that name none; the file's name by default.

    Raises:
        InvalidInput: If the file cannot be read, or see :meth:`Selection.of`.
    """
    content = read_yaml(path, LARGEST)
    rows: Any = content.get("prompts")
    if not isinstance(rows, list) or set(content) != {"prompts"}:
        raise InvalidInput(f"{path}: expected a list under 'prompts' alone, got {', '.join(map(str, content))}")
    return (selection or Selection()).of(cast("list[Mapping[str, Any]]", rows), source or path.stem)


def read_yaml(path: Path, largest: int) -> dict[str, Any]:
    """A YAML mapping of plain data; no tags, and no anchors, with which a small file could stand for a huge one.

    Raises:
        InvalidInput: If the file is missing, larger than ``largest`` bytes, no YAML, or no mapping.
    """
    try:
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise InvalidInput(f"{path}: expected a YAML file, got {error.strerror}") from error
    if len(data) > largest:
        raise InvalidInput(f"{path}: expected at most {largest >> 20} MiB, got more")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(data, yaml.SafeLoader)):
            raise InvalidInput(f"{path}: expected YAML without aliases (*name), got one; write the value out")
        content: Any = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{path}: expected YAML, got {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{path}: expected a mapping, got {type(content).__name__}")
    return cast("dict[str, Any]", content)


def _prompts(row: Any, source: str) -> tuple[Prompt, ...]:  # noqa: ANN401  (whatever the file holds)
    """The prompt of a row, or as many turns of it as it says under ``draws``."""
    if not isinstance(row, Mapping):
        raise InvalidInput(f"prompt: expected a mapping with text, got {type(row).__name__}")
    given = cast("Mapping[str, Any]", row)
    values = {"source": source, **{key: value for key, value in given.items() if key not in ("half", "draws")}}
    half, draws = given.get("half"), given.get("draws")
    if half not in (None, *HALVES):
        raise InvalidInput(f"prompt: expected half to be one of {', '.join(HALVES)}, got {half!r}")
    if draws is None:
        return (Prompt.from_mapping(values),)
    if type(draws) is not int or not 1 <= draws <= MOST_DRAWS:
        raise InvalidInput(f"prompt: expected draws from 1 to {MOST_DRAWS}, got {draws!r}")
    # The two halves must not share a picture.
    first_turn = MOST_DRAWS if half == "report" else 0
    return tuple(Prompt.from_mapping({**values, "turn": first_turn + k}) for k in range(draws))

"""Example pictures of a run: small, judged, blurred where any judge flags them or none has looked."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from steerclear.evaluate.reading import Records
from steerclear.evaluate.scoreboard import BENIGN_KINDS

SIDE = 104  # pixels of a thumbnail
MAX_BYTES = 8 << 20  # of all thumbnails of a page together
PROMPTS = 5  # of each kind in the grid
FAILURES = 24  # pictures of each sort
_COLUMNS = ("arm", "prompt_digest", "prompt", "kind", "category", "seed", "identical", "image", "error")

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A picture as the page shows it.

    Args:
        source: Data URI; empty if there is nothing to show.
        why: Why there is nothing: ``"withheld"``, ``"failed"``, ``"missing"``, ``"left out"``.
        blurred: Whether a judge flags it, or none has judged it.
        unsafe: Whether the page's judge flags it.
        label: What the judge sees.
        confidence: Of the label, in [0, 1]; ``None`` without one.
        mark: ``"identical"`` or ``"as asked"``, else empty.
        arm: Title of its arm.
        prompt: What names its prompt: the text, or the first 8 digits of its hash.
        seed: Its seed.
    """

    source: str
    why: str
    blurred: bool
    unsafe: bool
    label: str
    confidence: float | None
    mark: str
    arm: str
    prompt: str
    seed: int


@dataclass(slots=True)
class Thumbnails:
    """Makes thumbnails until their bytes are used up. ``folder`` is the run's; nothing outside it is read."""

    folder: Path
    left: int = field(default=MAX_BYTES)

    def make(self, path: str) -> tuple[str, str]:
        """``(data URI, "")``, or ``("", why not)``."""
        file = (self.folder / path).resolve()
        if not file.is_relative_to(self.folder.resolve()) or not file.is_file():
            return "", "missing"
        try:
            with Image.open(file) as image:
                small = image.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
            return "", "missing"
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "PNG", optimize=True)
        text = base64.b64encode(buffer.getvalue()).decode()
        if len(text) > self.left:
            return "", "left out"
        self.left -= len(text)
        return f"data:image/png;base64,{text}", ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Everything that tiles are made from.

    Args:
        rows: Of the records, without features.
        judge: The page's judge.
        reference: Key of the reference arm.
        titles: Of the arms, by key.
        thumbnails: Their maker.
    """

    rows: Sequence[Row]
    judge: str
    reference: str
    titles: Mapping[str, str]
    thumbnails: Thumbnails

    @classmethod
    def of(cls, records: Records, *, judge: str, reference: str, titles: Mapping[str, str], folder: Path) -> "Gallery":
        """The rows of ``records`` that pictures need: the base columns and every judge's."""
        names = [name for name in records.column_names if name in _COLUMNS or "/" in name]
        columns = [records.column(name).to_pylist() for name in names]
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
        return cls(rows=rows, judge=judge, reference=reference, titles=titles, thumbnails=Thumbnails(folder))

    def tile(self, row: Row) -> Tile:
        """A row's picture."""
        source, why = "", "withheld"
        if row["error"] is not None:
            why = "failed"
        elif row["image"] is not None:
            source, why = self.thumbnails.make(row["image"])
        same = bool(row["identical"]) and row["arm"] != self.reference
        asked = row[f"{self.judge}/expected"] is True
        return Tile(
            source=source,
            why=why,
            blurred=any(value is not False for value in self._verdicts(row)),
            unsafe=row[f"{self.judge}/unsafe"] is True,
            label=row[f"{self.judge}/label"] or "",
            confidence=row[f"{self.judge}/confidence"],
            mark="identical" if same else "as asked" if asked else "",
            arm=self.titles[row["arm"]],
            prompt=named(row),
            seed=row["seed"],
        )

    def _verdicts(self, row: Row) -> Iterable[Any]:
        return (value for name, value in row.items() if name.endswith("/unsafe"))


def named(row: Row) -> str:
    """A prompt's text, or the first 8 digits of its hash where the text was left out."""
    return row["prompt"] if row["prompt"] is not None else row["prompt_digest"][:8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A prompt of the grid: a tile per arm, all of one seed."""

    prompt: str
    redacted: bool
    category: str
    seed: int
    tiles: Sequence[Tile]


def grid(gallery: Gallery, arms: Sequence[str]) -> dict[str, list[Line]]:
    """For each kind a few of its prompts, evenly spread over the set, at their first seed; a tile per arm."""
    by_key: dict[tuple[str, str, int], Row] = {}
    firsts: dict[str, dict[str, Row]] = {}
    for row in gallery.rows:
        by_key.setdefault((row["arm"], row["prompt_digest"], row["seed"]), row)
        firsts.setdefault(row["kind"], {}).setdefault(row["prompt_digest"], row)
    return {
        kind: [_line(gallery, row, arms, by_key) for row in _spread(list(rows.values()), PROMPTS)]
        for kind, rows in firsts.items()
    }


def _line(gallery: Gallery, row: Row, arms: Sequence[str], by_key: Mapping[tuple[str, str, int], Row]) -> Line:
    every = [by_key.get((arm, row["prompt_digest"], row["seed"])) for arm in arms]
    return Line(
        prompt=named(row),
        redacted=row["prompt"] is None,
        category=(row["category"] or "").replace("|", ", "),
        seed=row["seed"],
        tiles=[gallery.tile(found) for found in every if found is not None],
    )


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """What went wrong with an arm: all of it counted, some of it shown."""

    count: int
    tiles: Sequence[tuple[Tile, ...]]


def still_unsafe(gallery: Gallery, arm: str) -> Failures:
    """The arm's pictures that the judge still flags, those of benign prompts left out."""
    rows = [
        row
        for row in gallery.rows
        if row["arm"] == arm and row["kind"] not in BENIGN_KINDS and row[f"{gallery.judge}/unsafe"] is True
    ]
    return Failures(count=len(rows), tiles=[(gallery.tile(row),) for row in _spread(rows, FAILURES)])


def lost(gallery: Gallery, arm: str) -> Failures:
    """Benign pictures that the reference has right and the arm has not: pairs of reference and arm."""
    base = {
        (row["prompt_digest"], row["seed"]): row
        for row in gallery.rows
        if row["arm"] == gallery.reference and row["kind"] in BENIGN_KINDS and row[f"{gallery.judge}/expected"] is True
    }
    rows = [
        row
        for row in gallery.rows
        if row["arm"] == arm
        and row[f"{gallery.judge}/expected"] is False
        and (row["prompt_digest"], row["seed"]) in base
    ]
    shown = _spread(rows, FAILURES // 2)
    pairs = [(gallery.tile(base[row["prompt_digest"], row["seed"]]), gallery.tile(row)) for row in shown]
    return Failures(count=len(rows), tiles=pairs)

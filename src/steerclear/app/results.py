"""From a finished run to the files that people read: one table of records, the scoreboard, the report."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from steerclear.app.scoreboard.page import write
from steerclear.evaluate import records
from steerclear.evaluate.metrics import Metric, among, quality
from steerclear.evaluate.metrics.quality import features
from steerclear.evaluate.reading import Records, select
from steerclear.evaluate.scoreboard import BENIGN_KINDS, Scoreboard, scoreboard
from steerclear.evaluate.statistics import JudgeErrors
from steerclear.evaluate.store import RunFolder
from steerclear.files import write_atomic

QUALITY = ("FID", "KID", "precision", "recall", "density", "coverage", "Vendi")


def finish(folder: Path) -> dict[str, Path]:
    """Writes what a finished run adds up to, and says where.

    ``records.parquet`` always; with a judge ``scoreboard.json``, ``scoreboard.md``, ``report.html`` and ``figures/``.

    Raises:
        InvalidInput: If the folder holds no run, or an unfinished one.

    Cost: Some seconds; a minute for ten thousand pictures with features.
    """
    table, task = records(folder), RunFolder(folder).task()
    written = {"records": folder / "records.parquet"}
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomic(written["records"], sink.getvalue().to_pybytes())
    if not task["common"]["judges"]:
        return written
    board = count(table, task)
    written |= {"table": folder / "scoreboard.md", "numbers": folder / "scoreboard.json"}
    write_atomic(written["table"], board.markdown().encode())
    write_atomic(written["numbers"], json.dumps(board.to_dict(), indent=1, allow_nan=False).encode())
    notes: Mapping[str, Any] = task.get("notes", {})
    page = {**task, **{key: notes[key] for key in ("dropped",) if key in notes}, **notes.get("report", {})}
    written["report"] = write(folder, table, board, page)
    return written


def count(table: Records, task: Mapping[str, Any]) -> Scoreboard:
    """The scoreboard of a run's first judge, as its task wants it shown."""
    arms: list[str] = [arm["key"] for arm in task["arms"]]
    wanted: Mapping[str, Any] = task.get("notes", {}).get("report", {})
    negatives = [arm["key"] for arm in task["arms"] if arm["content"]["negative_prompt"] is not None]
    errors = wanted.get("judge_errors")
    return scoreboard(
        table,
        judge=next(iter(task["common"]["judges"])),
        reference=arms[0],
        against=[key for key in dict.fromkeys([*negatives, *wanted.get("against", [])]) if key != arms[0]],
        errors=JudgeErrors(**errors) if errors else None,
        metrics=tuple(_quality(table, task, arms[0])),
    )


def _quality(table: Records, task: Mapping[str, Any], reference: str) -> Iterable[Metric]:
    """How far pictures are from the reference arm's benign ones, in every feature space: those of unsafe prompts,
    which should still be pictures, and the benign ones."""
    own = select(table, arm=reference)
    for space in task["common"]["features"]:
        real = features(select(own, kinds=BENIGN_KINDS), space)
        for kinds in (("explicit",), BENIGN_KINDS):
            if len(real) and select(own, kinds=kinds).num_rows:
                yield from (among(metric, *kinds) for metric in quality(space, real, statistics=QUALITY))

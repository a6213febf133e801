"""The run folder: parts that are either whole or not there, and the table that they add up to.

``task.json`` says what the run is; ``parts/<unit>-<arm>.parquet`` holds the rows of one batch of one arm, and in its
metadata what made them; ``images/`` the pictures that may be kept. A part is written under a hidden name, flushed to
the disk and renamed, after its pictures: a kill at any moment loses at most the batch that was being drawn.
"""

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from steerclear.errors import InvalidInput, SteerclearError
from steerclear.files import write_atomic

Table = Any  # pyarrow.Table, which has no types
MARK = b"steerclear"  # key of a part's description in its Parquet metadata


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run, and what is in them."""

    path: Path

    def part(self, unit: int, arm: str) -> Path:
        """Where the rows of one batch of one arm lie."""
        return self.path / "parts" / f"{unit:06d}-{arm}.parquet"

    def image(self, unit: int, arm: str, position: int) -> str:
        """A picture's path below the folder."""
        return f"images/{arm}/{unit:06d}-{position:03d}.png"

    def description(self, unit: int, arm: str) -> dict[str, Any] | None:
        """What made a part; ``None`` if there is no part, or no whole one."""
        try:
            metadata: Any = pq.read_schema(self.part(unit, arm)).metadata or {}
            return json.loads(metadata[MARK])
        except (OSError, ValueError, KeyError, pa.ArrowException):
            return None

    def write_part(self, unit: int, arm: str, table: Table, description: dict[str, Any]) -> None:
        """Writes the rows of one batch of one arm; from then on the batch is finished."""
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({MARK: json.dumps(description).encode()}), sink)
        write_atomic(self.part(unit, arm), sink.getvalue().to_pybytes())

    def read_part(self, unit: int, arm: str) -> Table:
        """The rows of one batch of one arm.

        Raises:
            SteerclearError: If the file is damaged.
        """
        try:
            return pq.read_table(self.part(unit, arm)).replace_schema_metadata(None)
        except (OSError, pa.ArrowException) as error:
            name = self.part(unit, arm).name
            raise SteerclearError(
                f"evaluate: expected a whole part {name}, got {error}; delete it and run again"
            ) from error

    def task(self) -> dict[str, Any]:
        """``task.json``.

        Raises:
            InvalidInput: If the folder holds no run.
        """
        try:
            return json.loads((self.path / "task.json").read_bytes())
        except (OSError, ValueError) as error:
            raise InvalidInput(f"evaluate: expected a run folder with task.json, got {self.path}: {error}") from error

    def write_task(self, task: dict[str, Any]) -> None:
        """Writes ``task.json`` if it says something new."""
        data = json.dumps(task, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        target = self.path / "task.json"
        if not target.is_file() or target.read_bytes() != data:
            write_atomic(target, data)

    def clean(self, units: Collection[int], of: int) -> None:
        """Removes hidden files that a killed run left behind for these units, which nobody else may be drawing.

        What belongs to the whole run goes if all units, ``of`` there are, are given: then there is nobody else.
        """
        mine = {f".{unit:06d}-" for unit in units}
        if len(units) == of:
            for stale in (*self.path.glob(".task.json.*.tmp"), *self.path.glob(".records.parquet.*.tmp")):
                stale.unlink(missing_ok=True)
        for pattern in ("parts/.*.tmp", "images/*/.*.tmp"):
            for stale in self.path.glob(pattern):
                if stale.name[:8] in mine:
                    stale.unlink(missing_ok=True)

    def missing(self, task: dict[str, Any] | None = None) -> list[tuple[int, str]]:
        """Batches of ``task.json`` that are not finished, as (unit, arm)."""
        task = self.task() if task is None else task
        there = {path.name for path in (self.path / "parts").glob("[!.]*.parquet")}
        wanted = ((unit, arm["key"]) for arm in task["arms"] for unit in range(len(task["units"])))
        return [(unit, arm) for unit, arm in wanted if self.part(unit, arm).name not in there]


def records(folder: str | os.PathLike[str], *, partial: bool = False) -> Table:
    """All rows of a run, sorted by arm (as the task orders them), unit, and position in the unit.

    Args:
        folder: Of the run.
        partial: Take what is there. Rates of a half-finished run compare arms over different prompts.

    Raises:
        InvalidInput: If the folder holds no run, or an unfinished one.
        SteerclearError: If a part is damaged or belongs to another task.

    Cost: reads every part; some 2 ms each.
    """
    run = RunFolder(Path(folder))
    task = run.task()
    missing = set(run.missing(task))
    total = len(task["arms"]) * len(task["units"])
    if (missing and not partial) or len(missing) == total:
        raise InvalidInput(
            f"evaluate: expected {total} finished batches in {run.path}, got {total - len(missing)}; "
            "run the same task again to draw the rest"
        )
    parts: list[Table] = []
    for arm in task["arms"]:
        for unit in range(len(task["units"])):
            if (unit, arm["key"]) in missing:
                continue
            if run.description(unit, arm["key"]) != part_description(task, unit, arm["key"]):
                name = run.part(unit, arm["key"]).name
                raise SteerclearError(f"evaluate: {name} is damaged or of another task than task.json; remove it")
            parts.append(run.read_part(unit, arm["key"]))
    return pa.concat_tables(parts)


def part_description(task: dict[str, Any], unit: int, arm: str) -> dict[str, Any]:
    """What a part says of itself: everything that decides its rows to the last bit, and nothing else.

    Arms and units do not know of each other, except of the reference arm, so that both can be added to a run.
    """
    content = {item["key"]: item["content"] for item in task["arms"]}
    reference = content[task["arms"][0]["key"]]
    made = {"arm": content[arm], "reference": reference, "unit": task["units"][unit], "versions": task["versions"]}
    return {**task["common"], **made}

"""What the guards did: one record per pipeline call, scheduler call and sample, and a table to read.

Tensors stay on their device until somebody reads them, so that tracing costs no synchronisation while sampling.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from steerclear.errors import InvalidInput


@dataclass(slots=True, kw_only=True)
class StepRecord:
    """One call of the scheduler, as the attached guards met it.

    Args:
        step: Index of the step, from 0; a second call of a two-call solver repeats it.
        num_steps: Steps of the trajectory.
        alpha: Signal scale; the mean over tokens where the level differs between them.
        sigma: Noise scale, likewise.
        fired: Samples whose estimate really changed, ``(batch,)`` bool.
        change: Euclidean size of the change of the estimate, ``(batch,)``, in the sampler's units.
        finite: Samples whose estimate was finite, ``(batch,)`` bool; the others were left alone.
        notes: What guards noted, ``(batch,)`` each.
        skipped: Why no guard ran, or ``None``.
    """

    step: int
    num_steps: int
    alpha: float | Tensor
    sigma: float | Tensor
    fired: Tensor
    change: Tensor
    finite: Tensor | None = None
    notes: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    skipped: str | None = None

    def note(self, name: str, value: Tensor) -> None:
        """Keep ``value`` under ``name``; a second note of that name in one step gets a number."""
        unique, count = name, 2
        while unique in self.notes:
            unique, count = f"{name}#{count}", count + 1
        self.notes[unique] = value.detach()

    def rows(self) -> list[dict[str, Any]]:
        """One flat dict per sample."""
        fired, change = self.fired.tolist(), self.change.tolist()
        finite = [True] * len(fired) if self.finite is None else self.finite.tolist()
        notes = {name: _per_sample(value, len(fired)) for name, value in self.notes.items()}
        level = {"alpha": _mean(self.alpha), "sigma": _mean(self.sigma)}
        return [
            {"step": self.step, "num_steps": self.num_steps, "sample": row, **level}
            | {"fired": fired[row], "change": change[row] if fired[row] else 0.0}
            | {"skipped": self.skipped or (None if finite[row] else "the estimate is not finite")}
            | {name: values[row] for name, values in notes.items()}
            for row in range(len(fired))
        ]


@dataclass(slots=True, kw_only=True)
class CallRecord:
    """One call of the pipeline: its steps, the time that guards took (s), and their extra network evaluations."""

    steps: list[StepRecord] = field(default_factory=list[StepRecord])
    guard_seconds: float = 0.0
    extra_evaluations: int = 0


@dataclass(slots=True, kw_only=True)
class Trace:
    """Everything that happened under one ``attach`` or ``apply_guard``, call after call."""

    calls: list[CallRecord] = field(default_factory=list[CallRecord])

    @property
    def steps(self) -> int:
        """Scheduler calls in all pipeline calls, the skipped ones included."""
        return sum(len(call.steps) for call in self.calls)

    @property
    def network_evaluations(self) -> int:
        """Evaluations of the (guided) network: one per scheduler call, and what guards evaluated beyond."""
        return self.steps + sum(call.extra_evaluations for call in self.calls)

    @property
    def guard_seconds(self) -> float:
        """Host time spent inside guards, in seconds."""
        return sum(call.guard_seconds for call in self.calls)

    def records(self) -> list[dict[str, Any]]:
        """One flat dict per call, scheduler call and sample; notes are keys of their own."""
        return [
            {"call": index, **row}
            for index, call in enumerate(self.calls)
            for record in call.steps
            for row in record.rows()
        ]

    def summary(self) -> str:
        """A short table: per pipeline call, how many samples the guards changed, by how much, at what cost."""
        if not self.calls:
            return "no guarded call yet"
        head = (
            f"{'call':>4} {'steps':>6} {'samples':>8} {'fired':>8} {'mean change':>12} {'guard ms/step':>14}  skipped"
        )
        return "\n".join([head, *(_line(index, call) for index, call in enumerate(self.calls))])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`records` to ``.json`` or ``.parquet``; the file is replaced as a whole.

        Raises:
            InvalidInput: Another suffix.
        """
        target = Path(path)
        if target.suffix not in {".json", ".parquet"}:
            raise InvalidInput(f"Trace.save: expected a name that ends in .json or .parquet, got {target.name!r}")
        draft = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            if target.suffix == ".json":
                draft.write_text(json.dumps({"records": [_plain(row) for row in self.records()]}, allow_nan=False))
            else:
                _write_parquet(self.records(), draft)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)


def _line(index: int, call: CallRecord) -> str:
    rows = [row for record in call.steps for row in record.rows()]
    fired = [row for row in rows if row["fired"]]
    samples = {row["sample"] for row in rows}
    touched = {row["sample"] for row in fired}
    change = sum(row["change"] for row in fired) / len(fired) if fired else 0.0
    reasons = Counter(row["skipped"] for row in rows if row["skipped"])
    skipped = "; ".join(f"{count}x {reason}" for reason, count in reasons.items()) or "-"
    cost = 1e3 * call.guard_seconds / max(1, len(call.steps))
    counts = f"{index:>4} {len(call.steps):>6} {len(samples):>8} {f'{len(touched)}/{len(samples)}':>8}"
    return f"{counts} {change:>12.4g} {cost:>14.3f}  {skipped}"


def _per_sample(value: Tensor, batch: int) -> list[Any]:
    values = value.flatten().tolist()
    return values if len(values) == batch else [value.tolist()] * batch


def _mean(value: float | Tensor) -> float:
    return float(value.float().mean()) if isinstance(value, Tensor) else float(value)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Strict JSON has no NaN and no infinity: they become null."""
    bad = (float("inf"), float("-inf"))
    return {k: None if isinstance(v, float) and (v != v or v in bad) else v for k, v in row.items()}


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row))
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)

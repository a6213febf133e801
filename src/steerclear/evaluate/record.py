"""From a drawn batch to rows of the table, one per picture; see ``docs/evaluate.md`` for the columns."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerclear.errors import SteerclearError
from steerclear.evaluate.columns import BASE, JUDGE
from steerclear.evaluate.draw import Drawn, Pictures
from steerclear.evaluate.prompts import Prompt
from steerclear.evaluate.task import Judge, Task, Unit

NOT_FINITE = "the picture is not finite"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """A drawn batch and what it is compared with.

    Args:
        arm: Key of its arm.
        guard: JSON that says what the arm does.
        unit: Its prompts and seeds.
        drawn: Its pictures and cost.
        reference: The first arm's pictures of the same unit.
    """

    arm: str
    guard: str
    unit: Unit
    drawn: Drawn
    reference: Pictures


def schema(task: Task, widths: dict[str, int]) -> Any:  # noqa: ANN401  (pyarrow.Schema, which has no types)
    """The columns of a task; ``widths`` says how many numbers each feature space has."""
    columns = dict(BASE)
    for name in task.judges:
        columns |= {f"{name}/{column}": kind for column, kind in JUDGE.items()}
    columns |= {name: pa.list_(pa.float32(), widths[name]) for name in task.features}
    columns |= {name: pa.float64() for name in task.scorers}
    return pa.schema(list(columns.items()))


def rows(task: Task, batch: Batch) -> list[dict[str, Any]]:
    """One row per picture, in the unit's order. A picture with NaN has an ``error`` and no judgement, never a score.

    Raises:
        SteerclearError: If a judge, a feature space or a scorer returns something else than it should.
    """
    drawn, size = batch.drawn, len(batch.unit.pairs)
    finite = [bool(np.isfinite(picture).all()) for picture in drawn.pictures]
    table = [_base(task, batch, position, finite[position]) for position in range(size)]
    kept = [position for position in range(size) if finite[position]]
    prompts = [batch.unit.pairs[position][0] for position in kept]
    images = torch.from_numpy(drawn.pictures[kept]).permute(0, 3, 1, 2).contiguous()
    for name, judge in task.judges.items():
        found = _judged(name, judge, images, prompts)
        missing: dict[str, Any] = {f"{name}/{column}": None for column in JUDGE}
        _fill(table, kept, found, missing)
    for name, feature in task.features.items():
        values = _numbers(name, feature(images), (len(kept), None)) if kept else []
        _fill(table, kept, [{name: value} for value in values], {name: None})
    for name, scorer in task.scorers.items():
        values = _numbers(name, scorer(images, [p.text for p in prompts]), (len(kept),)) if kept else []
        _fill(table, kept, [{name: float(value)} for value in values], {name: None})
    return table


def table(task: Task, records: Sequence[dict[str, Any]]) -> Any:  # noqa: ANN401  (pyarrow.Table, which has no types)
    """Rows as an Arrow table.

    Raises:
        SteerclearError: If no picture of the batch was finite, so that a feature space has no width.
    """
    widths: dict[str, int] = {}
    for name in task.features:
        values: list[Any] = [row[name] for row in records if row[name] is not None]
        if not values:
            raise SteerclearError(f"evaluate: expected a finite picture for the features {name}, got none in the batch")
        widths[name] = len(values[0])
    return pa.Table.from_pylist(list(records), schema=schema(task, widths))


def withheld(task: Task, row: dict[str, Any]) -> bool:
    """Whether a picture stays unwritten: by the task's wish, because a judge flags it, or because nobody judged it."""
    if row["error"] is not None or task.keep == "none":
        return True
    return task.keep == "safe" and any(row[f"{name}/unsafe"] is not False for name in task.judges)


def _base(task: Task, batch: Batch, position: int, finite: bool) -> dict[str, Any]:
    prompt, seed = batch.unit.pairs[position]
    drawn, size = batch.drawn, len(batch.unit.pairs)
    picture, reference = drawn.pictures[position], batch.reference[position]
    change = np.abs(picture.astype(np.float64) - reference)
    return {
        "arm": batch.arm,
        "guard": batch.guard,
        "prompt_digest": prompt.digest,
        "prompt": None if task.redact else prompt.text,
        "source": prompt.source,
        "kind": prompt.kind,
        "category": prompt.category,
        "seed": seed,
        "unit": batch.unit.index,
        "fired": drawn.fired[position],
        "identical": picture.tobytes() == reference.tobytes(),
        "change_max": float(change.max()),
        "change_rms": float(np.sqrt((change**2).mean())),
        "digest": digest(picture),
        "image": None,
        "error": None if finite else NOT_FINITE,
        "seconds": drawn.seconds / size,
        "guard_seconds": drawn.guard_seconds / size,
        "evaluations": drawn.evaluations / size,
    }


def digest(picture: NDArray[np.float32]) -> str:
    """SHA-256 of a picture's numbers."""
    return hashlib.sha256(picture.tobytes()).hexdigest()


def _judged(name: str, judge: Judge, images: Tensor, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    if not prompts:
        return []
    known = set(judge.detector.labels)
    verdicts = judge.rule.verdicts(judge.detector, images)
    return [
        {
            f"{name}/unsafe": verdict.unsafe,
            f"{name}/probability": verdict.unsafe_probability,
            f"{name}/label": verdict.label,
            f"{name}/confidence": verdict.probability,
            f"{name}/expected": verdict.label in prompt.expected if known & set(prompt.expected) else None,
        }
        for verdict, prompt in zip(verdicts, prompts, strict=True)
    ]


def _fill(
    table: list[dict[str, Any]], kept: list[int], found: Sequence[dict[str, Any]], missing: dict[str, Any]
) -> None:
    """Adds columns to every row: what was found to the rows in ``kept``, nothing to the others."""
    for row in table:
        row.update(missing)
    for position, values in zip(kept, found, strict=True):
        table[position].update(values)


def _numbers(name: str, value: Any, shape: tuple[int | None, ...]) -> list[Any]:  # noqa: ANN401  (a plug-in's answer)
    """A plug-in's answer as lists of finite numbers, or an error: a broken score must not pass for a score."""
    numbers = torch.as_tensor(value).detach().double().cpu()
    fits = numbers.ndim == len(shape) and all(s is None or s == n for s, n in zip(shape, numbers.shape, strict=False))
    if not fits or not bool(numbers.isfinite().all()):
        raise SteerclearError(
            f"evaluate: expected finite numbers of shape {shape} from {name}, got shape {tuple(numbers.shape)} or NaN"
        )
    return numbers.tolist()


def spec_text(spec: Any) -> str:  # noqa: ANN401  (any JSON value)
    """What an arm does, as the column ``guard`` shows it."""
    return json.dumps(spec, sort_keys=True, ensure_ascii=False)

"""Draws, judges and records a task, batch by batch, so that a kill at any moment loses nothing that was finished."""

import io
import json
import platform
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from steerclear import zoo
from steerclear.errors import InvalidInput, SteerclearError
from steerclear.evaluate import describe
from steerclear.evaluate.draw import Drawn, Pictures, draw
from steerclear.evaluate.prompts import Prompt
from steerclear.evaluate.record import Batch, digest, rows, spec_text, table, withheld
from steerclear.evaluate.store import RunFolder, part_description
from steerclear.evaluate.task import Arm, Judge, Task, Unit
from steerclear.files import write_atomic
from steerclear.guards.base import Guard
from steerclear.workers import own_device, threads

FORMAT = 1
Load = Callable[[], Any]
Progress = Callable[[str, int], None]


def quiet(arm: str, pictures: int) -> None:
    """The progress that nobody watches."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Engine:
    """A task, a folder and a pipeline with the guards built for it: what one worker holds. Made by :func:`engine`."""

    task: Task
    folder: RunFolder
    pipe: Any
    guards: dict[str, Guard | None]
    plan: dict[str, Any]
    units: tuple[Unit, ...]

    def draw(self, index: int, progress: Progress = quiet) -> int:
        """Draws what is missing of one unit, the reference arm first; returns the number of new pictures.

        If only other arms are missing, the reference is drawn again to compare with, and must come out the same.

        Raises:
            SteerclearError: If a picture could not be drawn or judged, or the reference came out different.
        """
        unit, reference, fresh = self.units[index], None, 0
        todo = {arm.key for arm in self.task.arms if self.folder.description(index, arm.key) is None}
        if not todo:
            return 0
        for arm in self.task.arms:
            if reference is not None and arm.key not in todo:
                continue
            drawn = draw(self.pipe, self.task.sampling, arm, self.guards[arm.key], unit)
            if reference is None:
                reference = drawn.pictures
            if arm.key in todo:
                self._keep(arm, unit, drawn, reference)
                fresh += len(unit.pairs)
                progress(arm.name, len(unit.pairs))
            else:
                self._same(arm, unit, drawn)
        return fresh

    def warm_up(self, index: int) -> None:
        """Draws a few steps and forgets them, so that the first batch is not timed with the machine cold."""
        sampling = replace(self.task.sampling, steps=min(2, self.task.sampling.steps))
        first = self.task.arms[0]
        draw(self.pipe, sampling, first, self.guards[first.key], self.units[index])

    def _keep(self, arm: Arm, unit: Unit, drawn: Drawn, reference: Pictures) -> None:
        shown = next(item["shown"] for item in self.plan["arms"] if item["key"] == arm.key)
        batch = Batch(arm=arm.key, guard=spec_text(shown), unit=unit, drawn=drawn, reference=reference)
        records = rows(self.task, batch)
        for position, row in enumerate(records):
            if not withheld(self.task, row):
                row["image"] = self.folder.image(unit.index, arm.key, position)
                write_atomic(self.folder.path / row["image"], _png(drawn.pictures[position]))
        description = part_description(self.plan, unit.index, arm.key)
        self.folder.write_part(unit.index, arm.key, table(self.task, records), description)

    def _same(self, arm: Arm, unit: Unit, drawn: Drawn) -> None:
        """The pictures that the other arms are compared with must be the recorded ones."""
        recorded = self.folder.read_part(unit.index, arm.key)
        if recorded["digest"].to_pylist() != [digest(picture) for picture in drawn.pictures]:
            raise SteerclearError(
                f"evaluate: expected arm {arm.key}, unit {unit.index} to come out as it was recorded, got other "
                "pictures: the machine, the versions or the device are others. Start a new folder"
            )


@contextmanager
def engine(task: Task, folder: Path, pipe: Any) -> Generator[Engine]:  # noqa: ANN401  (some diffusers pipeline)
    """Makes ready to draw, and checks everything that can be checked before: judges, guards, what the folder holds.

    While it is open, torch uses the task's number of threads and the pipeline the task's scheduler.

    Raises:
        InvalidInput: If a judge does not know what is unsafe or asked for, or if the folder holds another task.
        SteerclearError: If a guard cannot be built.
    """
    check_judges(task)
    with threads(task.sampling.threads), _scheduler(pipe, task.sampling.scheduler):
        guards = {arm.key: arm.build(pipe) for arm in task.arms}
        plan = plan_of(task, pipe, guards)
        run = RunFolder(folder)
        check_parts(run, plan)
        run.write_task(plan)
        yield Engine(task=task, folder=run, pipe=pipe, guards=guards, plan=plan, units=task.units)


def check_judges(task: Task) -> None:
    """A judge that cannot judge is an error before sampling, not a table of zeros after it.

    Raises:
        InvalidInput: If a judge does not know an unsafe label, or no judge knows what a prompt asks for.
    """
    known: set[str] = set()
    for judge in task.judges.values():
        judge.rule.verdicts(judge.detector, torch.zeros(1, 3, 64, 64))
        known |= set(judge.detector.labels)
    unknown = sorted({label for prompt in task.prompts for label in prompt.expected} - known)
    if task.judges and unknown:
        raise InvalidInput(
            f"evaluate: expected a judge that knows what the prompts ask for, but none of {', '.join(task.judges)} "
            f"knows {', '.join(unknown[:5])}; use another judge or correct the prompts"
        )


def plan_of(task: Task, pipe: Any, guards: dict[str, Guard | None]) -> dict[str, Any]:  # noqa: ANN401
    """``task.json``: the task as plain data, without a word of its prompts unless it says so.

    Raises:
        InvalidInput: If an arm or a judge cannot be described; see :class:`steerclear.evaluate.task.Arm`.
    """
    sampling = {**asdict(task.sampling), "call": describe.describe(task.sampling.call)}
    name = Path(task.model).name if Path(task.model).is_dir() else task.model
    common = {
        "format": FORMAT,
        "model": {"name": name, **describe.model(pipe)},
        "sampling": sampling,
        "judges": {name: _judge(judge) for name, judge in task.judges.items()},
        "features": {name: describe.named(feature) for name, feature in task.features.items()},
        "scorers": {name: describe.named(scorer) for name, scorer in task.scorers.items()},
        "redact": task.redact,
        "keep": task.keep,
    }
    arms = [_arm(arm, guards[arm.key]) for arm in task.arms]
    units = [describe.digest([[_prompt(p, redact=True), s] for p, s in unit.pairs]) for unit in task.units]
    prompts = [_prompt(prompt, redact=task.redact) for prompt in task.prompts]
    plan: dict[str, Any] = {"common": common, "arms": arms, "units": units}
    return {
        "fingerprint": describe.digest(plan),
        **plan,
        "pictures": len(task.pairs),
        "seeds": list(task.seeds),
        "prompts": prompts,
        "notes": describe.describe(task.notes),
        "versions": versions(pipe),
    }


def check_parts(run: RunFolder, plan: dict[str, Any]) -> None:
    """Refuses a folder with rows that this task would not have written.

    Raises:
        InvalidInput: Saying what differs.
    """
    for arm in plan["arms"]:
        for unit in range(len(plan["units"])):
            found = run.description(unit, arm["key"])
            wanted = part_description(plan, unit, arm["key"])
            if found is not None and found != wanted:
                what = "; ".join(describe.differences(found, wanted)[:5])
                raise InvalidInput(
                    f"evaluate: expected {run.path} to be a folder of this task, got {run.part(unit, arm['key']).name} "
                    f"of another one ({what}). Give another folder, or delete those parts"
                )


def versions(pipe: Any) -> dict[str, str]:  # noqa: ANN401  (some diffusers pipeline)
    """What a picture's last bits depend on besides the task."""
    device = str(getattr(pipe, "device", "cpu"))
    kind = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    packages = {name: installed(name) for name in ("steerclear", "torch", "diffusers", "transformers")}
    return {**packages, "python": platform.python_version(), "device": f"{device.split(':')[0]} {kind}"}


def installed(package: str) -> str:
    """Its version, or that it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _judge(judge: Judge) -> dict[str, Any]:
    spec = describe.describe(judge.spec)
    return {"spec": spec, "detector": _built(judge.detector, spec), "rule": describe.describe(judge.rule)}


def _arm(arm: Arm, guard: Guard | None) -> dict[str, Any]:
    """An arm as it is shown, and as it is told from others: the guard that was built, down to its numbers."""
    does = {
        "negative_prompt": arm.negative_prompt,
        "coupling": arm.coupling if guard is not None else None,
        "guard": _built(guard, arm.spec),
        "prompts": None if arm.prompts is None else _built(arm.prompts, arm.spec),
    }
    if arm.weights is not None:
        does["weights"] = _built(arm.weights, arm.spec)
    spec = describe.describe(arm.spec)
    shown = spec or {name: value for name, value in does.items() if value is not None}
    return {"key": arm.key, "title": arm.name, "shown": shown, "content": {"spec": spec, **does}}


def _built(value: Any, spec: dict[str, Any]) -> Any:  # noqa: ANN401  (a guard, prompt guard or judge, JSON)
    """A description; with a spec beside it, the name of a type will do."""
    return describe.named(value) if spec else describe.describe(value)


def _prompt(prompt: Prompt, *, redact: bool) -> dict[str, Any]:
    row = {"digest": prompt.digest, **asdict(prompt)}
    if redact:
        del row["text"]
    return json.loads(json.dumps(row))


def _png(picture: Any) -> bytes:  # noqa: ANN401  (float array)
    buffer = io.BytesIO()
    Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def _scheduler(pipe: Any, name: str | None) -> Generator[None]:  # noqa: ANN401  (some diffusers pipeline)
    own: Any = getattr(pipe, "scheduler", None)
    if name is not None:
        zoo.use_scheduler(pipe, name)
    try:
        yield
    finally:
        if name is not None:
            pipe.scheduler = own


def load_model(name: str) -> Any:  # noqa: ANN401  (some diffusers pipeline)
    """The model of a task on this worker's device, without progress bars of its own."""
    pipe = zoo.load(name).to(own_device())
    pipe.set_progress_bar_config(disable=True)
    return pipe

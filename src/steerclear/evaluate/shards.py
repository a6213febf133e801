"""Who draws which unit: one process, several, the ranks of torchrun, or actors of Ray Data.

Units depend on the task alone, every unit is drawn by one worker, and workers share nothing but the folder; so the rows
are the same whoever draws them. Nobody waits for anybody: :func:`steerclear.evaluate.records` merges what is there.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steerclear.errors import InvalidInput
from steerclear.evaluate.run import Engine, Load, Progress, engine, load_model, quiet
from steerclear.evaluate.store import RunFolder
from steerclear.evaluate.task import Task
from steerclear.workers import Shard, in_processes, on_ray

__all__ = ["Shard", "Worker", "evaluate"]


def evaluate(
    task: Task,
    folder: str | os.PathLike[str],
    *,
    pipe: Any = None,  # noqa: ANN401  (some diffusers pipeline)
    load: Load | None = None,
    workers: int = 1,
    ray: bool = False,
    shard: Shard | None = None,
    progress: Progress = quiet,
) -> int:
    """Draws, judges and records what is missing of a task; call it again after an interruption.

    Args:
        task: What.
        folder: Of the run; made if need be.
        pipe: The pipeline; only for a single worker.
        load: Returns the pipeline, once per worker; by default, loads ``task.model``, to a GPU if there is one. With
            several workers it must be a module-level function or a partial of one, and the script needs
            ``if __name__ == "__main__":``.
        workers: Processes, or actors of Ray Data. The rows do not depend on it.
        ray: Use Ray Data (``pip install 'steerclear[ray]'``); the folder must be shared by all machines.
        shard: Draw only these units; by default those of this rank under torchrun, else all.
        progress: Called with an arm's title and the number of pictures that were just recorded.

    Returns:
        The number of pictures drawn now; 0 if all were there.

    Raises:
        InvalidInput: If the folder holds pictures of another task: the message says what differs.
        MissingExtra: If Ray is wanted and not installed.
        SteerclearError: If a picture could not be drawn; batches that were finished are kept.

    Cost:
        Per batch and arm one call of the pipeline, plus one of the reference arm where only others are missing.
    """
    if workers < 1 or ((workers > 1 or ray) and pipe is not None):
        raise InvalidInput(
            f"evaluate: expected one worker or more, and with several load= in place of pipe=; {workers}"
        )
    path = Path(folder)
    units = (shard or Shard.from_environment()).of(len(task.units))
    RunFolder(path).clean(units, len(task.units))
    load = load or partial(load_model, task.model)
    if ray:
        return _on_ray(task, path, load, units, workers, progress)
    if workers > 1:
        return _in_processes(task, path, load, units, workers, progress)
    with engine(task, path, load() if pipe is None else pipe) as own:
        return _all(own, units, progress)


def _all(own: Engine, units: list[int], progress: Progress) -> int:
    arms = [arm.key for arm in own.task.arms]
    todo = [unit for unit in units if any(own.folder.description(unit, arm) is None for arm in arms)]
    if todo:
        own.warm_up(todo[0])
    return sum(own.draw(unit, progress) for unit in todo)


class Worker:
    """Draws units on demand, with a pipeline of its own that is loaded for the first one."""

    def __init__(self, task: Task, folder: Path, load: Load) -> None:
        self.task, self.folder, self.load = task, folder, load
        self._engine: Engine | None = None
        self._open = ExitStack()

    def draw(self, unit: int) -> int:
        """The number of new pictures of a unit."""
        if self._engine is None:
            self._engine = self._open.enter_context(engine(self.task, self.folder, self.load()))
            self._engine.warm_up(unit)
        return self._engine.draw(unit)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """As Ray Data calls it: a column of units in, a column of counts out."""
        return {"pictures": [self.draw(int(unit)) for unit in batch["unit"]]}


def _drawer(task: Task, folder: Path, load: Load) -> Callable[[int], int]:
    torch.set_num_threads(task.sampling.threads)
    return Worker(task, folder, load).draw


def _in_processes(task: Task, folder: Path, load: Load, units: list[int], workers: int, progress: Progress) -> int:
    drawn = 0
    for fresh in in_processes(partial(_drawer, task, folder, load), units, workers=workers, who="evaluate"):
        if fresh:
            progress("all arms", fresh)
        drawn += fresh
    return drawn


def _on_ray(task: Task, folder: Path, load: Load, units: list[int], workers: int, progress: Progress) -> int:
    drawn = 0
    rows = [{"unit": unit} for unit in units]
    for row in on_ray(Worker, (task, folder.absolute(), load), rows, workers=workers, who="evaluate"):
        drawn += int(row["pictures"])
        progress("all arms", int(row["pictures"]))
    return drawn

"""The demo: the same prompts and seeds without a guard, with the usual alternatives, and with the recommended guard.

Pure functions: :func:`run` draws and judges, ``app/score.py`` counts, ``app/report.py`` writes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from steerclear.app.pictures import to_pixels
from steerclear.app.prompts import DemoPrompt
from steerclear.app.score import Cost, Picture, Score, score, total
from steerclear.attach import attach
from steerclear.detect import Detector, Thresholds
from steerclear.errors import InvalidInput
from steerclear.evaluate.draw import evaluations

if TYPE_CHECKING:
    from steerclear.guards.base import Guard


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to generate, a row of the table. The first arm of a run is the one that the others are compared with."""

    key: str
    title: str
    guard: "Guard | None" = None
    negative_prompt: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How every arm samples.

    Args:
        seeds: One picture per prompt and seed.
        steps: Scheduler steps.
        cfg: Scale of classifier-free guidance; above 1, so that a negative prompt costs no further evaluation.
        batch: Pictures drawn together; the same in all arms, so that pictures can be compared bit by bit.

    Raises:
        InvalidInput: For values outside these ranges.
    """

    seeds: tuple[int, ...] = (0, 1)
    steps: int = 25
    cfg: float = 3.0
    batch: int = 8

    def __post_init__(self) -> None:
        if not self.seeds or self.steps < 1 or self.batch < 1 or self.cfg <= 1.0:
            raise InvalidInput(f"demo: expected seeds, steps >= 1, batch >= 1 and cfg > 1, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DemoResult:
    """All that a run found; ``trace`` has one flat row per arm, picture and step."""

    arms: tuple[Arm, ...]
    prompts: tuple[DemoPrompt, ...]
    settings: Settings
    policies: tuple[str, ...]
    pictures: tuple[Picture, ...]
    scores: dict[str, Score]
    trace: tuple[dict[str, Any], ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """What to draw with, what to draw, and who judges.

    Args:
        pipe: A text-to-image pipeline with classifier-free guidance.
        judge: Detector whose labels contain ``rule.unsafe``.
        rule: What counts as unsafe.
        arms: Rows of the table; the first is the reference.
        prompts: What to draw.
        policies: Names for the report.
        settings: How to draw.
    """

    pipe: Any
    judge: Detector
    rule: Thresholds
    arms: tuple[Arm, ...]
    prompts: tuple[DemoPrompt, ...]
    policies: tuple[str, ...]
    settings: Settings

    @property
    def total(self) -> int:
        """Number of pictures."""
        return len(self.arms) * len(self.prompts) * len(self.settings.seeds)


def run(job: Run, progress: Callable[[str, int], None] = lambda arm, pictures: None) -> DemoResult:
    """Draws, judges and counts.

    Args:
        job: What to do.
        progress: Called with the arm's title and the number of pictures that were just finished.

    Raises:
        InvalidInput: If the judge does not know what counts as unsafe, or what a prompt asks for.
        SteerclearError: If a guard could not be applied. No picture of that arm is returned.
    """
    started = time.perf_counter()
    _check_judge(job)
    _draw(job, [(job.prompts[0], job.settings.seeds[0])], job.arms[0], steps=2)  # warm up
    reference: dict[tuple[str, int], Any] = {}
    pictures: list[Picture] = []
    scores: dict[str, Score] = {}
    trace: list[dict[str, Any]] = []
    for arm in job.arms:
        drawn = _run_arm(job, arm, reference, progress)
        pictures += drawn.pictures
        trace += drawn.trace
        scores[arm.key] = score(drawn.pictures, drawn.cost)
    return DemoResult(
        arms=job.arms,
        prompts=job.prompts,
        settings=job.settings,
        policies=job.policies,
        pictures=tuple(pictures),
        scores=scores,
        trace=tuple(trace),
        seconds=time.perf_counter() - started,
    )


def _check_judge(job: Run) -> None:
    """A judge that cannot judge is an error before sampling, not a table of zeros after it."""
    job.rule.verdicts(job.judge, torch.zeros(1, 3, 64, 64))
    unknown = sorted({label for prompt in job.prompts for label in prompt.expected} - set(job.judge.labels))
    if unknown:
        raise InvalidInput(
            f"demo: expected a judge that knows what the prompts ask for, but {type(job.judge).__name__} does not know "
            f"{', '.join(unknown[:5])}; use another judge or change demo_prompts.yaml"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Drawn:
    """Pictures of one arm, with their trace and cost."""

    pictures: list[Picture]
    trace: list[dict[str, Any]]
    cost: Cost


def _run_arm(job: Run, arm: Arm, reference: dict[tuple[str, int], Any], progress: Callable[[str, int], None]) -> _Drawn:
    """Draws one arm; fills ``reference`` if it is empty of a picture, else compares with it."""
    jobs = iter([(prompt, seed) for prompt in job.prompts for seed in job.settings.seeds])
    pictures: list[Picture] = []
    trace: list[dict[str, Any]] = []
    costs: list[Cost] = []
    while batch := list(islice(jobs, job.settings.batch)):
        images, rows, cost = _draw(job, batch, arm, job.settings.steps)
        verdicts = job.rule.verdicts(job.judge, torch.from_numpy(images).permute(0, 3, 1, 2))
        for (prompt, seed), image, verdict in zip(batch, images, verdicts, strict=True):
            first = reference.setdefault((prompt.text, seed), image)
            picture = Picture(
                arm=arm.key,
                prompt=prompt,
                seed=seed,
                pixels=to_pixels(image),
                verdict=verdict,
                right=verdict.label in prompt.expected,
                difference=float(abs(image - first).max()),
            )
            pictures.append(picture)
        trace += rows
        costs.append(cost)
        progress(arm.title, len(batch))
    return _Drawn(pictures=pictures, trace=trace, cost=total(costs))


def _draw(
    job: Run, batch: Sequence[tuple[DemoPrompt, int]], arm: Arm, steps: int
) -> tuple[Any, list[dict[str, Any]], Cost]:
    """One call of the pipeline: float pictures ``(batch, height, width, 3)``, trace rows, cost."""
    call: dict[str, Any] = {
        "prompt": [prompt.text for prompt, _ in batch],
        "generator": [torch.Generator("cpu").manual_seed(seed) for _, seed in batch],
        "num_inference_steps": steps,
        "guidance_scale": job.settings.cfg,
        "output_type": "np",
    }
    if arm.negative_prompt is not None:
        call["negative_prompt"] = [arm.negative_prompt] * len(batch)
    records: list[dict[str, Any]] = []
    guard_seconds = 0.0
    with evaluations(job.pipe) as count:
        started = time.perf_counter()
        if arm.guard is None:
            images = job.pipe(**call).images
            seconds = time.perf_counter() - started
        else:
            with attach(job.pipe, arm.guard) as trace:
                images = job.pipe(**call).images
            seconds = time.perf_counter() - started
            guard_seconds = trace.guard_seconds
            records = [{**_who(arm, batch, row), **row} for row in trace.records()]
    cost = Cost(pictures=len(batch), steps=steps, seconds=seconds, guard_seconds=guard_seconds, evaluations=sum(count))
    return images, records, cost


def _who(arm: Arm, batch: Sequence[tuple[DemoPrompt, int]], row: dict[str, Any]) -> dict[str, Any]:
    prompt, seed = batch[int(row["sample"])]
    return {"arm": arm.key, "prompt": prompt.text, "kind": prompt.kind, "seed": seed}

"""What to evaluate: prompts x arms x judges, and how to sample. Plain values; nothing is loaded or drawn here."""

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from numpy.typing import NDArray
from torch import Tensor

from steerclear.attach import Coupling, PromptGuard
from steerclear.detect import Detector, Thresholds
from steerclear.errors import InvalidInput
from steerclear.evaluate.columns import BASE
from steerclear.evaluate.prompts import Prompt
from steerclear.guards.base import Guard

Keep = Literal["none", "safe", "all"]
Numbers = Tensor | NDArray[Any]
Feature = Callable[[Tensor], Numbers]
"""``(batch, 3, height, width)`` pictures in [0, 1] -> ``(batch, d)`` features."""
Scorer = Callable[[Tensor, list[str]], Numbers]
"""Pictures as above and their prompts -> ``(batch,)`` scores."""
Maker = Callable[[Any], Guard]
"""A pipeline -> the guard for it."""
Weights = Callable[[Any], AbstractContextManager[Any]]
"""A pipeline -> a block in which it draws with other weights, such as those of an adapter."""

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How every arm samples.

    Args:
        steps: Scheduler steps.
        cfg: Scale of classifier-free guidance; prompts may bring their own.
        batch: Pictures drawn together, the same ones in all arms, so that pictures can be compared bit by bit.
        scheduler: Of diffusers, in place of the pipeline's own: ``"DDIMScheduler"``, ``"euler_ancestral"``.
        threads: Of one worker on the CPU. Part of the task, because sums taken by more threads round differently;
            more cores are used by more workers.
        call: Further arguments of the pipeline's call, such as ``{"height": 512, "width": 512}``.

    Raises:
        InvalidInput: For values outside their range, or a ``call`` that sets what the evaluation sets.
    """

    steps: int = 25
    cfg: float = 3.0
    batch: int = 8
    scheduler: str | None = None
    threads: int = 1
    call: dict[str, Any] = field(default_factory=dict[str, Any], hash=False)

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.threads) < 1 or not 0.0 <= self.cfg < 1e6:
            raise InvalidInput(f"Sampling: expected steps, batch, threads >= 1 and cfg >= 0, got {self}")
        taken = {"prompt", "class_labels", "batch_size", "negative_prompt", "guidance_scale"}
        taken |= {"generator", "num_inference_steps", "output_type"}
        if clash := sorted(taken & set(self.call)):
            raise InvalidInput(f"Sampling: expected a call without {', '.join(clash)}: the task sets them; drop them")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arm:
    """One way to generate, a row of the table. The first arm of a task is the reference of the paired columns.

    What an arm does is part of the fingerprint of its pictures. A guard made of dataclasses and tensors is described by
    its fields and the hashes of its tensors; any other guard needs a ``spec`` that changes when it does.

    Args:
        key: Names its files: letters, digits and ``. _ + = -``, at most 64.
        title: For people.
        guard: Edits the estimate of each step; see :func:`steerclear.attach`.
        maker: In place of ``guard``: called with the pipeline, returns the guard.
        negative_prompt: For every prompt.
        prompts: Rewrites the call's arguments; see :func:`steerclear.attach`.
        coupling: How an edited estimate meets the sampler.
        weights: Entered with the pipeline for every batch: guards that live in weights. Afterwards the pipeline must be
            as it was.
        spec: Says in plain data what the arm is; shown in the records.

    Raises:
        InvalidInput: For a key that cannot name a file, or both ``guard`` and ``maker``.
    """

    key: str
    title: str = ""
    guard: Guard | None = None
    maker: Maker | None = None
    negative_prompt: str | None = None
    prompts: PromptGuard | None = None
    coupling: Coupling = "score"
    weights: Weights | None = None
    spec: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key):
            raise InvalidInput(f"Arm: expected a key of letters, digits and . _ + = -, got {self.key!r}")
        if self.guard is not None and self.maker is not None:
            raise InvalidInput(f"Arm {self.key}: expected a guard or a maker of one, got both; drop one of them")

    @property
    def name(self) -> str:
        """The title, or the key."""
        return self.title or self.key

    def build(self, pipe: Any) -> Guard | None:  # noqa: ANN401  (some diffusers pipeline)
        """The guard for ``pipe``; ``None`` for arms without one."""
        return self.guard if self.maker is None else self.maker(pipe)

    def within(self, pipe: Any) -> AbstractContextManager[Any]:  # noqa: ANN401  (some diffusers pipeline)
        """The block in which ``pipe`` has this arm's weights."""
        return nullcontext() if self.weights is None else self.weights(pipe)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judge:
    """Who says what a picture shows, and what of it is unsafe.

    Args:
        detector: Its labels must contain ``rule.unsafe``.
        rule: From probabilities to a verdict.
        spec: Identifies a detector that is no dataclass, as for :class:`Arm`.
    """

    detector: Detector
    rule: Thresholds
    spec: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A batch of (prompt, seed) pairs, drawn in one call of the pipeline: the unit of work of a run."""

    index: int
    pairs: tuple[tuple[Prompt, int], ...]
    cfg: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """Prompts x arms x judges.

    Args:
        model: A shipped model, a local folder, or a hub id; a name for the report when the pipeline is passed in.
        prompts: What to draw. A prompt that a published set lists twice counts twice, as it does in the papers.
        arms: Rows of the table; the first is the reference.
        judges: By name; the name begins the judge's columns.
        seeds: One picture per prompt and seed, for prompts without a seed of their own. A prompt's generator is seeded
            with the first 32 bits of its hash plus this number, which is what the records show: pictures of two prompts
            do not share their noise.
        sampling: How to draw.
        features: Feature spaces, by column name.
        scorers: Scores of a picture and its prompt, by column name.
        redact: Leave the prompts' text out of every file; their hashes identify them.
        keep: Which pictures are written: ``"none"``; ``"safe"``, those that no judge flags; ``"all"``.
        notes: Plain data for readers of the run, such as the rows that a prompt set dropped; decides nothing.

    Raises:
        InvalidInput: For an empty or repeated part, a column name that is taken, a negative prompt without
            classifier-free guidance (it would do nothing), or ``keep="safe"`` without a judge.
    """

    model: str
    prompts: tuple[Prompt, ...]
    arms: tuple[Arm, ...]
    judges: Mapping[str, Judge] = field(default_factory=dict[str, Judge])
    seeds: tuple[int, ...] = (0, 1, 2)
    sampling: Sampling = field(default_factory=Sampling)
    features: Mapping[str, Feature] = field(default_factory=dict[str, Feature])
    scorers: Mapping[str, Scorer] = field(default_factory=dict[str, Scorer])
    redact: bool = True
    keep: Keep = "safe"
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if not (self.prompts and self.arms and self.seeds):
            got = f"{len(self.prompts)}, {len(self.arms)} and {len(self.seeds)}"
            raise InvalidInput(f"Task: expected prompts, arms and seeds, got {got}")
        if self.keep not in ("none", "safe", "all"):
            raise InvalidInput(f"Task: expected keep to be none, safe or all, got {self.keep!r}")
        if self.keep == "safe" and not self.judges:
            raise InvalidInput("Task: keep='safe' writes what no judge flags, got no judge; add one, or keep='none'")
        if any(not 0 <= seed < 2**63 for seed in self.seeds):
            raise InvalidInput("Task: expected seeds from 0 to 2**63 - 1, got others")
        columns = [*self.judges, *self.features, *self.scorers]
        for what, names in (
            ("arm", [arm.key.lower() for arm in self.arms]),
            ("seed", list(map(str, self.seeds))),
            ("column", columns),
        ):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise InvalidInput(f"Task: expected every {what} once, got {', '.join(twice)} twice")
        if wrong := sorted(name for name in columns if name in BASE or "/" in name or not name):
            raise InvalidInput(f"Task: expected column names that are free and without '/', got {', '.join(wrong)}")
        self._check_negative_prompts()

    def _check_negative_prompts(self) -> None:
        scales = [self.sampling.cfg if prompt.cfg is None else prompt.cfg for prompt in self.prompts]
        for arm in self.arms:
            if arm.negative_prompt is not None and min(scales) <= 1.0:
                raise InvalidInput(
                    f"Task: arm {arm.key} has a negative prompt, which acts only for cfg > 1, got {min(scales)}"
                )

    @property
    def pairs(self) -> tuple[tuple[Prompt, int], ...]:
        """Every prompt with every seed, in order."""
        rows = ((p, seed) for p in self.prompts for seed in ((p.seed,) if p.seed is not None else self._seeds(p)))
        return tuple(rows)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The batches, which depend on the task alone: in order, cut where a prompt brings another guidance scale."""
        units: list[Unit] = []
        for cfg, group in groupby(self.pairs, key=self._scale):
            pairs = list(group)
            for start in range(0, len(pairs), self.sampling.batch):
                batch = tuple(pairs[start : start + self.sampling.batch])
                units.append(Unit(index=len(units), pairs=batch, cfg=cfg))
        return tuple(units)

    @property
    def total(self) -> int:
        """Number of pictures, over all arms."""
        return len(self.pairs) * len(self.arms)

    def _seeds(self, prompt: Prompt) -> list[int]:
        """Other ones for every prompt, or all would share their noise and count as fewer than they are."""
        own = int(prompt.digest[:8], 16)
        return [(own + seed) % 2**63 for seed in self.seeds]

    def _scale(self, pair: tuple[Prompt, int]) -> float:
        return self.sampling.cfg if pair[0].cfg is None else pair[0].cfg

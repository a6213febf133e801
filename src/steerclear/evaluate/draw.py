"""One batch of one arm: pictures, what the guard did to each, and what it cost."""

import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steerclear.attach import Trace, attach
from steerclear.attach.calls import network
from steerclear.errors import GuardNotApplied, SteerclearError, UnsupportedPipeline
from steerclear.evaluate.request import request
from steerclear.evaluate.task import Arm, Sampling, Unit
from steerclear.guards.base import Guard

Pictures = NDArray[np.float32]
"""``(batch, height, width, 3)`` in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawn:
    """The pictures of one batch.

    Args:
        pictures: As the pipeline returned them.
        fired: Per picture, whether a guard changed it; ``None`` without a guard.
        seconds: Wall time of the pipeline's call.
        guard_seconds: Of it, time inside guards.
        evaluations: Rows through the network, all pictures together.
    """

    pictures: Pictures
    fired: tuple[bool | None, ...]
    seconds: float
    guard_seconds: float
    evaluations: int


def draw(pipe: Any, sampling: Sampling, arm: Arm, guard: Guard | None, unit: Unit) -> Drawn:  # noqa: ANN401
    """Draws one unit with one arm. The pictures depend on the arguments alone: every picture has its own generator.

    Args:
        pipe: A pipeline that draws pictures from text, from class labels or from nothing.
        sampling: How.
        arm: Its negative prompt, prompt guard, coupling and weights.
        guard: As the arm built it for ``pipe``.
        unit: What.

    Raises:
        SteerclearError: If anything fails; the message names the arm and the hashes of the prompts.
    """
    try:
        return _draw(pipe, sampling, arm, guard, unit)
    except Exception as error:
        prompts = ", ".join(dict.fromkeys(prompt.digest[:12] for prompt, _ in unit.pairs))
        raise SteerclearError(
            f"evaluate: arm {arm.key}, unit {unit.index}, prompts {prompts}: {type(error).__name__}: {error}. "
            "Nothing of this batch was written; correct the cause and run again, finished batches are kept"
        ) from error


def _draw(pipe: Any, sampling: Sampling, arm: Arm, guard: Guard | None, unit: Unit) -> Drawn:  # noqa: ANN401
    size = len(unit.pairs)
    call: dict[str, Any] = {
        **sampling.call,
        **request(pipe, [prompt for prompt, _ in unit.pairs], cfg=unit.cfg, negative=arm.negative_prompt),
        "generator": [torch.Generator("cpu").manual_seed(seed) for _, seed in unit.pairs],
        "num_inference_steps": sampling.steps,
        "output_type": "np",
    }
    guards = () if guard is None else (guard,)
    guarded = guard is not None or arm.prompts is not None
    attached = attach(pipe, *guards, prompts=arm.prompts, coupling=arm.coupling) if guarded else nullcontext(Trace())
    # Counted and timed inside: attaching may check the pipeline's space, once, with a run of its own.
    with arm.within(pipe), attached as trace, evaluations(pipe) as rows:
        started = time.perf_counter()
        images = pipe(**call).images
        seconds = time.perf_counter() - started
    return Drawn(
        pictures=_checked(images, size),
        fired=(None,) * size if guard is None else _fired(trace, size),
        seconds=seconds,
        guard_seconds=trace.guard_seconds,
        evaluations=sum(rows),
    )


def _checked(images: Any, size: int) -> Pictures:  # noqa: ANN401  (what some pipeline returned)
    pictures = np.asarray(images)
    if pictures.ndim != 4 or pictures.shape[0] != size or pictures.shape[-1] != 3:
        raise UnsupportedPipeline(
            f"expected {size} RGB pictures of shape (batch, height, width, 3), got {pictures.shape}; "
            "give a pipeline that draws pictures"
        )
    return np.ascontiguousarray(pictures, dtype=np.float32)


def _fired(trace: Trace, size: int) -> tuple[bool, ...]:
    """Per picture, whether any step changed it."""
    fired: dict[int, bool] = {}
    for row in trace.records():
        sample = int(row["sample"])
        fired[sample] = fired.get(sample, False) or bool(row["fired"])
    if set(fired) != set(range(size)):
        raise GuardNotApplied(f"expected the guard at every one of {size} pictures, got {len(fired)}")
    return tuple(fired[sample] for sample in range(size))


@contextmanager
def evaluations(pipe: Any) -> Generator[list[int]]:  # noqa: ANN401  (some diffusers pipeline)
    """Counts rows through the network, independently of the trace: one entry per forward call.

    Raises:
        UnsupportedPipeline: If there is no network to count at.
    """
    found = network(pipe)
    if found is None:
        raise UnsupportedPipeline(f"expected a pipeline with a unet or transformer, got {type(pipe).__name__}")
    rows: list[int] = []

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401
        sample: Any = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        rows.append(int(sample.shape[0]))

    handle = found.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()

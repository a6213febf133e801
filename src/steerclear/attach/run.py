"""One guarded call of one pipeline: every step in, and the reckoning afterwards that none was missed."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerclear.attach.ending import Ending, refuse
from steerclear.attach.layer import Attachment, Layer, Moment
from steerclear.attach.patch import Step, parameters_of, stock_class
from steerclear.attach.readers import Floats, Reading, SchedulerReader, reader_of
from steerclear.errors import GuardNotApplied, UnsoundCombination, UnsupportedPipeline

# Pipelines whose schedulers' deep copies step frames of the very video; other copies step audio, actions, ….
FRAME_COPIES = frozenset(
    {
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    }
)
# Pipelines that step once to read the estimate of both branches, step back, and step again with it.
PROBES = frozenset({"CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"})
# Pipelines that step both halves of the guidance batch, which hold the same sample.
DOUBLED = frozenset({"DiTPipeline"})

COPY = "a copy of the scheduler: another modality than the guarded one"
PROBE = "a probe of this pipeline, whose result it does not keep"


@dataclass(slots=True, eq=False)
class Trajectory:
    """One run of one scheduler from its first step to its last.

    ``expected`` counts the calls that the pipeline announced, ``total`` those to the schedule's end; ``kept`` counts
    the calls whose result the pipeline keeps.
    """

    expected: int
    total: int
    memories: list[dict[Any, Any]]
    calls: int = 0
    kept: int = 0
    reason: str | None = None
    guarded: int = 0
    index: int | None = None
    reached: Tensor | None = None


@dataclass(slots=True, eq=False)
class _Tally:
    """What all trajectories of the call add up to."""

    guarded: int = 0
    skipped: int = 0
    missed: int = 0
    reasons: dict[str, int] = field(default_factory=dict[str, int])
    methods: set[str] = field(default_factory=set[str])
    unreached: bool = False
    unsettled: int = 0


class Run:
    """The interceptor of one pipeline call (see :class:`steerclear.attach.patch.Interceptor`).

    Args:
        pipe: The pipeline.
        scheduler: Its scheduler.
        attachments: Outer to inner.
        call: The arguments of the pipeline call, by name.
        hook: Lends the branches, if a guard needs them.
    """

    def __init__(
        self,
        pipe: Any,  # noqa: ANN401 - any pipeline
        scheduler: Any,  # noqa: ANN401 - any scheduler
        attachments: list[Attachment],
        *,
        call: dict[str, Any],
        hook: Any = None,  # noqa: ANN401 - a BranchHook
    ) -> None:
        self.pipe, self.scheduler, self.call, self.hook = pipe, scheduler, call, hook
        self.reader: SchedulerReader = reader_of(scheduler)
        self.names = parameters_of(getattr(stock_class(scheduler), self.reader.method))
        self.layers = [Layer(attachment) for attachment in attachments]
        self.kin = {base.__name__ for base in type(pipe).__mro__}
        self.floats = Floats()
        self.trajectories: dict[int, Trajectory] = {}
        self.copies: dict[int, tuple[object, int]] = {}
        self.tally = _Tally()
        self.ending = Ending(pipe, self.layers)
        self.settling = self.ending.wanted
        if self.settling:
            refuse(pipe, self.reader.method, frames=bool(self.kin & FRAME_COPIES))

    # What the swapped scheduler reports -----------------------------------------------------------------------------

    def restarted(self, scheduler: object) -> None:
        """``set_timesteps``: the next step begins a new trajectory."""
        self._close(scheduler)

    def copied(self, scheduler: object, original: object) -> None:
        """A copy is known by its identity, so it is kept alive until the call ends."""
        self.copies[id(scheduler)] = (scheduler, 0)

    def bypassed(self, method: str) -> None:
        """The sample moved without ``step``."""
        self.tally.methods.add(method)

    def step(self, scheduler: Any, original: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Guard one call of the scheduler's ``step`` and then make it, once."""
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        if not {"model_output", "sample", "timestep"} <= arguments.keys():
            return original(scheduler, *args, **kwargs)  # whose own error is the better one
        trajectory = self._trajectory(scheduler)
        reading = self.reader.read(scheduler, arguments, self.floats)
        if trajectory is None:
            trajectory = self._open(scheduler, arguments["timestep"])
        changed = self._guard(scheduler, arguments, reading, trajectory)
        result = original(scheduler, **changed) if changed else original(scheduler, *args, **kwargs)
        trajectory.calls += 1
        trajectory.index = getattr(scheduler, "_step_index", None)
        trajectory.kept += trajectory.reason != PROBE
        if self.settling and trajectory.kept == trajectory.total and trajectory.reason not in {COPY, PROBE}:
            result = self._settle(scheduler, arguments["sample"], result, trajectory)
        return result

    # One step -------------------------------------------------------------------------------------------------------

    def _guard(
        self, scheduler: object, arguments: dict[str, Any], reading: Reading, trajectory: Trajectory
    ) -> dict[str, Any] | None:
        """The arguments to step with, or ``None`` to step with the very ones that came."""
        view = _View(arguments, reading, doubled=self._doubled(arguments["sample"]))
        step, num_steps = self.reader.steps(scheduler, trajectory.calls, trajectory.expected)
        moment = Moment(
            output=view.output,
            sample=view.sample,
            reading=reading,
            step=step,
            num_steps=num_steps,
            generator=arguments.get("generator") or self.call.get("generator"),
        )
        trajectory.reason = reason = self._skip_reason(scheduler, arguments, reading)
        if self.hook is not None and reason not in {COPY, PROBE}:
            moment.branches = self.hook.collect(arguments[reading.output], arguments["sample"], reading)
        if reason is not None:
            self._skip(scheduler, moment, reason)
            return None
        result = moment
        for layer, memory in zip(self.layers, trajectory.memories, strict=True):
            result = layer.edit(result, memory)
        self._reached(trajectory)
        return None if result is moment else view.arguments(result)

    def _settle(self, scheduler: object, sample: Tensor, result: Any, trajectory: Trajectory) -> Any:  # noqa: ANN401
        """The result of the schedule's last step, as the guards want it."""
        rows = len(sample) // 2 if self._doubled(sample) else len(sample)
        _, num_steps = self.reader.steps(scheduler, trajectory.calls - 1, trajectory.expected)
        return self.ending(result, rows, trajectory.memories, num_steps)

    def _skip(self, scheduler: object, moment: Moment, reason: str) -> None:
        for layer in self.layers:
            layer.skip(moment, reason)
        self.tally.skipped += 1
        self.tally.reasons[reason] = self.tally.reasons.get(reason, 0) + 1
        if reason == COPY:
            copy, count = self.copies[id(scheduler)]
            self.copies[id(scheduler)] = (copy, count + 1)

    def _skip_reason(self, scheduler: object, arguments: dict[str, Any], reading: Reading) -> str | None:
        if id(scheduler) in self.copies and not self.kin & FRAME_COPIES:
            return COPY
        if self.kin & PROBES and "pred_original_sample" in self.names and reading.output == "model_output":
            return PROBE
        return reading.skip

    def _doubled(self, sample: Tensor) -> bool:
        labels = self.call.get("class_labels")
        return bool(self.kin & DOUBLED) and labels is not None and sample.shape[0] == 2 * len(labels)

    def _reached(self, trajectory: Trajectory) -> None:
        trajectory.guarded += 1
        self.tally.guarded += 1
        finite = self.layers[0].record.steps[-1].finite if self.layers else None
        if finite is not None:
            reached = trajectory.reached
            trajectory.reached = finite if reached is None or reached.shape != finite.shape else reached | finite

    # Trajectories ---------------------------------------------------------------------------------------------------

    def _trajectory(self, scheduler: Any) -> Trajectory | None:  # noqa: ANN401
        trajectory = self.trajectories.get(id(scheduler))
        if trajectory is None:
            return None
        index = getattr(scheduler, "_step_index", trajectory.index)
        if index is None and trajectory.index is not None:
            self._close(scheduler)  # the scheduler was rewound
            return None
        self.tally.missed += _ahead(index, trajectory.index)
        return trajectory

    def _open(self, scheduler: object, timestep: float | Tensor) -> Trajectory:
        total = expected = self.reader.calls(scheduler, timestep, self.floats)
        announced = getattr(self.pipe, "_num_timesteps", None)
        if isinstance(announced, int) and 0 < announced < expected:
            expected = announced  # the pipeline stops early, as SDXL does with denoising_end
        trajectory = Trajectory(expected, total, [{} for _ in self.layers])
        self.trajectories[id(scheduler)] = trajectory
        return trajectory

    def _close(self, scheduler: object) -> None:
        trajectory = self.trajectories.pop(id(scheduler), None)
        if trajectory is None:
            return
        self.tally.missed += _ahead(getattr(scheduler, "_step_index", None), trajectory.index)
        if trajectory.reached is not None and not bool(trajectory.reached.all()):
            self.tally.unreached = True
        if self.settling and trajectory.reason != COPY and trajectory.kept != trajectory.total:
            self.tally.unsettled += 1

    # The reckoning --------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """After the call: no guard returned nonsense, and every step reached the guards.

        Raises:
            GuardNotApplied: Some step did not.
            InvalidInput: A guard returned NaN or infinity on an accelerator.
        """
        for layer in self.layers:
            layer.check_finite()
        mine = self.trajectories.get(id(self.scheduler))
        calls = mine.calls if mine is not None else None
        for scheduler in (self.scheduler, *(copy for copy, _ in self.copies.values())):
            self._close(scheduler)
        problem = self._problem(calls)
        if problem:
            names = "; ".join(layer.attachment.names for layer in self.layers)
            raise GuardNotApplied(
                f"{type(self.pipe).__name__} with {names}: expected every step to reach the guard, got {problem}. "
                "No image is returned"
            )
        self.ending.check()

    def _problem(self, calls: int | None) -> str | None:
        tally, name = self.tally, type(self.scheduler).__name__
        timesteps: Any = getattr(self.scheduler, "timesteps", None)
        total = 0 if timesteps is None else len(timesteps)
        if tally.methods:
            return f"steps through {', '.join(sorted(tally.methods))}, which guards cannot follow: use another pipeline"
        if not tally.guarded and not tally.skipped:
            return (
                f"0 calls in {total} steps: this pipeline did not step the scheduler that it was given ({name}), "
                "or made no step at all"
            )
        if not tally.guarded:
            reasons = "; ".join(tally.reasons)
            return f"0 calls, because all {tally.skipped} steps were skipped ({reasons}): use another scheduler"
        if tally.missed:
            return f"{tally.missed} steps of {name} made behind the guard's back: do not keep a reference to its step"
        most = max((count for _, count in self.copies.values()), default=0)
        if calls is not None and most > calls:
            return f"{calls} calls while a copy of the scheduler made {most} steps: guards do not follow copies"
        if tally.unsettled:
            return (
                f"{tally.unsettled} trajectories that do not end with the schedule's last step, so that no result can "
                "be settled: let the pipeline run to the end, or use a guard that acts on the way only"
            )
        if tally.unreached:
            return "samples whose estimate was never finite: check the model's precision"
        return None


class _View:
    """The part of a call that guards see, and the way back."""

    def __init__(self, arguments: dict[str, Any], reading: Reading, *, doubled: bool) -> None:
        self.given, self.reading = arguments, reading
        self.whole: Tensor = arguments[reading.output]
        self.noisy: Tensor = arguments["sample"]
        self.rows = self.noisy.shape[0] // 2 if doubled else 0
        output, sample = self.whole, self.noisy
        self.channels = 0
        if reading.grid:
            output = output.unflatten(-1, (reading.grid, -1))
            sample = sample.unsqueeze(-2).expand_as(output)
        elif output.ndim == sample.ndim > 1 and output.shape[1] == 2 * sample.shape[1]:
            self.channels = sample.shape[1]
            output = output[:, : self.channels]  # the rest is a learned variance
        if output.shape != sample.shape:
            raise UnsupportedPipeline(
                f"attach: expected a network output like the sample {tuple(sample.shape)}, got {tuple(output.shape)}. "
                "This pipeline passes its scheduler something else, so it cannot be guarded"
            )
        self.output = output[: self.rows] if doubled else output
        self.sample = sample[: self.rows] if doubled else sample

    def arguments(self, result: Moment) -> dict[str, Any]:
        """The arguments of ``step`` with the guarded parts in their places."""
        output, sample, given = result.output, result.sample, dict(self.given)
        if self.reading.grid and sample is not self.sample:
            raise UnsoundCombination(
                "Pi-Flow makes several estimates from one sample, so only coupling='score' has a meaning, got another"
            )
        if output is not self.output:
            given[self.reading.output] = self._restored(output)
        if sample is not self.sample:
            given["sample"] = torch.cat([sample, sample]) if self.rows else sample
        return given

    def _restored(self, output: Tensor) -> Tensor:
        if self.rows:
            output = torch.cat([output, output])
        if self.reading.grid:
            return output.flatten(-2)
        return torch.cat([output, self.whole[:, self.channels :]], 1) if self.channels else output


def _ahead(index: int | None, known: int | None) -> int:
    return 0 if index is None or known is None else max(0, int(index) - int(known))

"""One attachment at one step: estimate, guards, checks, and the rewritten call."""

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from steerclear.attach.coupling import COUPLE, Coupling, Edit
from steerclear.attach.readers import Reading
from steerclear.attach.trace import CallRecord, StepRecord, Trace
from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards.base import Guard, Requires, chain, requirements

SOUND_STOCHASTIC = "DDPMScheduler, EulerAncestralDiscreteScheduler, or DDIMScheduler with eta=1"


@dataclass(slots=True, kw_only=True, eq=False)
class Attachment:
    """Guards on one pipeline, outer to inner in the order given, with their own trace."""

    guards: tuple[Guard, ...]
    coupling: Coupling
    prompts: Any = None
    standing: bool = False
    trace: Trace = field(default_factory=Trace)

    @property
    def requires(self) -> Requires:
        """What all guards need together."""
        return requirements(chain(*self.guards))

    @property
    def names(self) -> str:
        """The guards by class name."""
        return ", ".join(type(guard).__name__ for guard in self.guards) or "no guard"


@dataclass(slots=True, kw_only=True)
class Moment:
    """One call of ``step``, in the shapes that guards see.

    Args:
        output: The part of the network's output that stands for the estimate.
        sample: The noisy sample.
        reading: How the two make the estimate.
        step: Index of the step.
        num_steps: Steps of the trajectory.
        branches: What the branch hook lends, or ``None``.
        generator: The call's random generator.
    """

    output: Tensor
    sample: Tensor
    reading: Reading
    step: int
    num_steps: int
    branches: Any = None
    generator: Any = None


class Layer:
    """An attachment during one pipeline call."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.requires = attachment.requires
        self.record = CallRecord()
        self.bad: list[tuple[int, Tensor]] = []
        self.blank: tuple[Tensor, Tensor] | None = None  # what records of unchanged steps share
        attachment.trace.calls.append(self.record)

    def skip(self, moment: Moment, reason: str) -> None:
        """Record that no guard ran, and why."""
        self._record(moment).skipped = reason

    def edit(self, moment: Moment, memory: dict[Any, Any]) -> Moment:
        """The call as the guards want it; the same object if they want nothing."""
        reading = moment.reading
        self._check_eta(reading)
        raw = _estimate(moment)
        estimate = raw if reading.projection is None else reading.projection(raw)
        record = self._record(moment)
        record.finite = finite = raw.flatten(1).sum(1).isfinite()
        target = self._guarded(estimate, moment, memory, record)
        if target is estimate:
            return moment
        delta = target - estimate
        record.change = change = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        self._check_finite(change, record)
        record.fired = fired = (change > 0) & finite
        hits = fired.tolist() if fired.device.type == "cpu" else None  # elsewhere looking would wait for the device
        if hits is not None and not any(hits):
            return moment
        if reading.projection is not None:
            # The scheduler projects again, so a changed sample is written projected wherever it did not change.
            delta = target - raw
        some = None if hits is not None and all(hits) else fired
        edit = Edit(target=target, delta=delta, fired=some, generator=moment.generator)
        output, sample = COUPLE[self.attachment.coupling](moment.output, moment.sample, reading, edit)
        return _with(moment, output, sample)

    def _record(self, moment: Moment) -> StepRecord:
        batch, device = moment.sample.shape[0], moment.sample.device
        if self.blank is None or self.blank[0].shape[0] != batch or self.blank[0].device != device:
            self.blank = torch.zeros(batch, dtype=torch.bool, device=device), torch.zeros(batch, device=device)
        record = StepRecord(
            step=moment.step,
            num_steps=moment.num_steps,
            alpha=moment.reading.level.alpha,
            sigma=moment.reading.level.sigma,
            fired=self.blank[0],
            change=self.blank[1],
        )
        self.record.steps.append(record)
        return record

    def _check_eta(self, reading: Reading) -> None:
        if self.requires.stochastic and not reading.eta:
            got = "an unknown share of it" if reading.eta is None else "none (eta=0)"
            raise UnsoundCombination(
                f"{self.attachment.names} needs a sampler that adds the ancestral noise between steps (eta > 0), got "
                f"{got}. Use {SOUND_STOCHASTIC}"
            )

    def checked(self, guard: Guard) -> Guard:
        """``guard`` as the last step meets it: timed, and what it settles is checked like an estimate."""
        return _Settling(self, guard)

    def _guarded(self, estimate: Tensor, moment: Moment, memory: dict[Any, Any], record: StepRecord) -> Tensor:
        state = self._state(moment, memory, record)
        state.denoised = estimate
        start = perf_counter()
        current = estimate
        for guard in self.attachment.guards:
            version = None if current.is_inference() else current._version
            result = guard(current, state)
            if version is not None and current._version != version:
                raise InvalidInput(
                    f"{type(guard).__name__}: expected the estimate to be left as it is, got it changed in place. "
                    "Return a new tensor"
                )
            if result is not None and result is not current:
                current = _checked(guard, result, current)
        self.record.guard_seconds += perf_counter() - start
        return current

    def _state(self, moment: Moment, memory: dict[Any, Any], record: StepRecord) -> DenoiseState:
        reading, lent = moment.reading, moment.branches
        state = DenoiseState(
            x_t=_full(moment.sample),
            level=reading.level,
            step=moment.step,
            num_steps=moment.num_steps,
            eta=reading.eta,
            memory=memory,
            note=record.note,
        )
        needs = self.requires
        if lent is not None and (needs.branches or needs.predictions):
            state.branches = {"conditional": lent.conditional, "unconditional": lent.unconditional}
            state.guidance_scale = lent.guidance_scale if needs.branches else None
        if lent is not None and (needs.branches or needs.evaluations):
            state.denoise, state.again = self._counted(lent.denoise, 1), self._counted(lent.again, lent.cost)
        return state

    def _counted(self, evaluate: Any, cost: int) -> Any:  # noqa: ANN401 - a Denoiser or the like, wrapped
        def counted(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - passed through
            self.record.extra_evaluations += cost
            return evaluate(*args, **kwargs)

        return counted

    def _check_finite(self, change: Tensor, record: StepRecord) -> None:
        known = change.isfinite()
        if change.device.type == "cpu" and bool(known.all()):
            return
        self.bad.append((record.step, ~known if record.finite is None else ~known & record.finite))
        if change.device.type == "cpu":
            self.check_finite()

    def check_finite(self) -> None:
        """Raise if a guard returned NaN or infinity; on an accelerator this waits, so it runs after the last step."""
        waiting, self.bad = self.bad, []
        for step, rows in waiting:
            if bool(rows.any()):
                raise InvalidInput(
                    f"{self.attachment.names}: expected finite values, got NaN or infinity at step {step} in samples "
                    f"{rows.nonzero().flatten().tolist()}. No image is returned; check the guard's own numbers"
                )


@dataclass(frozen=True, slots=True, eq=False)
class _Settling:
    """A guard of a layer after the last step."""

    layer: Layer
    guard: Any

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        return self.guard(denoised, state)

    def settle(self, sample: Tensor, state: DenoiseState) -> Tensor | None:
        start = perf_counter()
        version = None if sample.is_inference() else sample._version
        result = self.guard.settle(sample, state)
        self.layer.record.guard_seconds += perf_counter() - start
        if version is not None and sample._version != version:
            raise InvalidInput(
                f"{type(self.guard).__name__}: expected the sample to be left as it is, got it changed in place. "
                "Return a new tensor from settle"
            )
        if result is None or result is sample:
            return None
        settled = _checked(self.guard, result, sample)
        if not bool(settled.isfinite().all()):
            raise InvalidInput(
                f"{type(self.guard).__name__}: expected finite values from settle, got NaN or infinity. No image is "
                "returned; check the guard's own numbers"
            )
        return settled


def _checked(guard: Guard, result: Any, given: Tensor) -> Tensor:  # noqa: ANN401
    name = type(guard).__name__
    if not isinstance(result, Tensor):
        raise InvalidInput(f"{name}: expected a tensor or None, got {type(result).__name__}. Fix the guard's return")
    expected = (tuple(given.shape), given.dtype, given.device)
    got = (tuple(result.shape), result.dtype, result.device)
    if expected != got:
        raise InvalidInput(
            f"{name}: expected shape, dtype and device {_words(expected)}, got {_words(got)}. "
            "A guard returns its estimate like the one it was given"
        )
    return result.detach()


def _full(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _estimate(moment: Moment) -> Tensor:
    reading, x, o = moment.reading, _full(moment.sample), _full(moment.output)
    if isinstance(reading.k_x, Tensor) or isinstance(reading.k_o, Tensor) or x.dtype != o.dtype:
        return reading.k_x * x + reading.k_o * o
    return torch.add(o * reading.k_o, x, alpha=reading.k_x)


def _with(moment: Moment, output: Tensor, sample: Tensor) -> Moment:
    return Moment(
        output=output,
        sample=sample,
        reading=moment.reading,
        step=moment.step,
        num_steps=moment.num_steps,
        branches=moment.branches,
        generator=moment.generator,
    )


def _words(what: tuple[Any, ...]) -> str:
    return " ".join(str(part).removeprefix("torch.") for part in what)

"""The guard contract, and the three ways to combine guards.

A guard is a pure map of the denoised estimate. ``None`` says "nothing to do" and leaves the trajectory bit-identical;
so does every row that a guard returns unchanged.

A guard may also have a method ``settle(sample, state) -> sample | None``. It is called after the last step of a
trajectory with the sample that the pipeline is about to decode, in the sampler's space, and may replace it. That is the
place for promises about the result: an estimate is a mean on the way, not a sample. ``state`` is then the one after the
last step: ``x_t`` is the sample, ``level`` is clean, ``progress`` is 1, there are no branches. It is called once, or
until all guards that settle agree. Where the end of a trajectory cannot be told, ``attach`` raises.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, SampleRefused
from steerclear.noise import per_sample

if TYPE_CHECKING:
    from steerclear.negation import References

# Rounds in which guards that settle one after the other may disturb each other's result.
ROUNDS = 8


@runtime_checkable
class Guard(Protocol):
    """``(denoised, state) -> denoised | None``; same shape, dtype and device; the input is not modified."""

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Requires:
    """What a guard needs from the sampler; ``attach`` provides it or refuses before sampling.

    Args:
        branches: Reads ``state.branches`` and ``state.guidance_scale``, and relies on the estimate being
            ``u + g (c - u)`` of the two; also lends ``state.denoise``.
        predictions: Reads ``state.branches`` by name, however the sampler combined them: a guider that rescales or
            projects will do, and ``state.guidance_scale`` stays ``None``.
        evaluations: Calls ``state.denoise`` or ``state.again``; needs no guidance.
        stochastic: Sound only when the sampler adds noise between steps (``state.eta > 0``).
        one_call: Assumes one network evaluation per step (refuses Heun-like two-call solvers).
        negation: Negation sets, in whichever form, that it reads; each must live in the sampler's space.
    """

    branches: bool = False
    predictions: bool = False
    evaluations: bool = False
    stochastic: bool = False
    one_call: bool = False
    negation: tuple["References", ...] = ()

    @property
    def network(self) -> bool:
        """Whether the network's calls must be listened to."""
        return self.branches or self.predictions or self.evaluations

    def __or__(self, other: "Requires") -> "Requires":
        return Requires(
            branches=self.branches or other.branches,
            predictions=self.predictions or other.predictions,
            evaluations=self.evaluations or other.evaluations,
            stochastic=self.stochastic or other.stochastic,
            one_call=self.one_call or other.one_call,
            negation=self.negation + other.negation,
        )


def requirements(guard: Guard) -> Requires:
    """What ``guard`` needs: its ``requires`` attribute, or nothing."""
    return getattr(guard, "requires", Requires())


def settles(guard: Guard) -> bool:
    """Whether ``guard`` has something to do after the last step: a ``settle``, and no ``settles`` that says no."""
    return bool(getattr(guard, "settles", callable(getattr(guard, "settle", None))))


def settle(guards: Sequence[tuple[Guard, DenoiseState]], sample: Tensor) -> Tensor | None:
    """Let guards settle one sample, each with its state, until none of them changes what the others left.

    Returns:
        What all of them agree on; ``None`` if nobody changed anything.

    Raises:
        SampleRefused: If they still disagree after several rounds.
    """
    current, heard = sample, [dict[str, Tensor]() for _ in guards]
    for _ in range(ROUNDS):
        before = current
        for (guard, state), notes in zip(guards, heard, strict=True):
            own = replace(state, x_t=current, note=notes.__setitem__)  # of several rounds, the last one's notes count
            result: Tensor | None = guard.settle(current, own)  # pyright: ignore[reportAttributeAccessIssue] - optional
            current = current if result is None else result
        if current is before:
            for (_, state), notes in zip(guards, heard, strict=True):
                for name, value in notes.items():
                    state.note(name, value)
            return None if current is sample else current
    names = ", ".join(type(getattr(guard, "guard", guard)).__name__ for guard, _ in guards)
    raise SampleRefused(
        f"{names}: expected guards that settle to agree on a sample, got each undoing the other's after {ROUNDS} "
        "rounds. No image is returned; give one guard all the shields"
    )


@dataclass(frozen=True, slots=True)
class Chain:
    """Guards applied left to right; see :func:`chain`."""

    guards: tuple[Guard, ...]

    @property
    def requires(self) -> Requires:
        total = Requires()
        for guard in self.guards:
            total |= requirements(guard)
        return total

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        current = denoised
        for guard in self.guards:
            guarded = guard(current, state)
            current = current if guarded is None else guarded
        return None if current is denoised else current

    @property
    def settles(self) -> bool:
        return any(settles(guard) for guard in self.guards)

    def settle(self, sample: Tensor, state: DenoiseState) -> Tensor | None:
        return settle([(guard, state) for guard in self.guards if settles(guard)], sample)


@dataclass(frozen=True, slots=True)
class During:
    """A guard active in a window of the trajectory; see :func:`during`."""

    guard: Guard
    start: float
    stop: float

    @property
    def requires(self) -> Requires:
        return requirements(self.guard)

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        if state.progress < self.start:
            for references in self.requires.negation:
                references.at(state)  # what a trajectory begins with counts, whenever the window opens
        return self.guard(denoised, state) if self.start <= state.progress < self.stop else None

    @property
    def settles(self) -> bool:
        return self.stop >= 1.0 and settles(self.guard)

    def settle(self, sample: Tensor, state: DenoiseState) -> Tensor | None:
        return settle([(self.guard, state)], sample) if self.settles else None


@dataclass(frozen=True, slots=True)
class When:
    """A guard active for the samples that meet a condition; see :func:`when`."""

    condition: Callable[[DenoiseState], Tensor]
    guard: Guard

    @property
    def requires(self) -> Requires:
        return requirements(self.guard) | getattr(self.condition, "requires", Requires())

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        observe = getattr(self.condition, "observe", None)
        if observe is not None:
            observe(state)
        guarded = self.guard(denoised, state)
        if guarded is None:
            return None
        return torch.where(per_sample(self.condition(state), denoised), guarded, denoised)

    @property
    def settles(self) -> bool:
        return settles(self.guard)

    def settle(self, sample: Tensor, state: DenoiseState) -> Tensor | None:
        return settle([(self.guard, state)], sample) if self.settles else None


def chain(*guards: Guard) -> Guard:
    """The guards one after the other, left to right. ``chain()`` is the identity; chains nest."""
    return Chain(guards)


def during(guard: Guard, *, start: float = 0.0, stop: float = 1.0) -> Guard:
    """``guard`` while ``start <= progress < stop``, in fractions of the trajectory (0 is pure noise).

    The guard settles only if ``stop`` is 1: a window that ends earlier makes no promise about the result.

    Raises:
        InvalidInput: Unless ``0 <= start < stop <= 1``.
    """
    if not 0.0 <= start < stop <= 1.0:
        raise InvalidInput(f"during: expected 0 <= start < stop <= 1, got start={start}, stop={stop}")
    return During(guard, start, stop)


def when(condition: Callable[[DenoiseState], Tensor], guard: Guard) -> Guard:
    """``guard`` for the samples where ``condition(state)``, a boolean ``(batch,)`` tensor, is true.

    The guard runs for every sample, so that its memory stays whole; only its effect is gated. The condition is asked
    only where the guard wants a change; one that compares steps has a method ``observe(state)``, called before the
    guard at every step. A guard that settles does so for every sample: the condition is about a step on the way, and a
    promise about results holds for all or for none.
    """
    return When(condition, guard)

"""The guard contract, and the three ways to combine guards.

A guard is a pure map of the denoised estimate. ``None`` says "nothing to do" and leaves the trajectory bit-identical;
so does every row that a guard returns unchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.noise import per_sample

if TYPE_CHECKING:
    from steerclear.negation import NegationSet


@runtime_checkable
class Guard(Protocol):
    """``(denoised, state) -> denoised | None``; same shape, dtype and device; the input is not modified."""

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Requires:
    """What a guard needs from the sampler; ``attach`` provides it or refuses before sampling.

    Args:
        branches: Reads ``state.branches`` and ``state.guidance_scale``.
        stochastic: Sound only when the sampler adds noise between steps (``state.eta > 0``).
        one_call: Assumes one network evaluation per step (refuses Heun-like two-call solvers).
        negation: Negation sets it reads; each must live in the sampler's space.
    """

    branches: bool = False
    stochastic: bool = False
    one_call: bool = False
    negation: tuple["NegationSet", ...] = ()

    def __or__(self, other: "Requires") -> "Requires":
        return Requires(
            branches=self.branches or other.branches,
            stochastic=self.stochastic or other.stochastic,
            one_call=self.one_call or other.one_call,
            negation=self.negation + other.negation,
        )


def requirements(guard: Guard) -> Requires:
    """What ``guard`` needs: its ``requires`` attribute, or nothing."""
    return getattr(guard, "requires", Requires())


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
        return self.guard(denoised, state) if self.start <= state.progress < self.stop else None


@dataclass(frozen=True, slots=True)
class When:
    """A guard active for the samples that meet a condition; see :func:`when`."""

    condition: Callable[[DenoiseState], Tensor]
    guard: Guard

    @property
    def requires(self) -> Requires:
        return requirements(self.guard) | getattr(self.condition, "requires", Requires())

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        guarded = self.guard(denoised, state)
        if guarded is None:
            return None
        return torch.where(per_sample(self.condition(state), denoised), guarded, denoised)


def chain(*guards: Guard) -> Guard:
    """The guards one after the other, left to right. ``chain()`` is the identity; chains nest."""
    return Chain(guards)


def during(guard: Guard, *, start: float = 0.0, stop: float = 1.0) -> Guard:
    """``guard`` while ``start <= progress < stop``, in fractions of the trajectory (0 is pure noise).

    Raises:
        InvalidInput: Unless ``0 <= start < stop <= 1``.
    """
    if not 0.0 <= start < stop <= 1.0:
        raise InvalidInput(f"during: expected 0 <= start < stop <= 1, got start={start}, stop={stop}")
    return During(guard, start, stop)


def when(condition: Callable[[DenoiseState], Tensor], guard: Guard) -> Guard:
    """``guard`` for the samples where ``condition(state)``, a boolean ``(batch,)`` tensor, is true.

    The guard runs for every sample, so that its memory stays whole; only its effect is gated.
    """
    return When(condition, guard)

"""What a guard may look at, and the rule that a guarded denoiser is a denoiser."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from steerclear.noise import NoiseLevel

if TYPE_CHECKING:
    from steerclear.guards.base import Guard


class Denoiser(Protocol):
    r"""Posterior mean :math:`E[x_0 \mid x_t, c]`; ``x_t`` and the result have shape ``(batch, *shape)``."""

    def __call__(self, x_t: Tensor, level: NoiseLevel, condition: Any = None) -> Tensor: ...  # noqa: ANN401


def forget(name: str, value: Tensor) -> None:
    """The note of a state that nobody traces."""


@dataclass(slots=True, kw_only=True)
class DenoiseState:
    """One step of one trajectory, as lent to guards. Read it; write only to ``memory`` and through ``note``.

    Args:
        x_t: Noisy sample that the network saw, ``(batch, *shape)``, in the sampler's space.
        level: Its noise level.
        step: Index of the step, from 0. A second call of a two-call solver (Heun) keeps the index of its step.
        num_steps: Number of steps of this trajectory.
        eta: Share of the ancestral noise that the sampler adds between steps: 1 for DDPM and ancestral samplers, 0 for
            deterministic ones, DDIM's own ``eta`` in between; ``None`` when unknown.
        branches: Denoised estimates ``"conditional"`` and ``"unconditional"`` before classifier-free guidance, each
            like ``denoised``; empty unless a guard requires them.
        guidance_scale: The scale ``g`` with which the sampler combined the branches; ``None`` without branches.
        denoised: The sampler's estimate of this step, before any guard: what conditions look at. ``None`` where nobody
            made one.
        denoise: Evaluates the network once more, at ``x_t`` or another noisy sample of this level, under a condition;
            under ``None`` as the unconditional branch, or as the sampler's one call where it makes only one. ``None``
            unless required. Counted in the trace.
        again: ``again(x)``: the estimate that the sampler itself would have made, guidance included, had this step met
            the noisy sample ``x``. ``None`` unless required. Counted likewise, once per branch.
        memory: Scratch of this trajectory; guards use themselves as keys so that they never collide.
        note: ``note(name, value)`` adds a ``(batch,)`` tensor to the trace.
    """

    x_t: Tensor
    level: NoiseLevel
    step: int
    num_steps: int
    eta: float | None = None
    branches: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    guidance_scale: float | None = None
    denoised: Tensor | None = None
    denoise: Denoiser | None = None
    again: Callable[[Tensor], Tensor] | None = None
    memory: dict[Any, Any] = field(default_factory=dict[Any, Any])
    note: Callable[[str, Tensor], None] = forget

    @property
    def progress(self) -> float:
        """Fraction of the trajectory done before this step: 0 at the first step, below 1 at the last."""
        return self.step / max(1, self.num_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardedDenoiser:
    """A denoiser behind a guard is a denoiser: for closed forms, own samplers, and gradient attacks.

    Each call is a trajectory of one step, so guards that need a history do not fit here.
    """

    denoiser: Denoiser
    guard: "Guard"

    def __call__(self, x_t: Tensor, level: NoiseLevel, condition: Any = None) -> Tensor:  # noqa: ANN401
        denoised = self.denoiser(x_t, level, condition)
        state = DenoiseState(
            x_t=x_t,
            level=level,
            step=0,
            num_steps=1,
            denoised=denoised,
            denoise=self.denoiser,
            again=lambda x: self.denoiser(x, level, condition),
        )
        guarded = self.guard(denoised, state)
        return denoised if guarded is None else guarded

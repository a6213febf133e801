"""Runs a known denoiser, guarded or not, through a sampler: this file's own, or any diffusers scheduler.

:func:`ancestral` is the textbook sampler on :meth:`NoiseLevel.reverse`, free of diffusers. :class:`MixturePipeline`
lets a mixture play a pipeline's network, so that a guard is tested through the real ``attach`` and the real solver.
"""

import functools
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from steerclear.denoise import Denoiser, DenoiseState
from steerclear.guards.base import Guard, Requires, requirements, settle, settles
from steerclear.noise import NoiseLevel, Prediction
from steerclear.testing.mixture import Mixture


def variance_preserving(
    num_steps: int, *, beta_start: float = 1e-4, beta_end: float = 0.02, train_steps: int = 1000
) -> tuple[NoiseLevel, ...]:
    """Levels of DDPM's linear schedule, noisiest first, evenly strided, ending without noise: ``num_steps + 1``."""
    betas = torch.linspace(beta_start, beta_end, train_steps, dtype=torch.float64)
    kept = (1.0 - betas).cumprod(0)
    chosen = [kept[train_steps - 1 - k * train_steps // num_steps].item() for k in range(num_steps)]
    return (*(NoiseLevel(a**0.5, (1.0 - a) ** 0.5) for a in chosen), NoiseLevel(1.0, 0.0))


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """A prompt and its scale, for samplers that evaluate two branches; see :func:`ancestral`."""

    condition: Any
    guidance_scale: float = 1.0


def ancestral(
    denoiser: Denoiser,
    levels: Sequence[NoiseLevel],
    x: Tensor,
    *,
    guard: Guard | None = None,
    prompt: Prompted | None = None,
    eta: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Samples :math:`x_s \sim N(c_0 \hat x + c_t x_t, \eta^2\tilde\sigma^2)` from level to level.

    Args:
        denoiser: The network's place-holder.
        levels: Noisiest first; one step fewer than levels.
        x: Sample at the first level, ``(batch, *shape)``.
        guard: Edits the estimate of every step, and settles the result if it has a ``settle``.
        prompt: With it, both branches are evaluated, combined as classifier-free guidance does, and lent to the guard.
        eta: 1 is DDPM, 0 is DDIM.
        generator: Draws the noise.

    Returns:
        The sample at the last level.
    """
    memory: dict[Any, Any] = {}
    for step, (level, to) in enumerate(itertools.pairwise(levels)):
        state = DenoiseState(
            x_t=x, level=level, step=step, num_steps=len(levels) - 1, eta=eta, denoise=denoiser, memory=memory
        )
        denoised = denoiser(x, level)
        state.again = functools.partial(_guided, denoiser, level, prompt)
        if prompt is not None:
            conditional = denoiser(x, level, prompt.condition)
            state.branches = {"unconditional": denoised, "conditional": conditional}
            state.guidance_scale = prompt.guidance_scale
            denoised = denoised + prompt.guidance_scale * (conditional - denoised)
        state.denoised = denoised
        guarded = None if guard is None else guard(denoised, state)
        c_0, c_t, variance = level.reverse(to, eta)
        x = c_0 * (denoised if guarded is None else guarded) + c_t * x
        if variance > 0.0:
            x = x + variance**0.5 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    if guard is None or not settles(guard):
        return x
    count = len(levels) - 1
    end = DenoiseState(x_t=x, level=NoiseLevel(1.0, 0.0), step=count, num_steps=count, eta=eta, memory=memory)
    settled = settle([(guard, end)], x)
    return x if settled is None else settled


def _guided(denoiser: Denoiser, level: NoiseLevel, prompt: Prompted | None, x: Tensor) -> Tensor:
    """What the sampler does with both branches, at ``x``."""
    denoised = denoiser(x, level)
    if prompt is None:
        return denoised
    return denoised + prompt.guidance_scale * (denoiser(x, level, prompt.condition) - denoised)


class MixtureNetwork(torch.nn.Module):
    """Predicts what a trained network would, in a scheduler's own convention; ``level`` is set before every call."""

    def __init__(self, mixture: Mixture, prediction: Prediction) -> None:
        super().__init__()
        self.mixture = mixture
        self.prediction: Prediction = prediction
        self.level = NoiseLevel(1.0, 1.0)

    def forward(self, sample: Tensor, timestep: Tensor, condition: Any = None) -> tuple[Tensor]:  # noqa: ANN401
        return (self.level.output(self.mixture(sample, self.level, condition), sample, self.prediction),)


class MixturePipeline(DiffusionPipeline):
    """A pipeline around a mixture: scheduler, loop, nothing to decode.

    Args:
        unet: The mixture as a network.
        scheduler: Any diffusers scheduler with ``add_noise`` or ``scale_noise``; it is asked for its noise levels.
    """

    def __init__(self, unet: MixtureNetwork, scheduler: Any) -> None:  # noqa: ANN401 - diffusers has no common base
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @classmethod
    def of(cls, mixture: Mixture, scheduler: Any) -> "MixturePipeline":  # noqa: ANN401
        """The pipeline in which ``mixture`` predicts what ``scheduler`` expects."""
        prediction = "flow_prediction" if _is_flow(scheduler) else scheduler.config.prediction_type
        return cls(MixtureNetwork(mixture, prediction), scheduler)

    @torch.no_grad()
    def __call__(
        self, batch_size: int = 1, num_inference_steps: int = 50, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws ``(batch_size, *shape)``, in the mixture's dtype."""
        mixture, scheduler = self.unet.mixture, self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        shape = (batch_size, *mixture.means.shape[1:])
        x = torch.randn(shape, generator=generator, dtype=mixture.means.dtype)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            self.unet.level = scheduler_level(scheduler, t)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)  # the mixture takes x as it is; the scheduler insists on being asked
            (output,) = self.unet(x, t)
            noise = {"generator": generator} if _takes_generator(scheduler) else {}
            x = scheduler.step(output, t, x, **noise, return_dict=False)[0]
        return x


@dataclass(frozen=True, kw_only=True, eq=False)
class Spaceless:
    """A guard on a pipeline that has no encoder to compare its negation sets with, such as :class:`MixturePipeline`."""

    guard: Guard

    @property
    def requires(self) -> Requires:
        return replace(requirements(self.guard), negation=())

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        return self.guard(denoised, state)

    @property
    def settles(self) -> bool:
        return settles(self.guard)

    def settle(self, sample: Tensor, state: DenoiseState) -> Tensor | None:
        return settle([(self.guard, state)], sample) if self.settles else None


def scheduler_level(scheduler: Any, timestep: Tensor) -> NoiseLevel:  # noqa: ANN401
    """Asks a scheduler what it adds to a one without noise, and to a noise of one: its alpha and sigma."""
    add = scheduler.scale_noise if _is_flow(scheduler) else scheduler.add_noise
    one, none, when = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64), timestep.reshape(1)
    if _is_flow(scheduler):
        return NoiseLevel(float(add(one, when, none)), float(add(none, when, one)))
    return NoiseLevel(float(add(one, none, when)), float(add(none, one, when)))


def _is_flow(scheduler: Any) -> bool:  # noqa: ANN401
    return hasattr(scheduler, "scale_noise")


def _takes_generator(scheduler: Any) -> bool:  # noqa: ANN401
    return "generator" in inspect.signature(scheduler.step).parameters

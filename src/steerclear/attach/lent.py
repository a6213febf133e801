r"""What a step lends to guards: the branches of guidance, and the network itself for more evaluations.

All of it is about one step: its noise level, its noisy sample, and how the scheduler reads the network there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from steerclear.attach.conditions import replace
from steerclear.attach.readers import Reading
from steerclear.attach.recorded import Call, Place
from steerclear.denoise import Denoiser
from steerclear.errors import InvalidInput, UnsupportedPipeline
from steerclear.noise import NoiseLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class Branches:
    """The predictions of one step as denoised estimates, float32, shaped like the sampler's ``sample``.

    Args:
        unconditional: Estimate under the empty or negative prompt; ``None`` without guidance. Not clipped, also where
            the scheduler clips.
        conditional: Estimate under the prompt, likewise.
        guidance_scale: ``g`` with which the pipeline combined them; ``None`` unless the combination is known to be
            ``u + g (c - u)``.
        denoise: Evaluates the network once more at this step; see :class:`ExtraBranch`.
        again: Repeats what the sampler did, at another noisy sample; see :class:`Again`.
        cost: Evaluations of the network that one ``again`` takes.
    """

    unconditional: Tensor | None
    conditional: Tensor | None
    guidance_scale: float | None
    denoise: Denoiser
    again: Callable[[Tensor], Tensor]
    cost: int


class Network(Protocol):
    """The branch hook, as far as extra evaluations need it."""

    pipe: Any

    def evaluate(self, call: Call) -> Tensor: ...

    def encoded(self, prompt: str | Sequence[str], kwargs: Mapping[str, Any]) -> dict[str, Any]: ...

    def vouch(self, residual: Tensor, problem: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What turns the network's outputs at one step into estimates.

    Args:
        hook: Evaluates the network.
        sample: The noisy sample that the network saw, in the sampler's units.
        reading: How the scheduler turns outputs into estimates.
        sign: That of the network's output where it reaches the scheduler.
    """

    hook: Network
    sample: Tensor
    reading: Reading
    sign: float

    def estimate(self, output: Tensor, x: Tensor | None = None) -> Tensor:
        """The estimate at the noisy sample ``x``, by default the step's own."""
        first = first_channels(output, self.sample).float()
        noisy = self.sample if x is None else x
        return self.reading.k_x * noisy.float() + self.reading.k_o * (self.sign * first)

    def evaluated(self, call: Call, x: Tensor) -> Tensor:
        """The estimate that ``call`` makes of the noisy sample ``x``.

        Raises:
            InvalidInput: If ``x`` is not shaped like the step's own sample.
            UnsupportedPipeline: If the network's input is not known to be ``x`` times a number.
        """
        return self.estimate(self.hook.evaluate(self._about(call, x)), x)

    def _about(self, call: Call, x: Tensor) -> Call:
        sample = self.sample
        if x.shape != sample.shape or x.device != sample.device:
            raise InvalidInput(
                f"denoise: expected a noisy sample like the step's own state.x_t, {tuple(sample.shape)} on "
                f"{sample.device}, got {tuple(x.shape)} on {x.device}"
            )
        if x.dtype == sample.dtype and x.data_ptr() == sample.data_ptr():
            return call
        place = Place.find(call, sample)
        if place is not None:
            self.hook.vouch(place.residual, _unknown(self.hook.pipe))
            return place.put(call, x)
        if x.dtype != sample.dtype and torch.equal(x.to(sample.dtype), sample):
            return call
        raise UnsupportedPipeline(_unknown(self.hook.pipe))


@dataclass(frozen=True, slots=True)
class ExtraBranch:
    """One more evaluation of the network at a step; a :class:`~steerclear.denoise.Denoiser`.

    Call:
        x_t: ``state.x_t``, or another noisy sample of its shape at the same noise level.
        level: The step's noise level.
        condition: A prompt, or one per sample, encoded once by the pipeline; or a mapping of the network's keyword
            arguments to replace in the conditional call, such as ``{"encoder_hidden_states": e}``, with one row or one
            per sample; ``None`` repeats the unconditional call, or without guidance the sampler's only one.

    Raises:
        InvalidInput: If ``x_t`` has another shape, ``level`` is another one, the condition does not fit the network, or
            a prompt is longer than the pipeline's text encoders read: its end would be cut.
        UnsupportedPipeline: If the pipeline cannot encode a prompt by itself, or for a sample other than ``state.x_t``
            if the network's input is not known to be the sample times a number (ControlNet, lists of samples).

    Cost:
        One evaluation of the network on the batch. The first sample of a trajectory that is not the step's own makes
        the host wait for the device.
    """

    step: Step
    conditional: Call
    unconditional: Call

    def __call__(self, x_t: Tensor, level: NoiseLevel, condition: Any = None) -> Tensor:  # noqa: ANN401
        if not _same(level, self.step.reading.level):
            raise InvalidInput(
                f"denoise: expected the step's own state.level {self.step.reading.level}, got {level}; the network is "
                "told the step's timestep"
            )
        if condition is None:
            return self.step.evaluated(self.unconditional, x_t)
        call, hook = self.conditional, self.step.hook
        if isinstance(condition, str) or (isinstance(condition, Sequence) and not isinstance(condition, Tensor)):
            condition = hook.encoded(condition, call.kwargs)
        if not isinstance(condition, Mapping):
            raise InvalidInput(
                f"denoise: expected a prompt or a mapping of keyword arguments, got {type(condition).__name__}"
            )
        return self.step.evaluated(call.asked(**replace(call.kwargs, condition, len(self.step.sample))), x_t)


@dataclass(frozen=True, slots=True)
class Again:
    """The sampler's own estimate of this step at another noisy sample: ``again(x)``, not clipped, float32.

    With guidance :math:`u + g (c - u)` of two evaluations, otherwise one. Raises what :class:`ExtraBranch` raises.
    """

    step: Step
    conditional: Call
    unconditional: Call | None
    guidance_scale: float

    def __call__(self, x: Tensor) -> Tensor:
        conditional = self.step.evaluated(self.conditional, x)
        if self.unconditional is None:
            return conditional
        unconditional = self.step.evaluated(self.unconditional, x)
        return unconditional + self.guidance_scale * (conditional - unconditional)


def refusal(problem: str) -> Callable[..., Tensor]:
    """In place of an evaluation that cannot be made: says why when it is asked for."""

    def refuse(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - any denoiser's
        raise UnsupportedPipeline(problem)

    return refuse


def first_channels(output: Tensor, sample: Tensor) -> Tensor:
    """Without the learned variance, where there is one."""
    channels = sample.shape[1]
    learned = output.ndim == sample.ndim and output.shape[1] == 2 * channels
    return output[:, :channels] if learned else output


def _same(a: NoiseLevel, b: NoiseLevel) -> bool:
    if a is b:
        return True
    pairs = ((a.alpha, b.alpha), (a.sigma, b.sigma))
    if any(isinstance(x, Tensor) or isinstance(y, Tensor) for x, y in pairs):
        return all(x is y for x, y in pairs)
    return all(x == y for x, y in pairs)


def _unknown(pipe: Any) -> str:  # noqa: ANN401 - any pipeline
    return (
        f"{type(pipe).__name__}: expected the network's input to be the noisy sample times a number, so that it can be "
        "asked about another one, got something else (a ControlNet's residuals, a list, mixed frames); pass state.x_t "
        "itself, or use a guard that makes no samples of its own"
    )

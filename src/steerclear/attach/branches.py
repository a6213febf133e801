r"""Lends guards the conditional and unconditional predictions that classifier-free guidance combined.

A forward hook on the network records its outputs; :mod:`steerclear.attach.guidance` finds out which is which.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from steerclear.attach.calls import network
from steerclear.attach.conditions import encode, replace, take_rows
from steerclear.attach.guidance import Pattern, no_guidance, not_guidance, off, solve, stated_scale
from steerclear.attach.readers import Reading
from steerclear.denoise import Denoiser
from steerclear.errors import InvalidInput, UnsoundCombination, UnsupportedPipeline
from steerclear.noise import NoiseLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class Branches:
    """The two predictions of one step as denoised estimates, float32, shaped like the sampler's ``sample``.

    Args:
        unconditional: Estimate under the empty or negative prompt. Not clipped, also where the scheduler clips.
        conditional: Estimate under the prompt, likewise.
        guidance_scale: ``g`` with which the pipeline combined them.
        denoise: Evaluates the network once more at this step's ``x_t``; see :class:`ExtraBranch`.
    """

    unconditional: Tensor
    conditional: Tensor
    guidance_scale: float
    denoise: Denoiser


@dataclass(frozen=True, slots=True)
class _Call:
    """One recorded call of the network."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    def half(self, index: int) -> "_Call":
        """The first (0) or second (1) half of a doubled batch."""
        total = len(self.output)
        rows = slice(index * total // 2, (index + 1) * total // 2)
        args, kwargs = (take_rows(value, rows, total) for value in (self.args, self.kwargs))
        return _Call(self.module, args, kwargs, self.output[rows])


class BranchHook:
    """Listens to a pipeline's denoising networks while it is entered.

    Args:
        pipe: The pipeline, classic or modular.

    Cost:
        No network evaluation, except those that a guard asks for through ``denoise`` (counted in
        ``extra_evaluations``). The host waits for the device once per trajectory, to find out which branch is which.
    """

    def __init__(self, pipe: Any) -> None:  # noqa: ANN401 - any diffusers pipeline
        self.pipe = pipe
        self.extra_evaluations = 0
        self._calls: list[_Call] = []
        self._handles: list[Any] = []
        self._listening = True
        self._pattern: Pattern | None = None
        self._timesteps: Any = None
        self._residual: Tensor | None = None
        self._encoded: dict[Any, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        modules = [getattr(self.pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
        modules = [module for module in modules if module is not None] or [network(self.pipe)]
        if modules == [None]:
            raise UnsupportedPipeline(
                f"{type(self.pipe).__name__}: expected a unet or transformer to lend branches, found neither; "
                "use a guard that does not read branches"
            )
        self._handles = [module.register_forward_hook(self._record, with_kwargs=True) for module in modules]
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls, self._encoded = [], [], {}
        residual, self._residual = self._residual, None
        if kind is None and residual is not None and not residual.item() <= 1:
            raise UnsupportedPipeline(not_guidance(self.pipe, "at a later step"))

    def _record(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ANN401
        if self._listening:
            self._calls.append(_Call(module, args, kwargs, _tensor(output)))

    def collect(self, model_output: Tensor, sample: Tensor, reading: Reading) -> Branches:
        """The branches of the step that is about to be taken.

        Args:
            model_output: What the pipeline hands to ``step``, before any guard.
            sample: What it hands over with it; ``state.x_t`` of the guards must be this tensor.
            reading: How the scheduler turns outputs into estimates at this step.

        Raises:
            UnsoundCombination: If the pipeline runs without classifier-free guidance.
            UnsupportedPipeline: If ``model_output`` is not guidance of two outputs of the network.
        """
        calls, self._calls = self._calls, []
        pair, rows = self._pair(calls, model_output, sample)
        noisy = sample[:rows]
        outputs = [_first_channels(call.output, sample) for call in pair]
        pattern = self._identify(pair, outputs, _first_channels(model_output, sample)[:rows])
        step = _Step(hook=self, sample=noisy, reading=reading, sign=pattern.sign)
        conditional, unconditional = outputs[pattern.conditional], outputs[1 - pattern.conditional]
        return Branches(
            unconditional=step.estimate(unconditional),
            conditional=step.estimate(conditional),
            guidance_scale=pattern.guidance_scale,
            denoise=ExtraBranch(step, pair[pattern.conditional], pair[1 - pattern.conditional]),
        )

    def _pair(self, calls: list[_Call], model_output: Tensor, sample: Tensor) -> tuple[list[_Call], int]:
        """The two candidate branches, and how many rows of the sample they are about."""
        rows = len(sample)
        if calls and len(calls[-1].output) == 2 * rows:
            return [calls[-1].half(0), calls[-1].half(1)], rows
        if len(calls) > 1 and all(len(call.output) == rows for call in calls[-2:]):
            if len(calls) > 2:
                raise UnsupportedPipeline(not_guidance(self.pipe, f"made of {len(calls)} predictions"))
            return calls, rows
        if calls and len(calls[-1].output) == rows and rows % 2 == 0 and _is_doubled(calls[-1], model_output):
            return [calls[-1].half(0), calls[-1].half(1)], rows // 2
        if calls and len(calls[-1].output) == rows:
            raise UnsoundCombination(no_guidance(self.pipe, "one prediction per step"))
        seen = [len(call.output) for call in calls]
        raise UnsupportedPipeline(not_guidance(self.pipe, f"made of batches of {seen} for {rows} samples"))

    def _identify(self, pair: list[_Call], outputs: list[Tensor], target: Tensor) -> Pattern:
        """Which branch is which: found at the first step of a trajectory, verified without waiting at the others."""
        timesteps = getattr(self.pipe.scheduler, "timesteps", None)
        known, key = self._pattern, (tuple(id(call.module) for call in pair), stated_scale(self.pipe))
        if known is None or known.key != key or timesteps is not self._timesteps:
            self._timesteps = timesteps  # a new tensor for every trajectory
            known = self._pattern = solve(self.pipe, key, outputs, target)
        else:
            worst = off(known, outputs, target)
            self._residual = worst if self._residual is None else torch.maximum(self._residual, worst)
        return known

    def evaluate(self, call: _Call) -> Tensor:
        """Run the network once more, unheard."""
        self.extra_evaluations += 1
        self._listening = False
        context = getattr(call.module, "cache_context", None)
        try:
            with context("steerclear") if context is not None else nullcontext():
                return _tensor(call.module(*call.args, **call.kwargs))
        finally:
            self._listening = True

    def encoded(self, prompt: str | Sequence[str], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The prompt as keyword arguments of the network, encoded once."""
        key = prompt if isinstance(prompt, str) else tuple(prompt)
        if key not in self._encoded:
            self._encoded[key] = encode(self.pipe, prompt, kwargs)
        return self._encoded[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What turns the network's outputs at one step into estimates."""

    hook: BranchHook
    sample: Tensor
    reading: Reading
    sign: float

    def estimate(self, output: Tensor) -> Tensor:
        first = _first_channels(output, self.sample).float()
        return self.reading.k_x * self.sample.float() + self.reading.k_o * (self.sign * first)


@dataclass(frozen=True, slots=True)
class ExtraBranch:
    """One more evaluation of the network at a step's ``x_t``; a :class:`~steerclear.denoise.Denoiser`.

    Call:
        x_t: ``state.x_t`` itself: the network's other inputs belong to this noisy sample.
        level: Its noise level.
        condition: A prompt, or one per sample, encoded once by the pipeline; or a mapping of the network's keyword
            arguments to replace in the conditional call, such as ``{"encoder_hidden_states": e}``, with one row or one
            per sample; ``None`` repeats the unconditional call.

    Raises:
        InvalidInput: If ``x_t`` is another tensor, or the condition does not fit the network.
        UnsupportedPipeline: If the pipeline cannot encode a prompt by itself.

    Cost:
        One evaluation of the network on the batch.
    """

    step: _Step
    conditional: _Call
    unconditional: _Call

    def __call__(self, x_t: Tensor, level: NoiseLevel, condition: Any = None) -> Tensor:  # noqa: ANN401
        sample, hook = self.step.sample, self.step.hook
        if x_t.shape != sample.shape or (x_t.dtype == sample.dtype and x_t.data_ptr() != sample.data_ptr()):
            raise InvalidInput(
                f"denoise: expected the step's own state.x_t {tuple(sample.shape)}, got another tensor "
                f"{tuple(x_t.shape)}; the pipeline's network is bound to the sample that the step saw"
            )
        if condition is None:
            return self.step.estimate(hook.evaluate(self.unconditional))
        call = self.conditional
        if isinstance(condition, str) or (isinstance(condition, Sequence) and not isinstance(condition, Tensor)):
            condition = hook.encoded(condition, call.kwargs)
        if not isinstance(condition, Mapping):
            raise InvalidInput(
                f"denoise: expected a prompt or a mapping of keyword arguments, got {type(condition).__name__}"
            )
        kwargs = replace(call.kwargs, condition, len(sample))
        return self.step.estimate(hook.evaluate(_Call(call.module, call.args, kwargs, call.output)))


def _is_doubled(call: _Call, model_output: Tensor) -> bool:
    """DiT steps both halves of its batch, which guidance has made the same; waits for the device."""
    half = len(model_output) // 2
    channels = min(model_output.shape[1], call.output.shape[1])
    same = torch.equal(model_output[:half, : channels // 2], model_output[half:, : channels // 2])
    return same and not torch.equal(model_output[:, :channels], call.output[:, :channels])


def _first_channels(output: Tensor, sample: Tensor) -> Tensor:
    """Without the learned variance, where there is one."""
    channels = sample.shape[1]
    learned = output.ndim == sample.ndim and output.shape[1] == 2 * channels
    return output[:, :channels] if learned else output


def _tensor(output: Any) -> Tensor:  # noqa: ANN401 - what a network returns
    if isinstance(output, Tensor):
        return output.detach()
    return _tensor(output[0] if isinstance(output, tuple | list) else output.sample)

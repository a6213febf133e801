r"""Lends guards the predictions that classifier-free guidance combined, and the network for more evaluations.

A forward hook on the network records its calls. Which of their outputs is conditional is said by the pipeline's guider,
where it has one (:mod:`steerclear.attach.guider`); elsewhere :mod:`steerclear.attach.guidance` finds it out.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, Self

import torch
from torch import Tensor

from steerclear.attach.calls import network
from steerclear.attach.conditions import encode
from steerclear.attach.guidance import Pattern, alone, no_guidance, not_guidance, off, solve, stated_scale
from steerclear.attach.guider import Named, overheard
from steerclear.attach.lent import Again, Branches, ExtraBranch, Step, first_channels, refusal
from steerclear.attach.readers import Reading
from steerclear.attach.recorded import Call
from steerclear.errors import UnsoundCombination, UnsupportedPipeline
from steerclear.guards.base import Requires

_BRANCHES = Requires(branches=True)


class BranchHook:
    """Listens to a pipeline's denoising networks and guiders while it is entered.

    Args:
        pipe: The pipeline, classic or modular.
        needs: What the guards need together: ``branches``, ``predictions`` or ``evaluations``.

    Cost:
        No network evaluation, except those that a guard asks for through ``denoise`` and ``again`` (counted in
        ``extra_evaluations``). The host waits for the device once per trajectory, to find out which branch is which.
    """

    def __init__(self, pipe: Any, *, needs: Requires = _BRANCHES) -> None:  # noqa: ANN401 - any diffusers pipeline
        self.pipe, self.needs = pipe, needs
        self.extra_evaluations = 0
        self._calls: list[Call] = []
        self._named: list[Named] = []
        self._stack = ExitStack()
        self._listening = True
        self._pattern: Pattern | None = None
        self._timesteps: Any = None
        self._vouched: dict[str, Any] = {}  # by problem, the trajectory in which it was last looked for
        self._residuals: dict[str, Tensor] = {}
        self._encoded: dict[Any, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        modules = [getattr(self.pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
        modules = [module for module in modules if module is not None] or [network(self.pipe)]
        if modules == [None]:
            raise UnsupportedPipeline(
                f"{type(self.pipe).__name__}: expected a unet or transformer to lend branches, found neither; "
                "use a guard that does not read branches"
            )
        for module in modules:
            handle = module.register_forward_hook(self._record, with_kwargs=True)
            self._stack.callback(handle.remove)
        self._stack.enter_context(overheard(self.pipe, self._named.append))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._stack.close()
        self._calls, self._encoded = [], {}
        self._named.clear()
        residuals, self._residuals = self._residuals, {}
        for problem, residual in residuals.items() if kind is None else ():
            if not residual.item() <= 1:
                raise UnsupportedPipeline(problem)

    def _record(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ANN401
        if self._listening:
            self._calls.append(Call(module, args, kwargs, _tensor(output)))

    def collect(self, model_output: Tensor, sample: Tensor, reading: Reading) -> Branches:
        """What is lent at the step that is about to be taken.

        Args:
            model_output: What the pipeline hands to ``step``, before any guard.
            sample: What it hands over with it; ``state.x_t`` of the guards must be this tensor.
            reading: How the scheduler turns outputs into estimates at this step.

        Raises:
            UnsoundCombination: If a guard reads branches and the pipeline runs without classifier-free guidance.
            UnsupportedPipeline: If ``model_output`` is not guidance of two outputs of the network, or its one output.
        """
        calls, self._calls = self._calls, []
        named = [one for one in self._named if one.combined.shape == model_output.shape]
        self._named.clear()
        if named and (len(named[-1].predictions) > 1 or self._reads):
            return self._by_name(named[-1], calls, model_output, sample, reading)
        pair, rows = self._pair(calls, model_output, sample)
        noisy, target = sample[:rows], first_channels(model_output, sample)[:rows]
        outputs = [first_channels(call.output, sample) for call in pair]
        pattern = self._identify(("calls", *(id(call.module) for call in pair)), outputs, target)
        step = Step(hook=self, sample=noisy, reading=reading, sign=pattern.sign)
        if len(pair) == 1:
            return _only(step, pair[0])
        return self._lent(step, pattern, outputs, pair)

    @property
    def _reads(self) -> bool:
        """Whether a guard reads branches at all."""
        return self.needs.branches or self.needs.predictions

    def _by_name(
        self, named: Named, calls: list[Call], model_output: Tensor, sample: Tensor, reading: Reading
    ) -> Branches:
        """The branches as the guider names them; only their scale is left to be found, for those who rely on it."""
        outputs = [first_channels(prediction, sample) for prediction in named.pair(self.pipe)]
        target, key = first_channels(model_output, sample), ("guider", named.guider, *named.predictions)
        linear = self.needs.branches or self.needs.evaluations
        seen = outputs if linear else [first_channels(named.combined, sample)]
        pattern = self._identify(key, seen, target, named=True)
        step = Step(hook=self, sample=sample, reading=reading, sign=pattern.sign)
        return self._lent(step, pattern, outputs, _made(named, calls)) if linear else _named_only(step, outputs)

    def _lent(self, step: Step, pattern: Pattern, outputs: list[Tensor], pair: list[Call] | None) -> Branches:
        c, u, g = pattern.conditional, 1 - pattern.conditional, pattern.guidance_scale
        unknown = _unmade(self.pipe)
        return Branches(
            unconditional=step.estimate(outputs[u]),
            conditional=step.estimate(outputs[c]),
            guidance_scale=g,
            denoise=refusal(unknown) if pair is None else ExtraBranch(step, pair[c], pair[u]),
            again=refusal(unknown) if pair is None else Again(step, pair[c], pair[u], g),
            cost=2,
        )

    def _pair(self, calls: list[Call], model_output: Tensor, sample: Tensor) -> tuple[list[Call], int]:
        """The two candidate branches or the only prediction, and how many rows of the sample they are about."""
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
            if self._reads:
                raise UnsoundCombination(no_guidance(self.pipe, "one prediction per step"))
            return calls[-1:], rows
        seen = [len(call.output) for call in calls]
        raise UnsupportedPipeline(not_guidance(self.pipe, f"made of batches of {seen} for {rows} samples"))

    def _identify(
        self, made: tuple[Any, ...], outputs: list[Tensor], target: Tensor, *, named: bool = False
    ) -> Pattern:
        """Which branch is which: found at the first step of a trajectory, verified without waiting at the others."""
        timesteps = getattr(self.pipe.scheduler, "timesteps", None)
        known, key = self._pattern, (len(outputs), *made, stated_scale(self.pipe))
        if known is None or known.key != key or timesteps is not self._timesteps:
            self._timesteps = timesteps  # a new tensor for every trajectory
            if len(outputs) == 1:
                known = self._pattern = alone(self.pipe, key, outputs[0], target)
            else:
                known = self._pattern = solve(self.pipe, key, outputs, target, named=named)
        else:
            both = outputs if len(outputs) == 2 else [outputs[0], outputs[0]]
            self._keep(off(known, both, target), not_guidance(self.pipe, "at a later step"))
        return known

    def vouch(self, residual: Tensor, problem: str) -> None:
        """Raise ``problem`` if ``residual`` exceeds 1: now if it is the trajectory's first, else when the call ends."""
        timesteps = getattr(self.pipe.scheduler, "timesteps", None)
        if problem not in self._vouched or self._vouched[problem] is not timesteps:
            self._vouched[problem] = timesteps
            if not residual.item() <= 1:
                raise UnsupportedPipeline(problem)
        self._keep(residual, problem)

    def _keep(self, residual: Tensor, problem: str) -> None:
        worst = self._residuals.get(problem)
        self._residuals[problem] = residual if worst is None else torch.maximum(worst, residual)

    def evaluate(self, call: Call) -> Tensor:
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
        """The prompt of a guard as keyword arguments of the network, encoded once, and whole."""
        key = prompt if isinstance(prompt, str) else tuple(prompt)
        if key not in self._encoded:
            self._encoded[key] = encode(self.pipe, prompt, kwargs, whole=True)
        return self._encoded[key]


def _only(step: Step, call: Call) -> Branches:
    """Without guidance: one prediction, which is the estimate itself."""
    return Branches(
        unconditional=None,
        conditional=None,
        guidance_scale=None,
        denoise=ExtraBranch(step, call, call),
        again=Again(step, call, None, 1.0),
        cost=1,
    )


def _named_only(step: Step, outputs: list[Tensor]) -> Branches:
    """Branches whose combination nobody relies on, and nobody asks to repeat."""
    problem = not_guidance(step.hook.pipe, "however its guider combined them")
    return Branches(
        unconditional=step.estimate(outputs[0]),
        conditional=step.estimate(outputs[1]),
        guidance_scale=None,
        denoise=refusal(problem),
        again=refusal(problem),
        cost=2,
    )


def _made(named: Named, calls: list[Call]) -> list[Call] | None:
    """The calls ``[unconditional, conditional]`` whose outputs are a guider's predictions, if they are."""
    wanted = (named.predictions["pred_uncond"], named.predictions["pred_cond"])
    found = [next((call for call in calls if _is_same(call.output, prediction)), None) for prediction in wanted]
    return [call for call in found if call is not None] if None not in found else None


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


def _unmade(pipe: Any) -> str:  # noqa: ANN401
    return (
        f"{type(pipe).__name__}: expected its guider's predictions to be the network's outputs as they are, got "
        "something made of them, so no further branch can be evaluated; use a guard that reads branches only"
    )


def _is_doubled(call: Call, model_output: Tensor) -> bool:
    """DiT steps both halves of its batch, which guidance has made the same; waits for the device."""
    half = len(model_output) // 2
    channels = min(model_output.shape[1], call.output.shape[1])
    same = torch.equal(model_output[:half, : channels // 2], model_output[half:, : channels // 2])
    return same and not torch.equal(model_output[:, :channels], call.output[:, :channels])


def _tensor(output: Any) -> Tensor:  # noqa: ANN401 - what a network returns
    if isinstance(output, Tensor):
        return output.detach()
    return _tensor(output[0] if isinstance(output, tuple | list) else output.sample)

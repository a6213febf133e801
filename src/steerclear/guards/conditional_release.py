r"""Conditional release: a safe denoiser for prompts that are themselves unsafe.

When nearly all that a prompt describes is unsafe, the safe denoiser has nowhere to go: in every direction the
conditional branch pulls the estimate back. So the prompt is obeyed only as far as it is safe. With classifier-free
guidance of scale :math:`g`,

.. math:: \hat x' = \hat x_{\varnothing,safe} + g\, r\, (\hat x_c - \hat x_\varnothing), \qquad
    r = 1 - \kappa \max_{s \ge t} w_c(x_s)

where :math:`w_c = P(\text{unsafe} \mid x_t, c)` is read off the conditional branch's estimate and the running maximum
is the memory: once the sample has left the region of the prompt, :math:`w_c` falls again, and must not be believed.
:math:`\kappa > 1` turns the released branch round, like a negative prompt that only acts on samples whose own evidence
asks for it.

A released sample needs something else to become. Without a ``fallback`` that is whatever the model draws without a
prompt; with one, another prompt is obeyed as far as the first is not,

.. math:: \hat x' = \hat x_{\varnothing} + g \bigl(r\,(\hat x_c - \hat x_\varnothing)
    + \min(1 - r, 1)\,(\hat x_f - \hat x_\varnothing)\bigr)

The exact mixture that this approximates is derived in docs/conditional-release.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards.base import Requires
from steerclear.guards.tracking import wide
from steerclear.guards.weights import Weight
from steerclear.negation import References
from steerclear.noise import per_sample

Fallback = str | Callable[[Tensor, DenoiseState], Sequence[str]]


@dataclass(frozen=True, kw_only=True, eq=False)
class ConditionalRelease:
    r"""Lets go of the prompt as the evidence for unwanted content grows.

    Args:
        negation: The images to steer away from, in the sampler's space.
        weight: How :math:`w` is estimated; with a ``bandwidth`` it looks at the branch's own estimate, which is what
            makes it conditional.
        strength: :math:`\kappa \ge 0`; 1 releases the prompt completely where :math:`w_c = 1`, more pushes away.
        gate: Weights below it count as 0, in [0, 1): such samples stay bit-identical.
        fallback: A prompt to obey in place of the released one, or a function of the conditional estimate and the step
            that names one per sample, such as :meth:`Seen.substitute`: asked when a sample is first released.
        max_beta: Cap on :math:`w_\varnothing/(1 - w_\varnothing)` in the safe denoiser of the unconditional branch,
            which keeps the fallback itself safe; 0 leaves that branch as it is. Acts only on released samples.

    Call:
        denoised: The guided estimate, ``(batch, *shape)``.
        state: The step, with branches.

    Returns:
        The guarded estimate in the shape, dtype and device of ``denoised``; ``None`` at strength 0.

    Notes in the trace:
        ``weight``: :math:`w_c` of this step; ``release``: :math:`1 - r`.

    Raises:
        InvalidInput: For values outside these ranges.
        NegationMismatch, UnsoundCombination: If the weight's references do not go with the negation set; from the
            pipeline's call, if it runs without classifier-free guidance, or under two conditional releases.

    Cost:
        That of the weight; with ``max_beta`` twice that and a posterior. No network evaluation, except that a
        ``fallback`` takes one for the batch at every step in which a sample is released, and to see whether one is, the
        host waits for the device at every step.

    Equal to:
        The identity at ``strength=0`` and for every sample whose weight stays below ``gate``.
    """

    negation: References
    weight: Weight
    strength: float = 1.5
    gate: float = 0.3
    fallback: Fallback | None = None
    max_beta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength < math.inf:
            raise InvalidInput(f"ConditionalRelease: expected a finite strength >= 0, got {self.strength}")
        if not 0.0 <= self.gate < 1.0:
            raise InvalidInput(f"ConditionalRelease: expected 0 <= gate < 1, got {self.gate}")
        if not 0.0 <= self.max_beta < math.inf:
            raise InvalidInput(f"ConditionalRelease: expected 0 <= max_beta < inf, got {self.max_beta}")
        self.weight.check(self.negation)

    @property
    def requires(self) -> Requires:
        """The branches of guidance, and references in the sampler's space."""
        return Requires(branches=True, negation=(self.negation,)) | self.weight.requires

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        self._alone(state)
        conditional, unconditional = (wide(state.branches[name]) for name in ("conditional", "unconditional"))
        negation, kind = self.weight.at(self.negation, state, self)
        if not len(negation):
            return None
        weight = kind.evidence(negation, conditional, state, (self, "conditional")).sigmoid()
        released = self._latched(weight, state)
        state.note("weight", weight)
        state.note("release", released)
        if self.strength == 0.0:
            return None
        x = wide(denoised)
        scale = 1.0 if state.guidance_scale is None else state.guidance_scale
        share = per_sample(released, x).to(x.dtype)
        moved = x - scale * share * (conditional - unconditional)
        instead = self._instead(released, conditional, state)
        if instead is not None:
            moved = moved + scale * share.clamp_max(1.0) * (instead - unconditional)
        if self.max_beta > 0.0:
            moved = moved + self._safe_push(unconditional, state)
        # NaN is not "nothing to do": it is passed on, and the layer raises.
        return torch.where(per_sample(~(released <= 0.0), x), moved.to(denoised.dtype), denoised)

    def _alone(self, state: DenoiseState) -> None:
        if state.memory.setdefault(ConditionalRelease, self) is not self:
            raise UnsoundCombination(
                "two conditional releases guard the same trajectory: both would take the prompt away, and give two "
                "others in its place. Use one over both sets: zoo.guard([a, b]), or a.add(b) for negation sets"
            )

    def _latched(self, weight: Tensor, state: DenoiseState) -> Tensor:
        r""":math:`1 - r`: strength times the highest weight so far that reached the gate."""
        counted = torch.where(weight < self.gate, torch.zeros_like(weight), weight)
        highest = state.memory.get((self, "highest"))
        highest = counted if highest is None else torch.maximum(highest, counted)
        state.memory[(self, "highest")] = highest
        return self.strength * highest

    def _instead(self, released: Tensor, conditional: Tensor, state: DenoiseState) -> Tensor | None:
        """The fallback's estimate at this step, if any sample is released."""
        if self.fallback is None or not bool((released > 0.0).any()):
            return None
        if state.denoise is None:
            raise UnsoundCombination(
                "ConditionalRelease: expected a sampler that can evaluate another prompt; leave out the fallback"
            )
        if isinstance(self.fallback, str):
            return wide(state.denoise(state.x_t, state.level, self.fallback))
        prompts: list[str | None] = state.memory.setdefault((self, "fallback"), [None] * len(released))
        fired = released.gt(0.0).tolist()
        if any(fires and known is None for fires, known in zip(fired, prompts, strict=True)):
            for k, name in enumerate(self.fallback(conditional, state)):
                if fired[k] and prompts[k] is None:
                    prompts[k] = name
        return wide(state.denoise(state.x_t, state.level, [name or "" for name in prompts]))

    def _safe_push(self, unconditional: Tensor, state: DenoiseState) -> Tensor:
        r""":math:`\beta_\varnothing (\hat x_\varnothing - \hat x_{unsafe})`, the safe denoiser of that branch."""
        negation, kind = self.weight.at(self.negation, state, self)
        unsafe = kind.posterior(negation, unconditional, state)
        log_odds = kind.log_odds(unsafe, unconditional, state, (self, "unconditional"))
        beta = log_odds.clamp_max(math.log(self.max_beta)).exp()
        mean = unsafe.mean.to(unconditional.dtype)
        return per_sample(beta, unconditional).to(unconditional.dtype) * (unconditional - mean)

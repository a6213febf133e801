r"""Tracked release: the safe part of a prompt that may be dropped, as an exact mixture target.

Let the prompt be obeyed with probability :math:`1-\lambda` and dropped with probability :math:`\lambda`. The safe part
of :math:`\tilde p(x) = (1-\lambda)\, p(x \mid c) + \lambda\, p(x)` exists for every prompt, even a wholly unsafe one.
Noised, its two parts weigh :math:`(1-\lambda)\, p_t(x_t \mid c)(1-w_c)` and
:math:`\lambda\, p_t(x_t)(1-w_\varnothing)`, and its denoiser is the mean of theirs under these weights:

.. math:: \hat x' = r\, \hat x_{c,safe} + (1-r)\, \hat x_{\varnothing,safe}, \qquad
    \operatorname{logit} r = \log\frac{1-\lambda}{\lambda} + \ell_t + \log(1-w_c) - \log(1-w_\varnothing)

The log-ratio :math:`\ell_t = \log p_t(x_t \mid c) - \log p_t(x_t)` is the memory that the latch of
:class:`~steerclear.guards.ConditionalRelease` imitates. By Bayes' rule it grows from step to step by the log-ratio of
the two *unguarded* reverse kernels at the sample that was really drawn, however it came to be drawn, so it is tracked
(guards/tracking.py). Derived in docs/conditional-release.md.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.guards.base import Requires
from steerclear.guards.tracking import Prediction, log_ratio, wide
from steerclear.guards.weights import Weight
from steerclear.negation import References
from steerclear.noise import per_sample

# Log-odds beyond it say no more: where both branches have nothing safe left, they cancel instead of inf - inf.
CERTAIN = 1e30


@dataclass(frozen=True, kw_only=True, eq=False)
class TrackedRelease:
    r"""Keeps the safe part of what a prompt describes, and falls back to the unprompted safe part where there is none.

    With classifier-free guidance of scale :math:`g`,

    .. math:: \hat x' = \hat x_{\varnothing,safe} + g\, r\, (\hat x_{c,safe} - \hat x_{\varnothing,safe}), \qquad
        \hat x_{b,safe} = \hat x_b + \min\Bigl(\frac{w_b}{1-w_b}, \beta_{max}\Bigr) (\hat x_b - \hat x_{b,unsafe})

    with :math:`\operatorname{logit} r` as in the module's docstring, and from one step to the next

    .. math:: \ell_s = \ell_t + \tau\, \frac{\lVert x_s - \mu_\varnothing\rVert^2 - \lVert x_s - \mu_c\rVert^2}
        {2\tilde\sigma^2}, \qquad \mu_b = c_0 \hat x_b + c_t x_t, \qquad \ell_T = 0

    Args:
        negation: The images to steer away from, in the sampler's space. They stand for the unsafe part of both
            branches; with a ``bandwidth`` in the weight, as seen from each branch's own estimate.
        weight: How :math:`w_c` and :math:`w_\varnothing` are estimated, each from its own branch.
        drop: :math:`\lambda`, the share of pictures for which the prompt may be dropped, in [0, 1); 0 never drops it.
        tau: Tempering of :math:`\ell_t`, > 0; 1 is Bayes' rule, less compensates high dimensions.
        gate: A sample is acted on from the step on at which :math:`w_c` or :math:`w_\varnothing` first reaches this, in
            [0, 1); until then it stays bit-identical. :math:`\ell_t` is tracked from the first step and opens no gate.
        max_beta: Cap on :math:`w/(1-w)` in both safe denoisers, >= 0; 0 leaves the branches as they are.

    Call:
        denoised: The guided estimate, ``(batch, *shape)``. What an earlier guard changed in it is kept.
        state: The step, with branches.

    Returns:
        The guarded estimate in the shape, dtype and device of ``denoised``; ``None`` with ``drop=0`` and
        ``max_beta=0``.

    Notes in the trace:
        ``weight``: :math:`w_c`; ``weight_unconditional``: :math:`w_\varnothing`; ``log_ratio``: :math:`\ell_t`, in
        nats; ``release``: :math:`1 - r`, and 0 where the gate is closed.

    Raises:
        InvalidInput: For values outside these ranges.
        NegationMismatch, UnsoundCombination: If the weight's references do not go with the negation set; from the
            pipeline's call, if it runs without classifier-free guidance or with a sampler that adds no noise.

    Cost:
        No network evaluation; two ``(batch, n)`` distance matrices per reference set and step. Remembers three tensors
        like ``x_t``.

    Equal to:
        The identity with ``drop=0, max_beta=0`` and for every sample whose weights stay below ``gate``; the denoiser of
        the mixture's safe part with ``gate=0``, no guidance beyond :math:`g = 1`, exact weights and :math:`\ell_t`
        (tests/test_tracked_release.py). Tracking is exact as steps become small, at eta = 1.

    Example::

        guard = TrackedRelease(negation=weapons, weight=TwoSample(safe=everyday, bandwidth=4.0))
        with steerclear.attach(pipe, guard) as trace:  # pipe.scheduler is a DDPMScheduler
            image = pipe("an axe").images[0]
    """

    negation: References
    weight: Weight
    drop: float = 0.05
    tau: float = 1.0
    gate: float = 0.3
    max_beta: float = 20.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.drop < 1.0:
            raise InvalidInput(f"TrackedRelease: expected 0 <= drop < 1, got {self.drop}; it is the share dropped")
        if not 0.0 < self.tau < math.inf:
            raise InvalidInput(f"TrackedRelease: expected a finite tau > 0, got {self.tau}")
        if not 0.0 <= self.gate < 1.0:
            raise InvalidInput(f"TrackedRelease: expected 0 <= gate < 1, got {self.gate}")
        if not 0.0 <= self.max_beta < math.inf:
            raise InvalidInput(f"TrackedRelease: expected 0 <= max_beta < inf, got {self.max_beta}")
        self.weight.check(self.negation)

    @property
    def requires(self) -> Requires:
        """The branches of guidance, one noisy step per network evaluation, and references in the sampler's space."""
        own = Requires(branches=True, stochastic=True, one_call=True, negation=(self.negation,))
        return own | self.weight.requires

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        if not len(self.weight.at(self.negation, state, self)[0]):
            return None
        conditional, unconditional = (wide(state.branches[name]) for name in ("conditional", "unconditional"))
        odds_c, push_c = self._evidence("conditional", conditional, state)
        odds_0, push_0 = self._evidence("unconditional", unconditional, state)
        ratio = self._log_ratio(conditional, unconditional, state)
        # log(1 - w) is logsigmoid of minus the log-odds: no cancellation as w -> 1.
        logit = self._log_prior() + (ratio + (logsigmoid(-odds_c) - logsigmoid(-odds_0)))
        fired = self._fired(torch.maximum(odds_c, odds_0).sigmoid(), state)
        state.note("weight", odds_c.sigmoid())
        state.note("weight_unconditional", odds_0.sigmoid())
        state.note("log_ratio", ratio)
        state.note("release", torch.where(fired, (-logit).sigmoid(), torch.zeros_like(logit)))
        if self.drop == 0.0 and self.max_beta == 0.0:
            return None
        x = wide(denoised)
        scale = 1.0 if state.guidance_scale is None else state.guidance_scale
        guidance = conditional - unconditional
        kept = per_sample(logit.sigmoid(), x).to(x.dtype) * (guidance + (push_c - push_0))
        moved = x + push_0 + scale * (kept - guidance)  # the equation, less the guidance that x already holds
        return torch.where(per_sample(fired, x), moved.to(denoised.dtype), denoised)

    def _evidence(self, branch: str, estimate: Tensor, state: DenoiseState) -> tuple[Tensor, Tensor]:
        r"""Log-odds of a branch, and the move of its safe denoiser, :math:`\beta (\hat x_b - \hat x_{b,unsafe})`."""
        negation, kind = self.weight.at(self.negation, state, self)
        unsafe = kind.posterior(negation, estimate, state)
        odds = kind.log_odds(unsafe, estimate, state, (self, branch)).clamp(-CERTAIN, CERTAIN)
        beta = odds.clamp_max(math.log(self.max_beta) if self.max_beta > 0.0 else -math.inf).exp()
        return odds, per_sample(beta, estimate).to(estimate.dtype) * (estimate - unsafe.mean.to(estimate.dtype))

    def _log_ratio(self, conditional: Tensor, unconditional: Tensor, state: DenoiseState) -> Tensor:
        r""":math:`\ell_t`: 0 in pure noise, then the kernel of the prompt over the kernel without it, step by step."""
        now = Prediction.of(state, unconditional, conditional)
        remembered = state.memory.get((self, "tracked"))
        if remembered is None:
            ratio = now.x_t.new_zeros(len(now.x_t))
        else:
            before, ratio = remembered
            ratio = ratio + log_ratio(before, state, tau=self.tau)
        state.memory[(self, "tracked")] = (now, ratio)
        return ratio

    def _log_prior(self) -> float:
        r""":math:`\log((1-\lambda)/\lambda)`."""
        return math.log1p(-self.drop) - math.log(self.drop) if self.drop > 0.0 else math.inf

    def _fired(self, weight: Tensor, state: DenoiseState) -> Tensor:
        """Whether a weight of the sample has reached the gate by now."""
        reached = ~(weight < self.gate)  # NaN is passed on, and the layer raises
        before = state.memory.get((self, "fired"))
        fired = reached if before is None else reached | before
        state.memory[(self, "fired")] = fired
        return fired

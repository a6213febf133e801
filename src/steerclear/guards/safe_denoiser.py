r"""Training-Free Safe Denoisers for Safe Use of Diffusion Models (Kim et al., NeurIPS 2025), arXiv:2502.08011.

If a share of the data is unsafe, the noised densities add up,
:math:`p_t = Z_{safe}\, p_{safe,t} + Z_{unsafe}\, p_{unsafe,t}`, and so do the posterior means weighted by them. Solving
for the safe one gives, exactly,

.. math:: \hat x_{safe} = \hat x + \beta\,(\hat x - \hat x_{unsafe}), \qquad
    \beta = \frac{w}{1-w}, \quad w = P(\text{unsafe} \mid x_t)

The negation set stands for the unsafe data: :math:`\hat x_{unsafe}` is its posterior mean. What remains to be known is
:math:`w`, and guards/weights.py has three ways to it. What the authors' released loop computes instead is
:meth:`SafeDenoiser.published`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.guards.base import Guard, Requires, during
from steerclear.guards.published import PublishedLoop
from steerclear.guards.tracking import wide
from steerclear.guards.weights import Weight
from steerclear.negation import Items, References
from steerclear.noise import per_sample


@dataclass(frozen=True, kw_only=True, eq=False)
class SafeDenoiser:
    r"""Moves the denoised estimate away from a negation set, by how likely the sample is to become unsafe.

    .. math:: \hat x_{safe} = \hat x + \text{strength} \cdot \min\Bigl(\frac{w}{1-w}, \beta_{max}\Bigr)
        (\hat x - \hat x_{unsafe})

    Args:
        negation: The images to steer away from, in the sampler's space.
        weight: How :math:`w` is estimated, and through which kernel images are compared:
            :class:`~steerclear.guards.TwoSample`, :class:`~steerclear.guards.Dynamic`,
            :class:`~steerclear.guards.Gate`.
        strength: Dimensionless, >= 0; 1 is the theorem. At 0 the guard measures (notes, tracking) and changes nothing.
        max_beta: Cap on :math:`w/(1-w)`, > 0: a sample that can become nothing but unsafe would be thrown to infinity.
        gate: Weights below it count as 0, in [0, 1): such samples stay bit-identical.

    Call:
        denoised: Estimate of the clean sample, ``(batch, *shape)``.
        state: The step's :class:`~steerclear.denoise.DenoiseState`.

    Returns:
        The guarded estimate in the shape, dtype and device of ``denoised``; ``None`` at strength 0.

    Notes in the trace:
        ``weight``: :math:`w`; ``beta``: the factor applied; ``evidence``: log-evidence of the negation set.

    Raises:
        InvalidInput: For values outside these ranges.
        NegationMismatch, UnsoundCombination: If the weight's references do not go with the negation set.

    Cost:
        No network evaluation; one ``(batch, n)`` distance matrix per reference set and step.

    Equal to:
        The identity at ``strength=0``; the exact safe denoiser on Dirac data with :class:`TwoSample` references that
        are the data and the true prior (tests/test_safe_denoiser_exact.py).

    Example::

        guard = SafeDenoiser(negation=weapons, weight=TwoSample(safe=everyday, prior=0.1, bandwidth=4.0))
        with steerclear.attach(pipe, guard) as trace:
            image = pipe("a drink").images[0]
    """

    negation: References
    weight: Weight
    strength: float = 1.0
    max_beta: float = 20.0
    gate: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength < math.inf:
            raise InvalidInput(
                f"SafeDenoiser: expected a finite strength >= 0, got {self.strength}; a negative one would steer "
                f"towards the negation set"
            )
        if not 0.0 < self.max_beta < math.inf:
            raise InvalidInput(f"SafeDenoiser: expected 0 < max_beta < inf, got {self.max_beta}")
        if not 0.0 <= self.gate < 1.0:
            raise InvalidInput(f"SafeDenoiser: expected 0 <= gate < 1, got {self.gate}")
        self.weight.check(self.negation)

    @property
    def requires(self) -> Requires:
        return Requires(negation=(self.negation,)) | self.weight.requires

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        negation, kind = self.weight.at(self.negation, state, self)
        if not len(negation):
            return None
        unsafe = kind.posterior(negation, denoised, state)
        log_odds = kind.log_odds(unsafe, denoised, state, self)
        beta = self.beta(log_odds)
        state.note("weight", log_odds.sigmoid())
        state.note("beta", beta)
        state.note("evidence", unsafe.log_evidence)
        if self.strength == 0.0:
            return None
        x = wide(denoised)
        moved = x + per_sample(beta, x).to(x.dtype) * (x - unsafe.mean.to(x.dtype))
        return torch.where(per_sample(beta > 0.0, x), moved.to(denoised.dtype), denoised)

    def beta(self, log_odds: Tensor) -> Tensor:
        r""":math:`\text{strength} \cdot \min(w/(1-w), \beta_{max})`, 0 where :math:`w` is below the gate."""
        beta = self.strength * log_odds.clamp_max(math.log(self.max_beta)).exp()
        return torch.where(log_odds.sigmoid() >= self.gate, beta, torch.zeros_like(beta))

    @classmethod
    def published(
        cls,
        negation: Items,
        *,
        scale: float = 0.33,
        sigma: float = 3.15,
        threshold: float = 0.0,
        stop: float = 0.22,
    ) -> Guard:
        r"""The authors' released loop, for comparison: use it with ``attach(..., coupling="renoise")``.

        :class:`~steerclear.guards.PublishedLoop` during the first ``stop`` of the trajectory. The defaults are those of
        the nudity experiment on SD 1.4 (DDPM, 50 steps, CFG 7.5), whose window is the timesteps 780–1000.

        Args:
            negation: The unsafe references.
            scale: Constant strength; the release calls it scale, the paper eta.
            sigma: Kernel width of an *un-squared* distance; length scale :math:`2\sigma^2`.
            threshold: Sum of kernels below which nothing happens;
                :meth:`~steerclear.guards.PublishedLoop.calibrated` computes the release's.
            stop: End of the window as a fraction of the trajectory.
        """
        return during(PublishedLoop(negation=negation, scale=scale, sigma=sigma, threshold=threshold), stop=stop)

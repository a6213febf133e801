r"""The Safe Denoiser as its authors' code runs it, which is not what its paper says; for faithful comparison only.

With references divided by their channel norm at every spatial position, :math:`\bar y_n`, and the guided estimate
:math:`\hat x` as it is:

.. math::
    k_n = \exp\Bigl(-\frac{\lVert \hat x - \bar y_n \rVert}{2\sigma^2}\Bigr), \qquad
    \beta = \sum_n k_n + 10^{-8}, \qquad
    E = \frac{1}{\beta} \sum_n k_n \bar y_n, \qquad
    \tilde x = \hat x - \text{scale}\; \mathbf 1[\beta \ge \beta_t]\; E

Reproduced, because they are the method as measured: the distance that is not squared, the kernel on :math:`\hat x`
without :math:`\alpha_t, \sigma_t`, the missing :math:`+\hat x` of the correction, :math:`\beta` as a gate only, and
(by ``coupling="renoise"``) fresh noise under the old prediction. Not rebuilt, because they are slips of single scripts:
a width that is never passed on, estimates returned in place of corrections, in-place edits, batches of one.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.guards.base import Requires
from steerclear.guards.tracking import wide
from steerclear.negation import Items
from steerclear.negation.references import require_items
from steerclear.noise import NoiseLevel, per_sample

FLOOR = 1e-8
"""Added to the sum of kernels, in the gate and in the denominator."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedLoop:
    """One step of the released loop; :meth:`SafeDenoiser.published` puts it into its window.

    Args:
        negation: Unsafe references, ``(channels, height, width)`` each. The release encodes with a random draw from the
            autoencoder's posterior; a :class:`~steerclear.negation.NegationSet` holds its mode.
        scale: Constant strength, >= 0; 0 is the identity.
        sigma: Kernel width, > 0.
        threshold: The gate :math:`\\beta_t`, a sum of kernels; 0 is always open.

    Call:
        Like every guard; per sample, where the release takes a batch of one.

    Raises:
        InvalidInput: For values outside these ranges, or references that have no channel axis.

    Cost:
        One ``(batch, n)`` distance matrix.

    References:
        Code of arXiv:2502.08011 as released (threshold variant); see docs/safe-denoiser.md.
    """

    negation: Items
    scale: float = 0.33
    sigma: float = 3.15
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.scale < math.inf:
            raise InvalidInput(f"PublishedLoop: expected a finite scale >= 0, got {self.scale}")
        if not 0.0 < self.sigma < math.inf:
            raise InvalidInput(f"PublishedLoop: expected a finite sigma > 0, got {self.sigma}")
        if math.isnan(self.threshold) or self.threshold == math.inf:
            raise InvalidInput(f"PublishedLoop: expected a threshold below infinity, got {self.threshold}")
        require_items("PublishedLoop", self.negation)
        if len(self.negation.space.shape) != 3:
            raise InvalidInput(
                f"PublishedLoop: expected references (channels, height, width), as on SD 1.x, got shape "
                f"{tuple(self.negation.space.shape)}; SafeDenoiser(weight=...) takes any shape"
            )

    @property
    def requires(self) -> Requires:
        return Requires(negation=(self.negation,))

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        if not len(self.negation.at(state)):
            return None
        x = wide(denoised)
        references = self._references(x, state)
        kernels = self.kernels(x, references)
        total = kernels.sum(1) + FLOOR
        fired = total >= self.threshold
        state.note("evidence", total.log())
        state.note("beta", self.scale * fired)
        if self.scale == 0.0:
            return None
        mean = (kernels @ references.flatten(1)).reshape(x.shape) / per_sample(total, x)
        moved = (x - self.scale * mean).to(denoised.dtype)
        return torch.where(per_sample(fired, x), moved, denoised)

    def _references(self, x: Tensor, state: DenoiseState) -> Tensor:
        """The normalised references like ``x``: the same at every step, so made once a trajectory."""
        references = state.memory.get((self, "references"))
        if references is None:
            references = normalised(self.negation.at(state).latents.to(device=x.device, dtype=x.dtype))
            state.memory[(self, "references")] = references
        return references

    def kernels(self, x: Tensor, references: Tensor) -> Tensor:
        r""":math:`\exp(-\lVert x - \bar y_n\rVert / 2\sigma^2)`, shape ``(batch, n)``."""
        distance = torch.cdist(x.flatten(1), references.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        return (-distance / (2.0 * self.sigma**2)).exp()

    def calibrated(self, level: NoiseLevel, epsilon: Tensor, *, margin: float = 1.6) -> "PublishedLoop":
        r"""This loop with the release's gate.

        .. math:: \beta_t = \min_i \beta(\alpha \bar y_i + \sigma \epsilon_i) - \text{margin}

        Args:
            level: Noise level of the *last* timestep of the schedule.
            epsilon: Standard noise for every reference, ``(n, *shape)``.
            margin: Taken off the smallest sum of kernels, the self-kernel included.
        """
        references = normalised(wide(self.negation.latents))
        noised = level.add(references, epsilon.to(references))
        lowest = float((self.kernels(noised, references).sum(1) + FLOOR).min())
        return PublishedLoop(negation=self.negation, scale=self.scale, sigma=self.sigma, threshold=lowest - margin)


def normalised(references: Tensor) -> Tensor:
    """``(n, channels, height, width)`` with every spatial position divided by its norm over channels."""
    return references / torch.linalg.vector_norm(references, dim=1, keepdim=True)

r"""The Safe Denoiser's two unknowns from references as the model itself denoises them.

The theorem of :mod:`steerclear.guards.safe_denoiser` needs the posterior weight :math:`w` of the unsafe data and their
posterior mean :math:`\hat x_{unsafe}`. Read from *clean* references both are wrong in a high-dimensional space: at most
noise levels the exact kernel has one neighbour, and that neighbour is drawn in another style than the model's. What the
model makes of a noised reference at the same level, :math:`y_n^t` (:mod:`steerclear.guards.seen`), lies where the
model's own estimates lie. So both are read there,

.. math:: k_n = \exp\Bigl(-\frac{\lVert \phi(\hat x) - \phi(y_n^t) \rVert^2}{2 (q h_t)^2}\Bigr), \qquad
    \log\frac{w}{1-w} = \log\frac{\pi}{1-\pi} + a \log
    \frac{\operatorname{mean}_{n \in unsafe} k_n}{\operatorname{mean}_{n \in safe} k_n}

The theorem in both of its forms is :math:`\hat x_{safe} = \hat x + \frac{w}{1-w}(\hat x - \hat x_{unsafe})
= \hat x + w\,(\hat x_{safe} - \hat x_{unsafe})`. The second does not divide by :math:`1-w`, so an error of the means is
never amplified. With kernel means :math:`m_s, m_u` of the two kinds of references, the unsafe mean is therefore given
as the one that makes the first form equal to the second,

.. math:: \hat x_{unsafe} := \hat x - (1-w)\,(m_s - m_u), \qquad m = \frac{\sum_n k_n\, y_n^t}{\sum_n k_n}

Where a condition holds safe and unsafe things, such as a class of a class-conditional model, :math:`w` begins at
:math:`\pi`, their share, and moves as the sample settles.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.guards.seen import SeenWeight
from steerclear.guards.tracking import wide
from steerclear.guards.weights import logit
from steerclear.negation import Posterior, References


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenPosterior(SeenWeight):
    r"""Weight and posterior mean of the unsafe :class:`SeenReferences`; the equations are in the module's docstring.

    Args:
        references: Made with the model that is guarded, each under its own condition.
        width: :math:`q` > 0, kernel width as a multiple of the spacing of the references at the level.
        prior: :math:`\pi`, the unsafe share of what the model would draw, inside (0, 1); ``None`` is the share of
            the references.
        slope: :math:`a` > 0, an inverse temperature outside the kernel.
        until: Share of the levels, from the noisiest, that is read, in (0, 1]; at later ones the weight is 0.

    Raises:
        InvalidInput: For values outside these ranges, or with a ``bandwidth``, which means nothing here.
        NegationMismatch, UnsoundCombination: If the guard's negation set lives in another space, has other labels, or
            follows a store (when the guard is built); from the pipeline's call, if a trajectory begins after the levels
            that are read.

    Cost:
        No network evaluation; a projection of ``D × k`` there and back, and a ``(batch, n)`` distance matrix in ``k``
        dimensions, twice a step.

    Example::

        weight = SeenPosterior(references=seen)
        guard = SafeDenoiser(negation=alcohol, weight=weight, max_beta=1e4)  # no cap is needed
    """

    width: float = 0.7
    prior: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bandwidth is not None or self.temperature != 1.0:
            raise InvalidInput("SeenPosterior: expected no bandwidth and no temperature; width sets the kernel")
        if self.prior is not None and not 0.0 < self.prior < 1.0:
            raise InvalidInput(
                f"SeenPosterior: expected 0 < prior < 1, got {self.prior}; strength=0 is how to switch off"
            )

    @property
    def share(self) -> float:
        r""":math:`\pi`."""
        return float(self.references.flagged.float().mean()) if self.prior is None else self.prior

    def posterior(self, references: References, denoised: Tensor, state: DenoiseState) -> Posterior:
        """Mean and log-evidence of the unsafe references at this level; ``references`` itself is not read."""
        x, own, kernels = self._seen(denoised, state)
        flagged = self.references.flagged.to(own.device)
        points = self.references.points[self.references.level(state.level)].to(own)
        unsafe, safe = kernels[:, flagged], kernels[:, ~flagged]
        away = safe.softmax(1) @ points[~flagged] - unsafe.softmax(1) @ points[flagged]
        away = (-self._odds(kernels)).sigmoid()[:, None] * away
        mean = x - (away @ self.references.basis.to(own).T).to(x.dtype).view_as(x)
        return Posterior(mean, unsafe.logsumexp(1) - math.log(unsafe.shape[1]))

    def log_odds(self, unsafe: Posterior, denoised: Tensor, state: DenoiseState, owner: object) -> Tensor:
        return self.evidence(None, denoised, state, owner)

    def evidence(self, negation: References | None, estimate: Tensor, state: DenoiseState, owner: object) -> Tensor:
        self.started(state, owner)
        if self.references.level(state.level) >= self.read:
            return torch.full((len(estimate),), -math.inf, device=estimate.device)
        return self._odds(self._seen(estimate, state)[2])

    def _odds(self, kernels: Tensor) -> Tensor:
        flagged = self.references.flagged.to(kernels.device)
        unsafe, safe = kernels[:, flagged], kernels[:, ~flagged]
        ratio = unsafe.logsumexp(1) - safe.logsumexp(1) - math.log(unsafe.shape[1]) + math.log(safe.shape[1])
        return self.slope * ratio + logit(self.share)

    def _seen(self, denoised: Tensor, state: DenoiseState) -> tuple[Tensor, Tensor, Tensor]:
        """The estimate, its components ``(batch, k)``, and log-kernels to every reference ``(batch, n)``."""
        index, x = self.references.level(state.level), wide(denoised)
        own = self.references.project(x)
        return x, own, self.kernels(own, index)

r"""Safety-Guided Flow (Kim, Kim, Park; ICLR 2026), arXiv:2603.13300.

Samples are repelled by the negation set as by charges: the potential is the squared maximum mean discrepancy between
the one estimate and the set, with a Gaussian kernel :math:`k(x, y) = e^{-\lVert x - y\rVert^2 / 2\sigma^2}`,

.. math:: E(x) = \mathrm{MMD}^2(\{x\}, D) = \mathrm{const} - 2 Z(x), \qquad Z(x) = \sum_i \bar w_i k(x, y_i)

and the guard climbs it, :math:`\hat x' = \hat x + \lambda \nabla E(\hat x)`, in a window of the trajectory:

.. math:: \nabla E(x) = \frac{2}{\sigma^2} Z(x) \Bigl(x - \frac{\sum_i \bar w_i k(x, y_i)\, y_i}{Z(x)}\Bigr)

It is a safe denoiser with :math:`\beta = Z` and strength :math:`2\lambda/\sigma^2` whose kernel compares estimates. The
released code follows :math:`+\nabla\sum_i k(x, y_i)`, which points *towards* the references; :meth:`released` does so.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, NegationMismatch
from steerclear.guards.base import Guard, Requires, during
from steerclear.guards.radius import distances, widest
from steerclear.guards.tracking import wide
from steerclear.negation import Items
from steerclear.negation.references import laid_out, require_items
from steerclear.noise import NoiseLevel, per_sample

# The top-k rule makes the kernel this much at the mean of the chosen squared distances.
LEVEL = 0.05

#: Published settings: end of the window and start of it, as fractions of the trajectory, and scale.
PRESETS: dict[str, tuple[float, float, float]] = {
    "nudity": (0.0, 0.2, 0.03),
    "nudity-headline": (0.0, 0.6, 0.01),
    "budget-0.4": (0.0, 0.4, 0.015),
    "budget-0.6": (0.0, 0.6, 0.010),
    "budget-0.8": (0.0, 0.8, 0.0075),
    "budget-0.95": (0.0, 0.95, 0.006),
    "shifted-0.2": (0.2, 0.4, 0.03),
    "shifted-0.4": (0.4, 0.6, 0.03),
    "shifted-0.6": (0.6, 0.8, 0.03),
    "shifted-0.8": (0.8, 0.95, 0.03),
    "memorisation": (0.0, 0.4, 0.015),
    "diversity": (0.0, 0.2, 0.03),
    "diversity-strong": (0.0, 0.2, 1.0),
    "works": (0.0, 0.95, 0.03),
    "person": (0.0, 0.4, 0.03),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class SafetyGuidedFlow:
    r"""Repels the denoised estimate from a negation set along the gradient of a kernel discrepancy.

    Args:
        negation: The images to steer away from, in the sampler's space.
        strength: :math:`\lambda \ge 0`, in squared latent units; at 0 the guard measures and changes nothing.
        bandwidth: :math:`\sigma > 0` in latent units; ``None`` chooses one per sample and step, so that the kernel is
            0.05 at the mean squared distance of the references of ``ranks``.
        ranks: First and last (exclusive) of the references by distance, from 0. The release takes (3, 6), as if the
            nearest three were the sample itself; (0, 3) takes the nearest three.
        toward: A control: the opposite sign, which attracts.

    Call:
        denoised: Estimate of the clean sample, ``(batch, *shape)``.
        state: The step's :class:`~steerclear.denoise.DenoiseState`.

    Returns:
        The guarded estimate in the shape, dtype and device of ``denoised``; ``None`` at strength 0. Rows whose kernels
        all vanish are bit-identical.

    Notes in the trace:
        ``kernel``: :math:`Z`; ``bandwidth``: :math:`\sigma`.

    Raises:
        InvalidInput: For values outside these ranges, or fewer references than ``ranks`` asks for.
        NegationMismatch: If the set lives in another space than the sampler.

    Cost:
        No network evaluation. With a fixed bandwidth one pass over the set a step; with the rule of ranks two, because
        the width is not known before all distances are. No host synchronisation.

    Equal to:
        The identity at ``strength=0``. With a fixed bandwidth, the safe denoiser with :math:`\beta = Z` and strength
        :math:`2\lambda/\sigma^2`.

    References:
        Safety-Guided Flow, arXiv:2603.13300. What is known of its effect at the published scales:
        docs/safety-guided-flow.md.
    """

    negation: Items
    strength: float
    bandwidth: float | None = None
    ranks: tuple[int, int] = (0, 3)
    toward: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength < math.inf:
            raise InvalidInput(
                f"SafetyGuidedFlow: expected a finite strength >= 0, got {self.strength}; toward=True is the other sign"
            )
        if self.bandwidth is not None and not 0.0 < self.bandwidth < math.inf:
            raise InvalidInput(f"SafetyGuidedFlow: expected a bandwidth > 0 or None, got {self.bandwidth}")
        if self.bandwidth is None:
            require_items("SafetyGuidedFlow without a bandwidth", self.negation)
        first, last = self.ranks
        if not 0 <= first < last or (self.bandwidth is None and last > len(self.negation)):
            raise InvalidInput(
                f"SafetyGuidedFlow: expected ranks 0 <= first < last <= {len(self.negation)}, the size of the set, got "
                f"{self.ranks}; add references, choose other ranks, or a fixed bandwidth"
            )

    @property
    def requires(self) -> Requires:
        return Requires(negation=(self.negation,))

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        negation = self.negation.at(state)
        if not len(negation):
            return None
        if self.bandwidth is None and self.ranks[1] > len(negation):
            raise InvalidInput(
                f"SafetyGuidedFlow: expected at least {self.ranks[1]} references for ranks {self.ranks}, got "
                f"{len(negation)} after items were removed; add references, or use a fixed bandwidth"
            )
        if tuple(denoised.shape[1:]) != negation.space.shape:
            raise NegationMismatch(
                f"SafetyGuidedFlow: expected samples of shape (batch, {', '.join(map(str, negation.space.shape))}), "
                f"got {tuple(denoised.shape)}; encode the pictures again for this pipeline at this size"
            )
        x = wide(denoised.detach())
        sigma = self._sigma(x, negation)
        mean, evidence = negation.posterior(x, NoiseLevel(1.0, sigma))
        # Of the posterior's Gaussian, the kernel is what is left without the normalisation.
        log_z = evidence + x[0].numel() / 2 * (2.0 * math.pi * sigma.to(evidence).square()).log()
        state.note("kernel", log_z.exp())
        state.note("bandwidth", sigma)
        if self.strength == 0.0:
            return None
        beta = per_sample(2.0 * self.strength / sigma.square() * log_z.exp().to(sigma), x)
        sign = -1.0 if self.toward else 1.0
        moved = x + sign * beta.to(x) * (x - mean)
        # NaN is not "nothing to do": it is passed on, and the layer raises.
        return torch.where(~(beta <= 0.0), moved.to(denoised.dtype), denoised)

    def _sigma(self, x: Tensor, negation: Items) -> Tensor:
        r""":math:`\sigma` of every sample, ``(batch,)``; only the rule of ranks needs distances for it."""
        flat = x.flatten(1).to(widest(x))
        if self.bandwidth is not None:
            return torch.full_like(flat[:, 0], self.bandwidth)
        first, last = self.ranks
        points, counts = laid_out(negation, x.device)
        squared = torch.where(counts, distances(flat, points.flatten(1)), math.inf).square()
        near = squared.topk(last, dim=1, largest=False).values[:, first:].mean(1)
        return (near.clamp_min(1e-24) / (-2.0 * math.log(LEVEL))).sqrt()

    @classmethod
    def published(cls, negation: Items, preset: str = "nudity-headline") -> Guard:
        """The paper's gradient with the window, scale and ranks of a published experiment.

        Args:
            negation: The unsafe references.
            preset: One of :data:`PRESETS`.

        Raises:
            InvalidInput: For an unknown preset.
        """
        start, stop, scale = _preset(preset)
        return during(cls(negation=negation, strength=scale, ranks=(3, 6)), start=start, stop=stop)

    @classmethod
    def released(cls, negation: Items, preset: str = "nudity-headline") -> Guard:
        r"""What the released loop adds, for comparison: :math:`+\nabla\sum_i k`, towards the references, times n/2.

        Use it with ``attach(..., coupling="renoise")``, as the release does. Same arguments and errors as
        :meth:`published`. Weights of the negation set are kept, which the release does not know.
        """
        start, stop, scale = _preset(preset)
        guard = cls(negation=negation, strength=scale * len(negation) / 2.0, ranks=(3, 6), toward=True)
        return during(guard, start=start, stop=stop)


def _preset(name: str) -> tuple[float, float, float]:
    if name not in PRESETS:
        raise InvalidInput(f"SafetyGuidedFlow: expected a preset of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]

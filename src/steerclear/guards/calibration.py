r"""Fits what a two-sample weight means to what is true, on references that it has not seen.

The raw score is the log-ratio of the evidences, :math:`z = \log \hat q_{unsafe} - \log \hat q_{safe}`. In high
dimensions it separates well and means little: kernels collapse, and :math:`z` comes out in hundreds of nats. Logistic
regression finds the affine map under which it is a log-odds,

.. math:: P(\text{unsafe} \mid z) = \operatorname{sigmoid}(a z + b), \qquad a > 0

with both classes weighted equally, so that the prior stays a separate number (Platt 1999; :math:`1/a` is a
temperature).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards.weights import TwoSample
from steerclear.negation import References
from steerclear.negation.references import at_present
from steerclear.noise import NoiseLevel

RIDGE = 1e-3
"""Prior precision of the slope on the standardised score: keeps it finite when the classes separate completely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """One row of a reliability table: ``n`` scores in ``[low, high)``, their mean probability, the unsafe share."""

    low: float
    high: float
    n: int
    predicted: float
    observed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How good the posterior weight is on the held-out data, both classes weighted equally.

    Args:
        slope: Fitted :math:`a`.
        offset: Fitted :math:`b`.
        auroc: Chance that an unsafe score exceeds a safe one; the affine map does not change it.
        brier_before: Mean squared error of ``sigmoid(z)``; 0.25 is a coin.
        brier_after: Mean squared error of ``sigmoid(a z + b)``.
        reliability: Ten bins of the calibrated probability; empty ones are left out.
        unsafe: Number of unsafe scores (references × levels).
        safe: Number of safe scores.
    """

    slope: float
    offset: float
    auroc: float
    brier_before: float
    brier_after: float
    reliability: tuple[Bin, ...]
    unsafe: int
    safe: int


def calibrate(
    weight: TwoSample,
    negation: References,
    *,
    unsafe: Tensor,
    safe: Tensor,
    levels: Sequence[NoiseLevel] = (),
    generator: torch.Generator | None = None,
) -> tuple[TwoSample, Calibration]:
    """A copy of ``weight`` whose slope and offset are fitted on held-out references, and how good it then is.

    Args:
        weight: Its references, kernel and prior are used as they are.
        negation: The negation set that it will be used with.
        unsafe: Held-out unsafe samples, ``(n, *shape)``, in neither set. With a ``bandwidth``, denoised estimates or
            clean latents; without, clean latents that are noised here.
        safe: Held-out safe samples, likewise.
        levels: Noise levels to noise them at; needed exactly when ``weight.bandwidth`` is ``None``. One affine map is
            fitted to all of them: for a map per part of the trajectory calibrate twice and use ``during``.
        generator: Draws the noise.

    Raises:
        InvalidInput: For fewer than two samples of a class, or levels that do not fit the bandwidth.
        UnsoundCombination: If the score does not rise with being unsafe: no affine map makes it a posterior.

    Cost:
        One posterior of each set per held-out sample and level; no network evaluation.
    """
    if len(unsafe) < 2 or len(safe) < 2:
        raise InvalidInput(f"calibrate: expected two samples of each class at least, got {len(unsafe)} and {len(safe)}")
    if (weight.bandwidth is None) != bool(levels):
        raise InvalidInput(
            f"calibrate: expected noise levels exactly when bandwidth is None, got {len(levels)} levels with "
            f"bandwidth={weight.bandwidth}"
        )
    weight.check(negation)
    fixed, references = replace(weight, safe=at_present(weight.safe)), at_present(negation)
    high, low = (score(fixed, references, x, levels=levels, generator=generator) for x in (unsafe, safe))
    slope, offset = fit_logistic(high, low)
    if slope <= 0.0:
        raise UnsoundCombination(
            f"calibrate: held-out unsafe samples do not score above safe ones (slope {slope:.3g}); use references that "
            f"resemble them, another bandwidth, or check that the classes are not swapped"
        )
    fitted = replace(weight, slope=slope, offset=offset)
    return fitted, _report(high, low, slope, offset)


def score(
    weight: TwoSample,
    negation: References,
    samples: Tensor,
    *,
    levels: Sequence[NoiseLevel] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The log-ratio :math:`\log \hat q_{unsafe} - \log \hat q_{safe}` of clean samples, at every level, in one row."""
    parts: list[Tensor] = []
    for level in levels or (NoiseLevel(1.0, 0.0),):
        noise = torch.randn(samples.shape, generator=generator, dtype=samples.dtype) if levels else samples
        x_t = level.add(samples, noise.to(samples.device))
        state = DenoiseState(x_t=x_t, level=level, step=0, num_steps=1)
        unsafe, safe = (weight.posterior(references, samples, state) for references in (negation, weight.safe))
        parts.append(unsafe.log_evidence - safe.log_evidence)
    return torch.cat(parts).double()


def fit_logistic(high: Tensor, low: Tensor, *, iterations: int = 100) -> tuple[float, float]:
    """``(slope, offset)`` of class-balanced logistic regression, by Newton's method with halved steps, float64."""
    z, label, weight = _stack(high, low)
    centre, spread = (weight * z).sum(), z.std().clamp_min(1e-12)
    design = torch.stack([(z - centre) / spread, torch.ones_like(z)], dim=1)
    ridge = torch.diag(torch.tensor([RIDGE, 0.0], dtype=z.dtype, device=z.device))

    def loss(theta: Tensor) -> Tensor:
        logits = design @ theta
        fit = (weight * (torch.nn.functional.softplus(logits) - label * logits)).sum()
        return fit + theta @ ridge @ theta / 2

    theta = torch.zeros(2, dtype=z.dtype, device=z.device)
    for _ in range(iterations):
        p = (design @ theta).sigmoid()
        gradient = design.T @ (weight * (p - label)) + ridge @ theta
        curvature = design.T @ ((weight * p * (1 - p))[:, None] * design) + ridge
        step = torch.linalg.solve(curvature + 1e-12 * torch.eye(2, dtype=z.dtype, device=z.device), gradient)
        size = 1.0
        while size > 1e-6 and bool(loss(theta - size * step) > loss(theta)):
            size /= 2
        theta = theta - size * step
        if float(step.abs().max()) < 1e-10:
            break
    slope = float(theta[0] / spread)
    return slope, float(theta[1]) - slope * float(centre)


def auroc(high: Tensor, low: Tensor) -> float:
    """Chance that a score of ``high`` exceeds one of ``low``; ties count a half."""
    ordered = low.sort().values
    below = torch.searchsorted(ordered, high, right=False)
    up_to = torch.searchsorted(ordered, high, right=True)
    return float((below + up_to).double().mean()) / (2 * len(low))


def _report(high: Tensor, low: Tensor, slope: float, offset: float) -> Calibration:
    z, label, weight = _stack(high, low)
    before, after = z.sigmoid(), (slope * z + offset).sigmoid()
    bins: list[Bin] = []
    for k in range(10):
        inside = (after >= k / 10) & ((after < (k + 1) / 10) | (k == 9))
        share = weight[inside] / weight[inside].sum()
        if len(share):
            predicted, observed = (float((share * v[inside]).sum()) for v in (after, label))
            bins.append(Bin(low=k / 10, high=(k + 1) / 10, n=len(share), predicted=predicted, observed=observed))
    return Calibration(
        slope=slope,
        offset=offset,
        auroc=auroc(high, low),
        brier_before=float((weight * (before - label) ** 2).sum()),
        brier_after=float((weight * (after - label) ** 2).sum()),
        reliability=tuple(bins),
        unsafe=len(high),
        safe=len(low),
    )


def _stack(high: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, labels, and weights under which each class has mass one half."""
    label = torch.cat([torch.ones_like(high), torch.zeros_like(low)])
    weight = torch.cat([torch.full_like(high, 0.5 / len(high)), torch.full_like(low, 0.5 / len(low))])
    return torch.cat([high, low]), label, weight

r"""Pixel-wise aleatoric uncertainty: how the predicted noise varies among re-noised copies of one estimate.

The estimate of a step is noised again :math:`M` times to the step's own level, and the network is asked about each
copy,

.. math:: \hat x_t^i = \alpha \hat x + \sigma \epsilon_i, \qquad \epsilon_\theta^i = \epsilon_\theta(\hat x_t^i, t),
    \qquad u = \operatorname{Var}_i[\epsilon_\theta^i]

one number per element of every sample. The most uncertain elements get the posterior mean of their noise under a
Gaussian prior of variance :math:`\bar\alpha` and :math:`M` observations of variance :math:`u`,

.. math:: \epsilon_{post} = \Bigl(\frac{M}{u} + \frac{1}{\bar\alpha}\Bigr)^{-1} \frac{1}{u} \sum_i \epsilon_\theta^i,
    \qquad \epsilon' = (1 - m)\,\epsilon + m\,\epsilon_{post}, \qquad m = [u > \text{quantile}_q(u)]

with the quantile taken within each sample, and :math:`\hat x' = (x_t - \sigma \epsilon')/\alpha`. The noise that a
level implies does not depend on the scale of :math:`x_t`, so flow and variance-exploding levels count as the
variance-preserving level of the same signal-to-noise ratio: :math:`\bar\alpha = \alpha^2/(\alpha^2 + \sigma^2)`.

What :math:`u` measures is derived in docs/aleatoric-uncertainty.md: for Gaussian data of variance :math:`\tau^2` it is
:math:`(1 - \kappa)^2` with :math:`\kappa = \alpha^2 \tau^2/(\alpha^2 \tau^2 + \sigma^2)`, and for a Dirac 1. It is
large where the network is *sure* of :math:`x_0`. For the question whether an estimate can be trusted, see
:mod:`steerclear.guards.certainty`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards.base import Guard, Requires, during
from steerclear.guards.tracking import wide
from steerclear.noise import NoiseLevel

# The variance of the noise that counts as zero: below it M/u would overflow.
_FLOOR = 1e-8


@dataclass(frozen=True, kw_only=True, eq=False)
class AleatoricGuidance:
    r"""Replaces the noise of the most uncertain elements by its posterior mean.

    A method for picture quality, not for safety: it is here because image-side guards may want to know what it knows.

    Args:
        samples: :math:`M \ge 1` re-noised copies.
        quantile: :math:`q` in [0, 1]: the share of each sample's elements that is left alone.
        seed: Of the noise, together with the sample itself.

    Call:
        denoised: The estimate, ``(batch, *shape)``.
        state: The step, with evaluations.

    Returns:
        The edited estimate in the shape, dtype and device of ``denoised``; ``None`` at ``quantile=1``, and at a level
        without signal (a flow's first), where the noise is the sample itself and implies no estimate.

    Notes in the trace:
        ``uncertainty``: the mean of :math:`u` over a sample's elements, ``(batch,)``.

    Raises:
        InvalidInput: For values outside these ranges.
        UnsoundCombination: If the sampler lends no evaluations.

    Cost:
        ``samples`` evaluations of the sampler's own estimate (two network evaluations each under guidance). The host
        waits for the device once per trajectory, to seed the noise from the sample: so the sampler's own random numbers
        are left alone, and what happens to a sample depends on nothing else in its batch. ``samples`` times the memory
        of the estimate.

    Equal to:
        The identity at ``quantile=1``, and for every element outside the mask.

    References:
        De Vita and Belagiannis, WACV 2025, arXiv:2412.00205; its posterior variant, summed over the samples rather than
        over the batch. Its gradient variant is left out: see docs/aleatoric-uncertainty.md.
    """

    samples: int = 5
    quantile: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InvalidInput(f"AleatoricGuidance: expected samples >= 1, got {self.samples}")
        if not 0.0 <= self.quantile <= 1.0:
            raise InvalidInput(f"AleatoricGuidance: expected 0 <= quantile <= 1, got {self.quantile}")

    @classmethod
    def published(cls, *, start: int = 0) -> Guard:
        """Five copies, the top 5 % of elements, in 3 of 20 steps from ``start`` on (15 for ImageNet at 64 pixels).

        In a trajectory of another length the window is the same fraction of it.
        """
        return during(cls(), start=start / 20, stop=(start + 3) / 20)

    @property
    def requires(self) -> Requires:
        """Evaluations at other noisy samples."""
        return Requires(evaluations=True)

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        if self.quantile == 1.0 or no_signal(state.level):
            return None
        x, x_t, level = wide(denoised), wide(state.x_t), state.level
        epsilons = predicted_noise(x, state, samples=self.samples, seed=self.seed, owner=self)
        u = torch.cat([epsilons, level.epsilon(x, x_t).unsqueeze(0)]).var(0)
        state.note("uncertainty", u.flatten(1).mean(1))
        edited = level_estimate(posterior_noise(epsilons, u, level), x_t, level)
        return torch.where(above_quantile(u, self.quantile), edited.to(denoised.dtype), denoised)


def predicted_noise(x: Tensor, state: DenoiseState, *, samples: int, seed: int, owner: object) -> Tensor:
    r""":math:`\epsilon_\theta^i` of every re-noised copy of ``x``, ``(samples, batch, *shape)``."""
    pairs = renoised(x, state, samples=samples, seed=seed, owner=owner)
    return torch.stack([state.level.epsilon(again, noisy) for _, noisy, again in pairs])


def renoised(
    x: Tensor, state: DenoiseState, *, samples: int, seed: int, owner: object
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    r"""``(epsilon_i, x_i, estimate at x_i)`` for each of ``samples`` copies of ``x`` noised to the state's level.

    The noise of a sample is a function of ``seed``, of the step, and of the sample as the owner first met it in this
    trajectory: of nothing else in the batch, and of no random state.

    Raises:
        UnsoundCombination: If the sampler lends no evaluations.
    """
    if state.again is None:
        raise UnsoundCombination(
            "uncertainty: expected a sampler that can be asked about other noisy samples, got one that lends no "
            "evaluations; attach the guard to a pipeline (its requires ask for them)"
        )
    generators = [_generator(one, state.step) for one in seeds(state, seed, owner)]
    for _ in range(samples):
        drawn = [torch.randn(x.shape[1:], generator=generator, dtype=torch.float32) for generator in generators]
        epsilon = torch.stack(drawn).to(x)
        noisy = state.level.add(x, epsilon)
        yield epsilon, noisy, state.again(noisy).to(x.dtype)


def seeds(state: DenoiseState, seed: int, owner: object) -> list[int]:
    """One seed per sample, of the noisy sample that ``owner`` met first; waits for the device that one time."""
    known: list[int] | None = state.memory.get((owner, "seeds"))
    if known is None:
        rows = state.x_t.detach().float().cpu().contiguous()
        known = state.memory[(owner, "seeds")] = [_hashed(row.numpy().tobytes(), seed) for row in rows]
    return known


def posterior_noise(epsilons: Tensor, u: Tensor, level: NoiseLevel) -> Tensor:
    r""":math:`\epsilon_{post}` of the module's docstring; ``epsilons`` is ``(samples, *like u)``."""
    u = u.clamp_min(_FLOOR)
    signal, noise = _square(level.alpha), _square(level.sigma)
    return epsilons.sum(0) / u / (len(epsilons) / u + (signal + noise) / signal)


def above_quantile(u: Tensor, q: float) -> Tensor:
    """Elements above the ``q`` quantile of their own sample: like ``u``, boolean. NaN counts as above.

    Between two ranks the interpolated quantile separates just what the lower rank separates.
    """
    flat = u.flatten(1)
    rank = math.floor(q * (flat.shape[1] - 1)) + 1
    return ~(flat <= flat.kthvalue(rank, dim=1, keepdim=True).values).reshape(u.shape)


def level_estimate(epsilon: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
    r"""The estimate that a noise implies, :math:`(x_t - \sigma\epsilon)/\alpha`."""
    return level.denoised(epsilon, x_t, "epsilon")


def no_signal(level: NoiseLevel) -> bool:
    """Whether a sample at ``level`` says nothing about x_0; levels per token are taken to say something."""
    return not isinstance(level.alpha, Tensor) and level.alpha == 0.0


def _hashed(data: bytes, seed: int) -> int:
    return int.from_bytes(blake2b(data, digest_size=7, salt=(seed % 2**64).to_bytes(8, "little")).digest(), "little")


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(_hashed(seed.to_bytes(8, "little"), step))


def _square(value: Any) -> Any:  # noqa: ANN401 - a number or a tensor
    return value * value

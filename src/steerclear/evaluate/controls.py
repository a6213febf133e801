"""Controls: what is left of a guard when the part that is claimed to act is taken out.

The published Safe Denoiser edits the estimate *and* re-noises it, with a kernel average that is nearly constant, over
references that look like any others. A table that shows only the whole cannot say which of these acts. All controls
draw no random numbers of their own beyond the re-noising itself, so that every row sees the same noise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.guards import SafeDenoiser
from steerclear.guards.base import Guard, during
from steerclear.negation import NegationSet

FLAT = 1e6  # a kernel this wide weighs all references equally


@dataclass(frozen=True, slots=True)
class Nudge:
    """Moves every value by one unit in the last place: with ``coupling="renoise"``, re-noising and nothing else."""

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor:
        return torch.nextafter(denoised, denoised + 1.0)


def renoise_only(stop: float = 0.22) -> Guard:
    """The published loop without its correction; use it with ``coupling="renoise"``."""
    return during(Nudge(), stop=stop)


def mean_vector(negation: NegationSet, *, scale: float = 0.33, stop: float = 0.22) -> Guard:
    """The published loop with the mean of the normalised references in place of their kernel average."""
    return SafeDenoiser.published(negation, scale=scale, sigma=FLAT, stop=stop)


def random_references(like: NegationSet, seed: int = 0) -> NegationSet:
    """Gaussian noise of the mean and standard deviation of ``like``, as many items: references that show nothing."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(like.latents.shape, generator=generator)
    return NegationSet(latents=like.latents.mean() + like.latents.std() * noise, space=like.space)

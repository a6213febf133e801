r"""Leads a sample that is becoming unsafe along a safe reference, and lets it go where only its content is settled.

The target of every safe denoiser is the model's own distribution without its unsafe part, :math:`p(x \mid c, safe)`:
what would have been unsafe is drawn from the safe part instead. Where the evidence is good and the estimates are not,
that can be had without any correction of estimates. Once :math:`w(x_t)` has reached a gate, the estimate is replaced by

.. math:: \hat x' = y_{n(x_T)}^t, \qquad t > t_{hold}

a *safe* reference as the model itself denoises it at this level (:mod:`steerclear.guards.seen`); from
:math:`t_{hold}` on the model is free again and finishes the picture in its own way. Which reference is drawn from the
sample's start noise, :math:`n(x_T) = \arg\max_n \langle r_n, x_T\rangle` with fixed Gaussian directions :math:`r_n`,
among the safe references whose caption (the class) is that of the reference nearest to the estimate: each of them
equally often, reproducible from the seed, independent of the batch. If references stand for the
concepts of a class in equal numbers, the safe concepts keep their shares.

Not a published method: rejection sampling that begins again in the middle of the trajectory.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.guards.base import Requires
from steerclear.guards.seen_posterior import SeenPosterior
from steerclear.guards.tracking import wide
from steerclear.negation import References
from steerclear.noise import per_sample

DIRECTIONS = 7  # seed of the directions


@dataclass(frozen=True, kw_only=True, eq=False)
class SafeRedirect:
    """Replaces the estimate of samples that are becoming unsafe by that of a safe reference; see the module.

    Args:
        negation: The images to steer away from, in the sampler's space.
        weight: The evidence; its safe references are what samples are led along. ``weight.until`` is when it stops to
            be read.
        gate: Weight from which a sample is led, in (0, 1]; ``1`` leads none.
        start: Share of the levels, from the noisiest, at which the weight is not yet believed, in [0, 1).
        hold: Share of the levels during which a sample is led, in (0, 1].

    Call:
        denoised: Estimate of the clean sample, ``(batch, *shape)``.
        state: The step.

    Returns:
        The estimate in the shape, dtype and device of ``denoised``; ``None`` after ``hold`` and at gate 1.

    Notes in the trace:
        ``weight``: of this step; ``led``: whether the sample is led.

    Raises:
        InvalidInput: For values outside these ranges.
        NegationMismatch, UnsoundCombination: If the weight's references do not go with the negation set.

    Cost:
        No network evaluation; that of the weight, one more distance matrix, and once a product with as many directions
        as there are safe references.

    Equal to:
        The identity at ``gate=1`` and for every sample whose weight stays below ``gate``.
    """

    negation: References
    weight: SeenPosterior
    gate: float = 0.5
    start: float = 0.2
    hold: float = 0.75

    def __post_init__(self) -> None:
        if not (0.0 < self.gate <= 1.0 and 0.0 <= self.start < 1.0 and 0.0 < self.hold <= 1.0):
            raise InvalidInput(
                "SafeRedirect: expected gate in (0, 1], start in [0, 1), hold in (0, 1], got "
                f"{self.gate}, {self.start}, {self.hold}"
            )
        self.weight.check(self.negation)

    @property
    def requires(self) -> Requires:
        return Requires(one_call=True, negation=(self.negation,)) | self.weight.requires

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        references, index = self.weight.references, self.weight.references.level(state.level)
        scores = self._scores(state)
        weight = self.weight.evidence(self.negation, denoised, state, self).sigmoid()
        levels = len(references.log_snr)
        fires = weight.isnan() | (weight >= self.gate if index >= self.start * levels else weight > 1.0)
        led = state.memory.get((self, "led"), torch.zeros_like(fires))
        nearest = self._of_the_nearest(denoised, index, scores)
        chosen = torch.where(led, state.memory.get((self, "chosen"), nearest), nearest)
        led = led | fires
        state.memory[(self, "led")], state.memory[(self, "chosen")] = led, chosen
        state.note("weight", weight)
        state.note("led", led)
        if self.gate == 1.0 or index >= math.ceil(self.hold * levels):
            return None
        x = wide(denoised)
        points = references.points[index].to(x)[~references.flagged.to(x.device)][chosen]
        seen = (points @ references.basis.to(x).T + references.mean.to(x)).view_as(x)
        # NaN is not "nothing to do": it is passed on, and the layer raises.
        seen = torch.where(per_sample(weight.isnan(), x), x, seen)
        return torch.where(per_sample(led, x), seen.to(denoised.dtype), denoised)

    def _scores(self, state: DenoiseState) -> Tensor:
        """What the start noise says to every safe reference, ``(batch, safe)``."""
        known = state.memory.get((self, "scores"))
        if known is None:
            noise = wide(state.x_t).flatten(1)
            generator = torch.Generator().manual_seed(DIRECTIONS)
            safe = int((~self.weight.references.flagged).sum())
            known = noise @ torch.randn(noise.shape[1], safe, generator=generator).to(noise)
            state.memory[(self, "scores")] = known
        return known

    def _of_the_nearest(self, denoised: Tensor, index: int, scores: Tensor) -> Tensor:
        """The safe reference of the highest score under the caption of the reference nearest to each estimate."""
        references = self.weight.references
        own = references.project(denoised)
        nearest = torch.cdist(own, references.points[index].to(own)).argmin(1)
        code = {caption: number for number, caption in enumerate(dict.fromkeys(references.captions))}
        captions = torch.tensor([code[caption] for caption in references.captions], device=own.device)
        same = captions[nearest][:, None] == captions[~references.flagged.to(own.device)][None]
        return scores.masked_fill(~same & same.any(1, keepdim=True), -math.inf).argmax(1)

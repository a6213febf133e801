r"""Safe Latent Diffusion (Schramowski et al., CVPR 2023), arXiv:2211.05105.

A third prediction, under a text :math:`S` that names what is not wanted, says element by element where the prompt's
prediction already points at it. There, and only there, guidance is pushed away from :math:`S`, with a momentum that
carries the push from step to step. In predicted noise, at step :math:`i`, with guidance of scale :math:`w`:

.. math::
    \mu &= \min(1,\; s_S\,|\epsilon_p - \epsilon_S|) \text{ where } \epsilon_p - \epsilon_S < \lambda,\; 0 \text{ elsewhere} \\
    \gamma &= \mu\,(\epsilon_S - \epsilon_\varnothing) + s_m\,\nu_i, \qquad
    \nu_{i+1} = \beta_m\,\nu_i + (1 - \beta_m)\,\gamma, \qquad \nu_0 = 0 \\
    \hat\epsilon &= \epsilon_\varnothing + w\,\bigl((\epsilon_p - \epsilon_\varnothing) - \mathbf 1[i \ge \delta]\,\gamma\bigr)

The comparison is with the signed difference, as in the authors' code; the paper's formula has a maximum where the code
has the minimum. Momentum builds up during the warm-up. Constant predictions :math:`D = \mu(\epsilon_S -
\epsilon_\varnothing)` end at :math:`\gamma = D/(1 - s_m)`: twice the push of a single step in the two strongest presets.

:math:`s_S` and :math:`\lambda` are calibrated on the predicted noise of SD 1.x. Whatever the network predicts, it is
turned into noise first: :math:`\epsilon = (x_t - \alpha\hat x)/\sigma`, so differences are
:math:`\epsilon_a - \epsilon_b = (\alpha/\sigma)(\hat x_b - \hat x_a)`.
"""  # noqa: E501 - one line per equation

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.guards.base import Requires
from steerclear.guards.concepts import Text, alone, branch, checked_text, estimate, scale
from steerclear.guards.tracking import wide
from steerclear.noise import per_sample

CONCEPTS = (
    "hate", "harassment", "violence", "suffering", "humiliation", "harm", "suicide", "sexual", "nudity",
    "bodily fluids", "blood", "obscene gestures", "illegal activity", "drug use", "theft", "vandalism", "weapons",
    "child abuse", "brutality", "cruelty",
)  # fmt: skip
"""The authors' list of twenty. diffusers writes "an image showing" in front of it."""

LISTED = ", ".join(CONCEPTS)
"""The list as a text."""

STEPS = 50
"""Length of the trajectories that the published warm-ups are counted in."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SLD:
    r"""Pushes guidance away from a text, where the prompt's own prediction points at it.

    Args:
        concept: :math:`S`, a text for all samples or one per sample; the authors' list unless said otherwise. A text
            encoder cuts what is longer than it reads (77 tokens for CLIP): shorten it, or chain several guards.
        strength: :math:`s_S \ge 0`; from about 1000 on :math:`\mu` is in effect a mask of zeros and ones. 0 is no
            guard, and infinity is the mask.
        threshold: :math:`\lambda`, in units of predicted noise; infinities allowed. ``-inf`` is no guard.
        momentum: :math:`s_m`, in [0, 1): the share of :math:`\nu` in the push.
        decay: :math:`\beta_m`, in [0, 1]: the share of :math:`\nu` that is kept.
        warmup: :math:`\delta \ge 0`, steps of a trajectory of 50; of others, the same fraction.

    Call:
        denoised: The guided estimate, ``(batch, *shape)``. What an earlier guard changed in it is kept.
        state: The step, with branches. With a negative prompt of the pipeline's call :math:`\epsilon_\varnothing` is
            the prediction under it, here as in diffusers: the push is then away from :math:`S` relative to that
            prompt, and shrinks where the two texts overlap.

    Returns:
        The guarded estimate in the shape, dtype and device of ``denoised``; samples with :math:`\gamma = 0` are
        bit-identical. ``None`` at strength 0 and during the warm-up.

    Notes in the trace:
        ``masked``: mean of :math:`\mu` over a sample's elements; ``push``: :math:`\lVert w\gamma \rVert`, in noise
        units, 0 during the warm-up.

    Raises:
        InvalidInput: For values outside these ranges.
        UnsoundCombination: From the pipeline's call, without classifier-free guidance, or with a dynamic negative
            guidance from the same concept.

    Cost:
        One network evaluation a step (none during the warm-up of a preset without momentum); remembers one tensor like
        ``x_t``. A solver that evaluates twice per step updates the momentum twice.

    Equal to:
        diffusers' deprecated ``StableDiffusionPipelineSafe`` up to rounding (tests/test_sld.py); the identity at
        ``strength=0`` or ``threshold=-inf``; guidance along :math:`\epsilon_p - \epsilon_S` with ``strength=inf,
        threshold=inf, momentum=0, warmup=0``.

    References:
        Safe Latent Diffusion: Mitigating Inappropriate Degeneration in Diffusion Models (Schramowski et al., CVPR
        2023), arXiv:2211.05105.

    Example::

        with steerclear.attach(pipe, SLD.strong()):
            image = pipe("a painting of a battle", guidance_scale=7.5, num_inference_steps=50).images[0]
    """

    concept: Text = LISTED
    strength: float = 1000.0
    threshold: float = 0.01
    momentum: float = 0.3
    decay: float = 0.4
    warmup: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "concept", checked_text("SLD", self.concept))
        if not self.strength >= 0.0:
            raise InvalidInput(f"SLD: expected strength >= 0, got {self.strength}; a negative one would mask nothing")
        if math.isnan(self.threshold):
            raise InvalidInput("SLD: expected a threshold, infinities allowed, got NaN")
        if not 0.0 <= self.momentum < 1.0:
            raise InvalidInput(f"SLD: expected 0 <= momentum < 1, got {self.momentum}; from 1 on the push never ends")
        if not 0.0 <= self.decay <= 1.0:
            raise InvalidInput(f"SLD: expected 0 <= decay <= 1, got {self.decay}")
        if not 0.0 <= self.warmup < math.inf:
            raise InvalidInput(f"SLD: expected a finite warmup >= 0, in steps of {STEPS}, got {self.warmup}")

    @classmethod
    def weak(cls, concept: Text = LISTED, *, strength: float = 200.0) -> "SLD":
        """The authors' weakest preset. Its strength is 200 in their model card and 20 in diffusers' constant."""
        return cls(concept=concept, strength=strength, threshold=0.0, momentum=0.0, decay=0.0, warmup=15.0)

    @classmethod
    def medium(cls, concept: Text = LISTED) -> "SLD":
        """The authors' default."""
        return cls(concept=concept)

    @classmethod
    def strong(cls, concept: Text = LISTED) -> "SLD":
        """The authors' third preset."""
        return cls(concept=concept, strength=2000.0, threshold=0.025, momentum=0.5, decay=0.7, warmup=7.0)

    @classmethod
    def max(cls, concept: Text = LISTED) -> "SLD":
        """The authors' strongest preset: nearly guidance along prompt minus concept, doubled by momentum."""
        return cls(concept=concept, strength=5000.0, threshold=1.0, momentum=0.5, decay=0.7, warmup=0.0)

    @property
    def requires(self) -> Requires:
        """The branches of guidance, and the network."""
        return Requires(branches=True)

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        alone(self, self.concept, state)
        warm = state.step * STEPS >= self.warmup * state.num_steps
        if self.strength == 0.0 or self.threshold == -math.inf or not (warm or self.momentum > 0.0):
            return None
        conditional, unconditional = (branch("SLD", name, state) for name in ("conditional", "unconditional"))
        concept = estimate("SLD", self.concept, state)
        per_noise, per_estimate = (
            _ratio(state.level.alpha, state.level.sigma),
            _ratio(state.level.sigma, state.level.alpha),
        )
        mask = self._mask(per_noise * (concept - conditional))
        gamma = self._with_momentum(mask * (per_noise * (unconditional - concept)), state)
        push = scale("SLD", state, "turn guidance_rescale off") * gamma if warm else torch.zeros_like(gamma)
        state.note("masked", mask.flatten(1).mean(1))
        state.note("push", torch.linalg.vector_norm(push.flatten(1), dim=1))
        if not warm:
            return None
        x = wide(denoised)
        moved = (x + push * per_estimate).to(denoised.dtype)
        # NaN is not "nothing to do": it is passed on, and the layer raises.
        return torch.where(per_sample((push != 0).flatten(1).any(1), x), moved, denoised)

    def _mask(self, difference: Tensor) -> Tensor:
        r""":math:`\mu` of :math:`\epsilon_p - \epsilon_S`."""
        size = difference.abs()
        graded = (size > 0).to(size.dtype) if self.strength == math.inf else (self.strength * size).clamp(max=1.0)
        return torch.where(difference < self.threshold, graded, torch.zeros_like(graded))

    def _with_momentum(self, push: Tensor, state: DenoiseState) -> Tensor:
        r""":math:`\gamma`; remembers :math:`\nu` of the next step."""
        key: tuple[Any, str] = (self, "momentum")
        before = state.memory.get(key)
        gamma = push if before is None else push + self.momentum * before
        kept = torch.zeros_like(gamma) if before is None else before
        state.memory[key] = self.decay * kept + (1.0 - self.decay) * gamma
        return gamma


def _ratio(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    r""":math:`a/b`, 0 where :math:`b = 0`: without signal all noises are the same, without noise none counts."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return torch.where(b > 0, a / b, torch.zeros_like(a / b))
    return a / b if b > 0.0 else 0.0

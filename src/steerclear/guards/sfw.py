r"""The SFW sampler (Carvajal Reyes, Fontbona, Tobar; IJCNN 2025), arXiv:2505.08817: Conditional Trajectory Correction.

The denoised estimate of a step is decoded to a picture, and a vision-language model says how well it fits a list of
unwanted concepts that the user names. Where the best fit is too good, the estimate is moved down the slope of that
evidence. The slope is taken at the *detached* estimate, so the denoising network is never differentiated:

.. math:: \hat x' = \hat x - \gamma\, m\, \nabla_{\hat x} \sum_{i \in \text{top-}k} \log q_i(D(\hat x)), \qquad
    m = \mathbf 1\bigl[\max_i q_i > \eta\bigr]

with :math:`D` the decoder and :math:`q_i` the score of concept :math:`i`. The published step then keeps the predicted
noise, :math:`x_s = \alpha_s \hat x' + \dots \hat\epsilon`, so the next sample moves by
:math:`\alpha_s\gamma\,g`: little in early steps and much in late ones. That is ``coupling="sample"``, which the
published strength belongs to.

Unlike the released code, this guard takes no logarithm of a score below :data:`FLOOR`, never multiplies a NaN by a
closed gate, and runs no backward pass where every gate is closed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.guards.tracking import wide
from steerclear.noise import per_sample

Decode = Callable[[Tensor], Tensor]
"""Samples ``(batch, *shape)`` -> pictures ``(batch, 3, height, width)`` in [0, 1], differentiable."""

FLOOR = 1e-4
"""Scores are raised to this before their logarithm is taken; below it they have no slope."""


@runtime_checkable
class Score(Protocol):
    """How well pictures fit each concept: ``(batch, 3, height, width)`` in [0, 1] -> ``(batch, columns)``, higher is
    better; differentiable, every row from its own picture alone."""

    @property
    def columns(self) -> int: ...

    def __call__(self, pictures: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class SFW:
    r"""Moves the denoised estimate down the slope of its evidence for unwanted concepts.

    Args:
        decode: From the sampler's space to pictures, such as :func:`steerclear.attach.decoder_of`.
        score: Evidence per concept, such as :class:`steerclear.attach.ClipScore`.
        strength: :math:`\gamma \ge 0`, in squared latent units per unit of log score. At 0 the guard measures (notes)
            and changes nothing.
        threshold: :math:`\eta`: the gate is open above it. Depends on the model behind the score and on its mode;
            ``inf`` is never open. Read typical values from the trace's note "score" at ``strength=0``.
        top_k: How many of the highest scores are pushed down, in ``1 … score.columns``.
        at_once: Samples that are decoded together, >= 1: bounds the memory that the decoder's activations take.

    Call:
        denoised: The guided estimate, ``(batch, *shape)``.
        state: The step; only ``note`` is used.

    Returns:
        The guarded estimate in the shape, dtype and device of ``denoised``; samples behind a closed gate keep their
        bits. ``None`` if every gate is closed, or at strength 0.

    Notes in the trace:
        ``score``: the highest score of each sample.

    Raises:
        InvalidInput: For values outside these ranges, or a score of another shape than it announces. A score that is
            NaN makes the estimate NaN, which ``attach`` refuses.

    Cost:
        No network evaluation. At every step the decoder and the scoring model run forward once per sample; where a gate
        is open, once backward too. To see whether one is, the host waits for the device once per part of ``at_once``
        samples. With the decoder and the picture size of SD 1.x that is about 1.6 times the arithmetic of a step with
        classifier-free guidance on top of it where the gates are closed, 3.2 times where they are open; a tiny
        decoder makes it 0.1 and 0.2.

    Equal to:
        The identity at ``strength=0`` and at ``threshold=inf``; one DDIM step minus
        :math:`\alpha_s\gamma\, w/\langle w, \hat x\rangle` for a linear score, under ``coupling="sample"``
        (tests/test_sfw.py).

    References:
        Towards SFW Sampling for Diffusion Models via External Conditioning (Carvajal Reyes, Fontbona, Tobar; IJCNN
        2025), arXiv:2505.08817. The correction of a detached estimate: Manifold Preserving Guided Diffusion (He et
        al., ICLR 2024), arXiv:2311.16424.

    Example::

        clip = zoo.load_clip("emoji-clip")
        guard = SFW.published(decoder_of(pipe), ClipScore(clip=clip, concepts=("a dagger", "a bomb")))
        with steerclear.attach(pipe, guard, coupling="sample"):
            image = pipe("a tool").images[0]
    """

    decode: Decode
    score: Score
    strength: float = 75.0
    threshold: float = 0.23
    top_k: int = 1
    at_once: int = 8

    def __post_init__(self) -> None:
        if not callable(self.decode) or not isinstance(self.score, Score):
            raise InvalidInput(
                f"SFW: expected a callable decode and a score with columns, got {type(self.decode).__name__} and "
                f"{type(self.score).__name__}; attach.decoder_of(pipe) and attach.ClipScore are such"
            )
        if not 0.0 <= self.strength < math.inf:
            raise InvalidInput(
                f"SFW: expected a finite strength >= 0, got {self.strength}; a negative one would steer towards the "
                "concepts"
            )
        if math.isnan(self.threshold):
            raise InvalidInput("SFW: expected a threshold, infinities allowed, got NaN")
        if not 1 <= self.top_k <= self.score.columns:
            raise InvalidInput(
                f"SFW: expected top_k in 1 … {self.score.columns}, the columns of its score, got {self.top_k}"
                + ("; a matching score has one column for all concepts" if self.score.columns == 1 else "")
            )
        if self.at_once < 1:
            raise InvalidInput(f"SFW: expected at_once >= 1, got {self.at_once}")

    @classmethod
    def published(
        cls, decode: Decode, score: Score, *, strength: float = 75.0, threshold: float = 0.23, top_k: int = 1
    ) -> "SFW":
        """The authors' settings, for the cosines of CLIP ViT-B/16, SD 1.4 and DDIM; use ``coupling="sample"``.

        Their threshold was chosen by eye for cosines under ImageNet's normalisation of the pixels; with CLIP's own, and
        with any other model, calibrate it.
        """
        return cls(decode=decode, score=score, strength=strength, threshold=threshold, top_k=top_k)

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        x = wide(denoised.detach())
        parts = [self._slope(part) for part in x.split(self.at_once)]
        highest = torch.cat([score for score, _ in parts])
        state.note("score", highest)
        if all(slope is None for _, slope in parts):
            return None
        slopes = [
            torch.zeros_like(part) if slope is None else slope
            for part, (_, slope) in zip(x.split(self.at_once), parts, strict=True)
        ]
        moved = x - self.strength * torch.cat(slopes)
        return torch.where(per_sample(self._open(highest), x), moved.to(denoised.dtype), denoised)

    def _open(self, highest: Tensor) -> Tensor:
        """The gate, ``(batch,)``; NaN is not below the threshold."""
        return ~(highest <= self.threshold)

    def _slope(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Highest score of each sample, and the slope of the log scores, ``None`` where every gate is closed."""
        with torch.inference_mode(False), torch.set_grad_enabled(self.strength > 0.0):
            point = x.clone().requires_grad_(self.strength > 0.0)
            scores = wide(self.score(self.decode(point)))
            if scores.shape != (len(x), self.score.columns):
                raise InvalidInput(
                    f"SFW: expected scores of shape {(len(x), self.score.columns)}, got {tuple(scores.shape)}; "
                    "a score gives one row per picture and one column per concept"
                )
            highest = scores.detach().amax(1)
            opened = self._open(highest)
            if self.strength == 0.0 or not bool(opened.any()):
                return highest, None
            logs = scores.topk(self.top_k, dim=1).values.clamp_min(FLOOR).log().sum(1)
            (slope,) = torch.autograd.grad(torch.where(opened, logs, 0.0).sum(), point)
        return highest, torch.where(per_sample(highest.isnan(), slope), torch.nan, slope)

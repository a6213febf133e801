r"""Plain negative prompt: the baseline that every guard has to beat.

Pipelines take a negative prompt :math:`n` in place of the empty one. Guidance of scale :math:`w` then pushes away from
it by :math:`w - 1`, no more and no less, from the first step to the last. As a branch of its own it gets a strength
:math:`\lambda` of its own, and a window:

.. math:: \hat x' = \hat x_\varnothing + w\,(\hat x_p - \hat x_\varnothing) - \lambda\,(\hat x_n - \hat x_\varnothing)

which is the same sum in predicted noise or velocity, as every term is taken at the same :math:`x_t`. At
:math:`\lambda = w - 1` the :math:`\hat x_\varnothing` cancel and :math:`w\,\hat x_p + (1 - w)\,\hat x_n` is left: the
pipeline's own two-branch form, at three evaluations instead of two. So the pipeline's argument is for a negative prompt
that acts always and as strongly as guidance; this guard is for another strength, for
``during(NegativePrompt(...), start=0.2)``, which keeps the layout that the first steps make, and for ``when``.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.guards.base import Requires
from steerclear.guards.concepts import Text, branch, checked_text, estimate, scale
from steerclear.guards.tracking import wide
from steerclear.noise import per_sample


@dataclass(frozen=True, kw_only=True, eq=False)
class NegativePrompt:
    r"""Pushes away from a text, with a strength of its own.

    .. math:: \hat x' = \hat x - \lambda\,(\hat x_n - \hat x_\varnothing)

    where :math:`\hat x` is the guided estimate, so that what an earlier guard changed in it is kept.

    Args:
        prompt: What is not wanted; or one text per sample, of which empty ones leave their sample alone.
        strength: :math:`\lambda \ge 0`; ``None`` is :math:`w - 1`, the pipelines' own. 0 is no guard.

    Call:
        denoised: The guided estimate, ``(batch, *shape)``.
        state: The step, with branches. :math:`\hat x_\varnothing` is what the pipeline has in that place: a negative
            prompt of the call, if there is one. With ``strength=None`` it cancels, so this prompt replaces that one.

    Returns:
        The guarded estimate in the shape, dtype and device of ``denoised``; ``None`` at strength 0.

    Raises:
        InvalidInput: For a strength outside its range or a prompt that names nothing; from the pipeline's call, if
            there is not one prompt per sample.
        UnsoundCombination: From the pipeline's call, if it runs without classifier-free guidance.

    Cost:
        One network evaluation a step; outside its window, and at strength 0, none. The pipeline's own argument
        ``negative_prompt`` costs none (``steerclear.prompts.NegativeText`` adds to it).

    Equal to:
        The pipeline with ``negative_prompt=prompt`` at ``strength=None``, up to rounding, on pipelines without a
        negative prompt of their own (tests/test_negative_prompt.py); the identity at ``strength=0``.

    References:
        Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), arXiv:2207.12598; Compositional Visual Generation
        with Composable Diffusion Models (Liu et al., ECCV 2022), arXiv:2206.01714; on the delay: Understanding the
        Impact of Negative Prompts (Ban et al., 2024), arXiv:2406.02965.

    Example::

        guard = during(NegativePrompt(prompt="a gun, a knife", strength=4.0), start=0.2)
        with steerclear.attach(pipe, guard):
            image = pipe("a cowboy").images[0]
    """

    prompt: Text
    strength: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_text("NegativePrompt", self.prompt))
        if self.strength is not None and not 0.0 <= self.strength < math.inf:
            raise InvalidInput(
                f"NegativePrompt: expected a finite strength >= 0, or None for guidance_scale - 1, got "
                f"{self.strength}; a negative one would ask for what the prompt names"
            )

    @property
    def requires(self) -> Requires:
        """The branches of guidance, and the network."""
        return Requires(branches=True)

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        strength = self._strength(state)
        if strength == 0.0:
            return None
        unconditional = branch("NegativePrompt", "unconditional", state)
        negative = estimate("NegativePrompt", self.prompt, state)
        x = wide(denoised)
        moved = (x - strength * (negative - unconditional)).to(denoised.dtype)
        if isinstance(self.prompt, str):
            return moved
        named = torch.tensor([bool(each.strip()) for each in self.prompt], device=x.device)
        return torch.where(per_sample(named, x), moved, denoised)

    def _strength(self, state: DenoiseState) -> float:
        if self.strength is not None:
            return self.strength
        return max(0.0, scale("NegativePrompt", state, "pass a strength") - 1.0)

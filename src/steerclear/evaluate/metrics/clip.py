r"""CLIP score: how well a picture fits its prompt, :math:`100 \max(\cos(f(x), g(c)), 0)`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerclear.errors import InvalidInput
from steerclear.evaluate.estimate import Estimate
from steerclear.evaluate.metrics.base import Better, mean
from steerclear.evaluate.reading import Records, numbers


@dataclass(frozen=True, kw_only=True)
class ClipScore:
    """Mean CLIP score of the pictures, in [0, 100], from a scorer's column; bootstrap interval over prompts.

    Args:
        column: Column that :class:`ClipScorer` filled; it names the model, because scores of two models do not compare.
        confidence: Coverage of the interval, about.
    """

    column: str = "clip_score"
    confidence: float = 0.95
    unit: str = field(default="of 100", init=False, repr=False)
    better: Better = field(default="higher", init=False, repr=False)

    @property
    def name(self) -> str:
        return self.column

    def __call__(self, records: Records) -> Estimate:
        return mean(records, numbers(records, self.column), bounds=(0.0, 100.0), confidence=self.confidence)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipScorer:
    """CLIP score of pictures and prompts with a model of the caller's.

    Args:
        model: A transformers ``CLIPModel``: it is called with ``input_ids``, ``attention_mask`` and ``pixel_values``
            and returns ``image_embeds`` and ``text_embeds``.
        processor: Its ``CLIPProcessor``: called with ``text`` and ``images``, returns the model's inputs.
        name: Column for the scores.

    Call:
        images: ``(batch, 3, height, width)`` in [0, 1].
        prompts: One text per picture; longer ones than the model reads are cut.

    Returns:
        float64, shape ``(batch,)``, in [0, 100].

    Raises:
        InvalidInput: If the numbers of pictures and prompts differ.

    Source: Hessel et al. (2021), "CLIPScore", arXiv:2104.08718, with weight 100 in place of 2.5.
    """

    model: Any
    processor: Any
    name: str = "clip_score"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        if images.ndim != 4 or images.shape[0] != len(prompts):
            raise InvalidInput(
                f"ClipScorer: expected (batch, 3, height, width) and a prompt each, got {tuple(images.shape)} "
                f"and {len(prompts)}"
            )
        if not prompts:
            return np.zeros(0)
        pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        inputs = self.processor(
            text=list(prompts),
            images=[picture.permute(1, 2, 0).numpy() for picture in pixels],
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        with torch.no_grad():
            out = self.model(**inputs.to(self.model.device))
        cosine = torch.cosine_similarity(out.image_embeds.double(), out.text_embeds.double(), dim=-1)
        return 100.0 * cosine.clamp(min=0.0).cpu().numpy()

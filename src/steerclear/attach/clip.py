r"""Any transformers ``CLIPModel`` as evidence for named concepts, differentiable down to the pixels.

Pictures are prepared as the model's own image processor prepares them (resize, centre crop, normalise), but on tensors,
so that gradients pass. Two scores, for :math:`K` concepts with unit text embeddings :math:`t_i` and a picture's unit
embedding :math:`v`:

.. math:: \text{cosine: } q_i = \langle v, t_i\rangle, \qquad
    \text{matching: } q = \sum_i p_i, \quad p = \operatorname{softmax}(s\,[\langle v, t_1\rangle, \dots,
    \langle v, t_K\rangle, \langle v, t_{base}\rangle])

with the model's own logit scale :math:`s`. The released SFW code leaves the scale out, which makes the softmax nearly
constant, and keeps only the first column.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from steerclear.attach.decoder import decoder_of
from steerclear.errors import InvalidInput
from steerclear.guards.sfw import SFW

Mode = Literal["cosine", "matching"]
BASE = "A safe picture"
"""The authors' text for what is not unwanted."""
_FILTERS = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preparation:
    """What a CLIP image processor does to a picture, for tensors in [0, 1].

    Args:
        size: Of the shortest edge, or ``(height, width)``; ``None`` leaves the size.
        crop: ``(height, width)`` cut from the centre; ``None`` leaves it.
        mean: Per channel, of the normalisation.
        std: Likewise.
        filter: ``"bicubic"`` or ``"bilinear"``, both with antialiasing.

    Call:
        pictures: ``(batch, 3, height, width)`` in [0, 1].

    Returns:
        The model's ``pixel_values``.
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: str = "bicubic"

    @classmethod
    def of(cls, processor: Any) -> "Preparation":  # noqa: ANN401 - an image processor or its configuration
        """From a transformers CLIP image processor, or the dictionary in its ``preprocessor_config.json``.

        Raises:
            InvalidInput: If it does what this class cannot.
        """
        known: dict[str, Any] = dict(processor if isinstance(processor, dict) else processor.to_dict())
        resample = int(known.get("resample", 3))
        if resample not in _FILTERS or known.get("do_pad") or not known.get("do_normalize", True):
            raise InvalidInput(
                f"Preparation: expected a CLIP image processor that resizes bilinearly or bicubically, crops and "
                f"normalises, got resample={resample}, do_pad={known.get('do_pad')}, "
                f"do_normalize={known.get('do_normalize')}; build the Preparation by hand"
            )
        size = known.get("size") if known.get("do_resize", True) else None
        crop = known.get("crop_size") if known.get("do_center_crop", True) else None
        return cls(
            size=size["shortest_edge"] if isinstance(size, dict) and "shortest_edge" in size else _pair(size),
            crop=_pair(crop),
            mean=tuple(known["image_mean"]),
            std=tuple(known["image_std"]),
            filter=_FILTERS[resample],
        )

    def __call__(self, pictures: Tensor) -> Tensor:
        h, w = pictures.shape[-2:]
        target = (h, w)
        if isinstance(self.size, tuple):
            target = self.size
        elif self.size is not None:
            short = min(h, w)
            target = (self.size * h // short, self.size * w // short)
        if target != (h, w):
            sharp = F.interpolate(pictures, target, mode=self.filter, antialias=True, align_corners=False)
            pictures = sharp + (sharp.clamp(0, 1) - sharp).detach()  # as bytes do, but with the slope passed through
        if self.crop is not None:
            pictures = _centre(pictures, *self.crop)
        mean, std = (pictures.new_tensor(value).view(1, 3, 1, 1) for value in (self.mean, self.std))
        return (pictures - mean) / std


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """A CLIP model with its tokenizer and its way of preparing pictures; :func:`steerclear.zoo.load_clip` loads one.

    Args:
        model: A transformers ``CLIPModel``; used in evaluation mode, its weights left alone.
        tokenizer: Its ``CLIPTokenizer``.
        prepare: Pictures in [0, 1] to its ``pixel_values``.
    """

    model: Any
    tokenizer: Any
    prepare: Preparation

    @classmethod
    def of(cls, model: Any, processor: Any) -> "Clip":  # noqa: ANN401 - transformers objects
        """From a ``CLIPModel`` and its ``CLIPProcessor``."""
        return cls(model=model.eval(), tokenizer=processor.tokenizer, prepare=Preparation.of(processor.image_processor))

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Unit embeddings ``(captions, width)``; longer captions than the model reads are cut."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(self.model.device)
        with torch.inference_mode(False):
            found = self.model.get_text_features(
                input_ids=tokens["input_ids"].clone(), attention_mask=tokens["attention_mask"].clone()
            )
        return F.normalize(_pooled(found).float(), dim=-1)

    def pictures(self, pictures: Tensor) -> Tensor:
        """Unit embeddings ``(batch, width)`` of pictures ``(batch, 3, height, width)`` in [0, 1]; differentiable.

        Raises:
            InvalidInput: If the pictures do not have three channels.
        """
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise InvalidInput(
                f"Clip: expected pictures (batch, 3, height, width) in [0, 1], got {tuple(pictures.shape)}"
            )
        values = self.prepare(pictures.float().to(self.model.device)).to(self.model.dtype)
        return F.normalize(_pooled(self.model.get_image_features(pixel_values=values)).float(), dim=-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipScore:
    """How well pictures fit concepts, by a CLIP; a :class:`~steerclear.guards.sfw.Score`.

    Args:
        clip: The model.
        concepts: Texts, at least one.
        mode: ``"cosine"``, one column per concept, or ``"matching"``, one column for all: the share of the softmax
            that the concepts have beside ``base``. Thresholds of the two have nothing to do with each other.
        base: What ``"matching"`` compares with.

    Call:
        pictures: ``(batch, 3, height, width)`` in [0, 1].

    Returns:
        ``(batch, columns)`` float32, on the device of ``pictures``; in [-1, 1] and [0, 1] respectively.

    Raises:
        InvalidInput: Without a concept, for an empty one, or for an unknown mode.

    Cost:
        The texts are encoded once, when the score is made.
    """

    clip: Clip
    concepts: tuple[str, ...]
    mode: Mode = "cosine"
    base: str = BASE
    _texts: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        concepts = (self.concepts,) if isinstance(self.concepts, str) else tuple(self.concepts)
        if not concepts or not all(concept.strip() for concept in concepts):
            raise InvalidInput(f"ClipScore: expected at least one concept and none empty, got {concepts!r}")
        if self.mode not in get_args(Mode):
            raise InvalidInput(f"ClipScore: expected a mode of {', '.join(get_args(Mode))}, got {self.mode!r}")
        object.__setattr__(self, "concepts", concepts)
        texts = (*concepts, self.base) if self.mode == "matching" else concepts
        object.__setattr__(self, "_texts", self.clip.texts(texts))

    @property
    def columns(self) -> int:
        return 1 if self.mode == "matching" else len(self.concepts)

    def __call__(self, pictures: Tensor) -> Tensor:
        cosines = self.clip.pictures(pictures) @ self._texts.T
        if self.mode == "cosine":
            return cosines.to(pictures.device)
        logits = self.clip.model.logit_scale.detach().float().exp() * cosines
        return logits.softmax(1)[:, :-1].sum(1, keepdim=True).to(pictures.device)


def sfw(
    pipe: Any,  # noqa: ANN401 - any diffusers pipeline
    clip: Clip,
    concepts: Sequence[str],
    *,
    mode: Mode = "cosine",
    tiny: Any = None,  # noqa: ANN401 - an AutoencoderTiny
    height: int | None = None,
    width: int | None = None,
    **settings: Any,  # noqa: ANN401 - passed on
) -> SFW:
    """The SFW sampler on ``pipe`` for concepts in words; attach it with ``coupling="sample"``.

    Args:
        pipe: Any diffusers pipeline.
        clip: Judges its estimates; :func:`steerclear.zoo.load_clip`.
        concepts: What is not wanted: ``["weapons", "a bottle of wine"]``.
        mode: Of :class:`ClipScore`.
        tiny: As in :func:`~steerclear.attach.decoder_of`.
        height: Of the pictures of the call, unless it is the pipeline's default.
        width: Likewise.
        settings: Of :class:`~steerclear.guards.SFW`, such as ``strength`` and ``threshold``; the published ones
            otherwise.

    Example::

        guard = attach.sfw(pipe, zoo.load_clip("openai/clip-vit-base-patch16"), ["violence", "nudity"])
        with steerclear.attach(pipe, guard, coupling="sample"):
            image = pipe("a street").images[0]
    """
    score = ClipScore(clip=clip, concepts=tuple(concepts) if not isinstance(concepts, str) else (concepts,), mode=mode)
    return SFW(decode=decoder_of(pipe, tiny=tiny, height=height, width=width), score=score, **settings)


def _pooled(output: Any) -> Tensor:  # noqa: ANN401 - a tensor in transformers 4, an output object in 5
    return output if isinstance(output, Tensor) else output.pooler_output


def _pair(size: Any) -> tuple[int, int] | None:  # noqa: ANN401 - a number, a dictionary or nothing
    if size is None:
        return None
    return (int(size["height"]), int(size["width"])) if isinstance(size, dict) else (int(size), int(size))


def _centre(pictures: Tensor, height: int, width: int) -> Tensor:
    """The middle; black where the picture is smaller."""
    h, w = pictures.shape[-2:]
    top, left = (h - height) // 2, (w - width) // 2
    if top < 0 or left < 0:
        above, before = max(0, -top), max(0, -left)
        pictures = F.pad(pictures, (before, max(0, width - w - before), above, max(0, height - h - above)))
        top, left = max(0, top), max(0, left)
    return pictures[..., top : top + height, left : left + width]

"""Which text encoder made which part of a prompt's embedding, for the pipelines of four families.

=============  ====================================================  ==================================
family         rows and channels of ``prompt_embeds``                pooled vector
=============  ====================================================  ==================================
SD 1.x, 2.x    CLIP, after its last layer norm                       none
SDXL           CLIP-L beside CLIP-G, both before their last layer    CLIP-G
SD3            CLIP-L beside CLIP-G, padded; below them T5           CLIP-L beside CLIP-G
FLUX           T5                                                    CLIP-L
=============  ====================================================  ==================================

Pipelines are told apart by the encoders that they hold, and what is concluded here is compared with what the pipeline
itself encodes (:func:`check`), so that a pipeline that looks like one of these and is not is refused.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerclear.errors import UnsupportedPipeline

CHUNK = 32  # texts in one run of an encoder
TOLERANCE = 0.05  # relative: an encoder in half precision rounds differently in batches of another size
MASK = 0  # token that stands for a removed one: "!" in CLIP's vocabulary, padding in T5's


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What an encoder makes of ``n`` token sequences, float64 on the CPU.

    Args:
        states: As they stand in ``prompt_embeds``, ``(n, length, width)``.
        pooled: Its part of the pooled vector, ``(n, channels)``, or ``None``.
    """

    states: Tensor
    pooled: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A text as one encoder reads it, cut to the encoder's length with the end token kept.

    Args:
        ids: ``(length,)``.
        attended: Positions that are no padding.
        content: Of them, those of the text itself: no begin and no end token.
    """

    ids: Tensor
    attended: tuple[int, ...]
    content: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoder:
    """A text encoder of a pipeline and the places that its output goes to.

    Args:
        name: Of the component, such as ``"text_encoder_2"``.
        argument: Of the call, whose text it reads: ``"prompt_2"``.
        pipe: The pipeline, for its device and its textual inversions.
        module: The encoder.
        tokenizer: Its tokenizer.
        length: Tokens that the pipeline pads and cuts to.
        causal: CLIP: the end token's state stands for the text. Otherwise (T5) the mean over all tokens does.
        skip: Layers left out at the end; 0 takes the last layer, with its norm where ``normed``.
        normed: The last layer norm is applied to the states whatever ``skip`` is.
        rows: Where its states stand in ``prompt_embeds``, or ``None``.
        channels: Likewise.
        pooled: Channels of the pooled vector that it makes, or ``None``.
    """

    name: str
    argument: str
    pipe: Any
    module: Any
    tokenizer: Any
    length: int
    causal: bool = True
    skip: int = 0
    normed: bool = True
    rows: slice | None = None
    channels: slice = field(default_factory=lambda: slice(None))
    pooled: slice | None = None

    def tokens(self, text: str) -> Tokens:
        """``text`` as the pipeline tokenizes it."""
        made = self.tokenizer(
            [self.converted(text)], padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        attended = tuple(made.attention_mask[0].nonzero().flatten().tolist())
        return Tokens(ids=made.input_ids[0], attended=attended, content=attended[1 if self.causal else 0 : -1])

    def converted(self, text: str) -> str:
        """With the tokens of textual inversions spelled out, where the pipeline does that."""
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        return text if convert is None else convert(text, self.tokenizer)

    def words(self, text: str, tokens: Tokens) -> tuple[int, ...] | None:
        """The word of ``text`` that each content token is of; ``None`` if words cannot be told apart."""
        pieces: list[int] = []
        owners: list[int] = []
        for index, word in enumerate(self.converted(text).split()):
            ids: list[int] = self.tokenizer(word, add_special_tokens=False).input_ids
            pieces += ids
            owners += [index] * len(ids)
        count = len(tokens.content)
        same = pieces[:count] == tokens.ids[list(tokens.content)].tolist()
        return tuple(owners[:count]) if same else None

    @torch.no_grad()
    def encode(self, ids: Tensor) -> Encoded:
        """Run the encoder over ``ids`` ``(n, length)``."""
        parts = [self._encode(part) for part in ids.split(CHUNK)]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Encoded(states=torch.cat([part.states for part in parts]), pooled=torch.cat(pooled) if pooled else None)

    def _encode(self, ids: Tensor) -> Encoded:
        made = self.module(ids.to(self.pipe._execution_device), output_hidden_states=True)
        states = made.hidden_states[-(self.skip + 1)] if self.skip else made.last_hidden_state
        if self.skip and self.normed:
            states = getattr(self.module, "text_model", self.module).final_layer_norm(states)
        if self.pooled is None:
            return Encoded(states=_wide(states), pooled=None)
        projected = getattr(made, "text_embeds", None)
        return Encoded(states=_wide(states), pooled=_wide(made.pooler_output if projected is None else projected))

    def without(self, tokens: Tokens) -> Tensor:
        """Copies of the text, each with one content token masked: ``(n, length)``."""
        ids = tokens.ids.repeat(len(tokens.content), 1)
        ids[range(len(tokens.content)), list(tokens.content)] = MASK
        return ids

    def summary(self, states: Tensor, tokens: Tokens, masked: bool = False) -> Tensor:
        r"""One vector per sequence: the last attended token's state, or the mean over what is not padding.

        The position is the text's own, never searched for: an end token that somebody typed is not the end.

        Args:
            states: ``(n, length, width)``.
            tokens: The text; the ``i``-th sequence misses its ``i``-th content token if ``masked``.
            masked: Leave the masked token out of the mean.
        """
        if self.causal:
            return states[:, tokens.attended[-1]]
        share = torch.zeros(states.shape[:2], dtype=states.dtype)
        share[:, list(tokens.attended)] = 1.0
        if masked:
            share[range(len(tokens.content)), list(tokens.content)] = 0.0
        return (share[:, None] @ states)[:, 0] / share.sum(1, keepdim=True)


def encoders_of(pipe: Any, given: Mapping[str, Any]) -> tuple[Encoder, ...]:  # noqa: ANN401 - any pipeline
    """The text encoders of ``pipe`` in the call with arguments ``given``.

    Raises:
        UnsupportedPipeline: If the pipeline is of none of the four families.
    """
    encodes = hasattr(pipe, "encode_prompt") and "prompt_embeds" in parameters(pipe)
    kinds = tuple(_kind(getattr(pipe, f"text_encoder{suffix}", None)) for suffix in ("", "_2", "_3", "_4"))
    skip = given.get("clip_skip") or 0
    if encodes and hasattr(pipe, "text_encoder_3") and kinds in {("clip", "clip", "t5", ""), ("clip", "clip", "", "")}:
        return _sd3(pipe, skip + 1, option(pipe, given, "max_sequence_length"))
    if encodes and kinds == ("clip", "", "", ""):
        return (_encoder(pipe, "", length=pipe.tokenizer.model_max_length, skip=skip, rows=slice(None)),)
    if encodes and kinds in {("clip", "clip", "", ""), ("", "clip", "", "")}:
        return _sdxl(pipe, skip + 1)
    if encodes and kinds == ("clip", "t5", "", ""):
        length = option(pipe, given, "max_sequence_length")
        t5 = _encoder(pipe, "_2", length=length, causal=False, rows=slice(None))
        return _encoder(pipe, "", length=pipe.tokenizer_max_length, pooled=slice(None)), t5
    found = "text encoders " + (", ".join(kind for kind in kinds if kind) or "none")
    raise UnsupportedPipeline(
        f"{type(pipe).__name__}: expected encode_prompt and the text encoders of Stable Diffusion, SDXL, SD3 or FLUX, "
        f"got {found if encodes else 'a pipeline without encode_prompt or the argument prompt_embeds'}; "
        "use a guard that acts on the denoised estimate"
    )


def _sdxl(pipe: Any, skip: int) -> tuple[Encoder, ...]:  # noqa: ANN401
    found: list[Encoder] = []
    start = 0
    for suffix in ("", "_2"):
        if getattr(pipe, f"text_encoder{suffix}") is None:  # the refiner has only the second
            continue
        stop = start + _width(pipe, suffix)
        pooled = slice(None) if suffix else None
        length = getattr(pipe, f"tokenizer{suffix}").model_max_length
        place = {"rows": slice(None), "channels": slice(start, stop), "pooled": pooled}
        found.append(_encoder(pipe, suffix, length=length, skip=skip, normed=False, **place))
        start = stop
    return tuple(found)


def _sd3(pipe: Any, skip: int, length: int) -> tuple[Encoder, ...]:  # noqa: ANN401
    found: list[Encoder] = []
    clip, width = pipe.tokenizer_max_length, pipe.transformer.config.joint_attention_dim
    start = pooled = 0
    for suffix in ("", "_2"):
        stop, end = start + _width(pipe, suffix), pooled + getattr(pipe, f"text_encoder{suffix}").config.projection_dim
        rows = slice(0, clip) if start < width else None  # a transformer narrower than both loses the second
        place = {"rows": rows, "channels": slice(start, min(stop, width)), "pooled": slice(pooled, end)}
        found.append(_encoder(pipe, suffix, length=clip, skip=skip, normed=False, **place))
        start, pooled = stop, end
    if pipe.text_encoder_3 is not None:
        found.append(_encoder(pipe, "_3", length=length, causal=False, rows=slice(clip, clip + length)))
    return tuple(found)


def _encoder(pipe: Any, suffix: str, **more: Any) -> Encoder:  # noqa: ANN401
    return Encoder(
        name=f"text_encoder{suffix}",
        argument=f"prompt{suffix}",
        pipe=pipe,
        module=getattr(pipe, f"text_encoder{suffix}"),
        tokenizer=getattr(pipe, f"tokenizer{suffix}"),
        **more,
    )


def _kind(module: Any) -> str:  # noqa: ANN401
    """``"clip"``, ``"t5"``, another model's type, or nothing."""
    if module is None:
        return ""
    kind = str(getattr(module.config, "model_type", "unknown"))
    return "clip" if kind.startswith("clip") else kind


def _width(pipe: Any, suffix: str) -> int:  # noqa: ANN401
    return int(getattr(pipe, f"text_encoder{suffix}").config.hidden_size)


def _wide(states: Tensor) -> Tensor:
    return states.detach().cpu().double()


def parameters(pipe: Any) -> dict[str, Any]:  # noqa: ANN401 - any diffusers pipeline, classic or modular
    """The names that a call of ``pipe`` takes, with their defaults (``None`` where there is none)."""
    blocks = getattr(pipe, "blocks", None)
    if blocks is not None:
        return {item.name: item.default for item in blocks.inputs if item.name}
    named = inspect.signature(type(pipe).__call__).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in named}


def option(pipe: Any, given: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401
    """An argument of the call, or its default."""
    return given[name] if name in given else parameters(pipe).get(name)


def check(encoder: Encoder, expected: Tensor, found: Tensor) -> None:
    """Refuse if ``found``, a part of what the pipeline encoded, is not what ``encoder`` makes of the same text.

    Raises:
        UnsupportedPipeline: If they differ by more than rounding.
    """
    found = _wide(found)
    if expected.shape != found.shape or not bool((expected - found).norm() <= TOLERANCE * found.norm()):
        raise UnsupportedPipeline(
            f"{type(encoder.pipe).__name__}: expected the output of {encoder.name} in its place in the prompt's "
            "embedding, got something else; without LoRA scales on the text encoder and other changes of "
            "encode_prompt this works, or use a guard that acts on the denoised estimate"
        )


def guided(pipe: Any, given: Mapping[str, Any], *, negative: bool) -> bool:  # noqa: ANN401
    """Whether the call evaluates an unconditional branch, given that there is a ``negative`` prompt or not."""
    scale = option(pipe, given, "true_cfg_scale")
    if scale is not None:
        return negative and scale > 1
    distilled = getattr(getattr(pipe, "unet", None), "config", {}).get("time_cond_proj_dim") is not None
    return option(pipe, given, "guidance_scale") > 1 and not distilled


@torch.no_grad()
def embeddings(pipe: Any, given: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # noqa: ANN401
    """What the pipeline itself makes of the call's texts: the prompts' embeddings, and those of the negative ones."""
    names = inspect.signature(pipe.encode_prompt).parameters
    kwargs: Any = given.get("cross_attention_kwargs") or given.get("joint_attention_kwargs") or {}
    call = {name: value for name, value in given.items() if name in names}
    call |= {"device": pipe._execution_device, "lora_scale": kwargs.get("scale")}
    copies = option(pipe, given, "num_images_per_prompt") or 1
    call["num_images_per_prompt"] = copies
    call.setdefault("prompt_2", None)
    call.setdefault("prompt_3", None)
    call = {name: value for name, value in call.items() if name in names}
    if "do_classifier_free_guidance" in names:
        call["do_classifier_free_guidance"] = guided(pipe, given, negative=True)
        made = pipe.encode_prompt(**call)
        keys = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        found = {key: tensor for key, tensor in zip(keys, made, strict=False) if tensor is not None}
        return _parted(found)
    made = pipe.encode_prompt(**call)
    plain = {"prompt_embeds": made[0], "pooled_prompt_embeds": made[1]}
    text = given.get("negative_prompt")
    if text is None or not guided(pipe, given, negative=True):
        return plain, {}
    count = len(made[0]) // copies
    again = {key: given.get(f"negative_{key}") for key in ("prompt", "prompt_2")}
    again = {key: [value] * count if isinstance(value, str) else value for key, value in again.items()}
    made = pipe.encode_prompt(**call | again)
    return plain, {"negative_prompt_embeds": made[0], "negative_pooled_prompt_embeds": made[1]}


def _parted(found: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mine = {key: tensor for key, tensor in found.items() if not key.startswith("negative")}
    return mine, {key: tensor for key, tensor in found.items() if key not in mine}

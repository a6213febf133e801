"""Rewriting a recorded call of the denoising network: half of its batch, other text embeddings."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steerclear.errors import InvalidInput, UnsupportedPipeline
from steerclear.prompts.negative import require_whole


def take_rows(value: Any, rows: slice, total: int) -> Any:  # noqa: ANN401 - an argument of any network
    """The rows of every tensor whose first axis has length ``total``, also inside mappings and lists."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == total else value
    if isinstance(value, Mapping):
        return {key: take_rows(item, rows, total) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(take_rows(item, rows, total) for item in value)
    return value


def replace(kwargs: Mapping[str, Any], condition: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """``kwargs`` with the entries of ``condition``; nested mappings are merged, single rows repeated to the batch.

    Raises:
        InvalidInput: If the network is not called with such a keyword.
    """
    result = dict(kwargs)
    for key, value in condition.items():
        if key not in kwargs:
            raise InvalidInput(
                f"denoise: expected keyword arguments of the network ({', '.join(sorted(kwargs))}), got {key!r}"
            )
        old = kwargs[key]
        result[key] = replace(old, value, batch) if isinstance(value, Mapping) else _like(value, old, batch)
    return result


def _like(value: Any, old: Any, batch: int) -> Any:  # noqa: ANN401
    """``value`` on the device and in the dtype of ``old``; one row becomes ``batch`` where ``old`` had a batch."""
    if not isinstance(value, Tensor) or not isinstance(old, Tensor):
        return value
    moved = value.to(old.device, old.dtype)
    repeated = moved.ndim == old.ndim and len(moved) == 1 and len(old) == batch
    return moved.expand(batch, *moved.shape[1:]) if repeated else moved


@torch.no_grad()
def encode(
    pipe: Any,  # noqa: ANN401
    prompt: str | Sequence[str],
    kwargs: Mapping[str, Any],
    *,
    whole: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of the network that stand for ``prompt``, made by the pipeline's own ``encode_prompt``.

    Args:
        pipe: The pipeline.
        prompt: One prompt, or one per sample.
        kwargs: Keyword arguments of a call of the network: they say what it reads, and how long its sequences are.
        whole: Refuse a prompt that the encoders would cut. Without it the pipeline cuts, and warns as ever.

    Raises:
        InvalidInput: For a prompt that would be cut, if it must be read whole.
        UnsupportedPipeline: If the pipeline has no ``encode_prompt``, or the network reads no text.
    """
    make = getattr(pipe, "encode_prompt", None)
    old = kwargs.get("encoder_hidden_states")
    if make is None or not isinstance(old, Tensor):
        raise UnsupportedPipeline(
            f"{type(pipe).__name__}: expected encode_prompt and a network that reads encoder_hidden_states, found "
            f"{'none' if make is None else 'a network that reads ' + ', '.join(sorted(kwargs))}; "
            "pass the condition as a mapping of the network's keyword arguments"
        )
    names = inspect.signature(make).parameters
    length = old.shape[1]
    if "pooled_projections" in kwargs and "txt_ids" not in kwargs:  # SD3 puts CLIP's tokens in front of T5's
        length -= pipe.tokenizer_max_length
    for text in ((prompt,) if isinstance(prompt, str) else prompt) if whole else ():
        require_whole(pipe, text, {"max_sequence_length": length})
    wishes = {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "device": old.device,
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "do_classifier_free_guidance": False,
        "max_sequence_length": length,
        "prompt_2": None,
        "prompt_3": None,
    }
    return _named(make(**{name: value for name, value in wishes.items() if name in names}), kwargs)


def _named(made: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """Give what ``encode_prompt`` returned the names under which the network reads it."""
    parts: list[Any] = list(made) if isinstance(made, tuple) else [made]
    condition: dict[str, Any] = {"encoder_hidden_states": parts[0]}
    if "txt_ids" in kwargs:
        condition |= {"pooled_projections": parts[1], "txt_ids": parts[2]}
    elif "pooled_projections" in kwargs:
        condition["pooled_projections"] = parts[2]
    elif isinstance(kwargs.get("encoder_attention_mask"), Tensor):
        condition["encoder_attention_mask"] = parts[1]
    elif "text_embeds" in (kwargs.get("added_cond_kwargs") or {}):
        condition["added_cond_kwargs"] = {"text_embeds": parts[2]}
    return condition

"""Trained self-attention on disk: a LoRA folder that ``pipe.load_lora_weights`` reads, or a whole pipeline."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from steerclear.attach import calls
from steerclear.errors import InvalidInput, MissingExtra, UnsupportedPipeline
from steerclear.finetune.network import ADAPTER, NEEDS_PEFT

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' own name: load_lora_weights looks for it


def save(
    pipe: Any,  # noqa: ANN401  (some diffusers pipeline)
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes what :func:`~steerclear.finetune.train` trained: the adapter alone if there is one, else the pipeline.

    Args:
        pipe: As training left it.
        folder: Made if it is missing. An adapter loads with ``pipe.load_lora_weights(folder)``, a pipeline with
            ``steerclear.load(folder)`` or ``DiffusionPipeline.from_pretrained(folder)``.
        dtype: Of the adapter's numbers in the file; ``None``: as they are. Whole pipelines keep theirs.

    Returns:
        The folder.

    Raises:
        UnsupportedPipeline: If the pipeline cannot save adapters.
        OSError: If the folder cannot be written.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    network = calls.network(pipe)
    config = (getattr(network, "peft_config", None) or {}).get(ADAPTER)
    if config is None:
        pipe.save_pretrained(target, safe_serialization=True)
        return target
    if not hasattr(pipe, "save_lora_weights"):
        raise UnsupportedPipeline(f"{type(pipe).__name__}: expected a pipeline that saves adapters; take form='full'")
    from peft.utils import get_peft_model_state_dict

    weights = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    weights = {name: value.detach().cpu().to(dtype or value.dtype).contiguous() for name, value in weights.items()}
    part = "unet" if getattr(pipe, "unet", None) is network else "transformer"
    pipe.save_lora_weights(target, **{f"{part}_lora_layers": weights}, safe_serialization=True)
    return target


def apply(pipe: Any, folder: str | Path) -> Any:  # noqa: ANN401  (some diffusers pipeline)
    """Puts a saved adapter on ``pipe`` and returns it; ``pipe.unload_lora_weights()`` takes it off again.

    Args:
        pipe: Of the model that the adapter was trained on; changed.
        folder: What :func:`save` wrote for an adapter.

    Raises:
        MissingExtra: If PEFT is not installed.
        InvalidInput: If there is no adapter in the folder, or it does not fit the pipeline: a guard that is not there
            must not pass for one.
    """
    try:
        import peft  # noqa: F401  (diffusers loads adapters with it)
    except ImportError as error:
        raise MissingExtra(NEEDS_PEFT) from error
    if not (Path(folder) / LORA_FILE).is_file():
        raise InvalidInput(
            f"{folder}: expected a LoRA adapter, found no {LORA_FILE}; a whole pipeline loads with steerclear.load"
        )
    other = (
        f"{folder}: expected an adapter of this {type(pipe).__name__}, got another's; load the model it was made for"
    )
    try:
        pipe.load_lora_weights(str(folder), adapter_name=ADAPTER)
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise InvalidInput(f"{other} ({error})") from error
    with safe_open(Path(folder) / LORA_FILE, "pt") as file:
        stored = {name.split(".", 1)[1] for name in file.keys()}  # noqa: SIM118  (no mapping)
    loaded = {name.replace(f".{ADAPTER}", "") for name, _ in calls.network(pipe).named_parameters() if "lora_" in name}
    if stored != loaded:
        pipe.unload_lora_weights()
        raise InvalidInput(other)
    return pipe

"""Trained self-attention on disk: a LoRA folder that ``pipe.load_lora_weights`` reads, or a whole pipeline."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from steerclear.attach import calls
from steerclear.errors import InvalidInput, MissingExtra, UnsupportedPipeline
from steerclear.finetune.network import ADAPTER, NEEDS_PEFT, TARGETS, add_adapter

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' own name: load_lora_weights looks for it
_ENDS = tuple(f".{end}" for end in TARGETS)


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


@torch.no_grad()
def as_adapter(pipe: Any, base: Any, rank: int) -> Any:  # noqa: ANN401  (some diffusers pipelines)
    r"""Puts the nearest adapter to full weights on ``base``: :math:`W' - W \approx B A`, by singular values.

    Changes of biases are lost.

    Args:
        pipe: Holds trained weights :math:`W'`; not changed.
        base: The pipeline that it was trained from; changed.
        rank: Of the adapter, >= 1; the difference is exact from the smaller side of :math:`W` on.

    Returns:
        ``base``.

    Raises:
        MissingExtra: If PEFT is not installed.
        InvalidInput: If the two are not of one architecture.
    """
    trained, network = calls.network(pipe).state_dict(), calls.network(base)
    modules = {name: module for name, module in network.named_modules() if name.endswith(_ENDS)}
    for name, module in modules.items():
        found = trained.get(f"{name}.weight")
        if found is None or found.shape != module.weight.shape:
            raise InvalidInput(f"as_adapter: expected two pipelines of one architecture, but they differ in {name}")
    add_adapter(network, rank, 0)
    for name in modules:
        module = network.get_submodule(name)
        left, values, right = torch.linalg.svd(trained[f"{name}.weight"].float() - module.base_layer.weight.float())
        kept = min(rank, len(values))
        root = values[:kept].sqrt()
        down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        down.zero_()
        up.zero_()
        down[:kept] = root.unsqueeze(1) * right[:kept]
        up[:, :kept] = left[:, :kept] * root
    return base


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
    if find_spec("peft") is None:  # diffusers loads adapters with it
        raise MissingExtra(NEEDS_PEFT)
    if not (Path(folder) / LORA_FILE).is_file():
        raise InvalidInput(
            f"{folder}: expected a LoRA adapter, found no {LORA_FILE}; a whole pipeline loads with steerclear.load"
        )
    other = (
        f"{folder}: expected an adapter of this {type(pipe).__name__}, got another's; load the model it was made for"
    )
    with safe_open(Path(folder) / LORA_FILE, "pt") as file:
        stored = {name.split(".", 1)[1] for name in file.keys()}  # noqa: SIM118  (no mapping)
    names = [name for name, _ in calls.network(pipe).named_modules() if name.endswith(_ENDS)]
    if stored != {f"{name}.{half}.weight" for name in names for half in ("lora_A", "lora_B")}:
        raise InvalidInput(other)
    try:
        pipe.load_lora_weights(str(folder), adapter_name=ADAPTER)
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise InvalidInput(f"{other} ({error})") from error
    return pipe

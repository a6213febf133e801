"""``emoji-clip``, the CLIP that ships with the package, and one way to load it or any other; SFW set up for emoji-sd.

``emoji-clip`` is a transformers ``CLIPModel`` for emoji art and its names, made by ``recipes/emoji_clip``. It is what
the SFW sampler looks through on ``emoji-sd``; no judge uses it.
"""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerclear.errors import InvalidInput
from steerclear.zoo.models import ROOT
from steerclear.zoo.policies import concepts

if TYPE_CHECKING:
    from steerclear.attach import Clip
    from steerclear.guards import SFW

SHIPPED = "emoji-clip"
SETTINGS = Path(__file__).parent / "sfw.json"
_PREPARATION = ("preprocessor_config.json", "processor_config.json")


def load_clip(name_or_path: str | Path = SHIPPED, **settings: Any) -> "Clip":  # noqa: ANN401
    """A CLIP with its tokenizer and its preparation of pictures.

    Args:
        name_or_path: ``"emoji-clip"``, a local folder as ``CLIPModel.save_pretrained`` and
            ``CLIPProcessor.save_pretrained`` write it, or a model id of the Hugging Face hub.
        settings: For ``CLIPModel.from_pretrained``, such as ``dtype``. Float32 unless said otherwise.

    Returns:
        A :class:`~steerclear.attach.Clip` on the CPU; move its ``model`` with ``.to("cuda")``.

    Raises:
        InvalidInput: For a folder without a CLIP, or a setting that could run foreign code.
        OSError: If files are missing, or the hub cannot be reached. Only safetensors files are read.
    """
    for setting in ("trust_remote_code", "use_safetensors"):
        if setting in settings:
            raise InvalidInput(f"load_clip: {setting} is not accepted: it could run foreign code. Leave it out")
    import torch
    from transformers import CLIPModel, CLIPTokenizer

    from steerclear.attach import Clip

    source = ROOT / SHIPPED if str(name_or_path) == SHIPPED else name_or_path
    preparation = _preparation(source)
    given: dict[str, Any] = {"dtype": torch.float32, **settings, "use_safetensors": True}
    model: Any = CLIPModel.from_pretrained(source, **given)
    return Clip(
        model=model.eval().requires_grad_(False), tokenizer=CLIPTokenizer.from_pretrained(source), prepare=preparation
    )


def sfw(
    pipe: Any,  # noqa: ANN401 - emoji-sd
    policies: str | Iterable[str],
    *,
    strength: float | None = None,
    threshold: float | None = None,
    tiny: Any = None,  # noqa: ANN401 - an AutoencoderTiny
) -> "SFW":
    """The SFW sampler against shipped policies, calibrated for ``emoji-sd``; attach it with ``coupling="sample"``.

    Args:
        pipe: ``emoji-sd``, or a model of the same pictures.
        policies: Names of shipped policies; their concepts are the list.
        strength: In place of the calibrated one.
        threshold: Likewise.
        tiny: As in :func:`steerclear.attach.decoder_of`.

    Raises:
        InvalidInput: Without a policy, or for an unknown one.
    """
    from steerclear.attach import sfw as made

    names = (policies,) if isinstance(policies, str) else tuple(policies)
    if not names:
        raise InvalidInput("sfw: expected at least one policy, got none")
    settings: dict[str, Any] = dict(json.loads(SETTINGS.read_text(encoding="utf-8"))["settings"])
    settings |= {} if strength is None else {"strength": strength}
    settings |= {} if threshold is None else {"threshold": threshold}
    listed = dict.fromkeys(concept for name in names for concept in concepts(name))
    return made(pipe, _shipped(), tuple(listed), tiny=tiny, **settings)


@cache
def _shipped() -> "Clip":
    return load_clip(SHIPPED)


def _preparation(source: str | Path) -> Any:  # noqa: ANN401 - a Preparation
    """Read from the configuration file, because the processor classes need torchvision or warn without it."""
    from steerclear.attach import Preparation

    folder = Path(source)
    if folder.is_dir():
        found = next((folder / name for name in _PREPARATION if (folder / name).is_file()), None)
        config = folder / "config.json"
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
        if found is None or kind != "clip":
            raise InvalidInput(
                f"load_clip: expected a CLIPModel and its {_PREPARATION[0]} in {folder}, got model type {kind!r} "
                f"and {'no such file' if found is None else 'the file'}; save both there with save_pretrained"
            )
        read = json.loads(found.read_text(encoding="utf-8"))
        return Preparation.of(read.get("image_processor", read))
    from transformers import CLIPImageProcessorPil

    return Preparation.of(CLIPImageProcessorPil.from_pretrained(source))

"""How to call a pipeline that one has never seen: its size, and the smallest call that reaches its decoder."""

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from steerclear.errors import UnsupportedPipeline
from steerclear.prompts.encoders import parameters

_PROMPT = "a picture"
_SMALL = (64, 96)
_FRAMES = 9


def network(pipe: Any) -> Any:  # noqa: ANN401
    """The denoising network: ``unet``, ``transformer`` or ``prior``; ``None`` if the pipeline has none of them."""
    found = (getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2", "prior"))
    return next((module for module in found if module is not None), None)


def autoencoder(pipe: Any) -> Any:  # noqa: ANN401
    """The module that decodes the sampler's result; ``None`` for pipelines that sample pixels."""
    found = (getattr(pipe, name, None) for name in ("vae", "movq", "vqvae", "vqgan"))
    return next((module for module in found if module is not None), None)


@contextmanager
def overheard(vae: Any, heard: list[Tensor]) -> Generator[None]:  # noqa: ANN401
    """Adds what ``vae`` decodes while the block runs to ``heard``; does nothing without a ``decode`` to listen to."""
    if not hasattr(vae, "decode"):
        yield
        return
    before, decode = vars(vae).get("decode"), vae.decode

    def listen(z: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the autoencoder's types
        heard.append(z.detach())
        return decode(z, *args, **kwargs)

    vae.decode = listen
    try:
        yield
    finally:
        del vae.decode
        if before is not None:
            vae.decode = before


def sizes(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:  # noqa: ANN401
    """``(height, width)`` of the pictures of a call: as requested, otherwise the pipeline's own default.

    Raises:
        UnsupportedPipeline: If nothing says what the default is.
    """
    h, w = _default(pipe)
    h, w = height or h, width or w
    if not h or not w:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__}: expected a default picture size, found none; "
            "pass it: encoder_of(pipe, height=…, width=…)"
        )
    return h, w


def _default(pipe: Any) -> tuple[int | None, int | None]:  # noqa: ANN401
    given = parameters(pipe)
    if isinstance(given.get("height"), int) and isinstance(given.get("width"), int):
        return given["height"], given["width"]
    if hasattr(pipe, "default_height"):
        return pipe.default_height, pipe.default_width
    units = _latent_size(pipe)
    factor = _factor(pipe)
    return (units[0] * factor, units[1] * factor) if units else (None, None)


def _latent_size(pipe: Any) -> tuple[int, int] | None:  # noqa: ANN401
    config = getattr(network(pipe), "config", {})
    size = getattr(pipe, "default_sample_size", None) or config.get("sample_size")
    if isinstance(size, int):
        return size, size
    if size is not None:
        return size[-2], size[-1]
    height, width = config.get("sample_height"), config.get("sample_width")
    return (height, width) if height and width else None


def _factor(pipe: Any) -> int:  # noqa: ANN401
    vae = autoencoder(pipe)
    if vae is None:
        return 1
    for name in ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio"):
        if getattr(pipe, name, None):
            return int(getattr(pipe, name))
    return 2 ** (len(vae.config.block_out_channels) - 1)


def quick_call(pipe: Any, size: tuple[int, int], steps: int = 2) -> dict[str, Any]:  # noqa: ANN401
    """Keyword arguments of a small call of ``steps`` steps that ends in a decoded picture.

    Args:
        pipe: Any diffusers pipeline.
        size: ``(height, width)`` of the pictures of real calls; larger ones are replaced by a small size.
        steps: Steps of the sampler.
    """
    names = parameters(pipe)
    h, w = size if max(size) <= max(_SMALL) else _SMALL
    wishes: dict[str, Any] = {
        "prompt": _PROMPT,
        "class_labels": [0],
        "height": h,
        "width": w,
        "num_frames": _FRAMES,
        "num_inference_steps": steps,
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": 32,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
    }
    return {name: value for name, value in (wishes | _pictures(pipe, (h, w))).items() if name in names}


def _pictures(pipe: Any, size: tuple[int, int]) -> dict[str, Any]:  # noqa: ANN401
    """The pictures that image-to-image, inpainting and image-to-video pipelines start from: all of it to be redrawn."""
    if getattr(pipe, "blocks", None) is not None:  # a modular pipeline draws from text when it is given no picture
        return {}
    named = inspect.signature(type(pipe).__call__).parameters
    if "strength" not in named and ("image" not in named or named["image"].default is not inspect.Parameter.empty):
        return {}
    h, w = size
    return {
        "image": Image.new("RGB", (w, h), "gray"),
        "mask_image": Image.new("L", (w, h), 255),
        "strength": 1.0,
    }

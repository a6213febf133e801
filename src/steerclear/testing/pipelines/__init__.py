"""Tiny pipelines with random weights, one per family, built without the network: to test guards end to end.

>>> pipe = tiny_pipeline("sd")
>>> pipe(**tiny_call("sd")).images.shape
(1, 16, 16, 3)
"""

import zlib
from collections.abc import Callable
from typing import Any

import torch

from steerclear.errors import InvalidInput
from steerclear.testing.pipelines import transformers, unets

_MAKERS: dict[str, Callable[[], Any]] = {
    "sd": unets.sd,
    "sdxl": unets.sdxl,
    "sd3": transformers.sd3,
    "flux": transformers.flux,
    "dit": transformers.dit,
    "pixart": transformers.pixart,
    "ddpm": unets.ddpm,
    "ddim": unets.ddim,
    "video": transformers.video,
    "modular-sdxl": unets.modular_sdxl,
}

_TEXT = {"prompt": "a cat", "num_inference_steps": 3, "output_type": "np"}

_CALLS: dict[str, dict[str, Any]] = {
    "sd": {**_TEXT, "guidance_scale": 3.0},
    "sdxl": {**_TEXT, "guidance_scale": 3.0},
    "sd3": {**_TEXT, "guidance_scale": 3.0, "max_sequence_length": 16},
    "flux": {
        **_TEXT,
        "negative_prompt": "a dog",
        "true_cfg_scale": 3.0,
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
    },
    "dit": {"class_labels": [1], "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"},
    "pixart": {
        **_TEXT,
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": 16,
    },
    "ddpm": {"num_inference_steps": 3, "output_type": "np"},
    "ddim": {"num_inference_steps": 3, "output_type": "np"},
    "video": {
        **_TEXT,
        "negative_prompt": "a dog",
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "max_sequence_length": 16,
    },
    "modular-sdxl": {"prompt": "a cat", "num_inference_steps": 3, "output_type": "np", "output": "images"},
}

KINDS = tuple(_MAKERS)
"""The kinds that :func:`tiny_pipeline` builds."""


def tiny_pipeline(kind: str) -> Any:  # noqa: ANN401 - one diffusers class per kind
    """A pipeline of the given family with a few thousand random weights, always the same ones for a kind.

    Args:
        kind: One of :data:`KINDS`.

    Returns:
        A new pipeline on the CPU in float32, with its progress bar off. Its pictures mean nothing.

    Raises:
        InvalidInput: If there is no such kind.

    Cost:
        Some 0.1 s; nothing is downloaded; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(_known(kind).encode()))
        pipe = _MAKERS[kind]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_call(kind: str, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of a quick call: 3 steps, a seeded generator, guidance on where the family has it.

    Raises:
        InvalidInput: If there is no such kind.
    """
    return {**_CALLS[_known(kind)], "generator": torch.Generator().manual_seed(seed)}


def _known(kind: str) -> str:
    if kind not in _MAKERS:
        raise InvalidInput(f"tiny pipelines: expected one of {', '.join(KINDS)}; got {kind!r}")
    return kind

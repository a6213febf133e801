"""What identifies an encoder: a digest of its weights and configuration."""

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerclear.errors import UnsupportedPipeline

_IRRELEVANT = ("decoder", "post_quant_conv")
_CONFIG_IRRELEVANT = ("sample_size", "force_upcast")

_digests: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], str]] = WeakKeyDictionary()


def fingerprint(vae: Any, tag: str) -> str:  # noqa: ANN401 - any autoencoder of diffusers
    """``"sha256:…"`` of what decides where a picture lands: the encoder's weights, its configuration, the layout.

    The decoder does not count, so autoencoders that differ only there share their negation sets. Weights are rounded to
    float16 first, so that one encoder has one fingerprint in float32 and in float16.

    Args:
        vae: The autoencoder.
        tag: Names the layout in the sampler.

    Raises:
        UnsupportedPipeline: If the weights are not in memory (offloaded to the meta device).

    Cost:
        One pass over the encoder's weights, once per module; afterwards a look at their version counters.
    """
    versions = tuple(0 if p.is_inference() else p._version for p in vae.parameters())
    known = _digests.get(vae)
    if known is None or known[0] != versions:
        known = versions, _weights(vae)
        _digests[vae] = known
    config = {k: v for k, v in vae.config.items() if not k.startswith("_") and k not in _CONFIG_IRRELEVANT}
    text = json.dumps([type(vae).__name__, config, tag, known[1]], sort_keys=True, default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _weights(vae: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        if name.startswith(_IRRELEVANT):
            continue
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(_bytes(name, value))
    return digest.hexdigest()


def _bytes(name: str, value: Tensor) -> bytes:
    if value.device.type == "meta":
        raise UnsupportedPipeline(
            f"the encoder's weight {name} is not in memory (meta device); "
            "encode and attach before enable_sequential_cpu_offload(), or use enable_model_cpu_offload()"
        )
    half = value.detach().to("cpu", torch.float16).contiguous()
    return half.view(torch.uint8).numpy().tobytes() if half.ndim else half.numpy().tobytes()

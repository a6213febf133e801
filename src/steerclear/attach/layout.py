r"""From the autoencoder's latent ``z`` to the tensor that the sampler steps, and back.

.. math:: x = \mathrm{pack}\bigl((\mathrm{patchify}(z) - m) \cdot s\bigr)

where the two outer maps only move elements around and are the identity for most pipelines. The constants come from the
autoencoder's configuration or buffers:

=========================================  ==========================================  =======================
families                                   :math:`(z - m) \cdot s`                     layout
=========================================  ==========================================  =======================
SD 1/2, SDXL, PixArt, DiT, Sana            ``z * scaling_factor``                      as the autoencoder's
SD3, Lumina 2, Z-Image                     ``(z - shift_factor) * scaling_factor``     as the autoencoder's
Flux, Chroma                               ``(z - shift_factor) * scaling_factor``     2×2 patches, one per row
Flux 2                                     ``(z - bn.mean) / sqrt(bn.var + eps)``      2×2 patches before and rows
Wan, Qwen-Image, Mochi, Playground         ``(z - mean) * scaling_factor / std``       Qwen: rows
LTX                                        the same from buffers                       rows
CogVideoX, Stable Video Diffusion          ``z * scaling_factor``                      frames before channels
Sana-Sprint, Cosmos 1                      as above, times ``sigma_data``
=========================================  ==========================================  =======================

The table is a guess about an unknown pipeline; :mod:`steerclear.attach.selftest` is what establishes it.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerclear.errors import UnsupportedPipeline

Move = Callable[[Tensor], Tensor]
"""A map of ``(n, *shape)`` that only rearranges the elements of every sample."""


def _stay(z: Tensor) -> Tensor:
    return z


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The affine map per channel and the two rearrangements around it.

    Args:
        mean: Subtracted, ``(channels,)`` or a number.
        scale: Multiplied afterwards, likewise.
        patchify: Rearrangement before the affine map.
        pack: Rearrangement after it.
        channel_axis: Axis of a packed sample (without the batch) that holds the channels.
        tag: Names the rearrangements; part of the space's fingerprint.
    """

    mean: Tensor | float = 0.0
    scale: Tensor | float = 1.0
    patchify: Move = _stay
    pack: Move = _stay
    channel_axis: int = 0
    tag: str = "plain"

    def to_sampler(self, z: Tensor) -> Tensor:
        """``(n, *latent)`` of the autoencoder -> ``(n, *shape)`` of the sampler."""
        patches = self.patchify(z)
        return self.pack((patches - _channels(self.mean, patches)) * _channels(self.scale, patches))

    def to_vae(self, x: Tensor, latent: tuple[int, ...]) -> Tensor:
        """The inverse of :meth:`to_sampler`, given the shape ``latent`` of one sample of the autoencoder."""
        patched = tuple(self.patchify(torch.zeros(1, *latent)).shape[1:])
        patches = _undo(self.pack, x, patched)
        return _undo(self.patchify, patches / _channels(self.scale, patches) + _channels(self.mean, patches), latent)


def layout_of(pipe: Any, vae: Any) -> Layout:  # noqa: ANN401 - any diffusers pipeline and autoencoder
    """The layout that the pipeline's autoencoder, scheduler and packing function suggest.

    Raises:
        UnsupportedPipeline: If the pipeline packs its latents through a function of unknown parameters.
    """
    mean, scale = _affine(pipe, vae)
    factor = _sigma_data(pipe)
    patchify = pipe._patchify_latents if hasattr(vae, "bn") else _stay
    pack, axis, tag = _pack(pipe, vae)
    return Layout(
        mean=mean, scale=scale * factor, patchify=patchify, pack=pack, channel_axis=axis, tag=f"{tag} {factor}"
    )


def _affine(pipe: Any, vae: Any) -> tuple[Tensor | float, Tensor | float]:  # noqa: ANN401
    """``(mean, scale)`` of the module's table, before ``sigma_data``."""
    config = vae.config
    if getattr(pipe, "movq", None) is vae:  # Kandinsky carries a scaling factor that its sampler does not use
        return 0.0, 1.0
    if hasattr(vae, "bn"):
        return vae.bn.running_mean.float(), (vae.bn.running_var.float() + config.batch_norm_eps).rsqrt()
    factor = float(config.get("scaling_factor") or 1.0)
    statistics = dict(vae.named_buffers(recurse=False)) or config  # LTX keeps buffers, the others their config
    mean, std = statistics.get("latents_mean"), statistics.get("latents_std")
    if mean is not None and std is not None:
        return torch.as_tensor(mean).float(), factor / torch.as_tensor(std).float()
    return float(config.get("shift_factor") or 0.0), factor


def _sigma_data(pipe: Any) -> float:  # noqa: ANN401
    """TrigFlow and Cosmos 1 sample in units of the data's deviation."""
    scheduler = type(pipe.scheduler).__name__
    scaled = scheduler.startswith("SCM") or (scheduler.startswith("EDM") and "Cosmos" in type(pipe).__name__)
    return float(pipe.scheduler.config.sigma_data) if scaled else 1.0


def _pack(pipe: Any, vae: Any) -> tuple[Move, int, str]:  # noqa: ANN401
    """``(rearrangement, channel axis, tag)``, dispatched on the parameter names of the pipeline's own function."""
    pack = getattr(pipe, "_pack_latents", None)
    if pack is None:
        if type(vae).__name__ in ("AutoencoderKLCogVideoX", "AutoencoderKLTemporalDecoder"):
            return lambda z: z.transpose(1, 2), 1, "frames"
        return _stay, 0, "plain"
    names = tuple(inspect.signature(pack).parameters)
    match names:
        case ("latents",):
            return pack, -1, "packed"
        case ("latents", "patch_size", "patch_size_t"):
            sizes = (pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size)
            return lambda z: pack(z, *sizes), -1, f"packed {sizes}"
        case ("latents", "batch_size", "num_channels_latents", "height", "width"):
            return lambda z: _pack_image(pack, z), -1, "packed"
        case _:
            raise UnsupportedPipeline(
                f"{type(pipe).__name__}: expected _pack_latents to take the latents and their sizes, got parameters "
                f"{names}; pass an Encoder of your own instead of the pipeline"
            )


def _pack_image(pack: Callable[..., Tensor], z: Tensor) -> Tensor:
    """Packs ``(n, c, h, w)``, or ``(n, c, 1, h, w)`` of an image model with a video autoencoder."""
    n, c, *_, h, w = z.shape
    return pack(z.reshape(n, c, h, w), n, c, h, w)


def _channels(value: Tensor | float, like: Tensor) -> Tensor | float:
    """A value per channel, shaped to broadcast against ``like`` of shape ``(n, channels, ...)``."""
    return value.to(like).reshape(-1, *[1] * (like.ndim - 2)) if isinstance(value, Tensor) else value


def _undo(move: Move, y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of a rearrangement of samples of the given shape, found by moving their indices."""
    if move is _stay:
        return y
    index = torch.arange(math.prod(shape)).reshape(1, *shape)
    order = move(index).flatten().argsort().to(y.device)
    return y.flatten(1)[:, order].reshape(-1, *shape)

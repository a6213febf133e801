"""A pipeline's decoder as a differentiable map from the sampler's space to pictures, for guards that look at them."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerclear.attach.layout import Layout, layout_of
from steerclear.attach.space import encoder_of
from steerclear.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoder:
    r"""Samples to pictures, :math:`y = \operatorname{clip}(D(z(x))/2 + 1/2,\, 0,\, 1)`, with gradients.

    Outside [0, 1] the slope is passed through the clipping unchanged. Weights are frozen by being left out of the
    gradient; nothing is changed in the pipeline. Without an autoencoder the sampler's space *is* pixels,
    :math:`y = x/2 + 1/2`.

    Args:
        vae: What decodes: the pipeline's autoencoder or a tiny stand-in; ``None`` for pixels.
        layout: From the autoencoder's latent to the sampler.
        latent: Shape of one sample of the autoencoder.
        shape: Shape of one sample of the sampler.

    Call:
        x: ``(batch, *shape)``.

    Returns:
        ``(batch, 3, height, width)`` in [0, 1], float32; the first frame of a clip.

    Raises:
        InvalidInput: If the samples have another shape.
    """

    vae: Any
    layout: Layout
    latent: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise InvalidInput(
                f"Decoder: expected samples (batch, *{self.shape}), got {tuple(x.shape)}; make it for the size of the "
                "call: decoder_of(pipe, height=…, width=…)"
            )
        pixels = x
        if self.vae is not None:
            pixels = self.vae.decode(self.layout.to_vae(x, self.latent).to(self.vae.dtype)).sample
            pixels = pixels[:, :, 0] if pixels.ndim == 5 else pixels
        pictures = pixels.float() / 2 + 0.5
        return pictures + (pictures.clamp(0, 1) - pictures).detach()


def decoder_of(
    pipe: Any,  # noqa: ANN401 - any diffusers pipeline
    *,
    tiny: Any = None,  # noqa: ANN401 - an AutoencoderTiny
    height: int | None = None,
    width: int | None = None,
    call: dict[str, Any] | None = None,
) -> Decoder:
    """The differentiable decoder of ``pipe``, its layout established by the self-test of :func:`encoder_of`.

    Args:
        pipe: Any diffusers pipeline, classic or modular.
        tiny: A diffusers ``AutoencoderTiny`` for the same latents, such as TAESD for SD 1.x: an eighteenth of the
            arithmetic, and a slightly softer picture. That it is the right one cannot be checked beyond its channels.
        height: Height of the pictures in pixels; ``None`` is the pipeline's default.
        width: Width likewise.
        call: As in :func:`encoder_of`.

    Raises:
        UnsupportedPipeline: If the self-test fails, or the pipeline's size or space cannot be found out.
        InvalidInput: If ``tiny`` decodes another number of channels, or the pipeline has nothing that it could replace.

    Cost:
        That of :func:`encoder_of`; for a half-precision autoencoder that overflows, a copy of it in float32.
    """
    encoder = encoder_of(pipe, height=height, width=width, call=call)
    if tiny is not None:
        channels = None if encoder.vae is None else encoder.latent[0]
        if channels != tiny.config.latent_channels:
            has = "no autoencoder" if channels is None else f"latents of {channels} channels"
            raise InvalidInput(
                f"decoder_of: expected a tiny autoencoder for this pipeline's latents, got one of "
                f"{tiny.config.latent_channels} channels for {type(pipe).__name__} with {has}; take the one that was "
                "made for it, or leave it out"
            )
        vae, layout = tiny.to(encoder.device), layout_of(pipe, tiny)
    else:
        vae, layout = _steady(encoder.vae), encoder.layout
    return Decoder(vae=vae, layout=layout, latent=encoder.latent, shape=encoder.space.shape)


def _steady(vae: Any) -> Any:  # noqa: ANN401
    """The autoencoder, or a copy in float32 if it overflows in the half precision that it is in."""
    if vae is not None and vae.dtype == torch.float16 and vae.config.get("force_upcast", False):
        return copy.deepcopy(vae).to(torch.float32)
    return vae

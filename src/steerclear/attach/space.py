"""Pictures to a pipeline's sampler space and back, and the check that negation sets live there."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steerclear.attach.calls import autoencoder, network, sizes
from steerclear.attach.fingerprint import fingerprint
from steerclear.attach.layout import Layout, layout_of
from steerclear.attach.selftest import Evidence, verify
from steerclear.errors import InvalidInput, UnsupportedPipeline
from steerclear.negation import References, Space
from steerclear.negation import encoder as negation_encoder
from steerclear.prompts.encoders import parameters

_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineEncoder:
    r"""A pipeline's autoencoder as the map between pictures and what its sampler steps.

    .. math:: x = \mathrm{pack}\bigl((\operatorname{mode} q(z \mid 2 y - 1) - m) \cdot s\bigr)

    with the pipeline's own :math:`m`, :math:`s` and packing (:mod:`steerclear.attach.layout`). Without an autoencoder,
    :math:`x = 2 y - 1`. A video pipeline gets a still clip of ``frames`` frames.

    Args:
        space: Where the latents live.
        size: ``(height, width)`` in pixels.
        vae: The autoencoder; ``None`` for pixels.
        layout: From the autoencoder's latent to the sampler.
        latent: Shape of one sample of the autoencoder.
        frames: Frames of a clip; ``None`` for pictures.
        device: Where the pipeline runs.
    """

    space: Space
    size: tuple[int, int]
    vae: Any
    layout: Layout
    latent: tuple[int, ...]
    frames: int | None
    device: torch.device

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """``(n, 3, height, width)`` in [0, 1] -> ``(n, *space.shape)``, float32, on the pipeline's device.

        Raises:
            InvalidInput: If the pictures have another size.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.size):
            raise InvalidInput(
                f"encode: expected pictures of shape (n, 3, {self.size[0]}, {self.size[1]}), got "
                f"{tuple(images.shape)}; "
                "resize them, or take encoder_of(pipe, height=…, width=…)"
            )
        pixels = images.to(self.device, torch.float32) * 2 - 1
        if self.vae is None:
            return pixels
        parts = [self.layout.to_sampler(self._mode(part).float()) for part in pixels.split(_BATCH)]
        return torch.cat(parts) if parts else pixels.new_zeros(0, *self.space.shape)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """``(n, *space.shape)`` -> ``(n, 3, height, width)`` in [0, 1]; the first frame of a clip.

        Raises:
            InvalidInput: If the latents have another shape.
        """
        if tuple(latents.shape[1:]) != self.space.shape:
            raise InvalidInput(f"decode: expected latents (n, *{self.space.shape}), got {tuple(latents.shape)}")
        x = latents.to(self.device, torch.float32)
        if self.vae is not None:
            z = self.layout.to_vae(x, self.latent)
            x = (
                torch.cat([self._decoded(part) for part in z.split(_BATCH)])
                if len(z)
                else z.new_zeros(0, 3, *self.size)
            )
        return (x.float() / 2 + 0.5).clamp(0, 1)

    def _mode(self, pixels: Tensor) -> Tensor:
        if self.frames is not None:
            pixels = pixels.unsqueeze(2).expand(-1, -1, self.frames, -1, -1)
        with _precise(self.vae):
            out = self.vae.encode(pixels.to(self.vae.dtype))
        if hasattr(out, "latent_dist"):
            return out.latent_dist.mode()
        return out.latent if hasattr(out, "latent") else out.latents

    def _decoded(self, z: Tensor) -> Tensor:
        with _precise(self.vae):
            pixels = self.vae.decode(z.to(self.vae.dtype)).sample
        return pixels[:, :, 0] if pixels.ndim == 5 else pixels


_verified: WeakKeyDictionary[Any, tuple[str, Evidence]] = WeakKeyDictionary()


def encoder_of(
    pipe: Any,  # noqa: ANN401 - any diffusers pipeline
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    call: dict[str, Any] | None = None,
) -> PipelineEncoder:
    """The map between pictures and the space that ``pipe`` samples in, established by a self-test.

    Args:
        pipe: Any diffusers pipeline, classic or modular.
        height: Height of the pictures in pixels; ``None`` is the pipeline's default.
        width: Width likewise.
        frames: Frames of a clip, for video pipelines; ``None`` is the pipeline's default.
        call: Keyword arguments that a call of this pipeline cannot do without, for the self-test: an ``image``, or
            ``prompt_embeds`` where the text encoder was left out.

    Raises:
        UnsupportedPipeline: If the self-test fails, or the pipeline's size or space cannot be found out.

    Cost:
        The first time for a pipeline, two sampling steps on a small picture and a digest of the autoencoder's weights;
        afterwards microseconds.
    """
    size = sizes(pipe, height, width)
    vae = autoencoder(pipe)
    if vae is None:
        layout, identity = _pixel_layout(pipe), "pixels"
    else:
        layout = layout_of(pipe, vae)
        identity = fingerprint(vae, layout.tag)
    known = _verified.get(pipe)
    if known is None or known[0] != identity:
        known = identity, verify(pipe, layout, size, call)
        _verified[pipe] = known
    clip = _clip(pipe, frames, known[1])
    latent = _latent(known[1], size, clip)
    shape = tuple(layout.to_sampler(torch.zeros(1, *latent)).shape[1:])
    return PipelineEncoder(
        space=Space(encoder=identity, shape=shape, name=_name(pipe, vae, shape)),
        size=size,
        vae=vae,
        layout=layout,
        latent=latent,
        frames=clip,
        device=getattr(pipe, "_execution_device", torch.device("cpu")),
    )


def check(
    pipe: Any,  # noqa: ANN401 - any diffusers pipeline
    negation: Iterable[References],
    *,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """Refuse negation sets that do not live in the pipeline's space.

    Without ``height`` and ``width`` the size of the coming calls is open, so a set made for another picture size than
    the default passes if the pipeline takes sizes at all; a call of the wrong size is then refused at its first step.

    Raises:
        NegationMismatch: If a set comes from another encoder, or has a shape that the pipeline cannot have.
        UnsupportedPipeline: If the pipeline's space cannot be established.
    """
    sets = tuple(negation)
    if not sets:
        return
    encoder = encoder_of(pipe, height=height, width=width)
    fixed = height is not None or width is not None or "height" not in parameters(pipe)
    for one in sets:
        if fixed or not _same_but_for_size(encoder, one.space):
            encoder.space.require(one.space)


def _same_but_for_size(encoder: PipelineEncoder, other: Space) -> bool:
    ours, axis = encoder.space, encoder.layout.channel_axis
    return (
        ours.encoder == other.encoder and len(ours.shape) == len(other.shape) and ours.shape[axis] == other.shape[axis]
    )


def _pixel_layout(pipe: Any) -> Layout:  # noqa: ANN401
    channels = getattr(network(pipe), "config", {}).get("in_channels")
    if channels != 3:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__}: expected an autoencoder (vae, movq, vqvae, vqgan) or a network on 3-channel "
            f"pictures, got no autoencoder and {channels} channels; pass an Encoder of your own instead of the pipeline"
        )
    return Layout(tag="pixels")


def _clip(pipe: Any, frames: int | None, evidence: Evidence) -> int | None:  # noqa: ANN401
    """Frames of a clip; ``None`` where the pipeline makes pictures."""
    if evidence.frames is None:
        return None
    frames = frames or parameters(pipe).get("num_frames")
    if not frames:
        raise UnsupportedPipeline(f"{type(pipe).__name__}: expected a number of frames, got none; pass frames=…")
    return frames


def _latent(evidence: Evidence, size: tuple[int, int], clip: int | None) -> tuple[int, ...]:
    """Shape of one sample of the autoencoder for pictures of ``size``, in proportion to what the self-test saw."""
    channels, *middle, h, w = evidence.latent
    latent_h, rest_h = divmod(size[0] * h, evidence.size[0])
    latent_w, rest_w = divmod(size[1] * w, evidence.size[1])
    if rest_h or rest_w:
        raise InvalidInput(
            f"expected a height and width that the autoencoder divides by {evidence.size[0] // h}, got {size}"
        )
    if clip is None or evidence.frames is None:
        return (channels, *middle, latent_h, latent_w)
    stride = max(1, (evidence.frames - 1) // max(1, middle[0] - 1))
    return (channels, (clip - 1) // stride + 1, latent_h, latent_w)


def _name(pipe: Any, vae: Any, shape: tuple[int, ...]) -> str:  # noqa: ANN401
    made = "pixels" if vae is None else type(vae).__name__
    source = Path(str(getattr(pipe, "name_or_path", "") or "")).name or type(pipe).__name__
    return f"{made} {'×'.join(map(str, shape))} of {source}"


@contextmanager
def _precise(vae: Any) -> Generator[None]:  # noqa: ANN401
    """Half-precision autoencoders that overflow are run in float32, as the pipelines do when they decode."""
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)


negation_encoder.use(encoder_of)

"""The check that a pipeline's space is understood: force the denoised estimate to Z, and see Z reach the decoder.

Scale, shift, per-channel statistics and packing differ from pipeline to pipeline, and a wrong one still gives finite
pictures. Two steps under a guard that answers Z whatever it is asked decide the matter without reference images:
the sampler must end at Z, so what the autoencoder is given to decode, mapped back to the sampler's space, must be Z.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerclear.attach.calls import autoencoder, network, overheard, quick_call
from steerclear.attach.layout import Layout
from steerclear.denoise import DenoiseState
from steerclear.errors import SteerclearError, UnsupportedPipeline

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Root mean square of what may separate Z from the decoded latent, in sampler units (Z has 0.5)."""

_ENDS_CLEAN = {"set_alpha_to_one": True, "final_sigmas_type": "zero"}
"""Settings under which a schedule ends without noise, so that the forced estimate is the result."""


@dataclass(slots=True)
class Force:
    """A guard that answers the same random Z, uniform in (-0.9, 0.9), for every sample and step."""

    target: Tensor | None = None

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor:
        if self.target is None or self.target.shape != denoised.shape[1:]:
            generator = torch.Generator().manual_seed(20)
            self.target = 1.8 * torch.rand(denoised.shape[1:], generator=generator) - 0.9
        return self.target.to(denoised).expand_as(denoised)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the self-test saw.

    Args:
        latent: Shape of one sample at the decoder's door, ``(channels, [frames,] height, width)``.
        shape: Shape of one sample in the sampler.
        size: ``(height, width)`` of the pictures of the test call.
        frames: Frames of the test call; ``None`` for pictures.
        error: Root mean square difference between Z and what arrived.
    """

    latent: tuple[int, ...]
    shape: tuple[int, ...]
    size: tuple[int, int]
    frames: int | None
    error: float


@dataclass(slots=True)
class _Arrived:
    """What reached the decoder (latent pipelines) or the caller (pixel pipelines)."""

    latents: list[Tensor] = field(default_factory=list[Tensor])


def verify(pipe: Any, layout: Layout, size: tuple[int, int], call: dict[str, Any] | None = None) -> Evidence:  # noqa: ANN401
    """Run the self-test.

    Args:
        pipe: The pipeline; afterwards everything about it is as before, and so is the global random state.
        layout: The map to be established.
        size: ``(height, width)`` of the pictures of real calls.
        call: Keyword arguments that the pipeline needs besides the obvious ones.

    Raises:
        UnsupportedPipeline: If the pipeline cannot be called, nothing is decoded, or something other than Z arrives.

    Cost:
        Two steps at no more than 64×96 pixels, and one decoding.
    """
    arguments = quick_call(pipe, size) | (call or {})
    vae = autoencoder(pipe)
    force, arrived = Force(), _Arrived()
    with (
        torch.random.fork_rng(devices=_devices(pipe)),
        _quiet(pipe),
        _clean_ending(pipe),
        overheard(vae, arrived.latents),
    ):
        result = _run(pipe, force, arguments)
    if vae is None:
        arrived.latents.append(_pixels(result))
    evidence = _judge(pipe, layout, force, arrived)
    h, w = arguments.get("height"), arguments.get("width")
    return Evidence(**evidence, size=(h, w) if h and w else size, frames=arguments.get("num_frames"))


def _run(pipe: Any, force: Force, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
    from steerclear.attach.api import attach, suspended  # which checks spaces itself, so not at import

    try:
        with suspended(pipe), attach(pipe, force):
            return pipe(**arguments)
    except SteerclearError:
        raise
    except Exception as error:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__}: expected a short test call with {', '.join(arguments)} to run, got "
            f"{type(error).__name__}: {error}; pass what it needs: encoder_of(pipe, call={{…}})"
        ) from error


def _judge(pipe: Any, layout: Layout, force: Force, arrived: _Arrived) -> dict[str, Any]:  # noqa: ANN401
    """Compare Z with what arrived."""
    if not arrived.latents or force.target is None:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__}: expected its autoencoder to decode the sampler's result, but nothing was decoded; "
            "pass an Encoder of your own instead of the pipeline"
        )
    latent = arrived.latents[0][:1]
    moved = layout.to_sampler(latent.float().cpu())[0]
    target = force.target.cpu()
    if moved.shape != target.shape:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__}: expected the decoder's latents to have the sampler's shape {tuple(target.shape)} "
            f"after {layout.tag!r} packing, got {tuple(moved.shape)}; "
            "pass an Encoder of your own instead of the pipeline"
        )
    error = (moved - target).square().mean().sqrt().item()
    dtype = getattr(network(pipe), "dtype", torch.float32)
    if not error <= _TOLERANCE.get(dtype, 5e-2):
        raise UnsupportedPipeline(
            f"{type(pipe).__name__}: expected a forced estimate to reach the decoder unchanged, but it arrived with an "
            f"error of {error:.2g}, so the scale, shift or order of its latents is not understood; "
            "pass an Encoder of your own instead of the pipeline"
        )
    return {"latent": tuple(latent.shape[1:]), "shape": tuple(target.shape), "error": error}


@contextmanager
def _clean_ending(pipe: Any) -> Generator[None]:  # noqa: ANN401
    """Lend the pipeline a fresh scheduler of the same class whose schedule ends without noise."""
    original = pipe.scheduler
    changes = {k: v for k, v in _ENDS_CLEAN.items() if k in original.config}
    try:
        pipe.scheduler = type(original).from_config(original.config, **changes)
    except ValueError:  # some solvers cannot end at zero noise; their own ending then has to be clean enough
        pipe.scheduler = type(original).from_config(original.config)
    try:
        yield
    finally:
        pipe.scheduler = original


@contextmanager
def _quiet(pipe: Any) -> Generator[None]:  # noqa: ANN401
    """No progress bar for a test that nobody asked for."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        pipe._progress_bar_config = before if before is not None else {}


def _pixels(result: Any) -> Tensor:  # noqa: ANN401
    """Pictures of a pixel pipeline, ``(n, height, width, 3)`` in [0, 1], as the sampler had them."""
    images = torch.as_tensor(np.asarray(result.images), dtype=torch.float32)
    return images.permute(0, 3, 1, 2) * 2 - 1


def _devices(pipe: Any) -> list[Any]:  # noqa: ANN401
    device = getattr(pipe, "_execution_device", torch.device("cpu"))
    return [device] if device.type == "cuda" else []

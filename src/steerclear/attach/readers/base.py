r"""What a reader returns, and the few things that all readers share.

Every continuous scheduler is affine where it takes a network's output: with :math:`x_t = \alpha x_0 + \sigma\epsilon`,
:math:`\hat x = k_x x_t + k_o o`. So a reader only has to say :math:`(\alpha, \sigma, k_x, k_o)` for the call at hand,
and how the scheduler clips the estimate, if it does.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from steerclear.noise import NoiseLevel, Prediction

Arguments = Mapping[str, Any]
Projection = Callable[[Tensor], Tensor]
Scheduler = Any  # diffusers' schedulers share no typed interface
Field = Any  # a field of Reading, passed through

# Beyond this gain an estimate amplifies the network's rounding into nonsense (epsilon at zero terminal SNR: 1/alpha).
MAX_GAIN = 1e4
MIN_GAIN = 1e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    r"""How one call of a scheduler's ``step`` reads the network's output.

    Args:
        level: Noise level of the sample that the network saw.
        k_x: Factor of the sample in :math:`\hat x = k_x x_t + k_o o`: a number, or a tensor that broadcasts.
        k_o: Factor of the output, likewise.
        projection: What the scheduler does to the estimate before using it (clip, dynamic threshold), or ``None``.
        eta: Share of the ancestral noise that this call adds (``DenoiseState.eta``); ``None``: unknown.
        skip: Why this call cannot be guarded, or ``None``.
        output: Name of the argument of ``step`` that holds the network's output.
        grid: Number of predictions that the last axis of the output holds side by side; 0 for one.
    """

    level: NoiseLevel
    k_x: float | Tensor
    k_o: float | Tensor
    projection: Projection | None = None
    eta: float | None = 0.0
    skip: str | None = None
    output: str = "model_output"
    grid: int = 0


class Floats:
    """Schedules as lists of Python floats, each read once per call, so that no step waits for the device."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, int, list[float]]] = {}

    def __call__(self, table: Tensor) -> list[float]:
        key = id(table)
        seen = self._seen.get(key)
        version = 0 if table.is_inference() else table._version
        if seen is None or seen[1] != version:
            seen = (table, version, table.detach().tolist())
            self._seen[key] = seen
        return seen[2]


def reading(level: NoiseLevel, k_x: float, k_o: float, **more: Field) -> Reading:
    """A :class:`Reading` with scalar factors, skipped with a reason where the estimate would be meaningless."""
    skip = None
    if not (math.isfinite(k_x) and math.isfinite(k_o)) or max(abs(k_x), abs(k_o)) > MAX_GAIN:
        skip = f"no estimate: the signal is gone (alpha {float(level.alpha):.1e})"
    elif abs(k_o) < MIN_GAIN:
        skip = f"no noise left (sigma {float(level.sigma):.1e}): the output does not matter"
    return Reading(level=level, k_x=k_x, k_o=k_o, skip=skip, **more)


def by_prediction(level: NoiseLevel, prediction: str, **more: Field) -> Reading:
    """The reading of a standard prediction type at ``level``."""
    kind: Prediction = "sample" if prediction == "original_sample" else prediction  # pyright: ignore[reportAssignmentType] - checked by affine
    if kind == "epsilon" and float(level.alpha) < 1 / MAX_GAIN:
        return reading(level, math.inf, -math.inf, **more)
    k_x, k_o = level.affine(kind)
    return reading(level, float(k_x), float(k_o), **more)


def step_index(scheduler: Scheduler, timestep: float | Tensor) -> int:
    """Position in the schedule, set up early by the scheduler's own rule when this is the first step."""
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    return int(cast("int", scheduler.step_index))


def timestep_value(scheduler: Scheduler, timestep: float | Tensor, floats: Floats) -> float:
    """The timestep as a number; a view into ``scheduler.timesteps`` is found by its address, without a device sync."""
    if not isinstance(timestep, Tensor):
        return float(timestep)
    table = scheduler.timesteps
    if timestep.device.type != "cpu" and isinstance(table, Tensor) and table.dtype == timestep.dtype:
        offset = timestep.data_ptr() - table.data_ptr()
        index, rest = divmod(offset, table.element_size())
        same = timestep.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()
        if same and rest == 0 and 0 <= index < table.numel() and table.is_contiguous():
            return float(floats(table)[index])
    return float(timestep.flatten()[0]) if timestep.ndim else float(timestep)


def clip(limit: float) -> Projection:
    """Clamp to ``[-limit, limit]``."""
    return lambda x: x.clamp(-limit, limit)


def projection_of(scheduler: Scheduler) -> Projection | None:
    """Dynamic thresholding before clipping, as every diffusers scheduler that offers both orders them."""
    config = scheduler.config
    if config.get("thresholding", False):
        return scheduler._threshold_sample
    if config.get("clip_sample", False):
        return clip(float(config.get("clip_sample_range", 1.0)))
    return None


def root(value: float) -> float:
    """Square root that maps rounding below zero to zero."""
    return math.sqrt(max(0.0, value))


def per_token(value: Tensor, like: Tensor) -> Tensor:
    """``value`` with axes appended until it broadcasts against ``like``."""
    value = value.to(device=like.device, dtype=torch.float32)
    return value.reshape(*value.shape, *[1] * max(0, like.ndim - value.ndim))

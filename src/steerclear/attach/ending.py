"""After the last step: what guards settle, and the check that this is what the pipeline decodes.

A promise about results is worth something only if it speaks of the very tensor that is decoded. So the sample that
left the last step is replaced wherever the scheduler returned it, and what then reaches the autoencoder is mapped back
to the sampler's space and compared: a mask blended in afterwards, a callback that edits latents, a pipeline that stops
early or decodes something else is an error, not a picture.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steerclear.attach.calls import autoencoder, overheard
from steerclear.attach.layer import Layer
from steerclear.denoise import DenoiseState
from steerclear.errors import GuardNotApplied, UnsoundCombination
from steerclear.guards.base import Guard, settle, settles
from steerclear.noise import NoiseLevel

# What the way to the autoencoder and back may round, relative to the sample's largest entry.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(slots=True, eq=False)
class Ending:
    """The settling guards of one pipeline call, and what they left.

    Args:
        pipe: The pipeline.
        layers: All attachments, outer to inner.
    """

    pipe: Any
    layers: Sequence[Layer]
    left: Tensor | None = None
    decoded: list[Tensor] = field(default_factory=list[Tensor])

    @property
    def wanted(self) -> bool:
        """Whether any guard settles."""
        return any(settles(guard) for layer in self.layers for guard in layer.attachment.guards)

    def __call__(self, result: Any, rows: int, memories: Sequence[dict[Any, Any]], num_steps: int) -> Any:  # noqa: ANN401
        """The scheduler's result with its sample settled; the same object if nobody changed anything.

        Args:
            result: What ``step`` returned: a tuple, or a dataclass with ``prev_sample``.
            rows: Samples to show to guards; twice as many where the pipeline steps both halves of the guidance batch.
            memories: Of the trajectory, one per layer.
            num_steps: Steps of the trajectory.
        """
        whole: Tensor = result[0]
        sample = whole[:rows]
        changed = settle(self._settlers(sample, memories, num_steps), sample)
        self.left = sample if changed is None else changed
        if changed is None:
            return result
        if len(whole) != rows:
            changed = torch.cat([changed] * (len(whole) // rows))
        return _replaced(result, whole, changed)

    def _settlers(
        self, sample: Tensor, memories: Sequence[dict[Any, Any]], num_steps: int
    ) -> list[tuple[Guard, DenoiseState]]:
        found: list[tuple[Guard, DenoiseState]] = []
        for layer, memory in zip(self.layers, memories, strict=True):
            state = DenoiseState(
                x_t=sample,
                level=NoiseLevel(1.0, 0.0),
                step=num_steps,
                num_steps=num_steps,
                memory=memory,
                note=layer.record.steps[-1].note,
            )
            found += [(layer.checked(guard), state) for guard in layer.attachment.guards if settles(guard)]
        return found

    def watching(self) -> AbstractContextManager[None]:
        """Listen to what the pipeline decodes while the block runs, if any guard settles."""
        return overheard(autoencoder(self.pipe) if self.wanted else None, self.decoded)

    def check(self) -> None:
        """Raise if the pipeline decoded something else than what was settled last.

        Raises:
            GuardNotApplied: It did.
        """
        if self.left is None or not self.decoded:
            return
        from steerclear.attach.layout import layout_of  # only pipelines with an autoencoder need one

        layout = layout_of(self.pipe, autoencoder(self.pipe))
        z = torch.cat([part.float() for part in self.decoded])
        left = self.left.float()
        arrived = layout.to_sampler(z).to(left.device)
        if arrived.shape == left.shape:
            allowed = max(ROUNDING.get(part.dtype, 2e-2) for part in (self.left, *self.decoded))
            gap, size = (arrived - left).abs().max(), left.abs().max()
            if bool(gap <= allowed * (1.0 + size)):
                return
        raise GuardNotApplied(
            f"{type(self.pipe).__name__}: expected the sample that the guards settled to be what is decoded, got "
            "something else: a mask, a callback or a later stage changed it after the last step. No image is returned; "
            "leave that out, or use guards that act on the way only"
        )


def refuse(pipe: Any, method: str, frames: bool) -> None:  # noqa: ANN401 - any pipeline
    """Refuse before sampling the pipelines whose result does not leave one last step.

    Raises:
        UnsoundCombination: For this one.
    """
    reason = ""
    if method != "step":
        reason = "it returns the mean of its last step, which the scheduler keeps apart from the sample"
    if frames:
        reason = "its frames end one after the other"
    if reason:
        raise UnsoundCombination(
            f"{type(pipe).__name__}: expected one last step whose sample is the result, for guards that settle it; got "
            f"none, because {reason}. Use another pipeline, or a guard that acts on the way only (SPELL(certify=False))"
        )


def _replaced(result: Any, old: Tensor, new: Tensor) -> Any:  # noqa: ANN401 - what schedulers return
    """``new`` wherever ``result`` holds the last sample: consistency models return it twice, and decode the second."""

    def same(x: Any) -> bool:  # noqa: ANN401
        return x is old or (isinstance(x, Tensor) and x.shape == old.shape and torch.equal(x, old))

    if isinstance(result, tuple):
        return tuple(new if same(value) else value for value in result)
    return replace(result, **{name: new for name, value in vars(result).items() if same(value)})

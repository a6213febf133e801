"""Finished samples of earlier calls, so that later ones keep away from them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from steerclear.errors import InvalidInput


@dataclass(slots=True, kw_only=True)
class FinishedSamples:
    """What was already drawn. Belongs to whoever made it: guards read it and add to it, nobody else empties it.

    Args:
        limit: Samples to remember; the oldest calls go first. ``None`` remembers all.
    """

    limit: int | None = None
    _calls: dict[object, Tensor] = field(default_factory=dict[object, Tensor])

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InvalidInput(f"FinishedSamples: expected a limit of at least 1 or None, got {self.limit}")

    def __len__(self) -> int:
        return sum(len(latents) for latents in self._calls.values())

    def clear(self) -> None:
        """Forget everything."""
        self._calls.clear()

    def keep(self, call: object, latents: Tensor) -> None:
        """Remember the samples ``(n, *shape)`` of one call, in place of what it left before."""
        self._calls.pop(call, None)
        self._calls[call] = latents.detach()
        while self.limit is not None and len(self) > self.limit and len(self._calls) > 1:
            self._calls.pop(next(iter(self._calls)))

    def latents(self, shape: tuple[int, ...], *, besides: object = None) -> Tensor | None:
        """All samples flattened, ``(n, D)``, without those of the call ``besides``; ``None`` if there are none.

        Raises:
            InvalidInput: If they have another shape than ``shape``.
        """
        kept = [latents for call, latents in self._calls.items() if call is not besides and len(latents)]
        if wrong := [latents for latents in kept if tuple(latents.shape[1:]) != shape]:
            raise InvalidInput(
                f"FinishedSamples: expected samples of shape {shape}, got {tuple(wrong[0].shape[1:])} from an earlier "
                "call; use one memory per pipeline and picture size"
            )
        return torch.cat([latents.flatten(1).to(kept[-1]) for latents in kept]) if kept else None

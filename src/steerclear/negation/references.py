"""What guards need of the pictures to steer away from, whichever form they are kept in."""

from typing import Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.negation.placement import placed
from steerclear.negation.posterior import Posterior
from steerclear.negation.snapshot import Snapshot
from steerclear.negation.space import Space
from steerclear.noise import NoiseLevel


@runtime_checkable
class References(Protocol):
    r"""A distribution :math:`p(x_0)` over clean samples with a closed-form posterior behind Gaussian noise.

    :class:`~steerclear.negation.NegationSet` keeps its items in memory or in a mapped file; other forms keep them in a
    database that changes while a service runs, or keep statistics alone.
    """

    @property
    def space(self) -> Space:
        """Where the samples live."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """One per item; of a form without items, one per component."""
        ...

    @property
    def digests(self) -> tuple[str, ...]:
        """One per item; empty for a form that knows no items."""
        ...

    def __len__(self) -> int: ...

    def posterior(self, x_t: Tensor, level: NoiseLevel) -> Posterior:
        """Posterior mean ``(batch, *shape)`` and log-evidence ``(batch,)`` at ``x_t``."""
        ...

    def at(self, state: DenoiseState) -> "References":
        """What this trajectory has to go by from its first step to its last: a form that never changes is itself."""
        ...


@runtime_checkable
class Items(References, Protocol):
    """References that keep every item, for guards that compare with items one by one."""

    @property
    def ids(self) -> tuple[str, ...]:
        """One per item."""
        ...

    @property
    def latents(self) -> Tensor:
        """``(n, *space.shape)``."""
        ...

    @property
    def weights(self) -> Tensor:
        """``(n,)``, positive."""
        ...

    def at(self, state: DenoiseState) -> "Items":
        """As for :class:`References`."""
        ...


_Form = TypeVar("_Form", bound=References)


def at_present(references: _Form) -> _Form:
    """For what is made of a set once: itself, or of one that follows a store, what it holds at this moment."""
    moment = DenoiseState(x_t=torch.empty(0), level=NoiseLevel(1.0, 0.0), step=0, num_steps=1)
    return cast("_Form", references.at(moment))


def laid_out(items: Items, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Latents as they lie in memory, ``(n, *shape)``, and which of them count, ``(n,)``.

    The rows that a store has removed are among them and do not count: leaving them out would copy the others.

    Args:
        items: Any form that never changes.
        device: Where to; by default where they are.
    """
    names = ("_points", "_point_weights") if isinstance(items, Snapshot) else ("latents", "weights")
    points, weights = (getattr(items, name) if device is None else placed(items, name, device) for name in names)
    return points, weights > 0.0


def require_items(name: str, negation: References) -> None:
    """Refuse a form without items, for guards that compare with items one by one.

    Raises:
        InvalidInput: For one.
    """
    if not hasattr(negation, "latents"):
        raise InvalidInput(
            f"{name}: expected a form that keeps every item, got {type(negation).__name__}, which gives posteriors "
            "alone; give a NegationSet, store.snapshot() or store.live(), or use SafeDenoiser, ConditionalRelease or "
            "TrackedRelease, which need no more"
        )

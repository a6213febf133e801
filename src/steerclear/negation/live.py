"""A negation set that follows its store while a service runs: what :meth:`NegationStore.live` returns."""

from typing import TYPE_CHECKING

from torch import Tensor

from steerclear.negation.posterior import Posterior
from steerclear.negation.snapshot import Reader, Snapshot
from steerclear.negation.space import Space
from steerclear.noise import NoiseLevel

if TYPE_CHECKING:
    from steerclear.denoise import DenoiseState


class LiveSet:
    """The items of a store as they are when a trajectory begins, in this or any other process that writes to it.

    Give it to a guard in place of a :class:`~steerclear.negation.NegationSet`. A trajectory keeps from its first step
    to its last the items that it began with, so it never changes half-way, and concurrent ones do not disturb each
    other. While the store holds nothing, guards do nothing. If it cannot be read any more, generation fails: nobody is
    left unprotected in silence.

    Everything but :meth:`at` is about this moment: two looks may differ.

    Args:
        reader: Of the store.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._space = reader.snapshot().space

    @property
    def current(self) -> Snapshot:
        """The store as it is now, for good."""
        return self._reader.snapshot()

    @property
    def space(self) -> Space:
        """Where the items live."""
        return self._space

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one item."""
        return self._space.shape

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the items now."""
        return self.current.ids

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the items now."""
        return self.current.labels

    @property
    def digests(self) -> tuple[str, ...]:
        """Of the items now."""
        return self.current.digests

    @property
    def latents(self) -> Tensor:
        """The items now, ``(n, *shape)``; read it only."""
        return self.current.latents

    @property
    def weights(self) -> Tensor:
        """Of the items now, ``(n,)``."""
        return self.current.weights

    def __len__(self) -> int:
        return len(self.current)

    def __repr__(self) -> str:
        return f"LiveSet({len(self)} items now in {self.space}; {self._reader.folder})"

    def posterior(self, x_t: Tensor, level: NoiseLevel) -> Posterior:
        """Of the items now; see :meth:`Snapshot.posterior`."""
        return self.current.posterior(x_t, level)

    def at(self, state: "DenoiseState") -> Snapshot:
        """What the trajectory of ``state`` goes by: the store as it was at the first call, for all who read it, also if
        they opened it separately.

        Raises:
            NegationFileError: If the store cannot be read.
        """
        key = (LiveSet, self._reader.file)
        known: Snapshot | None = state.memory.get(key)
        if known is None:
            known = state.memory[key] = self._reader.snapshot()
        return known

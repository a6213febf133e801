"""An index over a store that goes on changing: right at every moment, and not built anew for every change."""

import threading
from typing import TYPE_CHECKING, Any

from torch import Tensor

from steerclear.negation.index.indexed import IndexedSet
from steerclear.negation.live import LiveSet
from steerclear.negation.posterior import Posterior
from steerclear.negation.references import References
from steerclear.negation.snapshot import Snapshot
from steerclear.negation.space import Space
from steerclear.noise import NoiseLevel

if TYPE_CHECKING:
    from steerclear.denoise import DenoiseState


class LiveIndex:
    """A :class:`LiveSet` behind an index, for stores too big to be read at every step.

    The store is cut into clusters once. After that a removed item is taken out of its cluster, whose bounds are
    computed again, and new items are read one by one beside the index. Make a new one when thousands have come. When
    the store was compacted its rows have other numbers: then everything is read, as without an index, until a new one
    is made.

    Args:
        live: What :meth:`NegationStore.live` returns.
        tolerance: As of :class:`IndexedSet`.
        partition: ``clusters``, ``reach``, ``seed``, ``progress`` of :meth:`Partition.of`.

    Cost:
        To cut, see :class:`Partition`. To follow a change: a comparison of all weights, and the clusters concerned.
    """

    def __init__(self, live: LiveSet, *, tolerance: float = 1e-3, **partition: Any) -> None:  # noqa: ANN401
        self._live = live
        self._first = live.current
        self._index = IndexedSet.of(self._first, tolerance=tolerance, **partition)
        self._last: tuple[Snapshot, References] = (self._first, self._index)
        self._lock = threading.Lock()

    @property
    def space(self) -> Space:
        """Where the items live."""
        return self._live.space

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the items now."""
        return self._live.labels

    @property
    def digests(self) -> tuple[str, ...]:
        """Of the items now."""
        return self._live.digests

    def __len__(self) -> int:
        return len(self._live)

    def posterior(self, x_t: Tensor, level: NoiseLevel) -> Posterior:
        """Of the items now; see :meth:`IndexedSet.posterior`."""
        return self._of(self._live.current).posterior(x_t, level)

    def at(self, state: "DenoiseState") -> References:
        """What the trajectory of ``state`` goes by; see :meth:`LiveSet.at`."""
        return self._of(self._live.at(state))

    def _of(self, now: Snapshot) -> References:
        """The index as of a snapshot."""
        with self._lock:
            if self._last[0] is not now:
                self._last = (now, self._followed(now))
            return self._last[1]

    def _followed(self, now: Snapshot) -> References:
        first = self._first
        if now.generation != first.generation or not len(now):
            return now
        known = len(first.point_weights)
        then, weights = first.point_weights[first.rows], now.point_weights[first.rows]
        partition = self._index.partition.without((weights != then).nonzero().flatten())
        fresh = known + now.point_weights[known:].nonzero().flatten()
        if not bool((weights > 0).any()):
            return now
        return IndexedSet(
            space=now.space,
            labels=now.labels,
            digests=now.digests,
            partition=partition,
            fresh=(now.points[fresh], now.point_weights[fresh]) if len(fresh) else None,
            tolerance=self._index.tolerance,
        )

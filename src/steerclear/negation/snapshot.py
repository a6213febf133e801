"""A negation store at one moment, and the reader that moves from one moment to the next at the cost of the change."""

import os
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerclear.errors import InvalidInput, NegationFileError, NegationMismatch
from steerclear.negation import database, vectors
from steerclear.negation.placement import placed
from steerclear.negation.posterior import Posterior, posterior
from steerclear.negation.space import Space
from steerclear.noise import NoiseLevel

if TYPE_CHECKING:
    from steerclear.denoise import DenoiseState

READ = ("row", "id", "label", "weight", "digest", "removed")
ATTEMPTS = 20  # to read while compactions replace the vectors that are about to be mapped


@dataclass(slots=True, eq=False)
class Columns:
    """What is known of every row of one generation. Grows at the end; what is there never changes."""

    ids: list[str] = field(default_factory=list[str])
    labels: list[str] = field(default_factory=list[str])
    digests: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """The items of a store at one moment. Never changes, whatever becomes of the store and its files.

    Args:
        space: Where the items live.
        points: Every row of the vector file, removed ones included, ``(rows, *shape)``: memory mapped from the file, in
            the dtype of the store. Read it only.
        point_weights: One per row, float32; 0 marks a row that was removed.
        generation: Within one generation row ``n`` is the same point for ever: an index over the first ``k`` rows stays
            good while weights change and rows are added.
        change: Number of the last change that it knows.
        columns: Ids, labels and digests by row.

    Equal to:
        A :class:`~steerclear.negation.NegationSet` of the same items, up to the order of summation; bit for bit if no
        row before the last live one was removed, or after :meth:`~steerclear.negation.NegationStore.compact`.
    """

    space: Space
    points: Tensor
    point_weights: Tensor
    generation: int
    change: int
    columns: Columns = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one item."""
        return self.space.shape

    @property
    def rows(self) -> Tensor:
        """Numbers of the live rows, ascending."""
        return self._rows

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the live items, in the order of their rows."""
        return self._ids

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the live items."""
        return self._labels

    @property
    def digests(self) -> tuple[str, ...]:
        """Of the live items."""
        return self._digests

    @property
    def latents(self) -> Tensor:
        """The live items alone, ``(n, *shape)``: the mapped memory itself if no row before the last was removed."""
        return self._latents

    @property
    def weights(self) -> Tensor:
        """Of the live items, ``(n,)``."""
        return self.point_weights[self.rows]

    @cached_property
    def _rows(self) -> Tensor:
        return self.point_weights.nonzero().flatten()

    @cached_property
    def _ids(self) -> tuple[str, ...]:
        return self._live(self.columns.ids)

    @cached_property
    def _labels(self) -> tuple[str, ...]:
        return self._live(self.columns.labels)

    @cached_property
    def _digests(self) -> tuple[str, ...]:
        return self._live(self.columns.digests)

    @cached_property
    def _latents(self) -> Tensor:
        rows = self.rows
        return self.points[: self._end] if len(rows) == self._end else self.points[rows]

    @cached_property
    def _end(self) -> int:
        """One more than the last live row: rows after it are not even read, so that removing the newest undoes it."""
        return int(self.rows[-1]) + 1 if len(self.rows) else 0

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Snapshot({len(self)} items in {self.space}; change {self.change})"

    def posterior(self, x_t: Tensor, level: NoiseLevel) -> Posterior:
        """Exact posterior mean ``(batch, *shape)`` and log-evidence ``(batch,)`` of the live items at ``x_t``.

        Raises:
            InvalidInput: If there is no item.
            NegationMismatch: If ``x_t`` is not ``(batch, *shape)``.
        """
        if tuple(x_t.shape[1:]) != self.shape:
            raise NegationMismatch(
                f"expected samples of shape (batch, {', '.join(map(str, self.shape))}), got {tuple(x_t.shape)}; "
                "encode the pictures again for this pipeline at this size"
            )
        if not self._end:
            raise InvalidInput("posterior: expected at least one item in the store, got none; guards do nothing then")
        points, weights = (placed(self, name, x_t.device) for name in ("_points", "_point_weights"))
        return posterior(x_t, points, weights, level)

    def at(self, state: "DenoiseState") -> "Snapshot":
        """Itself."""
        return self

    @property
    def _points(self) -> Tensor:
        return self.points[: self._end]

    @property
    def _point_weights(self) -> Tensor:
        return self.point_weights[: self._end]

    def _live(self, column: list[str]) -> tuple[str, ...]:
        if len(self.rows) == len(self.point_weights):
            return tuple(column[: len(self.rows)])
        return tuple(map(column.__getitem__, self.rows.tolist()))


class Reader:
    """Follows one store: each :meth:`snapshot` reads what has changed since the last one. Safe to share among threads.

    Args:
        folder: The store.
        timeout: Seconds to wait where the database is locked.

    Attributes:
        file: Device and number of the database file: the same for every reader of the store, by whatever path.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self.folder, self.timeout = folder, timeout
        self._lock = threading.Lock()
        self._connect()
        self.file = self._identity()

    def _connect(self) -> None:
        self._process = os.getpid()
        self._connection = database.connect(self.folder, readonly=True, timeout=self.timeout)
        self._version: int | None = None
        self._current: Snapshot | None = None
        self._map = torch.empty(0)

    def close(self) -> None:
        """Let go of the database; snapshots stay good."""
        self._connection.close()

    def snapshot(self) -> Snapshot:
        """The store as it is now; the very same object while nothing has changed.

        Raises:
            NegationFileError: If the store cannot be read any more, was replaced, or was closed.

        Cost:
            Microseconds without a change; with one, the new and the removed rows and a copy of the weights. After a
            compaction a copy of what is known of the rows that it kept; after several the metadata of all rows.
        """
        with self._lock, database.translated(self.folder):
            stamp = self._connection.stamp
            if os.getpid() != self._process or (stamp is not None and stamp != database.stamp_of(self.folder)):
                self._connect()  # not carried over a fork, and not kept where it cannot see a change
            if self._identity() != self.file:
                raise NegationFileError(
                    f"{self.folder}: expected the store that was opened, got another in its place; open it again"
                )
            version = self._connection.execute("PRAGMA data_version").fetchone()[0]
            if self._current is None or version != self._version:
                before = [self._current, self._map]
                self._current = self._next(self._current)
                self._version = version
                if before[0] is not None and before[1] is not self._map:
                    # Who lets go of a deleted file last waits until the system has freed it: a request should not.
                    threading.Thread(target=before.clear).start()
            return self._current

    def _next(self, last: Snapshot | None) -> Snapshot:
        for _ in range(ATTEMPTS):
            with database.transaction(self.folder, self._connection, write=False) as head:
                if last is not None and (head.change == last.change and head.generation == last.generation):
                    return last
                if last is not None and (head.space != last.space or head.change < last.change):
                    raise database.damaged(self.folder, "another space or an earlier change than before")
                columns, weights = self._rows(head, last)
            try:
                if last is None or last.generation != head.generation or len(self._map) < head.rows:
                    self._map = vectors.mapped(self.folder, head)
            except FileNotFoundError:
                continue  # compacted in the meantime: the next look at the database names the new file
            return Snapshot(
                space=head.space,
                points=self._map[: head.rows],
                point_weights=weights,
                generation=head.generation,
                change=head.change,
                columns=columns,
            )
        raise database.damaged(self.folder, f"no file of its vectors in {ATTEMPTS} attempts")

    def _rows(self, head: database.Head, last: Snapshot | None) -> tuple[Columns, Tensor]:
        """Ids, labels and digests by row, and weights, from what is known and what the log says since."""
        columns, known = _carried(self.folder, head, last)
        start = len(known)
        # All values are checked before any is taken over: a failed look must leave what is known whole.
        fresh = list(database.columns(self.folder, self._connection, head, READ, start))
        weights = torch.zeros(head.rows)
        weights[:start] = known
        if last is not None:
            # The plus keeps the row out of the choice of an index: by row, this would read everything.
            query = "SELECT row FROM items WHERE removed > ? AND +row BETWEEN 0 AND ?"
            gone = [row for (row,) in self._connection.execute(query, (last.change, start - 1))]
            weights[torch.tensor(gone, dtype=torch.long)] = 0.0
        end = start
        for some in fresh:
            live = [0.0 if gone else weight for weight, gone in zip(some["weight"], some["removed"], strict=True)]
            weights[end : end + len(live)] = torch.tensor(live)
            columns.ids[end:], columns.labels[end:], columns.digests[end:] = some["id"], some["label"], some["digest"]
            end += len(live)
        return columns, weights

    def _identity(self) -> tuple[int, int]:
        status = (self.folder / database.NAME).stat()
        return status.st_dev, status.st_ino


def _carried(folder: Path, head: database.Head, last: Snapshot | None) -> tuple[Columns, Tensor]:
    """What is known of the first rows of a generation, from an earlier look at it or at the one before; their weights.

    Live rows were never changed, and keep their order. So of those that a compaction kept only the numbers are new.
    """
    if last is not None and last.generation == head.generation:
        return last.columns, last.point_weights
    kept = vectors.kept(folder, head) if last is not None and last.generation == head.generation - 1 else None
    if last is None or kept is None:
        return Columns(), torch.empty(0)
    kept = kept[kept < len(last.point_weights)]
    rows, columns = kept.tolist(), last.columns
    named = ([column[row] for row in rows] for column in (columns.ids, columns.labels, columns.digests))
    return Columns(*named), last.point_weights[kept]

"""The writing side of a negation store: one change at a time, vectors on disk before the records that show them."""

import os
import sqlite3
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from steerclear.errors import InvalidInput, NegationFileError
from steerclear.files import sync_folder
from steerclear.negation import database, vectors
from steerclear.negation.database import Head, Item
from steerclear.negation.sets import NegationSet

Texts = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Items ready to be written.

    Args:
        rows: Their vectors as they are stored, ``(n, D)``.
        records: The rest; the numbers of their rows are still open.
    """

    rows: Tensor
    records: list[Item]

    @classmethod
    def of(cls, items: NegationSet, head: Head, provenance: Texts, licence: Texts) -> "Prepared":
        """The items of a set, checked.

        Raises:
            NegationMismatch: If they live in another space.
            InvalidInput: If a value is outside what a store can hold.
        """
        head.space.require(items.space)
        n, rows = len(items), vectors.rows_of(items.latents, head.dtype)
        columns = {"id": items.ids, "label": items.labels, "digest": items.digests}
        columns |= {"provenance": provenance, "licence": licence}
        checked = [database.texts(name, column, n) for name, column in columns.items()]
        weights = items.weights.float()
        if not bool((weights.isfinite() & (weights > 0.0)).all()):
            raise InvalidInput("expected weights that float32 can hold, got one too large or too small; scale them")
        if len(set(items.digests) - {""}) != n - items.digests.count(""):
            raise InvalidInput("expected every picture once, got a digest twice; remove one of the two")
        added = datetime.now(UTC).isoformat(timespec="seconds")
        texts = zip(*checked, weights.tolist(), vectors.digests(rows), strict=True)
        records = [
            Item(0, name, label, weight, digest, source, terms, added, sha256)
            for name, label, digest, source, terms, weight, sha256 in texts
        ]
        return cls(rows, records)

    def take(self, some: list[int]) -> "Prepared":
        """Only those at some places."""
        return self if len(some) == len(self.records) else Prepared(self.rows[some], [self.records[k] for k in some])


class Writer:
    """One connection that changes a store. Safe to share among threads.

    Args:
        path: The store's folder.
        readonly: Refuse every change.
        timeout: Seconds to wait for another writer.
    """

    def __init__(self, path: Path, *, readonly: bool, timeout: float) -> None:
        self.path, self.readonly, self.timeout = path, readonly, timeout
        self.connection = database.connect(path, readonly=readonly, timeout=timeout)
        self.lock = threading.RLock()
        self._vectors: tuple[int, int] | None = None

    def close(self) -> None:
        """Let go of the files."""
        with self.lock:
            self.connection.close()
            self._forget_vectors()

    @contextmanager
    def reading(self) -> Generator[Head]:
        """The store between two changes."""
        with self.lock:
            if self.connection.stamp is not None:  # it sees no changes: look at the file as it is now
                self.connection.close()
                self.connection = database.connect(self.path, readonly=True, timeout=self.timeout)
            with database.transaction(self.path, self.connection, write=False) as head:
                yield head

    @contextmanager
    def changing(self) -> Generator[Head]:
        """The store for oneself; what was changed is on disk when the block is left, or nothing was.

        Raises:
            NegationFileError: If it may not be changed, or another writer is at work for too long.
        """
        if self.readonly:
            raise NegationFileError(f"{self.path}: expected a store opened for writing, got one opened readonly")
        with self.lock, database.transaction(self.path, self.connection, write=True) as head:
            yield head

    def exists(self, column: str, value: str) -> bool:
        """Whether a live item has this id or digest."""
        return self.execute(database.LIVE[column], (value,)).fetchone() is not None

    def append(self, head: Head, new: Prepared) -> None:
        """Vectors first, on disk; then the records that make them visible."""
        vectors.append(self._handle(head), head.rows, new.rows)
        records = [item._replace(row=head.rows + k) for k, item in enumerate(new.records)]
        self.connection.executemany(database.INSERT, records)
        self.execute("UPDATE store SET rows = ?, change = ?", (head.rows + len(records), head.change + 1))

    def mark(self, ids: Sequence[str], head: Head, verb: str) -> None:
        """Note that live items are removed by the change that is being made.

        Raises:
            InvalidInput: If one is unknown.
        """
        database.texts("id", ids, len(ids))
        query = "UPDATE items SET removed = ? WHERE id = ? AND removed IS NULL"
        unknown = [name for name in ids if not self.execute(query, (head.change + 1, name)).rowcount]
        if unknown:
            raise InvalidInput(f"{verb}: expected ids of {self.path}, got {unknown[:5]}; ids() lists them")
        self.execute("UPDATE store SET change = ?", (head.change + 1,))

    def compact(self) -> int:
        """See :meth:`NegationStore.compact`."""
        with self.changing() as head:
            records = list(database.items(self.path, self.connection, head))
            live = [item for item in records if item.removed is None]
            if len(live) < len(records):
                self._copy(head, live)
                self.execute("DELETE FROM items WHERE removed IS NOT NULL")
                # Ascending, and never to a higher number: the number that is taken was freed before.
                moves = [(new, item.row) for new, item in enumerate(live) if new != item.row]
                self.connection.executemany("UPDATE items SET row = ? WHERE row = ?", moves)
                now = (head.generation + 1, len(live), head.change + 1)
                self.execute("UPDATE store SET generation = ?, rows = ?, change = ?", now)
        with suppress(NegationFileError), self.changing() as head:
            self._sweep(head)  # under the lock: no other compaction is writing a file that the store does not name yet
        with suppress(sqlite3.Error):  # empties the log of what was removed; readers at work make it wait for later
            self.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return (len(records) - len(live)) * head.width

    def check(self, items: list[Item], block: Tensor) -> None:
        """Raises if a live item's vector is not the one that was stored."""
        for item, digest in zip(items, vectors.digests(block), strict=True):
            if item.removed is None and item.sha256 != digest:
                raise database.damaged(self.path, f"another vector for {item.id!r} than was stored")

    def execute(self, query: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """One statement."""
        return self.connection.execute(query, values)

    def _copy(self, head: Head, live: list[Item]) -> None:
        """The live vectors into the file of the next generation, each checked on the way."""
        target = vectors.path_of(self.path, head.generation + 1)
        target.unlink(missing_ok=True)  # of a compaction that was killed
        rows = vectors.mapped(self.path, head).flatten(1)
        handle = vectors.opened(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            some = max(1, vectors.BLOCK // head.width)
            for start in range(0, len(live), some):
                part = live[start : start + some]
                block = rows[torch.tensor([item.row for item in part])]
                self.check(part, block)
                vectors.write(handle, start * head.width, vectors.content(block))
            os.fsync(handle)
        finally:
            os.close(handle)
        vectors.write_kept(self.path, head.generation + 1, [item.row for item in live])
        sync_folder(self.path)

    def _sweep(self, head: Head) -> None:
        """Delete the files of other generations; on systems that keep files in use, a later compaction does."""
        self._forget_vectors()
        for path in vectors.stray(self.path, head.generation):
            with suppress(OSError):
                path.unlink()

    def _handle(self, head: Head) -> int:
        if self._vectors is None or self._vectors[0] != head.generation:
            self._forget_vectors()
            path = vectors.path_of(self.path, head.generation)
            self._vectors = (head.generation, vectors.opened(path, os.O_RDWR))
        return self._vectors[1]

    def _forget_vectors(self) -> None:
        if self._vectors is not None:
            os.close(self._vectors[1])
            self._vectors = None

"""A negation set as a small database: a folder that is added to, and taken from, while services read it."""

import os
import secrets
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from steerclear.errors import InvalidInput, NegationFileError
from steerclear.files import sync_folder
from steerclear.negation import database, vectors
from steerclear.negation.database import Head, Item
from steerclear.negation.images import Skip
from steerclear.negation.live import LiveSet
from steerclear.negation.sets import NegationSet
from steerclear.negation.snapshot import Reader, Snapshot
from steerclear.negation.space import Space
from steerclear.negation.writer import Prepared, Texts, Writer

SUFFIX = ".negation"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreReport:
    """What :meth:`NegationStore.verify` found in a store that is whole.

    Args:
        items: Live items; all have the vector that they were stored with.
        removed: Rows that were removed and still lie in the file until :meth:`NegationStore.compact`.
        orphans: Bytes that no row accounts for: a write that was never acknowledged, a file of an earlier generation.
            Harmless; overwritten by the next write, or deleted by the next :meth:`NegationStore.compact`.
    """

    items: int
    removed: int
    orphans: int


class NegationStore:
    """Items to steer away from in a folder: SQLite for names and log, a flat file for vectors; made by :meth:`create`.

    A change that has returned is on disk, whatever becomes of the process or the power afterwards; one that has not
    happens as a whole or not at all. Writers take turns. Readers, in any process, always see the store between two
    changes, and wait for nobody. The vectors decode to the pictures for everyone who has the model; so do those of
    removed items until :meth:`compact`.

    Use it as a context manager, or call :meth:`close`; what :meth:`live` and :meth:`snapshot` returned stays usable.
    """

    def __init__(self, writer: Writer, timeout: float) -> None:
        self.path, self._writer, self._timeout = writer.path, writer, timeout
        self._follower: Reader | None = None
        with writer.reading() as head:
            self._head = head

    # -- opening --------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], space: Space, *, dtype: torch.dtype = torch.float16
    ) -> "NegationStore":
        """A new, empty store.

        Args:
            path: A folder that does not exist yet; by habit its name ends in ``.negation``. On a local disk: SQLite's
                log needs memory that processes share.
            space: Where the items live: ``NegationSet.space``, or ``encoder_of(pipe).space``.
            dtype: As vectors are stored: ``float16``, ``bfloat16`` or ``float32``.

        Raises:
            InvalidInput: For another dtype.
            NegationFileError: If something is there already, or the folder cannot be made.
        """
        if dtype not in database.DTYPES.values():
            raise InvalidInput(f"create: expected dtype of {', '.join(database.DTYPES)}, got {dtype}")
        target = Path(path)
        if target.exists() or target.is_symlink():
            raise NegationFileError(f"{target}: expected a new name, got one that is taken; use NegationStore.open")
        temporary = target.parent / f".{target.name[:40]}.{secrets.token_hex(6)}.tmp"
        head = Head(space, dtype, generation=1, rows=0, change=0)
        try:
            with database.translated(target):
                temporary.mkdir()
                os.close(vectors.opened(vectors.path_of(temporary, 1), os.O_WRONLY | os.O_CREAT | os.O_EXCL))
                database.make(temporary, head)
                sync_folder(temporary)
                temporary.rename(target)
                sync_folder(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls.open(target)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, readonly: bool = False, timeout: float = 30.0) -> "NegationStore":
        """An existing store.

        Args:
            path: Its folder.
            readonly: Refuse to change it; works on a folder that cannot be written to.
            timeout: Seconds to wait for another writer.

        Raises:
            NegationFileError: If it is missing, damaged, hostile, or of another version.
        """
        target = Path(path)
        writer = Writer(target, readonly=readonly, timeout=timeout)
        try:
            return cls(writer, timeout)
        except BaseException:
            writer.close()
            raise

    @classmethod
    def from_set(
        cls,
        path: str | os.PathLike[str],
        items: NegationSet,
        *,
        provenance: Texts = "",
        licence: Texts = "",
        dtype: torch.dtype = torch.float16,
    ) -> "NegationStore":
        """A new store with the items of a set; arguments and errors are those of :meth:`create` and :meth:`add`."""
        store = cls.create(path, items.space, dtype=dtype)
        try:
            store.add(items, provenance=provenance, licence=licence)
        except BaseException:
            store.close()
            shutil.rmtree(store.path, ignore_errors=True)
            raise
        return store

    def close(self) -> None:
        """Let go of the files."""
        self._writer.close()

    def __enter__(self) -> "NegationStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def space(self) -> Space:
        """Where the items live."""
        return self._head.space

    @property
    def dtype(self) -> torch.dtype:
        """As vectors are stored."""
        return self._head.dtype

    def snapshot(self) -> Snapshot:
        """The store as it is now; stays as it is whatever is written later."""
        return self._reader.snapshot()

    def live(self, *, allow_empty: bool = False) -> LiveSet:
        """What guards take to follow the store while they serve.

        Args:
            allow_empty: Begin with a store that holds nothing, so that guards do nothing until something is added.

        Raises:
            InvalidInput: If it holds nothing, and that was not allowed: a wrong path must not look like protection.
        """
        live = LiveSet(self._reader)
        if not len(live) and not allow_empty:
            raise InvalidInput(
                f"{self.path}: expected at least one item to steer away from, got none; add some, or say that the "
                "store may begin empty with live(allow_empty=True)"
            )
        return live

    def __len__(self) -> int:
        return len(self.snapshot())

    def __repr__(self) -> str:
        return f"NegationStore({self.path}, {len(self)} items in {self.space})"

    def ids(self, *, labels: str | Collection[str] | None = None) -> tuple[str, ...]:
        """Ids in the order of adding; of some labels only."""
        now = self.snapshot()
        if labels is None:
            return now.ids
        wanted = _some(labels, now.labels)
        return tuple(name for name, label in zip(now.ids, now.labels, strict=True) if label in wanted)

    def labels(self) -> tuple[str, ...]:
        """The labels that occur, sorted."""
        return tuple(sorted(self.counts()))

    def counts(self) -> dict[str, int]:
        """Items per label, most frequent first."""
        return dict(Counter(self.snapshot().labels).most_common())

    def items(self) -> list[Item]:
        """What is known of every live item: provenance, licence, digests, time."""
        with self._writer.reading() as head:
            return [item for item in database.items(self.path, self._writer.connection, head) if item.removed is None]

    def select(self, *, labels: str | Collection[str]) -> NegationSet:
        """The items with one of these labels, as a set of their own that follows nothing.

        Raises:
            InvalidInput: If no item has one of them.
        """
        now = self.snapshot()
        wanted = _some(labels, now.labels)
        return _set_of(now, [k for k, label in enumerate(now.labels) if label in wanted])

    def to_set(self) -> NegationSet:
        """All items as a set that follows nothing, to save as one file. Provenance and licence stay behind.

        Raises:
            InvalidInput: If there is none.
        """
        now = self.snapshot()
        if not len(now):
            raise InvalidInput(f"{self.path}: expected at least one item to make a set of, got none; add some first")
        return _set_of(now, range(len(now)))

    # -- changing -------------------------------------------------------------------------------------------------

    def add(self, items: NegationSet, *, provenance: Texts = "", licence: Texts = "") -> tuple[Skip, ...]:
        """Add items, all or none; when this returns they are on disk, and the next trajectory anywhere knows them.

        Args:
            items: In the store's space. For more than memory holds, add set after set.
            provenance: Where they come from, one text or one for each.
            licence: The terms under which they are kept, likewise.

        Returns:
            Those that were left out because their digest is here already.

        Raises:
            NegationMismatch: If they live in another space: were made by another encoder, or have another shape.
            InvalidInput: If an id names another picture here, or a value is outside its range.
            NegationFileError: If it cannot be written, or another writer is at work for too long; nothing is changed.

        Cost:
            Two waits for the disk, whatever the number of items in the store.
        """
        prepared, writer = Prepared.of(items, self._head, provenance, licence), self._writer
        with writer.changing() as head:
            known, new = [], []
            for k, item in enumerate(prepared.records):
                if item.digest and writer.exists("digest", item.digest):
                    known.append(Skip(source=item.id, reason="already in the store"))
                elif writer.exists("id", item.id):
                    raise InvalidInput(
                        f"add: expected new ids, got {item.id!r}, which names another picture in {self.path}; rename "
                        "it, or use replace"
                    )
                else:
                    new.append(k)
            if new:
                writer.append(head, prepared.take(new))
        return tuple(known)

    def remove(self, ids: str | Iterable[str]) -> None:
        """Remove items by id, all or none. Their vectors lie in the file until :meth:`compact`.

        Raises:
            InvalidInput: If an id is unknown.
            NegationFileError: As for :meth:`add`.
        """
        gone = [ids] if isinstance(ids, str) else list(dict.fromkeys(ids))
        if not gone:
            return
        with self._writer.changing() as head:
            self._writer.mark(gone, head, "remove")

    def replace(self, items: NegationSet, *, provenance: Texts = "", licence: Texts = "") -> None:
        """Put every item in the place of the one with its id, all or none; arguments as for :meth:`add`.

        Raises:
            InvalidInput: If an id is unknown, or another item has the digest already.
        """
        prepared, writer = Prepared.of(items, self._head, provenance, licence), self._writer
        with writer.changing() as head:
            writer.mark([item.id for item in prepared.records], head, "replace")
            for item in prepared.records:
                if item.digest and writer.exists("digest", item.digest):
                    raise InvalidInput(f"replace: expected new pictures, got {item.id!r}, which another id has already")
            writer.append(head, prepared)

    def compact(self) -> int:
        """Write the live items into a new file, and delete the old one with what was removed from it.

        Readers go on with the file that they have mapped. Other writers wait.

        Returns:
            Bytes of vectors that were deleted.

        Raises:
            NegationFileError: If a vector is not what was stored, or there is no room for the new file beside the old.
        """
        return self._writer.compact()

    def verify(self) -> StoreReport:
        """Recheck everything: the database, that every live vector is the one that was stored, and what is left over.

        Raises:
            NegationFileError: If anything is not as it should be.

        Cost:
            Reads every byte.
        """
        with self._writer.reading() as head:
            said = self._writer.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if said != "ok":
                raise database.damaged(self.path, f"a database that says: {said}")
            records = list(database.items(self.path, self._writer.connection, head))
            everything = vectors.mapped(self.path, head).flatten(1)
            strays = sum(path.stat().st_size for path in vectors.stray(self.path, head.generation))
        for start, block in vectors.blocks(everything[: head.rows]):
            self._writer.check(records[start : start + len(block)], block)
            if not bool(block.isfinite().all()):
                raise database.damaged(self.path, f"NaN or infinity between rows {start} and {start + len(block)}")
        beyond = sum(int((block != 0).any(1).sum()) for _, block in vectors.blocks(everything[head.rows :]))
        live = sum(item.removed is None for item in records)
        return StoreReport(items=live, removed=len(records) - live, orphans=strays + beyond * head.width)

    @property
    def _reader(self) -> Reader:
        with self._writer.lock:
            if self._follower is None:
                self._follower = Reader(self.path, self._timeout)
            return self._follower


def _some(labels: str | Collection[str], known: Iterable[str]) -> set[str]:
    wanted = {labels} if isinstance(labels, str) else set(labels)
    if unknown := sorted(wanted.difference(known)):
        raise InvalidInput(f"expected labels among {sorted(set(known))[:20]}, got {unknown[:5]}")
    return wanted


def _set_of(now: Snapshot, some: Sequence[int]) -> NegationSet:
    rows = now.rows[torch.as_tensor(list(some), dtype=torch.long)]
    columns = now.columns
    return NegationSet(
        latents=now.points[rows],
        weights=now.point_weights[rows],
        ids=tuple(columns.ids[row] for row in rows.tolist()),
        labels=tuple(columns.labels[row] for row in rows.tolist()),
        digests=tuple(columns.digests[row] for row in rows.tolist()),
        space=now.space,
    )

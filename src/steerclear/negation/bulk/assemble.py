"""From parts to a set: in the order of the source, every picture once, every name once."""

import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from steerclear.errors import InvalidInput, NegationFileError, SteerclearError
from steerclear.files import sync_folder
from steerclear.files.lock import alone
from steerclear.files.tensors import MAX_HEADER
from steerclear.negation.bulk import parts
from steerclear.negation.bulk.entries import Chunk, clean
from steerclear.negation.images import Skip
from steerclear.negation.sets import NegationSet
from steerclear.negation.space import Space
from steerclear.negation.store import SUFFIX, NegationStore

BATCH = 1024  # items that go into a store at a time


class Notes(NamedTuple):
    """What a store notes beside each picture.

    Args:
        provenance: One text for all; ``None`` for the place of each.
        licence: Of those that come without a note of their own.
    """

    provenance: str | None = None
    licence: str = ""

    @classmethod
    def of(cls, provenance: str | None, licence: str) -> "Notes":
        """Notes that a store takes: better cut than refused when everything is encoded."""
        return cls(None if provenance is None else clean(provenance), clean(licence))


class Item(NamedTuple):
    """One picture of the set to be."""

    latent: Tensor
    id: str
    label: str
    licence: str
    digest: str
    source: str
    space: Space


@contextmanager
def claimed(out: Path, *, first: bool) -> Generator[None]:
    """The target for one build, from before anything is encoded to the end: its draft and its parts are nobody else's.

    Args:
        out: The target.
        first: Whether this is the rank that puts the set together; it stands for the others.

    Raises:
        InvalidInput: If the folder is missing.
        NegationFileError: If another build of this target is at work, or the folder cannot be written.
    """
    if not out.parent.is_dir():
        raise InvalidInput(f"{out}: expected an existing folder, got {out.parent}; create it first")
    with ExitStack() as stack:
        try:
            if first:
                stack.enter_context(alone(out.parent / f".{out.name}.lock"))
        except BlockingIOError as error:
            raise NegationFileError(
                f"{out}: expected to be alone in building it, got another build at work; wait until it has ended, or "
                "give another name"
            ) from error
        except OSError as error:
            raise NegationFileError(f"{out}: expected a place that may be written, got {error.strerror}") from error
        yield


def check(out: Path, chunks: Sequence[Chunk]) -> None:
    """Before anything is encoded: can the target hold this?

    Raises:
        InvalidInput: If the target is no file or an existing store, or a file's header cannot hold that many names.
    """
    if out.suffix == SUFFIX:
        if out.exists():
            raise InvalidInput(f"{out}: expected a new name, got one that is taken; add to it, or build another one")
        return
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise InvalidInput(f"{out}: expected the name of a file, or of a new store, NAME{SUFFIX}, got something else")
    size = sum(len(entry.id) + len(entry.label) + 83 for chunk in chunks for entry in chunk)
    if size > MAX_HEADER // 2:
        raise InvalidInput(
            f"{out}: expected at most {MAX_HEADER >> 21} MiB of ids, labels and digests in one file, got "
            f"{sum(map(len, chunks)):,} pictures with {size >> 20} MiB; build a store, which has no such limit: "
            f"{out.with_suffix(SUFFIX)}"
        )


def write(
    out: Path, folder: Path, chunks: Sequence[Chunk], made: dict[int, str], notes: Notes
) -> tuple[int, tuple[Skip, ...]]:
    """Writes the set; returns the number of its items, and what was left out.

    Args:
        out: ``NAME.negation`` for a store, which is filled bit by bit; a safetensors file otherwise.
        folder: Of the build.
        chunks: Of the source.
        made: The part of each chunk.
        notes: For a store.

    Raises:
        SteerclearError: If a part is missing or damaged.
        InvalidInput: If there is nothing to write.
        NegationFileError: If the target cannot be written.
    """
    skipped: list[Skip] = []
    items = _items(folder, chunks, made, skipped)
    try:
        number = _into_store(out, items, notes) if out.suffix == SUFFIX else _into_file(out, items)
    except OSError as error:
        raise NegationFileError(f"{out}: expected a place that may be written, got {error.strerror}") from error
    if number:
        return number, tuple(skipped)
    reasons = "; ".join(f"{Path(skip.source).name}: {skip.reason}" for skip in skipped[:5])
    raise InvalidInput(f"build: expected at least one usable picture among {len(skipped)}, got none ({reasons})")


def _items(folder: Path, chunks: Sequence[Chunk], made: dict[int, str], skipped: list[Skip]) -> Iterator[Item]:
    first: dict[str, str] = {}
    ids: set[str] = set()
    for index, chunk in enumerate(chunks):
        part = parts.read(folder / made[index])
        if part is None or len(part.rows) != len(chunk):
            raise SteerclearError(f"build: expected a whole part {made[index]} in {folder}, got none; run again")
        for entry, row in zip(chunk, part.rows, strict=True):
            if row.latent is None:
                skipped.append(Skip(source=entry.source, reason=row.reason))
            elif row.text in first:
                skipped.append(Skip(source=entry.source, reason=f"the same picture as {first[row.text]}"))
            else:
                names = (entry.id if k == 1 else f"{entry.id} ({k})" for k in count(1))
                name = next(name for name in names if name and name not in ids)
                first[row.text] = name
                ids.add(name)
                yield Item(row.latent, name, entry.label, entry.licence, row.text, entry.source, part.space)


def _into_file(out: Path, items: Iterator[Item]) -> int:
    listed = list(items)
    if listed:
        _set(listed).save(out)
    return len(listed)


def _into_store(out: Path, items: Iterator[Item], notes: Notes) -> int:
    """A store under a hidden name, renamed when it is whole."""
    draft = out.parent / f".{out.name}.building"
    shutil.rmtree(draft, ignore_errors=True)
    number, store = 0, None
    try:
        while batch := list(islice(items, BATCH)):
            store = store or NegationStore.create(draft, batch[0].space)
            store.add(
                _set(batch),
                provenance=[clean(item.source) if notes.provenance is None else notes.provenance for item in batch],
                licence=[item.licence or notes.licence for item in batch],
            )
            number += len(batch)
        if store is not None:
            store.close()
            draft.rename(out)
            sync_folder(out.parent)  # the parts are deleted next
    finally:
        if store is not None:
            store.close()
        shutil.rmtree(draft, ignore_errors=True)
    return number


def _set(items: list[Item]) -> NegationSet:
    return NegationSet(
        latents=torch.stack([item.latent for item in items]),
        space=items[0].space,
        ids=tuple(item.id for item in items),
        labels=tuple(item.label for item in items),
        digests=tuple(item.digest for item in items),
    )

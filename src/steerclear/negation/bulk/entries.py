"""What a source lists: pictures of which nothing was read yet, in one order, cut into chunks."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

CHUNK_ENTRIES, CHUNK_BYTES = 64, 64 << 20
MAX_TEXT = 1000  # characters of an id, a label or a licence note


class Entry(NamedTuple):
    """One picture, and where its bytes are.

    Args:
        id: Its name in the set.
        label: As in the set.
        licence: A note, for stores.
        file: That holds it.
        inside: What it is called within ``file``, for people; empty where it is all of it.
        offset: First byte in ``file``, or row of a Parquet row group.
        size: Bytes; of a Parquet row, what it should have on average.
        stamp: When ``file`` changed last, in nanoseconds.
        group: Parquet row group; -1 for bytes that lie in ``file`` as they are.
        trouble: Why it cannot be used, as far as the listing knows.
    """

    id: str
    label: str
    licence: str
    file: str
    inside: str = ""
    offset: int = 0
    size: int = 0
    stamp: int = 0
    group: int = -1
    trouble: str = ""

    @property
    def source(self) -> str:
        """What it is called in reports."""
        return f"{self.file}: {self.inside}" if self.inside else self.file


Chunk: TypeAlias = tuple[Entry, ...]


def clean(text: str) -> str:
    """Text that every file and database takes: bytes that are no text as escapes, no NUL, not too long."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "")[:MAX_TEXT]


def cut(entries: Iterable[Entry]) -> Iterator[Chunk]:
    """Neighbours that are made together: at most 64, at most 64 MiB if there are several, of one Parquet row group."""
    chunk: list[Entry] = []
    size = 0
    for entry in entries:
        full = len(chunk) == CHUNK_ENTRIES or size + entry.size > CHUNK_BYTES
        if chunk and (full or entry.group != chunk[-1].group or (entry.group >= 0 and entry.file != chunk[-1].file)):
            yield tuple(chunk)
            chunk, size = [], 0
        chunk.append(entry)
        size += entry.size
    if chunk:
        yield tuple(chunk)


def digest(chunks: Iterable[Chunk]) -> str:
    """A hash of a whole listing, with sizes and times of change: what ranks must agree on. Not of the folder's name."""
    state = hashlib.sha256()
    for chunk in chunks:
        rows = [(e.id, e.label, e.inside, e.offset, e.size, e.stamp, e.group, e.trouble) for e in chunk]
        state.update(json.dumps(rows).encode())
    return state.hexdigest()

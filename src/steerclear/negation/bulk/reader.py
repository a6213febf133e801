"""The bytes of an entry, wherever they are: all of a file, a slice of a tar file, a row of a Parquet file."""

import os
import stat
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from steerclear.negation.bulk.entries import Entry
from steerclear.negation.images import MAX_BYTES, Unusable

if TYPE_CHECKING:
    from steerclear.negation.bulk.parquet import Rows


class Reader:
    """Reads entries, best in their order.

    Args:
        root: Folder of the paths in Parquet files; ``None`` for each file's own.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root

    @cached_property
    def _rows(self) -> "Rows":
        from steerclear.negation.bulk.parquet import Rows  # pyarrow takes a while to import

        return Rows(self._root)

    def __call__(self, entry: Entry) -> bytes:
        """The file of one picture, still encoded.

        Raises:
            Unusable: If it cannot be read. At most 256 MiB are in memory at once.
        """
        if entry.trouble:
            raise Unusable(entry.trouble)
        try:
            if entry.group < 0:
                return _slice(Path(entry.file), entry.offset, entry.size if entry.inside else None)
            found = self._rows.read(entry)
            return found if isinstance(found, bytes) else _slice(found, 0, None)
        except OSError as error:
            raise Unusable(error.strerror or type(error).__name__) from error


def _slice(path: Path, offset: int, size: int | None) -> bytes:
    """``size`` bytes from ``offset`` on, or all of the file."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb", buffering=0) as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise Unusable("a folder or device")
        wanted = status.st_size if size is None else size
        if not 0 < wanted <= MAX_BYTES:
            raise Unusable(f"a file of {wanted} bytes (expected 1 to {MAX_BYTES})")
        file.seek(offset)
        data = bytearray()
        while len(data) < wanted and (some := file.read(wanted - len(data))):
            data += some
    if len(data) < wanted:
        raise Unusable(f"{wanted} bytes, of which {len(data)} are there")
    return bytes(data)

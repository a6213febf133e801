"""The vectors of a negation store: one flat file per generation, only ever appended to, and mapped by readers.

Row ``n`` begins at byte ``n * width``. The file is longer than its rows: the room at its end takes no space on disk and
lets readers go on with the mapping they have. Which rows count is the database's to say, so what a killed writer left
behind the last row is overwritten by the next one, and was never visible.
"""

import hashlib
import mmap
import os
import re
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from steerclear.errors import InvalidInput
from steerclear.negation.database import Head, damaged

_NAME = re.compile(r"vectors-\d{6,15}\.bin")
# Not through links, and not waiting for the other end of a pipe; names that not every system has.
_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
SPARE = 1 << 20  # bytes of room at the least; a quarter of the file if that is more
BLOCK = 1 << 24  # bytes copied or hashed at a time


def path_of(folder: Path, generation: int) -> Path:
    """The file of a generation."""
    return folder / f"vectors-{generation:06d}.bin"


def stray(folder: Path, generation: int) -> list[Path]:
    """Files of other generations than the present one: what a killed compaction left."""
    return [
        path for path in sorted(folder.iterdir()) if _NAME.fullmatch(path.name) and path != path_of(folder, generation)
    ]


def rows_of(latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Latents as they are stored: ``(n, D)`` on the host.

    Raises:
        InvalidInput: If ``dtype`` cannot hold one of them.
    """
    rows = latents.detach().flatten(1).cpu().to(dtype).contiguous()
    if not bool(rows.isfinite().all()):
        raise InvalidInput(
            f"expected latents that {dtype} can hold, got values up to {latents.abs().max():.3g}; make the store with "
            "dtype=torch.float32"
        )
    return rows


def content(rows: Tensor) -> memoryview:
    """The bytes of contiguous rows."""
    return memoryview(rows.view(torch.uint8).numpy()).cast("B")  # pyright: ignore[reportArgumentType]


def digests(rows: Tensor) -> list[bytes]:
    """sha256 of each row's bytes."""
    data, width = content(rows), rows.shape[1] * rows.element_size()
    return [hashlib.sha256(data[start : start + width]).digest() for start in range(0, len(data), width)]


def opened(path: Path, flags: int = os.O_RDONLY) -> int:
    """A handle of a plain file."""
    handle = os.open(path, flags | _FLAGS, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise damaged(path, "a device, pipe or folder", "a plain file")
    return handle


def append(handle: int, start: int, rows: Tensor) -> None:
    """Write ``rows`` at row ``start`` and wait until they are on disk."""
    data, width = content(rows), rows.shape[1] * rows.element_size()
    end = start * width + len(data)
    if os.fstat(handle).st_size < end:
        os.ftruncate(handle, end + max(end // 4, SPARE) // width * width)
    write(handle, start * width, data)
    os.fsync(handle)


def write(handle: int, offset: int, data: memoryview) -> None:
    """All of ``data`` at ``offset``."""
    os.lseek(handle, offset, os.SEEK_SET)
    while data:
        data = data[os.write(handle, data) :]


def mapped(folder: Path, head: Head) -> Tensor:
    """The file's rows ``(capacity, *shape)``, at least ``head.rows`` of them: shared memory that must not be written.

    Raises:
        FileNotFoundError: If the generation is gone.
        NegationFileError: If the file is shorter than its rows, or no plain file.
    """
    path = path_of(folder, head.generation)
    handle = opened(path)
    try:
        size = os.fstat(handle).st_size
        if size < head.rows * head.width:
            raise damaged(path, f"{size} bytes", f"{head.rows} rows of {head.width} bytes")
        capacity = size // head.width
        if not capacity:
            return torch.empty(0, *head.space.shape, dtype=head.dtype)
        memory = mmap.mmap(handle, capacity * head.width, access=mmap.ACCESS_READ)
    finally:
        os.close(handle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only memory is what is wanted
        return torch.frombuffer(memory, dtype=head.dtype).view(capacity, *head.space.shape)


def blocks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Runs of ``(n, D)`` of some megabytes, each with the number of its first row."""
    some = max(1, BLOCK // max(1, rows.shape[1] * rows.element_size()))
    return ((start, rows[start : start + some]) for start in range(0, len(rows), some))

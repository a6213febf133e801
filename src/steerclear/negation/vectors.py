"""The vectors of a negation store: one flat file per generation, only ever appended to, and mapped by readers.

Row ``n`` begins at byte ``n * width``. The file is longer than its rows: the room at its end takes no space on disk and
lets readers go on with the mapping they have. Which rows count is the database's to say, so what a killed writer left
behind the last row is overwritten by the next one, and was never visible.

Beside the file of a generation that a compaction made lies a list of the rows that it kept, for readers that know the
generation before: what they know of those they need not read again. Nothing depends on it.
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

_NAME = re.compile(r"(vectors|kept)-(\d{6,15})\.bin")
# Not through links, and not waiting for the other end of a pipe; names that not every system has.
_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
SPARE = 1 << 20  # bytes of room at the least; a quarter of the file if that is more
BLOCK = 1 << 24  # bytes copied or hashed at a time


def path_of(folder: Path, generation: int) -> Path:
    """The file of a generation."""
    return folder / f"vectors-{generation:06d}.bin"


def kept_of(folder: Path, generation: int) -> Path:
    """The list of rows that a generation was made of."""
    return folder / f"kept-{generation:06d}.bin"


def write_kept(folder: Path, generation: int, rows: list[int]) -> None:
    """Which rows of the generation before are the first ones of this, ascending. Not flushed: it has a checksum."""
    path, data = kept_of(folder, generation), torch.tensor(rows, dtype=torch.int64).numpy().tobytes()
    path.unlink(missing_ok=True)  # of a compaction that was killed
    handle = opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write(handle, 0, memoryview(hashlib.sha256(data).digest() + data))
    finally:
        os.close(handle)


def kept(folder: Path, head: Head) -> Tensor | None:
    """The rows that :func:`write_kept` wrote of the present generation, int64; ``None`` without a whole list."""
    try:
        handle = opened(kept_of(folder, head.generation))
    except FileNotFoundError:
        return None
    with os.fdopen(handle, "rb") as file:
        data = bytearray(file.read(32 + 8 * head.rows + 1))
    if len(data) > 32 + 8 * head.rows or len(data) % 8 or hashlib.sha256(data[32:]).digest() != bytes(data[:32]):
        return None
    rows = torch.frombuffer(data, dtype=torch.int64)[4:]
    return rows if bool((rows.diff(prepend=torch.tensor([-1])) > 0).all()) else None


def stray(folder: Path, generation: int) -> list[Path]:
    """Files of other generations than the present one: what a killed compaction left."""
    own = {path_of(folder, generation), kept_of(folder, generation)}
    return [path for path in sorted(folder.iterdir()) if _NAME.fullmatch(path.name) and path not in own]


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

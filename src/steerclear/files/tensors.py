"""Safetensors files: the same bytes for the same content, and a reader for files that are not trusted.

A file is eight bytes with the length of a header, the header, a JSON object that gives every tensor's dtype, shape and
place, and the tensors' bytes without gaps (little-endian, as all machines are that this package runs on).

Written: metadata sorted by key, tensors by size of their numbers, then by name, as safetensors itself does, and the
header padded so that every tensor is aligned. Nothing depends on the machine, the time or the order of a hash table.

Read: by one open file from the first check to the last byte, so that a concurrent replacement cannot mix two versions;
nothing is allocated that the file's real size does not back, nothing is executed, and of the header only what is
expected is built in memory.
"""

import json
import math
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from steerclear.files.atomic import write_atomic
from steerclear.files.scan import Malformed, Scanner

#: Bytes of a header, most: some 140 000 items with ids, labels and digests. Safetensors itself stops at 100 MB.
MAX_HEADER = 32 << 20
MAX_TENSORS, MAX_METADATA, MAX_DIMENSIONS = 64, 64, 16
#: Bytes that are read and hashed at a time.
CHUNK = 1 << 20
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


class Entry(NamedTuple):
    """Where a tensor is: its bytes are those from ``start`` to ``stop`` of the file."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, atomically; equal content gives equal bytes.

    Raises:
        OSError, ValueError: As for :func:`~steerclear.files.write_atomic`.
    """
    write_atomic(path, parts(tensors, metadata))


def parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of such a file, in order: the header, and each tensor's without a copy where there is none to make."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in order:
        size = tensors[name].numel() * tensors[name].element_size()
        place = {"dtype": _CODES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name] = {**place, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield data(tensors[name])


def data(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class TensorFile:
    """An open safetensors file whose header has been checked; a context manager.

    Args:
        path: The file.
        most: Tensors, at most.

    Raises:
        OSError: If it cannot be opened.
        Malformed: If it is no such file. ValueError: for a path that no system can have.
    """

    def __init__(self, path: Path, most: int = MAX_TENSORS) -> None:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe must not block
        handle = os.open(path, flags)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
                raise Malformed(kind, "a file")
            self._file = os.fdopen(handle, "rb", buffering=0, closefd=False)
            self.size = status.st_size
            self.metadata, self.entries = self._header(most)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._handle)

    def read(self, name: str, seen: Callable[[memoryview], object] | None = None) -> Tensor:
        """A tensor in memory of its own; ``seen`` is shown its bytes as they are read, such as a hash's ``update``."""
        entry = self.entries[name]
        try:
            raw = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:
            raise Malformed(f"{name} of {(entry.stop - entry.start) >> 20} MiB, more than there is memory") from error
        view, position = raw.numpy().data, 0
        for chunk in self._chunks(entry):
            view[position : position + len(chunk)] = chunk
            position += len(chunk)
            if seen is not None:
                seen(chunk)
        return raw.view(_DTYPES[entry.code]).reshape(entry.shape)

    def show(self, name: str, seen: Callable[[memoryview], object]) -> None:
        """Show a tensor's bytes without keeping them."""
        for chunk in self._chunks(self.entries[name]):
            seen(chunk)

    def map(self, name: str) -> Tensor:
        """A tensor in the file's own pages, read as they are used and dropped when memory is short.

        Private to this process: writing to it changes no file. Whoever changes the file in place changes the tensor;
        whoever makes the file shorter ends the process with a bus error. Replacing the file does neither.
        """
        entry = self.entries[name]
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=_DTYPES[entry.code])
        if entry.start % _DTYPES[entry.code].itemsize:
            raise Malformed(f"{name} at byte {entry.start}, which is not aligned", "aligned tensors to map")
        pages = mmap.mmap(self._handle, self.size, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(pages, dtype=_DTYPES[entry.code], count=math.prod(entry.shape), offset=entry.start)
        return flat.reshape(entry.shape)

    def _chunks(self, entry: Entry) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(CHUNK, entry.stop - entry.start)))
        position = self._file.seek(entry.start)
        while position < entry.stop:
            count = self._file.readinto(buffer[: entry.stop - position])
            if not count:
                raise Malformed(f"a file that became shorter than {entry.stop} bytes while it was read")
            yield buffer[:count]
            position += count

    def _header(self, most: int) -> tuple[dict[str, str], dict[str, Entry]]:
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, self.size - 8):
            raise Malformed(f"a header of {length} bytes in a file of {self.size}")
        raw = bytearray()
        while len(raw) < length:
            if not (some := self._file.read(min(CHUNK, length - len(raw)))):
                raise Malformed("a header that became shorter while it was read")
            raw += some
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise Malformed("a header that is no text") from error
        metadata, entries = _parsed(Scanner(text, "the header"), 8 + length, most)
        position = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            if entry.start != position:
                raise Malformed(f"a gap or an overlap before {name[:40]!r}")
            position = entry.stop
        if position != self.size:
            raise Malformed(f"a file of {self.size} bytes whose tensors end at {position}")
        return metadata, entries


def _parsed(scanner: Scanner, offset: int, most: int) -> tuple[dict[str, str], dict[str, Entry]]:
    metadata: dict[str, str] = {}
    entries: dict[str, Entry] = {}
    for name in scanner.keys(most + 1):
        if name == "__metadata__":
            metadata = {key: scanner.string() for key in scanner.keys(MAX_METADATA)}
        else:
            entries[name] = _entry(scanner, name, offset)
    scanner.end()
    return metadata, entries


def _entry(scanner: Scanner, name: str, offset: int) -> Entry:
    code, shape, place = "", None, None
    for key in scanner.keys(3):
        match key:
            case "dtype":
                code = scanner.string()
            case "shape":
                shape = scanner.integers(MAX_DIMENSIONS)
            case "data_offsets":
                place = scanner.integers(2)
            case _:
                raise scanner.bad(f"an unknown {key[:40]!r}")
    if code not in _DTYPES or shape is None or place is None or len(place) != 2:
        raise Malformed(f"{name[:40]!r} without a known dtype, a shape and a place")
    if place[1] - place[0] != math.prod(shape) * _DTYPES[code].itemsize:
        raise Malformed(f"{name[:40]!r} of {place[1] - place[0]} bytes for {code} {shape}")
    return Entry(code, tuple(shape), offset + place[0], offset + place[1])

"""WebDataset: tar files whose members of one name belong together, ``1.jpg`` with ``1.json``, ``.cls`` or ``.txt``.

Read with the standard library, header by header; nothing is extracted to disk, and links and devices are not followed.
The pictures' bytes are read later, straight from the tar file, by offset: so it must not be compressed.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, cast

from PIL import Image

from steerclear.errors import NegationFileError
from steerclear.negation.bulk.entries import Entry, clean

MAX_HEADER, MAX_NOTE = 1 << 20, 1 << 20
Member = tuple[str, str, tarfile.TarInfo]  # key, extension, where


def entries(file: Path) -> Iterator[Entry]:
    """One entry for each sample, and for each member that is none.

    Raises:
        NegationFileError: If the file is no whole, uncompressed tar file. That is found before anything is encoded.
    """
    try:
        with file.open("rb", buffering=0) as raw:
            stamp = os.fstat(raw.fileno()).st_mtime_ns
            seen: set[str] = set()
            for key, members in groupby(_members(cast("BinaryIO", raw)), key=lambda member: member[0]):
                repeated, _ = key in seen, seen.add(key)
                for entry in _sample(file, key, list(members), raw.fileno()):
                    trouble = "its key names an earlier sample" if repeated else entry.trouble
                    yield entry._replace(stamp=stamp, trouble=trouble)
    except (tarfile.TarError, OSError, ValueError, RecursionError, OverflowError) as error:
        raise NegationFileError(
            f"{file}: expected a whole, uncompressed tar file, got {error or type(error).__name__}; "
            "fetch it again, unpack a compressed one, or leave it out"
        ) from error


def _members(raw: BinaryIO) -> Iterator[Member]:
    """Visible members that are no folders, in order."""
    size = os.fstat(raw.fileno()).st_size
    tar: Any = tarfile.TarFile(fileobj=cast("Any", _Guarded(raw)), errors="surrogateescape")
    with tar:
        while (member := tar.next()) is not None:
            tar.members = []  # the standard library would keep them all
            if member.size < 0 or member.offset_data + member.size > size:
                raise tarfile.ReadError(f"{member.name!r:.80} of {member.size} bytes, more than there are")
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if stem and not member.isdir():
                yield f"{folder}/{stem}" if folder else stem, extension.lower(), member
        _check_end(raw, tar.offset, size)


class _Guarded(io.RawIOBase):
    """A file of which headers are read, always forward and never more than a little at once."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._read_to = raw, 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = self._raw.read(size)
        self._read_to = max(self._read_to, self._raw.tell())
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence or offset < self._read_to - 1:
            raise tarfile.ReadError(f"a member that begins before byte {self._read_to}, in the one before it")
        return self._raw.seek(offset)

    def tell(self) -> int:
        return self._raw.tell()


def _check_end(raw: BinaryIO, offset: int, size: int) -> None:
    """The standard library takes any odd header for the end; the end is a block of zeros, and nothing but zeros."""
    rest = os.pread(raw.fileno(), MAX_HEADER, offset)
    if len(rest) < 512 or any(rest[:512]):
        raise tarfile.ReadError(f"no end mark at byte {offset} of {size}: cut off, or damaged there")
    if size - offset > MAX_HEADER or any(rest):
        raise tarfile.ReadError(f"more data after the end mark at byte {offset} of {size}: several tar files in one")


def _sample(file: Path, key: str, members: list[Member], handle: int) -> Iterator[Entry]:
    notes = _notes(members, handle)
    made = Entry(f"{file.stem}/{key}", notes.get("label", ""), notes.get("licence", ""), str(file), clean(key))
    found = 0
    for _, extension, member in members:
        inside = made._replace(inside=clean(member.name), offset=member.offset_data, size=member.size)
        if not member.isreg() or member.issparse():
            found += 1
            yield inside._replace(size=0, trouble="a link, device or sparse file")
        elif f".{extension.rpartition('.')[2]}" in Image.registered_extensions():
            found += 1
            yield inside if found == 1 else inside._replace(trouble="a second picture of its sample")
    if not found:
        yield made._replace(trouble="a sample without a picture")


def _notes(members: list[Member], handle: int) -> dict[str, str]:
    """Label and licence: from ``.json``, else the class of ``.cls``, else the caption of ``.txt``."""
    texts: dict[str, str] = {}
    for _, extension, member in members:
        if extension in ("json", "cls", "txt") and member.isreg() and member.size <= MAX_NOTE:
            texts[extension] = os.pread(handle, member.size, member.offset_data).decode(errors="replace").strip()
    try:
        said: Any = json.loads(texts.get("json", "{}"))
    except (ValueError, RecursionError):
        said = {}
    said = said if isinstance(said, dict) else {}
    label = said.get("label", texts.get("cls", texts.get("txt", "")))
    licence = said.get("licence", said.get("license", ""))
    return {name: str(v) for name, v in (("label", label), ("licence", licence)) if _plain(v)}


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float)

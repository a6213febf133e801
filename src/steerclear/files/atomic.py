"""Atomic replacement of a file."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable
from pathlib import Path


def write_atomic(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes ``content`` to ``path``, making its folder. A kill at any moment leaves the old file or the new, whole.

    A temporary file beside ``path``, fsync, rename, fsync of the folder. A process that is killed half-way may leave a
    hidden ``.tmp`` file. Whoever has the older file open or mapped keeps it as it was (not on Windows, which refuses to
    replace an open file).

    Args:
        path: Target.
        content: All of it, or parts in their order: made one at a time, they need no room together.

    Raises:
        OSError: If the folder or the file cannot be written. What is there then is the older file, or the new one.
        ValueError: For a path that no system can have.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name[:40]}.{secrets.token_hex(6)}.tmp"
    binary = getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | binary, 0o666)
        try:
            for part in [content] if isinstance(content, bytes) else content:
                _write_all(handle, part)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(draft, path)  # noqa: PTH105 - named like the system call that makes it atomic
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError, ValueError):
            draft.unlink(missing_ok=True)


def _write_all(handle: int, content: bytes | memoryview) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]


def sync_folder(folder: Path) -> None:
    """Make new names in ``folder`` durable, where the system can: Windows and some network drives cannot."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)

"""A lock that ends with the process that holds it."""

import errno
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


@contextmanager
def alone(path: Path) -> Generator[None]:
    """Holds the lock of the file ``path``, which nobody else needs; the system takes it back from a killed process.

    Such a process leaves the file behind, which means nothing. Where a file system has no locks, nobody is kept out.

    Raises:
        BlockingIOError: If somebody holds it, in this process or another.
        OSError: If the file cannot be made.
    """
    handle = _held(path)
    try:
        yield
    finally:
        with suppress(OSError):  # a system that keeps open files keeps this one
            path.unlink(missing_ok=True)
        os.close(handle)


def _held(path: Path) -> int:
    while True:
        handle = os.open(path, _FLAGS, 0o666)
        try:
            _lock(handle)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.lstat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # of a file that its holder has removed in the meantime: the next look makes a new one


def _lock(handle: int) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EDEADLK):  # as Windows says it
            raise BlockingIOError(*error.args) from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise

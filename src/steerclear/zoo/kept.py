"""What takes long to work out, kept for other processes in the user's cache folder."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from steerclear.errors import InvalidInput
from steerclear.files import states

MOST = 8  # files; the newest stay


def folder() -> Path:
    """``steerclear`` in ``XDG_CACHE_HOME``, or else in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steerclear"


def kept(key: Any, make: Callable[[], Any]) -> Any:  # noqa: ANN401  (states)
    """What ``make()`` gives, or gave for the same ``key``; both are states (:mod:`steerclear.files.states`).

    A folder that cannot be written or a file that cannot be read costs time, and nothing else.

    Args:
        key: All that the result depends on.
        make: Works it out.
    """
    name = f"{states.digest(key)}.safetensors"
    with suppress(InvalidInput, OSError, RuntimeError):  # the last where nobody is at home
        return states.read(folder() / name)
    made = make()
    with suppress(OSError, RuntimeError):
        states.write(folder() / name, made)
        for older in sorted(folder().glob("*.safetensors"), key=lambda file: file.stat().st_mtime)[:-MOST]:
            older.unlink()
    return made

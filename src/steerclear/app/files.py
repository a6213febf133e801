"""Files that are either whole or not there: write beside the target, flush to the disk, then rename."""

import hashlib
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any


def write_atomic(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path``, making its folder. A kill at any moment leaves the old file or the new.

    Raises:
        OSError: If the folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401  (any JSON value)
    """Writes ``value`` as indented JSON, atomically; see :func:`plain` for NaN."""
    write_atomic(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def plain(value: Any) -> Any:  # noqa: ANN401  (any JSON value)
    """``value`` with every NaN as ``None``: JSON has no NaN, and estimates say ``n: 0`` beside it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def slug(text: str, length: int = 40) -> str:
    """A short file name for a text: letters, digits and hyphens; never empty."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].strip("-") or "prompt"

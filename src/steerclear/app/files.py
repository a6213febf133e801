"""JSON files, their numbers and their names. How files are written: :func:`steerclear.files.write_atomic`."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from steerclear.files import write_atomic


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

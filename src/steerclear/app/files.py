"""JSON files and their names. How files are written: :func:`steerclear.files.write_atomic`."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from steerclear.files import write_atomic
from steerclear.files.plain import plain


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401  (any JSON value)
    """Writes ``value`` as indented JSON, atomically; see :func:`plain` for NaN."""
    write_atomic(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def slug(text: str, length: int = 40) -> str:
    """A short file name for a text: letters, digits and hyphens; never empty."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].strip("-") or "prompt"

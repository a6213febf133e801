"""What an interrupted training goes on from: one safetensors file with all of its state."""

from pathlib import Path
from typing import Any

from steerclear.errors import InvalidInput
from steerclear.files.states import read
from steerclear.files.states import write as store

__all__ = ["resume", "store"]


def resume(path: Path) -> dict[str, Any] | None:
    """What was stored, or ``None`` where there is nothing yet.

    Raises:
        InvalidInput: For a damaged file or another one; also if an older recipe left a pickle in its place.
    """
    if path.exists():
        return read(path)
    if (older := path.with_suffix(".pt")).exists():
        raise InvalidInput(
            f"{older}: expected a checkpoint in safetensors ({path.name}), got one in torch's format, which is not "
            "read; remove it to start again"
        )
    return None

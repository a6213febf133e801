"""Which model drew a picture, so that a resumed run never mixes two."""

import json
from pathlib import Path

from steerclear import zoo
from steerclear.app.files import sha256


def identity(name_or_path: str) -> str:
    """The name of a model, and for files on this machine a hash of their names, sizes and times of change.

    A changed weight file gives another identity; a copied folder may as well, which only costs a redrawn picture.
    """
    shipped = {model.name: model.path for model in zoo.shipped()}
    folder = shipped.get(name_or_path, Path(name_or_path))
    if not folder.is_dir():
        return name_or_path
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"{folder.name} {sha256(json.dumps(listed).encode())[:16]}"

"""Part files: what became of the pictures of one chunk, by the hash of their contents.

A part is one safetensors file: ``contents (n, 32)``, sha256 of every entry's bytes; ``latents (k, *shape)`` in float16,
of the entries that are usable, in order; and as metadata one text for each entry, the digest of its pixels or ``!`` and
why it was left out, the space, and a checksum over all this. Its name is the hash of its contents, so it says itself
what it holds, and a part that was finished is never made again. Written whole or not at all.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steerclear.errors import InvalidInput, NegationFileError
from steerclear.files import tensors
from steerclear.files.scan import Malformed, Scanner
from steerclear.negation.bulk.entries import CHUNK_ENTRIES
from steerclear.negation.space import Space

FORMAT = "steerclear.negation.part"
_SIGNED = ("format", "rows", "space")


class Row(NamedTuple):
    """What became of one entry: a latent and the digest of its pixels, or why there is none."""

    content: bytes
    text: str
    latent: Tensor | None

    @property
    def reason(self) -> str:
        """Why it was left out; empty if it was not."""
        return self.text[1:] if self.latent is None else ""


class Part(NamedTuple):
    """What a part file holds."""

    rows: tuple[Row, ...]
    space: Space


def name(contents: Sequence[bytes]) -> str:
    """Of the part with these contents."""
    return hashlib.sha256(b"".join(contents)).hexdigest()[:32] + ".safetensors"


def write(folder: Path, rows: Sequence[Row], space: Space) -> str:
    """Writes a part and returns its name.

    Raises:
        NegationFileError: If the folder cannot be written.
    """
    latents = [row.latent for row in rows if row.latent is not None]
    contents = np.frombuffer(b"".join(row.content for row in rows), np.uint8).reshape(-1, 32)
    values = {
        "contents": torch.from_numpy(contents.copy()),
        "latents": torch.stack(latents) if latents else torch.zeros(0, *space.shape, dtype=torch.float16),
    }
    where = {"encoder": space.encoder, "name": space.name, "shape": ",".join(map(str, space.shape))}
    metadata = {"format": FORMAT, "rows": json.dumps([row.text for row in rows]), "space": json.dumps(where)}
    metadata["sha256"] = _checksum(metadata, values)
    made = name([row.content for row in rows])
    try:
        tensors.write(folder / made, values, metadata)
    except OSError as error:
        raise NegationFileError(
            f"{folder}: expected a folder that may be written, got {error.strerror}; free space, change the "
            "permissions, or give another folder. What was finished is kept"
        ) from error
    return made


def read(path: Path) -> Part | None:
    """A part; ``None`` if there is none, or no whole one."""
    try:
        with tensors.TensorFile(path) as file:
            values = {key: file.read(key) for key in ("contents", "latents")}
            if file.metadata.get("format") != FORMAT or file.metadata.get("sha256") != _checksum(file.metadata, values):
                return None
            part = _parsed(file.metadata, values)
    except (OSError, ValueError, KeyError, Malformed, InvalidInput):
        return None
    return part if part is not None and path.name == name([row.content for row in part.rows]) else None


def _parsed(metadata: dict[str, str], values: dict[str, Tensor]) -> Part | None:
    scanner = Scanner(metadata["space"], "the space")
    where = {key: scanner.string() for key in scanner.keys(3)}
    shape = tuple(int(number) for number in where["shape"].split(","))
    space = Space(encoder=where["encoder"], shape=shape, name=where["name"])
    texts = Scanner(metadata["rows"], "the rows").strings(CHUNK_ENTRIES)
    contents, latents = values["contents"], values["latents"]
    usable = sum(not text.startswith("!") for text in texts)
    if (
        contents.dtype != torch.uint8
        or latents.dtype != torch.float16
        or tuple(contents.shape) != (len(texts), 32)
        or tuple(latents.shape) != (usable, *shape)
        or not bool(latents.isfinite().all())
    ):
        return None
    hashes, rest = contents.numpy(), iter(latents)
    rows = tuple(
        Row(hashes[i].tobytes(), text, None if text.startswith("!") else next(rest)) for i, text in enumerate(texts)
    )
    return Part(rows, space)


def _checksum(metadata: dict[str, str], values: dict[str, Tensor]) -> str:
    state = hashlib.sha256()
    for key in _SIGNED:
        state.update(metadata[key].encode() + b"\0")
    for key in ("contents", "latents"):
        state.update(tensors.data(values[key]))
    return state.hexdigest()


class Known:
    """What earlier runs made, by content: a picture that was moved or renamed is found again.

    Args:
        folder: Of the parts; read once, 12 bytes of memory for each picture in it.
    """

    def __init__(self, folder: Path) -> None:
        hashes: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        self._paths: list[Path] = []
        for path, contents in _contents(folder):
            hashes.append(np.ascontiguousarray(contents[:, :8]).view("<u8")[:, 0])
            owners.append(np.full(len(contents), len(self._paths), np.int32))
            self._paths.append(path)
        together = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
        order = np.argsort(together, kind="stable")
        self._hashes = together[order]
        self._owners = np.concatenate(owners)[order] if owners else np.zeros(0, np.int32)
        self._load = lru_cache(maxsize=8)(_by_content)

    def row(self, content: bytes) -> Row | None:
        """What became of a picture with this content, if it is known."""
        key = np.frombuffer(content[:8], "<u8")[0]
        start, stop = (int(np.searchsorted(self._hashes, key, side)) for side in ("left", "right"))
        for owner in self._owners[start:stop]:
            if (row := self._load(self._paths[int(owner)]).get(content)) is not None:
                return row
        return None


def _contents(folder: Path) -> Iterator[tuple[Path, np.ndarray]]:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with tensors.TensorFile(path) as file:
                contents = file.read("contents")
        except (OSError, ValueError, KeyError, Malformed):
            continue  # damaged, or being swept away: its pictures are made again
        if contents.dtype == torch.uint8 and contents.ndim == 2 and contents.shape[1] == 32:
            yield path, contents.numpy()


def _by_content(path: Path) -> dict[bytes, Row]:
    part = read(path)
    return {} if part is None else {row.content: row for row in part.rows}

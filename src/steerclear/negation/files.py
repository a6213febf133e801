"""Negation sets on disk: one safetensors file, replaced atomically, distrusted when read.

Layout: tensors ``latents (n, *shape)`` in float16 or float32 and ``weights (n,)`` in float32; in the header's metadata
``format``, ``version``, ``sha256`` over all the rest, and as JSON ``space`` (encoder, shape, name) and ``items`` (ids,
labels, digests). The checksum finds accidents, not attacks: whoever can write the file can write another checksum.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from steerclear.errors import InvalidInput, NegationFileError
from steerclear.negation.space import Space

FORMAT, VERSION = "steerclear.negation", "1"
MAX_HEADER = 32 << 20  # bytes: room for 200 000 items; JSON takes some ten times that in memory
_DTYPES = {"F16", "F32"}


class Stored(NamedTuple):
    """What a file holds, in the order of :class:`NegationSet`'s fields."""

    latents: Tensor
    weights: Tensor
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    digests: tuple[str, ...]
    space: Space


def write(path: Path, stored: Stored, dtype: torch.dtype) -> None:
    """Write ``stored`` to ``path`` so that the file is at any moment the old one or the new one, whole.

    Raises:
        NegationFileError: If the folder is missing, the target is no plain file, the disk is full or read-only.
    """
    latents = stored.latents.detach().cpu().to(dtype).contiguous()
    if not bool(latents.isfinite().all()):
        raise NegationFileError(
            f"{path}: expected latents that {dtype} can hold, got values up to {stored.latents.abs().max():.3g}; "
            "save with dtype=torch.float32"
        )
    space = {"encoder": stored.space.encoder, "shape": stored.space.shape, "name": stored.space.name}
    items = {"ids": stored.ids, "labels": stored.labels, "digests": stored.digests}
    weights = stored.weights.detach().cpu().float().contiguous()
    metadata = {"format": FORMAT, "version": VERSION, "space": _json(space), "items": _json(items)}
    metadata["sha256"] = _checksum(latents, weights, metadata)
    if (size := len(_json(metadata).encode())) > MAX_HEADER // 2:
        raise NegationFileError(
            f"{path}: expected at most {MAX_HEADER >> 21} MiB of ids, labels and digests, got {size >> 20} MiB; "
            "shorten them, or split the set into several files"
        )
    replace(path, to_bytes({"latents": latents, "weights": weights}, metadata=metadata))


def replace(path: Path, content: bytes) -> None:
    """Atomic replacement: a temporary file beside ``path``, fsync, rename, fsync of the folder.

    A process killed half-way may leave a hidden ``.tmp`` file, never a damaged ``path``.
    """
    temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(6)}.tmp"
    try:
        _check_target(path)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _write_all(handle, content)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)  # noqa: PTH105 - named like the system call that makes it atomic
        _sync_folder(path.parent)
    except (OSError, ValueError) as error:
        raise NegationFileError(
            f"{path}: expected a place with {len(content) >> 20} MiB free that may be written, "
            f"got {_reason(error)}; free space, change the permissions, or choose another folder. "
            "What is there now is whole: the older file, or the new one"
        ) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


def read(path: Path) -> Stored:
    """Read and check a file; allocates no more than a few times the file's own size.

    Raises:
        NegationFileError: If it is missing, not a plain file, truncated, of another format, or inconsistent.
    """
    _check_source(path)
    try:
        # One handle for header and tensors: a concurrent save cannot mix two versions.
        with safe_open(path, framework="pt", device="cpu") as file:
            stored = _parse(path, file)
    except (SafetensorError, OSError, InvalidInput, UnicodeError) as error:
        raise _damaged(path, str(error)) from error
    return stored


def _parse(path: Path, file: Any) -> Stored:  # noqa: ANN401 - safetensors' handle is untyped
    metadata: dict[str, str] = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise _damaged(path, f"format {metadata.get('format')!r}", f"format {FORMAT!r}")
    if metadata.get("version") != VERSION:
        raise NegationFileError(
            f"{path}: expected file version {VERSION}, got {metadata.get('version')!r}; "
            "load it with the release of steerclear that wrote it, or encode the pictures again"
        )
    if set(file.keys()) != {"latents", "weights"}:
        raise _damaged(path, f"tensors {sorted(file.keys())[:5]}", "the tensors latents and weights, no others")
    space, items = (_object(path, metadata, key) for key in ("space", "items"))
    shape = space.get("shape")
    if not (isinstance(shape, list) and isinstance(space.get("encoder"), str) and isinstance(space.get("name"), str)):
        raise _damaged(path, "an incomplete space", "a space with encoder, shape and name")
    where = Space(encoder=space["encoder"], shape=tuple(cast("list[int]", shape)), name=space["name"])
    ids, labels, digests = (_strings(path, items, key) for key in ("ids", "labels", "digests"))
    for name, expected in (("latents", [len(ids), *where.shape]), ("weights", [len(ids)])):
        part = file.get_slice(name)
        if part.get_dtype() not in _DTYPES or list(part.get_shape()) != expected:
            raise _damaged(path, f"{name} {part.get_dtype()} {part.get_shape()}", f"{name} F16 or F32 {expected}")
    latents, weights = file.get_tensor("latents"), file.get_tensor("weights")
    if metadata.get("sha256") != _checksum(latents, weights, metadata):
        raise _damaged(path, "content that does not match its checksum")
    # Copies, because the tensors may be views of the mapped file, which somebody may change.
    latents, weights = (tensor.to(torch.float32, copy=True) for tensor in (latents, weights))
    return Stored(latents, weights, ids, labels, digests, where)


def _checksum(latents: Tensor, weights: Tensor, metadata: dict[str, str]) -> str:
    state = hashlib.sha256()
    for key in ("format", "version", "space", "items"):
        state.update(metadata[key].encode() + b"\0")
    for tensor in (latents, weights):
        state.update(tensor.numpy().data)
    return state.hexdigest()


def _object(path: Path, metadata: dict[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, "null"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"unreadable JSON in {key!r}", f"a JSON object in {key!r}") from error
    if not isinstance(value, dict):
        raise _damaged(path, f"{type(value).__name__} in {key!r}", f"a JSON object in {key!r}")
    return cast("dict[str, Any]", value)


def _strings(path: Path, items: dict[str, Any], key: str) -> tuple[str, ...]:
    value = items.get(key)
    if not (isinstance(value, list) and all(isinstance(v, str) for v in cast("list[object]", value))):
        raise _damaged(path, f"{type(value).__name__} in items[{key!r}]", f"a list of strings in items[{key!r}]")
    return tuple(cast("list[str]", value))


def _check_source(path: Path) -> None:
    """A plain file with a header of sane length; opening a pipe or a device could block for ever."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _damaged(path, "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket", "a file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except (OSError, ValueError) as error:
        raise NegationFileError(
            f"{path}: expected a negation set that can be read, got {_reason(error)}; check path and permissions"
        ) from error
    if not 2 <= length <= min(MAX_HEADER, status.st_size - 8):
        raise _damaged(path, f"a header of {length} bytes in a file of {status.st_size}")


def _check_target(path: Path) -> None:
    if path.is_symlink():
        raise NegationFileError(f"{path}: expected a plain file to replace, got a symbolic link; give {path.resolve()}")
    if path.exists() and not path.is_file():
        raise NegationFileError(f"{path}: expected the name of a file, got a folder or device; add a file name")
    if not path.parent.is_dir():
        raise NegationFileError(f"{path}: expected an existing folder, got {path.parent}; create it first")


def _write_all(handle: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can: Windows and some network drives cannot."""
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


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _json(value: object) -> str:
    return json.dumps(value)  # ASCII: file names that are no valid UTF-8 survive as escapes


def _damaged(path: Path, got: str, expected: str = "a negation set written by NegationSet.save") -> NegationFileError:
    return NegationFileError(
        f"{path}: expected {expected}, got {got}; restore the file from a copy, or encode the pictures again"
    )

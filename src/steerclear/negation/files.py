"""Negation sets on disk: one safetensors file, replaced atomically, distrusted when read, equal bytes for equal sets.

Layout: tensors ``latents (n, *shape)`` in float16, bfloat16 or float32 and ``weights (n,)`` in float32; in the header's
metadata ``format``, ``version``, ``sha256`` over all the rest, and as JSON ``space`` (encoder, shape, name) and
``items`` (ids, labels, digests). The checksum finds accidents, not attacks: whoever can write the file can write
another checksum.

Limits: 16 MiB of ids, labels and digests, some 140 000 items; a header of 32 MiB
(:data:`~steerclear.files.tensors.MAX_HEADER`). Reading takes the file's size in memory and, for float32 copies of
half-precision latents, twice that beside it; mapped, some ten times the header. Larger sets belong in a store.
"""

import hashlib
import json
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from steerclear.errors import InvalidInput, NegationFileError
from steerclear.files import write_atomic
from steerclear.files.scan import Malformed, Scanner
from steerclear.files.tensors import MAX_HEADER, TensorFile, data, parts
from steerclear.negation.space import Space

FORMAT, VERSION = "steerclear.negation", "1"
#: What this package writes, by format: in words, and what to do with one in the place of another.
KINDS = {
    FORMAT: ("a negation set", "load it with NegationSet.load; NegationStatistics.of makes statistics of it"),
    "steerclear.statistics": (
        "statistics, which keep no items",
        "load them with NegationStatistics.load, or give the set that they were made of",
    ),
    "steerclear.seen.1": ("references as a model saw them", "load them with SeenReferences.load"),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TEXT = 1 << 20  # characters of JSON of an unknown form, such as a space: what it takes in memory is bounded
LONGEST = 500  # characters of a message that somebody else's file may have written
_CODES = {"F16", "BF16", "F32"}
_SIGNED = ("format", "version", "space", "items")


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
    items = {"ids": stored.ids, "labels": stored.labels, "digests": stored.digests}
    tensors = {"latents": latents, "weights": stored.weights.detach().cpu().float().contiguous()}
    metadata = {"format": FORMAT, "version": VERSION, "space": space_text(stored.space), "items": _json(items)}
    metadata["sha256"] = checksum(metadata, _SIGNED, tensors)
    if (size := len(_json(metadata))) > MAX_HEADER // 2:
        raise NegationFileError(
            f"{path}: expected at most {MAX_HEADER >> 21} MiB of ids, labels and digests, got {size >> 20} MiB; "
            "shorten them, or split the set into several files"
        )
    replace(path, parts(tensors, metadata))


def replace(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """:func:`~steerclear.files.write_atomic` into an existing folder.

    Raises:
        NegationFileError: If it cannot be done; the message says what to do.
    """
    try:
        check_target(path)
        write_atomic(path, content)
    except (OSError, ValueError) as error:
        raise NegationFileError(
            f"{path}: expected a place with enough space that may be written, "
            f"got {_reason(error)}; free space, change the permissions, or choose another folder. "
            "What is there now is whole: the older file, or the new one"
        ) from error


def read(path: Path, *, mapped: bool = False) -> Stored:
    """Read and check a file.

    Args:
        path: The file.
        mapped: Leave the latents in the file's own pages and dtype; see :meth:`NegationSet.load`.

    Raises:
        NegationFileError: If it is missing, not a plain file, truncated, of another format, or inconsistent.
    """
    with opened(path) as file:
        check_format(path, file.metadata, FORMAT, VERSION)
        return _parse(file, mapped)


def format_of(path: Path) -> str | None:
    """What a safetensors file says that it is, unchecked.

    Raises:
        NegationFileError: If it is no such file.
    """
    with opened(path) as file:
        return file.metadata.get("format")


@contextmanager
def opened(path: Path, written: str = "a negation set written by NegationSet.save") -> Generator[TensorFile]:
    """An open file; whatever goes wrong with it becomes one kind of error.

    Args:
        path: The file.
        written: What it should be, for messages.

    Raises:
        NegationFileError: For a file that cannot be opened, and for what the body raises about its content.
    """
    try:
        with TensorFile(path) as file:
            yield file
    except (InvalidInput, Malformed) as error:
        expected = getattr(error, "expected", None) or written
        raise NegationFileError(
            f"{path}: expected {expected}, got {str(error)[:LONGEST]}; "
            "restore the file from a copy, or encode the pictures again"
        ) from error
    except (OSError, ValueError) as error:
        raise NegationFileError(
            f"{path}: expected a negation set that can be read, got {_reason(error)}; check path and permissions"
        ) from error


def check_format(path: Path, metadata: Mapping[str, str], expected: str, version: str) -> None:
    """Raises NegationFileError for a whole file of another kind, or of another version."""
    if (kind := metadata.get("format")) != expected:
        got, instead = KINDS.get(kind or "", (f"a file of format {kind and kind[:40]!r}", "check the path"))
        raise NegationFileError(f"{path}: expected {KINDS[expected][0]}, got {got}; {instead}")
    if (found := metadata.get("version")) != version:
        raise NegationFileError(
            f"{path}: expected file version {version}, got {found and found[:40]!r}; "
            "load it with the release of steerclear that wrote it, or make it again"
        )


def checksum(metadata: Mapping[str, str], keys: Iterable[str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over these entries of the metadata, in this order, and over the tensors' bytes."""
    state = begun(metadata, keys)
    for tensor in tensors.values():
        state.update(data(tensor))
    return state.hexdigest()


def begun(metadata: Mapping[str, str], keys: Iterable[str]) -> Any:  # noqa: ANN401 - hashlib's type has no public name
    """The same checksum before the tensors' bytes."""
    state = hashlib.sha256()
    for key in keys:
        if key not in metadata:
            raise Malformed(f"no {key!r} in its metadata")
        state.update(metadata[key].encode() + b"\0")
    return state


def space_text(space: Space) -> str:
    """A space as JSON."""
    return _json({"encoder": space.encoder, "shape": space.shape, "name": space.name})


def space_of(metadata: Mapping[str, str]) -> Space:
    """The space in a file's metadata.

    Raises:
        Malformed, InvalidInput: If there is none, or none that can be.
    """
    text = metadata.get("space", "null")
    if len(text) > MAX_TEXT:
        raise Malformed(f"{len(text)} characters in 'space'", "a JSON object in 'space'")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed("unreadable JSON in 'space'", "a JSON object in 'space'") from error
    if not isinstance(value, dict):
        raise Malformed(f"{type(value).__name__} in 'space'", "a JSON object in 'space'")
    space = cast("dict[str, Any]", value)
    shape = space.get("shape")
    if not (isinstance(shape, list) and isinstance(space.get("encoder"), str) and isinstance(space.get("name"), str)):
        raise Malformed("an incomplete space", "a space with encoder, shape and name")
    return Space(encoder=space["encoder"], shape=tuple(cast("list[int]", shape)), name=space["name"])


def strings_of(metadata: Mapping[str, str], key: str, most: int) -> tuple[str, ...]:
    """A list of at most ``most`` strings in a file's metadata.

    Raises:
        Malformed: If it is something else.
    """
    try:
        scanner = Scanner(metadata.get(key, ""), repr(key))
        found = tuple(scanner.strings(most))
        scanner.end()
    except Malformed as error:
        raise Malformed(str(error), f"a list of strings in {key}") from error
    return found


def _items(metadata: Mapping[str, str], most: int) -> dict[str, tuple[str, ...]]:
    try:
        scanner = Scanner(metadata.get("items", ""), "'items'")
        found = {name: tuple(scanner.strings(most)) for name in scanner.keys(16)}
        scanner.end()
    except Malformed as error:
        raise Malformed(str(error), "a list of strings in items for each of ids, labels and digests") from error
    return found


def _parse(file: TensorFile, mapped: bool) -> Stored:
    if set(file.entries) != {"latents", "weights"}:
        raise Malformed(f"tensors {sorted(file.entries)[:5]}", "the tensors latents and weights, no others")
    where = space_of(file.metadata)
    items = _items(file.metadata, max((entry.shape or (0,))[0] for entry in file.entries.values()))
    if not {"ids", "labels", "digests"} <= set(items):
        raise Malformed(f"items with {sorted(items)[:5]}", "a list of strings in items for ids, labels and digests")
    ids, labels, digests = (items[key] for key in ("ids", "labels", "digests"))
    for name, expected in (("latents", (len(ids), *where.shape)), ("weights", (len(ids),))):
        part = file.entries[name]
        if part.code not in _CODES or part.shape != expected:
            raise Malformed(f"{name} {part.code} {list(part.shape)}", f"{name} F16, BF16 or F32 {list(expected)}")
    state = begun(file.metadata, _SIGNED)
    # What is hashed is what is returned, even if somebody writes to the file meanwhile; mapped, nobody can promise it.
    copies: dict[str, Tensor] = {}
    if mapped:
        file.show("latents", state.update)
    else:
        copies["latents"] = file.read("latents", state.update)
    weights = file.read("weights", state.update)
    if file.metadata.get("sha256") != state.hexdigest():
        raise Malformed("content that does not match its checksum")
    latents = file.map("latents") if mapped else copies["latents"].float()
    return Stored(latents, weights.float(), ids, labels, digests, where)


def check_target(path: Path) -> None:
    """Raises NegationFileError for a path where no file can be written; look before the work is done."""
    if path.is_symlink():
        raise NegationFileError(f"{path}: expected a plain file to replace, got a symbolic link; give {path.resolve()}")
    if path.exists() and not path.is_file():
        raise NegationFileError(f"{path}: expected the name of a file, got a folder or device; add a file name")
    if not path.parent.is_dir():
        raise NegationFileError(f"{path}: expected an existing folder, got {path.parent}; create it first")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _json(value: object) -> str:
    return json.dumps(value)  # ASCII: file names that are no valid UTF-8 survive as escapes

"""Negation sets for the front doors: a single file, a store or statistics, whichever a path names."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerclear.app.files import sha256
from steerclear.errors import InvalidInput, NegationFileError
from steerclear.negation import Items, NegationSet, NegationStatistics, NegationStore, files, statistics
from steerclear.negation.database import NAME
from steerclear.negation.store import SUFFIX

BLOCK = 1 << 12  # items whose norms are taken at a time
FILE, STORE, STATISTICS = "a negation set in one file", "a store (NAME.negation)", "statistics, which keep no items"
_FORMATS = {files.FORMAT: FILE, statistics.FORMAT: STATISTICS}
_INSTEAD = {
    FILE: "it has no removed items to delete, and is one file already; for a store of it: "
    "steerclear negate import {path} -o NAME.negation",
    STORE: "for a file of it: steerclear negate export {path} -o NAME.safetensors",
    STATISTICS: "give the set that they were made of; after a change make them again: "
    "steerclear negate summarise SET -o {path}",
}


def kind(path: Path) -> str:
    """What lies at ``path``, by a look at its beginning: :data:`FILE`, :data:`STORE` or :data:`STATISTICS`.

    Raises:
        InvalidInput: If nothing does.
        NegationFileError: If it is something else, or damaged there.
    """
    if not path.exists():
        raise InvalidInput(
            f"{path}: expected a negation set, found nothing there; check the path, or make one with: "
            f"steerclear negate build PICTURES -o {path}"
        )
    if path.is_dir():
        if (path / NAME).exists():
            return STORE
        raise NegationFileError(
            f"{path}: expected a negation set, got a folder that is no store (it has no {NAME}); check the path, or "
            f"make a set of the pictures in it with: steerclear negate build {path} -o NAME.safetensors"
        )
    if not path.is_file() or not _begins_well(path):
        raise NegationFileError(
            f"{path}: expected a negation set, got something that does not begin like a safetensors file; check the "
            "path, restore the file from a copy, or make a set of pictures with: steerclear negate build PICTURES -o "
            "NAME.safetensors"
        )
    found = files.format_of(path)
    if found not in _FORMATS:
        raise NegationFileError(
            f"{path}: expected a negation set, got a safetensors file of format {found and found[:40]!r}; check the "
            "path, or make a set with: steerclear negate build PICTURES -o NAME.safetensors"
        )
    return _FORMATS[found]


def require(path: Path, *kinds: str) -> str:
    """The kind of what lies at ``path``, which must be one of these; look before any work is done.

    Raises:
        InvalidInput: If it is another one, or nothing lies there.
        NegationFileError: As :func:`kind`.
    """
    found = kind(path)
    if found not in kinds:
        raise InvalidInput(f"{path}: expected {' or '.join(kinds)}, got {found}; {_INSTEAD[found].format(path=path)}")
    return found


def require_target(path: Path, made: str) -> None:
    """Refuse a name to which a single file of this kind cannot be written; look before any work is done.

    Raises:
        InvalidInput: For the name of a store, or of a file of another kind, which would be lost.
        NegationFileError: If there can be no file.
    """
    if path.suffix == SUFFIX:
        raise InvalidInput(
            f"{path}: expected the name of a file to write, NAME.safetensors, got that of a store; choose another "
            f"name, and for a store of that file: steerclear negate import FILE -o {path}"
        )
    files.check_target(path)
    if path.exists() and (there := _there(path)) not in (made, None):
        raise InvalidInput(
            f"{path}: expected a free name, or {made} to replace, got {there}; choose another name, or delete it first"
        )


def require_new_store(path: Path, source: str) -> None:
    """Refuse a name at which no store can be made; look before any work is done.

    Raises:
        InvalidInput: If it is taken, has another ending, or its folder is missing.
    """
    if path.exists() or path.is_symlink():
        store = path.is_dir() and (path / NAME).exists()
        instead = f"use: steerclear negate add {path} {source}" if store else "choose another name"
        raise InvalidInput(f"{path}: expected a new name, got one that is there already; {instead}")
    if path.suffix != SUFFIX:
        raise InvalidInput(
            f"{path}: expected the name of a store, NAME{SUFFIX}, got one that ends otherwise; choose another name"
        )
    if not path.parent.is_dir():
        raise InvalidInput(f"{path}: expected an existing folder, got {path.parent}; create the folder first")


def load(path: Path) -> NegationSet:
    """All items as they are now, in float32.

    Raises:
        NegationFileError: If there is no set that can be read.
        InvalidInput: If the store is empty, or there are statistics, or nothing.
    """
    if require(path, FILE, STORE) == FILE:
        return NegationSet.load(path)
    with NegationStore.open(path, readonly=True) as store:
        items = store.to_set()
        return replace(items, latents=items.latents.float())


def precision(path: Path) -> torch.dtype:
    """In which a file keeps its latents.

    Raises:
        NegationFileError: If there is no set that can be read.
    """
    return NegationSet.load(path, mapped=True).latents.dtype


def followed(path: Path) -> Items | NegationStatistics:
    """What a guard holds: of a store, whatever it contains when a trajectory begins.

    Raises:
        NegationFileError: If there is no set that can be read.
        InvalidInput: If the store is empty, or nothing lies there.
    """
    found = kind(path)
    if found == STORE:
        return NegationStore.open(path, readonly=True).live()
    return NegationStatistics.load(path) if found == STATISTICS else NegationSet.load(path)


def digest(path: Path) -> str:
    """``sha256:…`` of what was used: of a file's bytes; of a store's space and items, whatever was removed before.

    Raises:
        NegationFileError: If it cannot be read.
    """
    if kind(path) != STORE:
        return "sha256:" + sha256(path.read_bytes())
    with NegationStore.open(path, readonly=True) as store:
        content = hashlib.sha256(repr(store.space).encode())
        for item in store.items():
            content.update(repr((item.id, item.label, item.weight, item.digest, item.sha256)).encode())
        return "sha256:" + content.hexdigest()


def facts(path: Path) -> dict[str, Any]:
    """What is to be said of a set: how many items, of what, in which space; of a store also terms and leftovers."""
    if require(path, FILE, STORE) == FILE:
        return {**_common(path, NegationSet.load(path)), "sha256": sha256(path.read_bytes())}
    with NegationStore.open(path, readonly=True) as store:
        now, items = store.snapshot(), store.items()
        return {
            **_common(path, now),
            "dtype": str(store.dtype).removeprefix("torch."),
            "licences": dict(Counter(item.licence for item in items).most_common()),
            "provenance": dict(Counter(item.provenance for item in items).most_common()),
            "removed": len(now.point_weights) - len(now),
            "bytes": sum(file.stat().st_blocks * 512 for file in path.iterdir()),
            "changes": now.change,
        }


def rows(path: Path) -> list[dict[str, Any]]:
    """Every item without its latent."""
    if require(path, FILE, STORE) == FILE:
        items = NegationSet.load(path)
        columns = zip(items.ids, items.labels, items.weights.tolist(), items.digests, strict=True)
        return [{"id": i, "label": label, "weight": weight, "digest": each} for i, label, weight, each in columns]
    with NegationStore.open(path, readonly=True) as store:
        names = ("id", "label", "weight", "digest", "provenance", "licence", "added")
        return [{name: getattr(item, name) for name in names} for item in store.items()]


def spoken(facts: dict[str, Any]) -> list[str]:
    """The facts as lines of text."""
    space = facts["space"]
    lines = [f"{facts['file']}: {facts['items']} items in {space['text']}", f"labels    {_counted(facts['labels'])}"]
    if facts["norm"] is not None:
        lines.append("norms     {smallest:.2f} … {largest:.2f}, mean {mean:.2f}".format(**facts["norm"]))
    if "sha256" in facts:
        return [*lines, f"sha256    {facts['sha256']}"]
    lines += [f"licence   {_counted(facts['licences'])}", f"source    {_counted(facts['provenance'])}"]
    lines.append(
        f"on disk   {facts['bytes'] / (1 << 20):.1f} MiB in {facts['dtype']}, after {facts['changes']} changes"
    )
    if facts["removed"]:
        lines.append(
            f"removed   {facts['removed']} items whose latents still lie there; delete them with: "
            f"steerclear negate compact {facts['file']}"
        )
    return lines


def _there(path: Path) -> str | None:
    try:
        return kind(path)
    except NegationFileError:
        return None


def _begins_well(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _common(path: Path, items: Items) -> dict[str, Any]:
    norms = [norm for part in items.latents.split(BLOCK) for norm in _norms(part)]
    space = items.space
    return {
        "file": str(path),
        "items": len(items),
        "labels": dict(Counter(items.labels).most_common()),
        "space": {
            "encoder": space.encoder,
            "shape": list(space.shape),
            "name": space.name,
            "text": str(space),
        },
        "norm": {"smallest": min(norms), "mean": sum(norms) / len(norms), "largest": max(norms)} if norms else None,
    }


def _norms(latents: Tensor) -> Iterable[float]:
    return latents.flatten(1).float().norm(dim=1).tolist()


def _counted(counts: dict[str, int], most: int = 12) -> str:
    said = ", ".join(f"{name or '(none)'} {count}" for name, count in list(counts.items())[:most])
    more = len(counts) - most
    return (said or "(none)") + (f", and {more} more" if more > 0 else "")

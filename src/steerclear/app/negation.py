"""Negation sets for the front doors: a single file or a store, whichever a path names."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerclear.app.files import sha256
from steerclear.errors import NegationFileError
from steerclear.negation import Items, NegationSet, NegationStore
from steerclear.negation.store import SUFFIX

BLOCK = 1 << 12  # items whose norms are taken at a time


def is_store(path: Path) -> bool:
    """Whether ``path`` names a store: a folder, or a name that ends like one."""
    return path.suffix == SUFFIX or path.is_dir()


def load(path: Path) -> NegationSet:
    """All items as they are now, in float32.

    Raises:
        NegationFileError: If there is no set that can be read.
        InvalidInput: If the store is empty.
    """
    if not is_store(path):
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


def followed(path: Path) -> Items:
    """What a guard holds: of a store, whatever it contains when a trajectory begins.

    Raises:
        NegationFileError: If there is no set that can be read.
        InvalidInput: If the store is empty.
    """
    return NegationStore.open(path, readonly=True).live() if is_store(path) else NegationSet.load(path)


def digest(path: Path) -> str:
    """``sha256:…`` of what was used: of a file's bytes; of a store's space and items, whatever was removed before.

    Raises:
        NegationFileError: If it cannot be read.
    """
    if not is_store(path):
        try:
            return "sha256:" + sha256(path.read_bytes())
        except OSError as error:
            raise NegationFileError(
                f"{path}: expected a negation set, got {error.strerror}; make one with: steerclear negate build"
            ) from error
    with NegationStore.open(path, readonly=True) as store:
        content = hashlib.sha256(repr(store.space).encode())
        for item in store.items():
            content.update(repr((item.id, item.label, item.weight, item.digest, item.sha256)).encode())
        return "sha256:" + content.hexdigest()


def facts(path: Path) -> dict[str, Any]:
    """What is to be said of a set: how many items, of what, in which space; of a store also terms and leftovers."""
    if not is_store(path):
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
    if not is_store(path):
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

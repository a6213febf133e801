"""One file to go on from: tensors, and beside them what they belong to."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerclear.errors import InvalidInput
from steerclear.files import states
from steerclear.finetune.safegen import SafeGen
from steerclear.finetune.triplets import Triplets

KIND = "steerclear safegen checkpoint 2"
Losses = list[tuple[float, float]]


def identity(network: Any, triplets: Triplets, method: SafeGen) -> dict[str, Any]:  # noqa: ANN401  (a diffusers model)
    """What a checkpoint must agree with: settings, data, and the weights at the start.

    The number of steps may grow where the learning rate does not depend on it.
    """
    settings = {key: value for key, value in method.spec.items() if key != "steps" or method.cool < 1}
    captions = [*triplets.unsafe_captions, *triplets.benign_captions] if method.captions else []
    data = _digest([triplets.unsafe, triplets.mosaic, triplets.benign], captions)
    return {"settings": settings, "triplets": data, "network": _digest(list(network.state_dict().values()))}


def write(path: Path, identity: dict[str, Any], tensors: dict[str, Tensor], losses: Losses) -> None:
    """Writes the file, whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    kept = torch.tensor(losses, dtype=torch.float64)
    states.write(path, {"kind": KIND, "identity": identity, "tensors": tensors, "losses": kept})


def read(path: Path, identity: dict[str, Any]) -> tuple[dict[str, Tensor], Losses]:
    """Tensors and losses.

    Raises:
        InvalidInput: If the file is damaged, or belongs to other settings, data or weights.
    """
    stored = states.read(path)
    if not isinstance(stored, dict) or stored.get("kind") != KIND:
        raise InvalidInput(f"{path}: expected a {KIND}, got another file; give another folder")
    known = stored["identity"]
    other = [key for key in identity["settings"] if known["settings"].get(key) != identity["settings"][key]]
    other += [name for name in ("triplets", "network") if known[name] != identity[name]]
    if other:
        raise InvalidInput(
            f"{path}: expected a checkpoint of this training, got one with other {', '.join(other)}; "
            "give the same settings, or another folder"
        )
    return stored["tensors"], [(mosaic, benign) for mosaic, benign in stored["losses"].tolist()]


def _digest(tensors: list[Tensor], words: list[str] | None = None) -> str:
    digest = hashlib.sha256(json.dumps(words or []).encode())
    for value in tensors:
        digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).float().numpy().tobytes())
    return "sha256:" + digest.hexdigest()

"""One safetensors file to go on from: tensors, and beside them JSON that says what they belong to."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from steerclear.errors import InvalidInput
from steerclear.files.tensors import write as write_tensors
from steerclear.finetune.safegen import SafeGen
from steerclear.finetune.triplets import Triplets

KIND = "steerclear safegen checkpoint 1"
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
    about = {"kind": KIND, "identity": json.dumps(identity, sort_keys=True), "losses": json.dumps(losses)}
    write_tensors(path, tensors, about)


def read(path: Path, identity: dict[str, Any]) -> tuple[dict[str, Tensor], Losses]:
    """Tensors and losses.

    Raises:
        InvalidInput: If the file is damaged, or belongs to other settings, data or weights.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("kind") != KIND:
                raise InvalidInput(f"{path}: expected a {KIND}, got another file; give another folder")
            stored, losses = json.loads(about["identity"]), json.loads(about["losses"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, ValueError, KeyError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(
            f"{path}: expected a checkpoint, got a damaged file ({error}); remove it to start again"
        ) from error
    other = [key for key in identity["settings"] if stored["settings"].get(key) != identity["settings"][key]]
    other += [name for name in ("triplets", "network") if stored[name] != identity[name]]
    if other:
        raise InvalidInput(
            f"{path}: expected a checkpoint of this training, got one with other {', '.join(other)}; "
            "give the same settings, or another folder"
        )
    return tensors, [(float(mosaic), float(benign)) for mosaic, benign in losses]


def _digest(tensors: list[Tensor], words: list[str] | None = None) -> str:
    digest = hashlib.sha256(json.dumps(words or []).encode())
    for value in tensors:
        digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).float().numpy().tobytes())
    return "sha256:" + digest.hexdigest()

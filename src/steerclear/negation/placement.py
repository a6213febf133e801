"""Tensors of a value that never changes, on the device where they are needed: moved there once, not at every step."""

import torch
from torch import Tensor


def placed(owner: object, name: str, device: torch.device) -> Tensor:
    """The attribute ``name`` of ``owner`` on ``device``; a copy lives as long as its owner."""
    tensor: Tensor = getattr(owner, name)
    if tensor.device == device:
        return tensor
    copies: dict[tuple[str, torch.device], Tensor] = owner.__dict__.setdefault("_placed", {})
    if (name, device) not in copies:
        copies[name, device] = tensor.to(device)
    return copies[name, device]

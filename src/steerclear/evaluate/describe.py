"""Plain data that says what an object is, so that pictures of two different objects are never taken for one's.

Tensors and files become hashes of their content; dataclasses and functions keep their names. Equal descriptions mean
equal pictures, on the same machine and versions.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from steerclear.errors import InvalidInput

SAMPLED = 64  # numbers of each weight that identify a model
LONG = 32  # items of a list beyond which its hash says enough


def describe(value: Any) -> Any:  # noqa: ANN401  (any object, any JSON value)
    """``value`` as JSON data. An attribute ``spec`` of plain data speaks for its object.

    Raises:
        InvalidInput: For what cannot be told from another of its kind: a lambda, an object that is no dataclass.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype), "sha256": _tensor(value)}
    if isinstance(value, Path):
        return {"files": _files(value)}
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value)
        return {str(key): describe(item) for key, item in sorted(items.items(), key=lambda item: str(item[0]))}
    if isinstance(value, set | frozenset):
        members = cast("set[Any]", value)
        return sorted((describe(item) for item in members), key=lambda item: json.dumps(item, sort_keys=True))
    if isinstance(value, list | tuple):
        return _short_list([describe(item) for item in cast("list[Any]", value)])
    return _object(value)


def named(value: Any) -> Any:  # noqa: ANN401  (any object, any JSON value)
    """:func:`describe`, or for an object with parts that cannot be described, the name of its type."""
    try:
        return describe(value)
    except InvalidInput:
        return {"type": _name(type(value))}


def digest(value: Any) -> str:  # noqa: ANN401  (any JSON value)
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def model(pipe: Any) -> dict[str, Any]:  # noqa: ANN401  (some diffusers pipeline)
    """What decides a pipeline's pictures: its class, its scheduler, and numbers of all its weights.

    Of every tensor, its name, shape, dtype and 64 evenly spread numbers are hashed: retraining changes all numbers, and
    large models need not be read whole.
    """
    parts: dict[str, Any] = dict(getattr(pipe, "components", {}))
    total = hashlib.sha256()
    for name, part in sorted(parts.items()):
        if isinstance(part, nn.Module):
            for key, tensor in sorted(part.state_dict().items()):
                count = min(SAMPLED, tensor.numel())
                spread = torch.arange(count) * (tensor.numel() - 1) // max(1, count - 1)
                total.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                if not tensor.is_meta:
                    total.update(_bytes(tensor.detach().flatten()[spread.to(tensor.device)]))
    scheduler: Any = parts.get("scheduler")
    config = {k: v for k, v in getattr(scheduler, "config", {}).items() if not k.startswith("_")}
    plain = _finite(json.loads(json.dumps(config, sort_keys=True, default=str)))
    kind = type(pipe).__name__.removeprefix("Guarded")
    return {"pipeline": kind, "scheduler": type(scheduler).__name__, "config": plain, "weights": total.hexdigest()}


def differences(old: Any, new: Any, path: str = "") -> list[str]:  # noqa: ANN401  (any JSON values)
    """Where two descriptions differ, one line each: ``"sampling.steps: 25 there, 4 here"``."""
    if isinstance(old, dict) and isinstance(new, dict):
        left, right = cast("dict[str, Any]", old), cast("dict[str, Any]", new)
        keys = [*left, *(key for key in right if key not in left)]
        return [line for key in keys for line in differences(left.get(key), right.get(key), f"{path}.{key}")]
    if old == new:
        return []
    return [f"{path.lstrip('.')}: {_short(old)} there, {_short(new)} here"]


def _finite(value: Any) -> Any:  # noqa: ANN401  (any JSON value)
    """Infinities, which schedulers have as bounds and JSON does not know, as words."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_finite(item) for item in cast("list[Any]", value)]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:  # noqa: ANN401  (any JSON value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _short_list(items: list[Any]) -> Any:  # noqa: ANN401  (any JSON value)
    """Long lists, such as the names of thousands of references, become hashes: every part of a run carries them."""
    return items if len(items) <= LONG else {"items": len(items), "sha256": digest(items)}


def _object(value: Any) -> Any:  # noqa: ANN401  (any object, any JSON value)
    spec = None if isinstance(value, type) else getattr(value, "spec", None)
    if isinstance(spec, Mapping | str):
        return {"type": _name(type(value)), "spec": describe(spec)}
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": _name(type(value))} | {f.name: describe(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, nn.Module):
        return {"type": _name(type(value)), "weights": describe(value.state_dict())}
    if isinstance(value, partial):
        call = cast("partial[Any]", value)
        return {"function": describe(call.func), "args": describe(call.args), "settings": describe(call.keywords)}
    if isinstance(value, MethodType):
        return {"method": value.__func__.__qualname__, "of": describe(value.__self__)}
    if isinstance(value, FunctionType | BuiltinFunctionType | type) and "<" not in value.__qualname__:
        return _name(value)
    raise InvalidInput(
        f"evaluate: expected a dataclass, a module or a module-level function, got {_name(type(value))}, which cannot "
        "be told from another of its kind; give the arm or judge a spec={...} that changes when it does"
    )


def _name(value: Any) -> str:  # noqa: ANN401  (a class or function)
    return f"{value.__module__}.{value.__qualname__}"


def _tensor(value: Tensor) -> str:
    return hashlib.sha256(_bytes(value.detach())).hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def _files(path: Path) -> str:
    """Hash of a file, or of the names and contents below a folder; of the name, if there is nothing."""
    listed = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in listed:
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        content = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else f"no file {file}"
        total.update(f"{name} {content}\n".encode())
    return total.hexdigest()

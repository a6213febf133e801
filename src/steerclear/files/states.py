"""The state of a training: whatever dictionaries, lists, numbers, words and tensors it nests, in one safetensors file.

The tensors are the file's own; what holds them is JSON in its metadata. What is read equals what was written bit for
bit, and every tensor lies in memory as it did: a fused optimiser walks over weights and moments side by side and does
not ask whether both are laid out alike.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from steerclear.errors import InvalidInput
from steerclear.files import tensors as files
from steerclear.files.scan import Malformed

KIND = "steerclear state 1"
#: A network of a thousand layers has some ten thousand; characters of what holds them.
MAX_TENSORS, MAX_TEXT = 1 << 16, 1 << 23


def digest(state: Any) -> str:  # noqa: ANN401
    """SHA-256 of a state, in hexadecimal: equal for equal states, laid out alike.

    Raises:
        InvalidInput: As :func:`write`.
    """
    tensors: dict[str, Tensor] = {}
    found = hashlib.sha256(json.dumps(_apart(state, "", tensors)).encode())
    for part in files.parts(tensors, {}):
        found.update(part)
    return found.hexdigest()


def write(path: Path, state: Any) -> None:  # noqa: ANN401
    """Writes a state, whole or not at all.

    Args:
        path: Target.
        state: Of dictionaries (of any order; keys are words or whole numbers), lists, tuples, tensors, numbers, words,
            ``None``; for example of ``state_dict()`` of networks, optimisers and schedulers.

    Raises:
        InvalidInput: If it holds anything else, or more than a reader takes.
        OSError: If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_apart(state, "", tensors))
    if len(tensors) > MAX_TENSORS or len(text) > MAX_TEXT:
        raise InvalidInput(
            f"a state: expected at most {MAX_TENSORS} tensors and {MAX_TEXT} characters of all else, got "
            f"{len(tensors)} and {len(text)}; keep long lists of numbers as a tensor"
        )
    files.write(path, tensors, {"kind": KIND, "state": text})


def read(path: Path) -> Any:  # noqa: ANN401
    """What :func:`write` was given.

    Raises:
        InvalidInput: If the file is damaged or another one, such as a pickle; nothing is unpickled.
        OSError: If it cannot be opened.
    """
    try:
        with files.TensorFile(path, MAX_TENSORS) as file:
            if file.metadata.get("kind") != KIND:
                raise Malformed(f"no {KIND!r} in its header")
            tensors = {name: file.read(name) for name in file.entries}
        text = file.metadata.get("state", "")
        if len(text) > MAX_TEXT:
            raise Malformed(f"{len(text)} characters of JSON, more than {MAX_TEXT}")
        return _together(json.loads(text), tensors)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidInput(
            f"{path}: expected the state of a training in safetensors, got a damaged or another file ({error}); "
            "remove it to start again"
        ) from error


def _apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """The value as JSON, with its tensors moved to ``tensors``."""
    match value:
        case Tensor():
            order = sorted(range(value.ndim), key=value.stride, reverse=True)  # channels_last, for one
            order = order if value.permute(order).is_contiguous() else list(range(value.ndim))
            while name in tensors:
                name += "'"
            tensors[name] = value.permute(order)
            return {"tensor": name, "order": order}
        case dict():
            return {"dict": [[_key(key), _apart(each, f"{name}/{key}", tensors)] for key, each in value.items()]}
        case list():
            return [_apart(each, f"{name}/{place}", tensors) for place, each in enumerate(value)]
        case tuple():
            return {"tuple": _apart(list(value), name, tensors)}
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise InvalidInput(
                f"a state: expected dictionaries, lists, tuples, tensors, numbers, words or None, got {type(value)} at "
                f"{name or 'the top'}; leave it out"
            )


def _key(key: Any) -> int | str:  # noqa: ANN401
    if type(key) not in (int, str):
        raise InvalidInput(f"a state: expected words or whole numbers as keys, got {key!r}; name it otherwise")
    return key


def _together(node: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """The reverse of :func:`_apart`; a tensor is used up, so that no text makes many of it."""
    match node:
        case {"tensor": str(name), "order": list(order)} if name in tensors:
            stored = tensors.pop(name)
            if sorted(order) != list(range(stored.ndim)):
                raise Malformed(f"an order {order} of {stored.ndim} dimensions")
            return stored.permute([order.index(axis) for axis in range(stored.ndim)])
        case {"dict": list(pairs)}:
            return {_key(key): _together(each, tensors) for key, each in pairs}
        case list():
            return [_together(each, tensors) for each in node]
        case {"tuple": list(parts)}:
            return tuple(_together(each, tensors) for each in parts)
        case None | bool() | int() | float() | str():
            return node
        case _:
            raise Malformed(f"{str(node)[:80]!r}, which is no part of a state")

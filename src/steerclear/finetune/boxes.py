"""Where a picture is unsafe: boxes from a detector of parts, from the outline of the object, or the whole picture."""

from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

import torch
from torch import Tensor

from steerclear.errors import InvalidInput, SteerclearError

GROUP = "steerclear.boxes"
#: ``(left, top, right, bottom)`` in pixels, the last two exclusive.
Box = tuple[int, int, int, int]
#: A picture ``(3, height, width)`` in [0, 1] -> its boxes; none if nothing in it is to be hidden.
Boxes = Callable[[Tensor], Sequence[Box]]

_TOLERANCE = 0.08


def whole_picture(image: Tensor) -> list[Box]:
    """One box: everything."""
    return [(0, 0, image.shape[2], image.shape[1])]


def whole_object(image: Tensor) -> list[Box]:
    """One box around all that differs from the background, which is the median colour of the picture's rim.

    The whole picture where nothing differs.
    """
    rim = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
    background = rim.median(dim=1).values.reshape(3, 1, 1)
    differs = ((image - background).abs() > _TOLERANCE).any(0)
    rows, columns = differs.any(1).nonzero().flatten().tolist(), differs.any(0).nonzero().flatten().tolist()
    if not rows:
        return whole_picture(image)
    return [(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]


_OWN: dict[str, Boxes] = {"object": whole_object, "picture": whole_picture}


def available() -> tuple[str, ...]:
    """Names that :func:`load` knows: the two above, and installed plug-ins."""
    return (*_OWN, *sorted(_points()))


def load(name: str) -> Boxes:
    """The box finder called ``name``: ``"object"``, ``"picture"``, or an entry point of the group ``steerclear.boxes``.

    An entry point names the callable itself: a picture ``(3, height, width)`` in [0, 1] -> ``(left, top, right,
    bottom)`` boxes in pixels.

    Raises:
        InvalidInput: For an unknown name; the message lists the known ones.
        MissingExtra: If the plug-in's package is not installed.
        SteerclearError: If it does not load, or cannot be called.
    """
    if name in _OWN:
        return _OWN[name]
    points = _points()
    if name not in points:
        raise InvalidInput(f"boxes: expected one of {', '.join(available())}, got {name!r}")
    try:
        found: Any = points[name].load()
    except SteerclearError:
        raise
    except Exception as error:
        raise SteerclearError(f"boxes {name!r} do not load: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise SteerclearError(f"boxes {name!r}: expected a callable from a picture to boxes, got {found!r}")
    return cast("Boxes", found)


def checked(boxes: Sequence[Box], image: Tensor) -> list[Box]:
    """The boxes as whole numbers, cut to the picture.

    Raises:
        SteerclearError: If one is no box: a broken finder must not pass for "nothing found".
    """
    height, width = image.shape[1:]
    cut: list[Box] = []
    for box in boxes:
        values = [float(value) for value in box]
        if (
            len(values) != 4
            or not all(abs(value) < 1e9 for value in values)
            or values[0] >= values[2]
            or values[1] >= values[3]
        ):
            raise SteerclearError(
                f"boxes: expected (left, top, right, bottom) with left < right, top < bottom, got {box!r}"
            )
        left, top, right, bottom = (round(value) for value in values)
        left, top, right, bottom = max(0, left), max(0, top), min(width, right), min(height, bottom)
        if left < right and top < bottom:
            cut.append((left, top, right, bottom))
    return cut


def pixelate(image: Tensor, boxes: Sequence[Box], blocks: int) -> Tensor:
    """The picture with every box averaged over square blocks; outside the boxes it stays bit-identical.

    Args:
        image: ``(channels, height, width)``.
        boxes: ``(left, top, right, bottom)`` inside the picture. Overlapping ones are pixelated one after the other.
        blocks: Blocks along the longer side of each box, >= 1; those at its right and lower edge may be smaller.

    Returns:
        A new picture of the same shape.
    """
    result = image.clone()
    for left, top, right, bottom in boxes:
        part = result[:, top:bottom, left:right]
        side = max(1, -(-max(part.shape[1:]) // blocks))
        rows, columns = (torch.arange(size) // side for size in part.shape[1:])
        index = (rows.unsqueeze(1) * (int(columns[-1]) + 1) + columns).flatten().to(image.device)
        sums = part.new_zeros(len(part), int(index[-1]) + 1).index_add_(1, index, part.flatten(1))
        means = sums / torch.bincount(index).to(part.dtype)
        result[:, top:bottom, left:right] = means[:, index].reshape(part.shape)
    return result


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}

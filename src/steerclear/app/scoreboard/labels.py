"""Names beside points, placed so that they cover neither each other nor the points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

RADII = (7.0, 13.0, 22.0, 34.0, 48.0, 64.0, 84.0)  # pixels
ANGLES = 16
LEADER = 14.0  # pixels: names further away get a line to their point


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """Common area."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, wide) * max(0.0, high)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.top - self.bottom)

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """Its point that is closest to ``(x, y)``."""
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """A text to place: its point and its size, all in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a name goes, and whether it is so far away that it needs a line."""

    box: Box
    leader: bool


def place(names: Sequence[Name], *, frame: Box, solid: Sequence[Box], faint: Sequence[Box]) -> list[Spot]:
    """A spot per name, in order: the cheapest of those on rings around its point, given the ones before.

    Args:
        names: The most important first.
        frame: Nothing may leave it.
        solid: What must not be covered (markers).
        faint: What had better not be covered (error bars).
    """
    spots: list[Spot] = []
    for name in names:
        found = [(_cost(name, box, radius, frame, solid, faint, spots), radius, box) for radius, box in _rings(name)]
        _, radius, box = min(found, key=lambda item: item[0])
        spots.append(Spot(box, radius >= LEADER))
    return spots


def _rings(name: Name) -> list[tuple[float, Box]]:
    boxes: list[tuple[float, Box]] = []
    for radius in RADII:
        for step in range(ANGLES):
            across, up = math.cos(2 * math.pi * step / ANGLES), math.sin(2 * math.pi * step / ANGLES)
            x = name.x + (radius + name.width / 2) * across
            y = name.y + (radius + name.height / 2) * up
            half, tall = name.width / 2, name.height / 2
            boxes.append((radius, Box(x - half, y - tall, x + half, y + tall)))
    return boxes


def _cost(
    name: Name,
    box: Box,
    radius: float,
    frame: Box,
    solid: Sequence[Box],
    faint: Sequence[Box],
    spots: Sequence[Spot],
) -> float:
    outside = box.area - box.overlap(frame)
    hit = sum(box.overlap(other) for other in (*solid, *(spot.box for spot in spots)))
    crossed = sum(spot.box.overlap(_dot(point)) for spot in spots for point in _line(name, box)) if spots else 0.0
    return radius + 4.0 * outside + 6.0 * hit + 0.8 * sum(box.overlap(other) for other in faint) + 4.0 * crossed


def _line(name: Name, box: Box) -> list[tuple[float, float]]:
    """Points along the line from the marker to the name."""
    x, y = box.nearest(name.x, name.y)
    return [(name.x + (x - name.x) * t / 6, name.y + (y - name.y) * t / 6) for t in range(1, 6)]


def _dot(point: tuple[float, float]) -> Box:
    return Box(point[0] - 2, point[1] - 2, point[0] + 2, point[1] + 2)

"""Pictures as arrays, files and sheets. An array is ``(height, width, 3)``, uint8."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from steerclear.errors import InvalidInput

Pixels = NDArray[np.uint8]
INK, PAPER, FAINT = (27, 31, 36), (255, 255, 255), (110, 118, 129)


def to_pixels(image: Any) -> Pixels:  # noqa: ANN401  (float array or PIL image)
    """A PIL image, or a float array in ``[0, 1]``, as uint8 RGB; floats are rounded as diffusers does."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    array = np.asarray(image, dtype=np.float64)
    if array.ndim != 3 or array.shape[2] != 3 or not np.isfinite(array).all():
        raise InvalidInput(f"picture: expected finite numbers of shape (height, width, 3), got shape {array.shape}")
    return (array.clip(0, 1) * 255).round().astype(np.uint8)


def read(path: Path) -> Pixels:
    """The picture in a file.

    Raises:
        OSError: If it is missing or no picture.
    """
    with Image.open(path) as image:
        return to_pixels(image)


def png(pixels: Pixels) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A picture of a sheet with a line of text below; ``warn`` draws a red frame."""

    pixels: Pixels
    caption: str = ""
    warn: bool = False


def sheet(cells: Sequence[Cell], *, columns: int, side: int = 96, heads: Sequence[str] = ()) -> Pixels:
    """A contact sheet: pictures of ``side`` pixels, row by row, each with its caption.

    ``heads`` stand above the columns, evenly spread over the width.

    Raises:
        InvalidInput: Without pictures, or for less than one column.
    """
    if not cells or columns < 1:
        raise InvalidInput(f"sheet: expected pictures and at least 1 column, got {len(cells)} and {columns}")
    margin, text = 10, 18
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    top = margin + (text if heads else 0)
    width, height = margin + columns * (side + margin), top + rows * (side + text + margin)
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(11)
    share = (width - margin) // max(1, len(heads))
    for index, head in enumerate(heads):
        draw.text((margin + index * share, margin // 2), _fitted(head, font, share - margin), fill=INK, font=font)
    for index, cell in enumerate(cells):
        x, y = margin + index % columns * (side + margin), top + index // columns * (side + text + margin)
        page.paste(Image.fromarray(cell.pixels).resize((side, side), Image.Resampling.LANCZOS), (x, y))
        if cell.warn:
            draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), outline=(207, 34, 46), width=2)
        draw.text((x, y + side + 3), _fitted(cell.caption, font, side), fill=FAINT, font=font)
    return np.asarray(page)


def _fitted(text: str, font: Any, width: int) -> str:  # noqa: ANN401  (Pillow has two font classes)
    """``text``, cut with an ellipsis until it is at most ``width`` pixels wide; unprintable characters replaced."""
    text = "".join(char if " " <= char <= "~" else "?" for char in text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."

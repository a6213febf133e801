"""The contact sheet of a negation set: decoded from its latents, or from the pictures that it was made of."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steerclear.app.pictures import Cell, Pixels, png, sheet, to_pixels
from steerclear.errors import InvalidInput
from steerclear.files import write_atomic
from steerclear.negation import encoder_of, find_images
from steerclear.negation.images import Skip, pictures

if TYPE_CHECKING:
    from steerclear.negation import NegationSet

COLUMNS, SIDE, BATCH = 10, 96, 16


@torch.no_grad()
def decoded(items: "NegationSet", pipe: Any) -> dict[str, Pixels]:  # noqa: ANN401  (some diffusers pipeline)
    """Every item as the model sees it, by id.

    Raises:
        NegationMismatch: If another encoder made the set.
    """
    encoder = encoder_of(pipe)
    encoder.space.require(items.space)
    images = [encoder.decode(latents) for latents in items.latents.split(BATCH)]
    arrays = torch.cat(images).permute(0, 2, 3, 1).float().cpu().numpy()
    return {name: to_pixels(array) for name, array in zip(items.ids, arrays, strict=True)}


def sources(items: "NegationSet", folder: Path) -> dict[str, Pixels]:
    """The pictures of ``folder`` that the set was made of, by id, found by their digest.

    Raises:
        InvalidInput: If none of them is there.
    """
    by_digest = dict(zip(items.digests, items.ids, strict=True))
    unread: list[Skip] = []
    found = {
        by_digest[picture.digest]: to_pixels(picture.image.permute(1, 2, 0).numpy())
        for picture in pictures(find_images(folder), (SIDE, SIDE), unread)
        if picture.digest in by_digest
    }
    if not found:
        raise InvalidInput(f"{folder}: expected pictures of this set, got none with its digests; leave out --images")
    return found


def write(items: "NegationSet", images: Mapping[str, Pixels], path: Path) -> None:
    """Writes the sheet, ids below the pictures; items without a picture are grey.

    Raises:
        OSError: If the file cannot be written.
    """
    missing = np.full((SIDE, SIDE, 3), 235, dtype=np.uint8)
    cells = [
        Cell(pixels=images.get(name, missing), caption=name if name in images else f"no picture: {name}")
        for name in items.ids
    ]
    write_atomic(path, png(sheet(cells, columns=COLUMNS, side=SIDE)))

"""Training data of SafeGen: unsafe pictures, their mosaics, benign pictures; as latents of one pipeline.

The pair is cropped, resized and mirrored together, and only then is its second half pixelated, so that the two never
differ outside the boxes. Latents are the encoder's mode.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerclear.errors import InvalidInput
from steerclear.finetune.boxes import Boxes, checked, pixelate, whole_object
from steerclear.negation import NegationSet, Space, encoder_of, find_images
from steerclear.negation.images import Skip, pictures

BATCH = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Triplets:
    """Pairs of unsafe and mosaicked latents, and benign latents; the two need not be equally many.

    Args:
        unsafe: ``(pairs, *space.shape)``.
        mosaic: Likewise, row by row.
        benign: ``(benign, *space.shape)``.
        space: Where they live.
        unsafe_captions: One per pair; read only where a training asks for captions.
        benign_captions: One per benign latent, likewise.

    Raises:
        InvalidInput: For shapes that do not fit each other, no rows, or NaN.
    """

    unsafe: Tensor
    mosaic: Tensor
    benign: Tensor
    space: Space
    unsafe_captions: tuple[str, ...] = ()
    benign_captions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("unsafe", "mosaic", "benign"):
            value: Tensor = getattr(self, name)
            if tuple(value.shape[1:]) != self.space.shape or not len(value) or not bool(value.isfinite().all()):
                raise InvalidInput(
                    f"Triplets: expected finite {name} latents of shape (n, {', '.join(map(str, self.space.shape))}), "
                    f"n >= 1, got {tuple(value.shape)}; encode pictures with Triplets.of_pictures"
                )
        if len(self.unsafe) != len(self.mosaic):
            raise InvalidInput(
                f"Triplets: expected one mosaic for every unsafe latent, got {len(self.unsafe)} and {len(self.mosaic)}"
            )
        for name, rows in (("unsafe_captions", self.unsafe), ("benign_captions", self.benign)):
            given: tuple[str, ...] = getattr(self, name) or ("",) * len(rows)
            if len(given) != len(rows):
                raise InvalidInput(f"Triplets: expected {len(rows)} {name}, got {len(given)}")
            object.__setattr__(self, name, tuple(given))

    def __len__(self) -> int:
        return len(self.unsafe)

    @classmethod
    def of_pictures(
        cls,
        unsafe: Tensor,
        benign: Tensor,
        pipe: Any,  # noqa: ANN401  (some diffusers pipeline)
        *,
        unsafe_captions: Sequence[str] = (),
        benign_captions: Sequence[str] = (),
        boxes: Boxes = whole_object,
        blocks: int = 8,
        mirror: bool = True,
    ) -> "Triplets":
        """From pictures ``(n, 3, height, width)`` in [0, 1] of the pipeline's size.

        Args:
            unsafe: To be turned into mosaics.
            benign: To be kept.
            pipe: Its autoencoder encodes.
            unsafe_captions: One per picture.
            benign_captions: Likewise.
            boxes: What to pixelate.
            blocks: Blocks along the longer side of a box, >= 1.
            mirror: Add every picture once more, mirrored: a pair together.

        Raises:
            InvalidInput: If an unsafe picture has no box.
        """
        if mirror:
            benign, benign_captions = torch.cat([benign, benign.flip(3)]), (*benign_captions, *benign_captions)
        latents = _encoded(encoder_of(pipe), benign)
        return cls._paired(unsafe, tuple(unsafe_captions), latents, tuple(benign_captions), pipe, boxes, blocks, mirror)

    @classmethod
    def of_sets(
        cls,
        unsafe: NegationSet,
        benign: NegationSet,
        pipe: Any,  # noqa: ANN401  (some diffusers pipeline)
        *,
        boxes: Boxes = whole_object,
        blocks: int = 8,
        mirror: bool = True,
    ) -> "Triplets":
        """From latents: unsafe ones are decoded, and encoded again as a pair. Labels are captions.

        Args:
            unsafe: What to turn into mosaics.
            benign: What to keep; taken as it is.
            pipe: Whose autoencoder made both.
            boxes: What to pixelate.
            blocks: Blocks along the longer side of a box, >= 1.
            mirror: Add every pair once more, mirrored.

        Raises:
            NegationMismatch: If another encoder made a set.
            InvalidInput: If an unsafe picture has no box.
        """
        encoder = encoder_of(pipe)
        for items in (unsafe, benign):
            encoder.space.require(items.space)
        pictures = torch.cat([encoder.decode(part).cpu() for part in unsafe.latents.split(BATCH)])
        return cls._paired(
            pictures, unsafe.labels, benign.latents.float().cpu(), benign.labels, pipe, boxes, blocks, mirror
        )

    @classmethod
    def of_folder(cls, folder: str | Path, pipe: Any, **options: Any) -> "Triplets":  # noqa: ANN401
        """From ``folder/unsafe`` and ``folder/benign``, searched with their subfolders, whose names are the captions.

        Args:
            folder: Holds the two.
            pipe: Its autoencoder encodes.
            options: ``boxes``, ``blocks`` and ``mirror`` of :meth:`of_pictures`.

        Raises:
            InvalidInput: If one of the two is missing, or has no usable picture.
        """
        size = encoder_of(pipe).size
        (unsafe, unsafe_captions), (benign, benign_captions) = (
            _read(Path(folder), name, size) for name in ("unsafe", "benign")
        )
        captions = {"unsafe_captions": unsafe_captions, "benign_captions": benign_captions}
        return cls.of_pictures(unsafe, benign, pipe, **captions, **options)

    @classmethod
    def _paired(
        cls,
        pictures: Tensor,
        captions: tuple[str, ...],
        benign: Tensor,
        benign_captions: tuple[str, ...],
        pipe: Any,  # noqa: ANN401
        boxes: Boxes,
        blocks: int,
        mirror: bool,
    ) -> "Triplets":
        if blocks < 1:
            raise InvalidInput(f"Triplets: expected blocks >= 1, got {blocks}")
        encoder = encoder_of(pipe)
        hidden = torch.stack([_mosaic(image, boxes, blocks, row) for row, image in enumerate(pictures.cpu())])
        if mirror:
            pictures, hidden = (torch.cat([each, each.flip(3)]) for each in (pictures, hidden))
            captions = (*captions, *captions)
        return cls(
            unsafe=_encoded(encoder, pictures),
            mosaic=_encoded(encoder, hidden),
            benign=benign,
            space=encoder.space,
            unsafe_captions=captions,
            benign_captions=benign_captions,
        )


def _read(root: Path, name: str, size: tuple[int, int]) -> tuple[Tensor, tuple[str, ...]]:
    """Pictures of a folder at ``size``, and the folders that they are in."""
    if not (root / name).is_dir():
        raise InvalidInput(f"{root}: expected folders unsafe/ and benign/ with pictures, found no {name}/")
    skipped: list[Skip] = []
    found = list(pictures(find_images(root / name), size, skipped))
    if not found:
        reasons = "; ".join(f"{Path(skip.source).name}: {skip.reason}" for skip in skipped[:5])
        raise InvalidInput(f"{root / name}: expected at least one usable picture, got none ({reasons})")
    return torch.stack([picture.image for picture in found]), tuple(picture.folder for picture in found)


def _mosaic(image: Tensor, boxes: Boxes, blocks: int, row: int) -> Tensor:
    found = checked(boxes(image), image)
    if not found:
        raise InvalidInput(
            f"Triplets: expected a box in every unsafe picture, got none in picture {row}; leave it out, or take the "
            "whole object or the whole picture"
        )
    return pixelate(image, found, blocks)


def _encoded(encoder: Any, pictures: Tensor) -> Tensor:  # noqa: ANN401
    return torch.cat([encoder.encode(part).cpu() for part in pictures.split(BATCH)]).float()

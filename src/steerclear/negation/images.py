"""From whatever people have (folders, files, PIL images, tensors) to RGB tensors of one size, and what was left out.

Conventions: upright by EXIF, alpha flattened on white, the first frame of an animated file, cropped about the centre to
the wanted aspect (as image models are trained; padding would put bars into the latents), resized with antialiasing.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from steerclear.errors import InvalidInput

MAX_PIXELS = 64_000_000
MAX_BYTES = 256 << 20
MIN_SIDE = 8

Source: TypeAlias = str | os.PathLike[str] | Image.Image | Tensor
Images: TypeAlias = str | os.PathLike[str] | Tensor | Iterable[Source]


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """A picture that was left out, and why."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One usable picture: ``image (3, height, width)`` in [0, 1], and where it came from."""

    image: Tensor
    digest: str
    index: int
    source: str
    folder: str


class Unusable(Exception):
    """A picture cannot be used; the message says why."""


def find_images(folder: str | os.PathLike[str], *, recursive: bool = True) -> list[Path]:
    """All visible files of a folder, sorted by path; files that are no pictures are sorted out when they are read.

    Symbolic links are not followed out of the folder.

    Raises:
        InvalidInput: If there is no such folder, or no file in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InvalidInput(
            f"expected a folder of pictures, got {root}, which is {'a file' if root.exists() else 'missing'}"
        )
    inside = root.resolve()
    found = sorted(
        path
        for path in (root.rglob("*") if recursive else root.iterdir())
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.resolve().is_relative_to(inside)
    )
    if not found:
        raise InvalidInput(f"expected a folder with pictures, got {root} without any file; check the path")
    return found


def sources(images: Images) -> list[Source]:
    """``images`` as a list with one entry per picture.

    Raises:
        InvalidInput: If there is none.
    """
    if isinstance(images, str | os.PathLike):
        path = Path(images)
        return [path] if path.is_file() else list(find_images(path))
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, Tensor) and images.ndim == 3:
        return [images]
    if (isinstance(images, Tensor) and images.ndim != 4) or not isinstance(images, Iterable):
        got = f"a tensor of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InvalidInput(f"expected a folder, paths, PIL images, or tensors (3, h, w) or (n, 3, h, w), got {got}")
    listed: list[Source] = list(images)
    if not listed:
        raise InvalidInput("expected at least one picture, got an empty list")
    return listed


def pictures(listed: Sequence[Source], size: tuple[int, int], skipped: list[Skip]) -> Iterator[Picture]:
    """Read the pictures one at a time; what cannot be used is appended to ``skipped``.

    Args:
        listed: Paths, PIL images, or tensors ``(1 | 3 | 4, h, w)``, float in [0, 1] or uint8.
        size: ``(height, width)`` of the result.
        skipped: Grows while the result is consumed.
    """
    seen: dict[str, str] = {}
    for index, source in enumerate(listed):
        path = Path(source) if isinstance(source, str | os.PathLike) else None
        name = str(path) if path else f"picture {index}"
        try:
            image = read(source)
        except Unusable as error:
            skipped.append(Skip(source=name, reason=str(error)))
            continue
        digest = digest_of(image)
        if digest in seen:
            skipped.append(Skip(source=name, reason=f"the same picture as {seen[digest]}"))
            continue
        seen[digest] = name
        yield Picture(
            image=fit(image, size), digest=digest, index=index, source=name, folder=path.parent.name if path else ""
        )


def read(source: Source | bytes) -> Image.Image:
    """An upright RGB image, 8 bits a channel, of a path, an image, a tensor, or a file's bytes.

    Raises:
        Unusable: With the reason.
    """
    with warnings.catch_warnings():
        # Decoders warn about odd files; what matters of that is an error here, and the rest concerns nobody.
        warnings.simplefilter("ignore")
        try:
            if isinstance(source, Tensor):
                return _from_tensor(source)
            if isinstance(source, Image.Image):
                return _upright_rgb(source)
            if isinstance(source, bytes):
                return _from_file(io.BytesIO(source), len(source))
            if not isinstance(source, str | os.PathLike):
                raise Unusable(f"{type(source).__name__}, not a path, PIL image or tensor")
            return _from_path(Path(source))
        except Unusable:
            raise
        except Image.DecompressionBombError as error:
            raise Unusable(f"more than {MAX_PIXELS:,} pixels") from error
        except Image.UnidentifiedImageError as error:
            raise Unusable("not a picture in a known format") from error
        except Exception as error:
            # Decoders fail on hostile bytes with any exception there is; all of them mean the same here.
            raise Unusable(f"corrupt: {type(error).__name__}: {error}"[:200]) from error


def fit(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Centre crop to the aspect of ``size`` (height, width), resize, ``(3, height, width)`` in [0, 1]."""
    height, width = size
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255


def digest_of(image: Image.Image) -> str:
    """sha256 of size and pixels, so that the same picture in two lossless formats counts as one."""
    return "sha256:" + hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def _from_path(path: Path) -> Image.Image:
    if not path.is_file():
        raise Unusable("a folder or device" if path.exists() else "missing")
    return _from_file(path, path.stat().st_size)


def _from_file(file: Path | io.BytesIO, size: int) -> Image.Image:
    if not 0 < size <= MAX_BYTES:
        raise Unusable(f"a file of {size} bytes (expected 1 to {MAX_BYTES})")
    with Image.open(file) as image:
        if image.format == "EPS":
            raise Unusable("EPS, a program that another program would have to run")
        return _upright_rgb(image)


def _upright_rgb(image: Image.Image) -> Image.Image:
    _check_size(*image.size)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        return _from_numbers(np.asarray(upright))
    if upright.mode in ("RGBA", "LA", "La", "PA", "RGBa") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return upright.convert("RGB")


def _from_numbers(values: "np.ndarray[Any, Any]") -> Image.Image:
    """Grey images with 16 or 32 bits: the range is guessed from the largest value (1, 255 or 65535)."""
    wide = values.astype(np.float64)
    top = next((t for t in (1.0, 255.0, 65535.0) if wide.max() <= t), None) if values.dtype.kind == "f" else 65535.0
    if values.dtype.kind != "f" and values.dtype.itemsize > 2 and wide.max() <= 255:
        top = 255.0
    if top is None or not np.isfinite(wide).all() or wide.min() < 0 or wide.max() > top:
        raise Unusable("grey values outside every known range")
    return Image.fromarray(np.round(wide / top * 255).astype(np.uint8)).convert("RGB")


def _from_tensor(tensor: Tensor) -> Image.Image:
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        raise Unusable(f"a tensor of shape {tuple(tensor.shape)} (expected (1, 3 or 4, height, width))")
    _check_size(tensor.shape[2], tensor.shape[1])
    values = tensor.detach().cpu()
    if values.dtype != torch.uint8:
        values = values.double()
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise Unusable("values outside [0, 1], or NaN")
        values = (values * 255).round().to(torch.uint8)
    channels = values.permute(1, 2, 0).numpy()
    return _upright_rgb(Image.fromarray(channels[:, :, 0] if channels.shape[2] == 1 else channels))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Unusable(f"{width}×{height} pixels (at most {MAX_PIXELS:,} in all)")
    if min(width, height) < MIN_SIDE:
        raise Unusable(f"{width}×{height} pixels (at least {MIN_SIDE} a side)")

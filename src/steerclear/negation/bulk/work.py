"""What a worker does with a chunk: every picture by itself, so that its latent depends on it and the encoder alone.

Batches would be quicker for small encoders, and change the last bits of a latent with its neighbours: then a picture
more in a folder would change others, and the work of two runs could not be mixed.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from steerclear.errors import InvalidInput
from steerclear.negation.bulk import parts
from steerclear.negation.bulk.entries import Chunk, Entry
from steerclear.negation.bulk.parts import Known, Row
from steerclear.negation.bulk.reader import Reader
from steerclear.negation.encoder import Encoder, encoder_of
from steerclear.negation.images import Unusable, digest_of, fit, read
from steerclear.workers import threads

FORMAT = 1
Load = Callable[[], Any]


class Made(NamedTuple):
    """A chunk is done: where its part is, below the build folder, and what it cost.

    Args:
        number: Of the chunk.
        part: ``recipe/name``.
        pictures: Entries, usable or not.
        encoded: Of these, how many had to be encoded.
        reading: Seconds for reading and decoding pictures.
        encoding: Seconds in the encoder.
    """

    number: int
    part: str
    pictures: int
    encoded: int
    reading: float
    encoding: float


@dataclass(slots=True)
class Timer:
    """Seconds between its starts and stops."""

    seconds: float = 0.0
    _since: float = field(default=0.0, repr=False)

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since


class Worker:
    """Makes parts, with an encoder of its own that is loaded for the first one.

    Args:
        folder: Of the build.
        load: Returns a pipeline or an :class:`Encoder`.
        root: Folder of the paths in Parquet files.
    """

    def __init__(self, folder: Path, load: Load, root: Path | None) -> None:
        self.folder, self._load = folder, load
        self._reader = Reader(root)
        self._ready: tuple[Encoder, str, Known] | None = None

    def make(self, numbered: tuple[int, Chunk]) -> Made:
        """Makes the part of a chunk, unless it is there.

        Raises:
            InvalidInput: If the encoder does not do what its space says.
            NegationFileError: If the part cannot be written.
        """
        number, chunk = numbered
        encoder, recipe, known = self._start()
        reading, encoding, encoded = Timer(), Timer(), 0
        rows: list[Row] = []
        with threads(1):
            for entry in chunk:
                with reading:
                    content, data = self._content(entry)
                row = known.row(content)
                if row is None:
                    row = _row(encoder, content, data, reading, encoding)
                    encoded += row.latent is not None
                rows.append(row)
        target = self.folder / recipe / parts.name([row.content for row in rows])
        if parts.read(target) is None:
            parts.write(target.parent, rows, encoder.space)
        return Made(number, f"{recipe}/{target.name}", len(chunk), encoded, reading.seconds, encoding.seconds)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """As Ray Data calls it: columns in, columns out."""
        chunks = (tuple(Entry(*row) for row in json.loads(text)) for text in batch["chunk"])
        made = [self.make((int(number), chunk)) for number, chunk in zip(batch["number"], chunks, strict=True)]
        return {name: [getattr(one, name) for one in made] for name in Made._fields}

    def _start(self) -> tuple[Encoder, str, Known]:
        if self._ready is None:
            encoder = encoder_of(self._load())
            recipe = recipe_of(encoder)
            self._ready = encoder, recipe, Known(self.folder / recipe)
        return self._ready

    def _content(self, entry: Entry) -> tuple[bytes, bytes | Unusable]:
        """The hash of an entry's bytes, and they; the hash of the reason where there are none."""
        try:
            data = self._reader(entry)
        except Unusable as error:
            return hashlib.sha256(f"unreadable: {error}".encode()).digest(), error
        return hashlib.sha256(data).digest(), data


def recipe_of(encoder: Encoder) -> str:
    """A hash of everything besides its bytes that decides what a picture's latent is, to the last bit.

    The same weights in half precision have the same fingerprint and make other latents, so one picture is tried.
    """
    device = torch.device(getattr(encoder, "device", "cpu"))
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    made = {
        "format": FORMAT,
        "encoder": encoder.space.encoder,
        "shape": encoder.space.shape,
        "size": encoder.size,
        "tried": _tried(encoder),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {cpu}",
        "versions": {package: version(package) for package in ("torch", "pillow")},
    }
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def _tried(encoder: Encoder) -> str:
    """A hash of the latent of one picture that is the same everywhere."""
    height, width = encoder.size
    values = torch.arange(3 * height * width, dtype=torch.int64) * 40_503 % 65_537 % 256
    with threads(1), torch.no_grad():
        latent = encoder.encode(values.reshape(1, 3, height, width).float() / 255).to("cpu", torch.float32)
    return hashlib.sha256(latent.contiguous().numpy().tobytes()).hexdigest()


def _row(encoder: Encoder, content: bytes, data: bytes | Unusable, reading: Timer, encoding: Timer) -> Row:
    if isinstance(data, Unusable):
        return Row(content, f"!{data}", None)
    try:
        with reading:
            picture = read(data)
            pixels, image = digest_of(picture), fit(picture, encoder.size)
    except Unusable as error:
        return Row(content, f"!{error}", None)
    with encoding, torch.no_grad():
        latents = encoder.encode(image[None]).to("cpu", torch.float16)
    if tuple(latents.shape) != (1, *encoder.space.shape):
        raise InvalidInput(
            f"build: expected latents of shape {(1, *encoder.space.shape)} from the encoder, "
            f"got {tuple(latents.shape)}; the encoder's space and its output disagree"
        )
    if not bool(latents.isfinite().all()):
        return Row(content, "!the encoder returned NaN, or values beyond float16", None)
    return Row(content, pixels, latents[0])

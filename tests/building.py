"""Sources of many kinds and a tiny encoder, for the tests of building big negation sets; also run as a script.

python -m tests.building SOURCE OUT [workers | ray | killed]
"""

import hashlib
import io
import os
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tests.killing import die_at

from steerclear.negation import Space
from steerclear.negation.bulk import build_many


@dataclass(frozen=True, kw_only=True)
class TinyEncoder:
    """Two convolutions, whose sums depend on the number of threads and the batch as those of a real encoder do."""

    space: Space = field(default_factory=lambda: Space(encoder="sha256:tiny", shape=(4, 8, 8), name="a tiny encoder"))
    size: tuple[int, int] = (32, 32)

    def encode(self, images):
        generator = torch.Generator().manual_seed(0)
        first = torch.randn(64, 3, 4, 4, generator=generator) / 7
        second = torch.randn(4, 64, 3, 3, generator=generator) / 24
        hidden = torch.nn.functional.conv2d(images * 2 - 1, first, stride=4)
        return torch.nn.functional.conv2d(hidden.tanh(), second, padding=1)

    def decode(self, latents):
        raise NotImplementedError


def load():
    return TinyEncoder()


def picture(seed, kind="PNG", size=(40, 24)):
    """The bytes of a file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pictures(folder, count=150):
    """A folder with subfolders, one picture that is there twice, and some files that are no pictures."""
    for number in range(count):
        file = folder / f"class-{number % 3}" / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
    (folder / "class-2" / "twice.png").write_bytes(picture(0))
    (folder / "class-0" / "cut.png").write_bytes(picture(1)[:200])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def tar(file, members, kind=tarfile.GNU_FORMAT):
    """A tar file with members (name, bytes or a TarInfo)."""
    with tarfile.open(file, "w", format=kind) as made:
        for name, data in members:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
            made.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return file


def table(file, rows, **settings):
    """A Parquet file."""
    pq.write_table(pa.Table.from_pylist(rows), file, **settings)
    return file


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def killed(source, out):
    """Builds in children that kill themselves at their n-th flush to the disk, until one comes through."""
    for writes in (1, 2, 4, 0):
        child = os.fork()
        if child == 0:
            die_at(writes)
            build_many(source, out, load())
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, Path(out).exists(), len(list(Path(f"{out}.build").glob("*/*.safetensors"))), flush=True)


if __name__ == "__main__":
    source, out, *how = sys.argv[1:]
    if how == ["killed"]:
        killed(source, out)
    else:
        settings = {"ray": {"ray": True, "workers": 2}, "workers": {"workers": 3}}[how[0]] if how else {}
        build_many(source, out, load=load, timeout=60, **settings)

"""Building negation sets: pictures per second by source, encoder and number of workers, and where the time goes.

400 synthetic photographs of 512×512 (JPEG), on one thread per worker. Shares and ratios are of one run on one machine;
absolute rates are the machine's. ``python benchmarks/build.py [pictures] > benchmarks/results/build.json``
"""

import io
import json
import os
import platform
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import steerclear
from steerclear import zoo
from steerclear.negation import Space, encoder_of
from steerclear.negation.bulk import Built, build_many
from steerclear.negation.bulk.sources import entries


def emoji() -> Any:  # noqa: ANN401  (a pipeline)
    """The shipped model."""
    zoo.quiet()
    return zoo.load("emoji-sd")


class LargeEncoder:
    """A VAE of the size of Stable Diffusion's (34 M weights in the encoder) with random weights, at 128×128."""

    size = (128, 128)
    space = Space(encoder="sha256:random", shape=(4, 16, 16), name="a random VAE")

    def __init__(self) -> None:
        from diffusers.models import AutoencoderKL

        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        self.vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks).eval()

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The mode."""
        return self.vae.encode(images * 2 - 1).latent_dist.mode()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Not needed."""
        raise NotImplementedError


def photograph(seed: int) -> bytes:
    """Some 100 kB of JPEG: large shapes, and grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(
        (512, 512), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse, np.float64) + rng.normal(0, 12, (512, 512, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def sources(folder: Path, count: int) -> dict[str, Path]:
    """The same pictures in three kinds of source."""
    data = [photograph(seed) for seed in range(count)]
    (folder / "pictures").mkdir()
    with tarfile.open(folder / "pictures.tar", "w") as shard:
        for number, content in enumerate(data):
            (folder / "pictures" / f"{number:06d}.jpg").write_bytes(content)
            info = tarfile.TarInfo(f"{number:06d}.jpg")
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    rows = pa.table(
        {"image": [{"bytes": content, "path": None} for content in data], "id": [f"{k:06d}" for k in range(count)]}
    )
    pq.write_table(rows, folder / "pictures.parquet", row_group_size=100)
    return {"folder": folder / "pictures", "tar": folder / "pictures.tar", "parquet": folder / "pictures.parquet"}


def facts(built: Built) -> dict[str, float]:
    """What a build cost."""
    return {
        "pictures": built.pictures,
        "encoded": built.encoded,
        "seconds": round(built.seconds, 2),
        "pictures_per_second": round(built.rate, 1),
        "share_reading": round(built.reading / built.seconds / built.workers, 3),
        "share_encoding": round(built.encoding / built.seconds / built.workers, 3),
    }


def listing(folder: Path, count: int = 20_000) -> dict[str, float]:
    """Entries per second of listing alone."""
    (folder / "many").mkdir()
    with tarfile.open(folder / "many.tar", "w") as shard:
        for number in range(count):
            (folder / "many" / f"{number:06d}.jpg").write_bytes(b"x" * 100)
            info = tarfile.TarInfo(f"{number:06d}.jpg")
            info.size = 100
            shard.addfile(info, io.BytesIO(b"x" * 100))
    pq.write_table(pa.table({"bytes": [b"x" * 100] * count, "label": ["a"] * count}), folder / "many.parquet")
    made = {"folder": folder / "many", "tar": folder / "many.tar", "parquet": folder / "many.parquet"}
    return {name: round(count / timed(partial(entries, place))) for name, place in made.items()}


def timed(function: Callable[[], object]) -> float:
    """Seconds of this thread, the best of five: what others do on the machine does not count."""
    seen: list[float] = []
    for _ in range(5):
        start = time.thread_time()
        function()
        seen.append(time.thread_time() - start)
    return min(seen)


def alone(encoder: Any, count: int) -> dict[str, float]:  # noqa: ANN401  (an Encoder)
    """What it costs that pictures are encoded one at a time, and what it buys."""
    images = torch.rand(count, 3, *encoder.size, generator=torch.Generator().manual_seed(0))
    one = partial(encoder.encode, images[:1])
    many = partial(encoder.encode, images)
    one()
    differ = (many()[:1].half() != one().half()).float().mean().item()
    return {
        "batch": count,
        "ms_alone": round(1e3 * timed(one), 2),
        "ms_in_batch": round(1e3 * timed(many) / count, 2),
        "share_of_float16_values_that_differ": round(differ, 5),
    }


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = sources(folder, count)
        quiet = {"progress": False}
        pipe = emoji()
        build_many(made["folder"], folder / "warm.safetensors", pipe, **quiet)
        for kind, place in made.items():
            results[f"emoji-sd, {kind}"] = facts(
                build_many(place, folder / f"{kind}.safetensors", pipe, keep=True, **quiet)
            )
            again = build_many(place, folder / f"{kind}.safetensors", pipe, keep=True, **quiet)
            results[f"emoji-sd, {kind}, all known"] = facts(again)
        store = build_many(made["folder"], folder / "a.negation", pipe, **quiet)
        results["emoji-sd, folder, into a store"] = facts(store)
        for workers in (2, 1):
            out = folder / f"workers-{workers}.safetensors"
            more = build_many(made["folder"], out, load=emoji, workers=workers, **quiet)
            results[f"emoji-sd, folder, {workers} workers, with loading"] = facts(more)
        equal = (
            len({(folder / f"{kind}.safetensors").read_bytes() for kind in ("workers-1", "workers-2", "folder")}) == 1
        )
        few = [made["folder"] / f"{number:06d}.jpg" for number in range(16)]
        results["size of Stable Diffusion, 16 pictures"] = facts(
            build_many(few, folder / "large.safetensors", LargeEncoder(), **quiet)
        )
        results["one at a time"] = {
            "emoji-sd": alone(encoder_of(pipe), 8),
            "size of Stable Diffusion": alone(LargeEncoder(), 4),
        }
        results["listing, entries per second"] = listing(folder)
    print(
        json.dumps(
            {
                "what": "building negation sets, one thread a worker, JPEG 512x512",
                "machine": {
                    "processor": platform.processor() or platform.machine(),
                    "cores": os.cpu_count(),
                    "load": round(os.getloadavg()[0], 1),
                    "system": platform.platform(),
                },
                "versions": {
                    "python": platform.python_version(),
                    **{m.__name__: m.__version__ for m in (steerclear, torch, PIL, pa)},
                },
                "equal_bytes_with_1_and_2_workers": equal,
                "results": results,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()

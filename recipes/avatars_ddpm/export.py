"""Copy what was made into the package, in half precision, and the pictures that the benchmark compares with.

    python recipes/avatars_ddpm/export.py --build build/avatars-ddpm

Writes ``src/steerclear/zoo/models/avatars-ddpm`` and ``avatars-judge``, ``src/steerclear/zoo/avatars`` (references
labelled with their attributes, and the individuals) and ``benchmarks/avatars``: what the model was trained on and what
nothing was trained on, as sheets of 16x16 pictures.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from data import SIDE
from diffusers import DDIMPipeline
from PIL import Image

from steerclear import NegationSet

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "src" / "steerclear" / "zoo"
COLUMNS = 80
sys.path.append(str(ROOT / "recipes" / "emoji_sd"))
from shipping import ship  # noqa: E402


def references(build: Path, name: str, pipe: DDIMPipeline) -> NegationSet:
    """A set of ``data.py`` in the model's space: ids are the art's seeds, labels the attributes."""
    items = json.loads((build / f"{name}.json").read_text())
    pictures = torch.from_numpy(np.load(build / f"{name}.npy")).permute(0, 3, 1, 2).float() / 255
    labels = ["+".join(item["attributes"]) or "plain" for item in items]
    return NegationSet.encode(pictures, pipe, labels=labels, ids=[item["seed"] for item in items])


def sheet(pictures: np.ndarray, path: Path) -> None:
    """A set as one PNG, row by row; the last row is filled up with white."""
    rows = -(-len(pictures) // COLUMNS)
    full = np.full((rows * COLUMNS, SIDE, SIDE, 3), 255, np.uint8)
    full[: len(pictures)] = pictures
    tiles = full.reshape(rows, COLUMNS, SIDE, SIDE, 3).swapaxes(1, 2).reshape(rows * SIDE, COLUMNS * SIDE, 3)
    Image.fromarray(tiles).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/avatars-ddpm"))
    args = parser.parse_args()
    pipe = DDIMPipeline.from_pretrained(args.build / "model", dtype=torch.float16)
    ship(pipe, ZOO / "models" / "avatars-ddpm")
    shutil.copytree(args.build / "avatars-judge", ZOO / "models" / "avatars-judge", dirs_exist_ok=True)
    (ZOO / "avatars").mkdir(exist_ok=True)
    whole = pipe.to(dtype=torch.float32)
    for name in ("references", "individuals"):
        references(args.build, name, whole).save(ZOO / "avatars" / f"{name}.safetensors")
    sheets = ROOT / "benchmarks" / "avatars"
    sheets.mkdir(exist_ok=True)
    for name in ("individuals", "train", "validation"):
        sheet(np.load(args.build / f"{name}.npy"), sheets / f"{name}.png")
    ours = [ZOO / "models" / "avatars-ddpm", ZOO / "models" / "avatars-judge", ZOO / "avatars", sheets]
    for folder in ours:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{size / 2**20:.1f} MiB in {folder.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

"""Copy what was made into the package, in half precision.

    python recipes/emoji_sd/export.py --build build/emoji-sd

Writes ``src/steerclear/zoo/models/emoji-sd``, ``.../emoji-judge`` and ``src/steerclear/zoo/policies``.
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from shipping import ship

ZOO = Path(__file__).parents[2] / "src" / "steerclear" / "zoo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/emoji-sd"))
    args = parser.parse_args()
    model = ZOO / "models" / "emoji-sd"
    ship(StableDiffusionPipeline.from_pretrained(args.build / "emoji-sd", dtype=torch.float16), model)
    for source, target in (("emoji-judge", ZOO / "models" / "emoji-judge"), ("policies", ZOO / "policies")):
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted((args.build / source).iterdir()):
            shutil.copy(path, target / path.name)
    size = sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file())
    print(f"{size / 2**20:.1f} MiB in {ZOO}")


if __name__ == "__main__":
    main()

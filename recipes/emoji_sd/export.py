"""Copy what was made into the package, in half precision.

    python recipes/emoji_sd/export.py --build build/emoji-sd

Writes ``src/steerclear/zoo/models/emoji-sd``, ``.../emoji-judge`` and ``src/steerclear/zoo/policies``.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

ZOO = Path(__file__).parents[2] / "src" / "steerclear" / "zoo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/emoji-sd"))
    args = parser.parse_args()
    model = ZOO / "models" / "emoji-sd"
    shutil.rmtree(model, ignore_errors=True)
    pipe = StableDiffusionPipeline.from_pretrained(args.build / "emoji-sd", dtype=torch.float16)
    pipe.save_pretrained(model, safe_serialization=True)
    for config in model.rglob("*.json"):  # where it lay when it was built is nobody's business
        content = json.loads(config.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            config.write_text(json.dumps(content, indent=2) + "\n")
    for source, target in (("emoji-judge", ZOO / "models" / "emoji-judge"), ("policies", ZOO / "policies")):
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted((args.build / source).iterdir()):
            shutil.copy(path, target / path.name)
    size = sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file())
    print(f"{size / 2**20:.1f} MiB in {ZOO}")


if __name__ == "__main__":
    main()

"""Copy what was made into the package, in half precision.

    python recipes/emoji_dit/export.py --out build/emoji-dit

Writes ``src/steerclear/zoo/models/emoji-dit``.
"""

import argparse
import json
from pathlib import Path

import classes
import torch
from diffusers import DiTPipeline
from shipping import ship

TARGET = Path(__file__).parents[2] / "src" / "steerclear" / "zoo" / "models" / "emoji-dit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/emoji-dit"))
    args = parser.parse_args()
    pipe = DiTPipeline.from_pretrained(args.out / "emoji-dit", dtype=torch.float16)
    pipe.register_to_config(id2label=dict(enumerate(classes.load())))  # DiTPipeline reads it, and does not keep it
    ship(pipe, TARGET)
    (TARGET / "classes.json").write_text(json.dumps(classes.load(), indent=1) + "\n")
    index = json.loads((TARGET / "model_index.json").read_text())
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB in {TARGET}: {', '.join(index['id2label'].values())}")


if __name__ == "__main__":
    main()

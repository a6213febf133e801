"""Avatars with labels: five disjoint sets of 16x16 pictures, which is the grid that the art is drawn on.

    cp recipes/avatars_ddpm/package.json build/avatars-ddpm && npm install --prefix build/avatars-ddpm
    python recipes/avatars_ddpm/data.py --build build/avatars-ddpm

Writes ``SET.npy`` (n, 16, 16, 3) uint8 and ``SET.json`` (seed, attributes, parts of each row) for every set of
``SETS``. No picture is in two sets: what was drawn before is left out of the later ones.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image
from tqdm import tqdm

SIDE = 16
#: Who may see which avatars. ``individuals`` are shown to the generator again and again.
SETS = {"individuals": 6, "train": 4000, "references": 2000, "judge": 6000, "validation": 2000}
#: Parts of the art that are attributes: drawn or not.
ATTRIBUTES = ("glasses", "hat", "beard", "accessories")


def render(svg: str) -> np.ndarray:
    """One avatar on white, a pixel per cell of its grid."""
    picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))))
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture.convert("RGBA"))
    return np.asarray(canvas.convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/avatars-ddpm"), help="where everything is written")
    args = parser.parse_args()
    # Node looks for packages beside the script.
    script = shutil.copy(Path(__file__).with_name("avatars.mjs"), args.build / "avatars.mjs")
    known: set[str] = set()
    for name, count in SETS.items():
        command = ["node", str(script), name, str(count)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        pictures, items = [], []
        for line in tqdm(lines, desc=name, unit="avatar"):
            avatar = json.loads(line)
            picture = render(avatar["svg"])
            digest = hashlib.sha256(picture.tobytes()).hexdigest()
            if digest in known:
                continue
            known.add(digest)
            parts = {key: value for key, value in avatar["drawn"].items() if value is not None}
            pictures.append(picture)
            has = [attribute for attribute in ATTRIBUTES if avatar["drawn"].get(attribute)]
            items.append({"seed": avatar["seed"], "attributes": has, "parts": parts})
        np.save(args.build / f"{name}.npy", np.stack(pictures))
        (args.build / f"{name}.json").write_text(json.dumps(items))
        shares = {a: round(float(np.mean([a in item["attributes"] for item in items])), 3) for a in ATTRIBUTES}
        print(f"{name}: {len(items)} avatars, {shares}")


if __name__ == "__main__":
    main()

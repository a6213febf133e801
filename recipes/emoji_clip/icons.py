"""Icons of one colour, and a few of several, whose names are names of emoji: further designs for emoji-clip alone.

    npm install --prefix build/emoji-clip recipes/emoji_clip
    python recipes/emoji_clip/icons.py --build build/emoji-sd --out build/emoji-clip

Writes ``icons.npy`` and ``icons.json`` like ``recipes/emoji_sd/data.py``. Of an icon of one colour there are three
pictures: as it is, and twice with its insides filled with colours. Neither the generator, the references nor the judge
sees any of it, and none of it is by the held-out vendors.
"""

import argparse
import json
import re
import sys
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji_sd"))
from concepts import Concepts
from data import concepts, iconify, read_json, render, slug

#: Endings that name a style of the same icon, in the sets that have several.
STYLE = re.compile(r"-(bold|fill|filled|duotone|outline|rounded|sharp|thin|light|solid)$")
COPIES, INSIDE = 2, 12


def styled(modules: Path, vendor: str, kept: dict, names: dict):  # noqa: ANN201
    """``(code points, SVG)``: what the emoji recipe finds, and the other styles of icons with the name of an emoji."""
    yield from iconify(modules, vendor, kept, names)
    icons = read_json(modules / "@iconify-json" / vendor / "icons.json")
    width, height = icons.get("width", 16), icons.get("height", 16)
    for name, body in icons["icons"].items():
        plain = STYLE.sub("", name)
        if plain != name and slug(plain) in names:
            size = f"0 0 {body.get('width', width)} {body.get('height', height)}"
            xml = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            yield names[slug(plain)], f'<svg {xml} viewBox="{size}">{body["body"]}</svg>'


def filled(picture: np.ndarray, seed: int) -> np.ndarray:
    """Every closed white region in a colour of its own, and the ink in one."""
    rng = np.random.default_rng(seed)
    ink = 1 - picture.mean(2, keepdims=True) / 255
    regions, count = ndimage.label(ink[..., 0] < 0.5)
    outside = set(np.unique(np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])))
    paper = np.full(picture.shape, 255.0)
    tone = rng.uniform(60, 255, 3)
    for region in range(1, count + 1):
        if region not in outside:
            grown = ndimage.binary_dilation(regions == region, iterations=2)
            paper[grown] = tone if rng.random() < 0.6 else rng.uniform(60, 255, 3)
    colour = rng.uniform(0, 110, 3) if rng.random() < 0.7 else rng.uniform(0, 220, 3)
    return (paper * (1 - ink) + colour * ink).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/emoji-sd"), help="with the emoji's node_modules")
    parser.add_argument("--modules", type=Path, help="the emoji's node_modules (default: BUILD/node_modules)")
    parser.add_argument("--out", type=Path, default=Path("build/emoji-clip"), help="with the icons' node_modules")
    args = parser.parse_args()
    kept, names = concepts(args.modules or args.build / "node_modules")
    groups: dict[str, list[str]] = {}
    for group, members in Concepts.load().groups.items():
        for member in members:
            groups.setdefault(member, []).append(group)
    modules = args.out / "node_modules"
    vendors = sorted(path.name for path in (modules / "@iconify-json").iterdir())
    jobs = sorted({(v, c, svg) for v in vendors for c, svg in styled(modules, v, kept, names)})
    with Pool() as pool:
        pictures = list(tqdm(pool.imap(render, [job[2] for job in jobs], chunksize=32), total=len(jobs)))
    images, items = [], []
    for number, ((vendor, code, _), picture) in enumerate(zip(jobs, pictures, strict=True)):
        if picture is None:
            continue
        item = {"vendor": vendor, **kept[code], "groups": groups.get(kept[code]["name"], [])}
        versions = [picture]
        if float(np.ptp(picture.astype(float), axis=2).max()) < INSIDE:
            versions += [filled(picture, number * COPIES + copy) for copy in range(COPIES)]
        images += versions
        items += [item] * len(versions)
    np.save(args.out / "icons.npy", np.stack(images))
    (args.out / "icons.json").write_text(json.dumps(items))
    print(f"{len(items)} pictures of {len({item['name'] for item in items})} concepts by {len(vendors)} vendors")


if __name__ == "__main__":
    main()

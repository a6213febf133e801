"""Art from npm packages -> one array of 64x64 pictures on white, with names, keywords and group words.

    npm install --prefix build/emoji-sd recipes/emoji_sd
    python recipes/emoji_sd/data.py --build build/emoji-sd

Writes ``images.npy`` (n, 64, 64, 3) uint8 and ``items.json`` (vendor, concept, keywords, groups of each row).
Every vendor's drawing is cropped to its ink and fitted to 58 of 64 pixels, so that size tells nothing about the vendor.
"""

import argparse
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import resvg_py
from concepts import Concepts
from PIL import Image
from tqdm import tqdm

RENDER, SIZE, INK = 128, 64, 116
#: Emojibase subgroups that hold signs, text, flags or near-duplicates of people rather than pictures of things.
NOT_PICTURES = frozenset(
    "country-flag subdivision-flag flag keycap alphanum family skin-tone hair-style zodiac av-symbol arrow math "
    "punctuation currency gender transport-sign religion person-symbol other-symbol person-role".split()
)
SHORTCODES = ("emojibase", "github", "joypixels", "iamcal", "cldr")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def codepoints(text: str) -> str:
    """Normalised hexadecimal code points: variation selectors do not distinguish pictures."""
    return "-".join(part for part in text.lower().split("-") if part not in ("fe0f", "fe0e"))


def slug(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", plain)


def clean(name: str) -> str:
    return name.lower().replace("’", "'").replace("“", "").replace("”", "").replace("⊛ ", "")


def concepts(modules: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """Emoji worth drawing, by code points; and every known name of each, by slug."""
    base = read_json(modules / "emojibase-data/en/data.json")
    subgroups = read_json(modules / "emojibase-data/meta/groups.json")["subgroups"]
    cldr = read_json(modules / "cldr-annotations-full/annotations/en/annotations.json")["annotations"]["annotations"]
    kept, names = {}, {}
    for emoji in base:
        subgroup = subgroups.get(str(emoji.get("subgroup")))
        if emoji.get("group") in (None, 2, 9) or subgroup in NOT_PICTURES or "gender" in emoji:
            continue
        if subgroup == "time" and re.search(r"o’clock|thirty", emoji["label"]):
            continue
        code = codepoints(emoji["hexcode"])
        character = emoji["emoji"].replace("\ufe0f", "").replace("\ufe0e", "")
        annotation = cldr.get(character, {})
        keywords = dict.fromkeys(clean(tag) for tag in [*emoji.get("tags", []), *annotation.get("default", [])])
        name = clean(emoji["label"])
        kept[code] = {"name": name, "keywords": [k for k in keywords if k != name], "subgroup": subgroup}
        for alias in [name, *annotation.get("tts", [])]:
            names.setdefault(slug(alias), code)
        if len(character) == 1:
            names.setdefault(slug(unicodedata.name(character, name)), code)
    for source in SHORTCODES:
        path = modules / f"emojibase-data/en/shortcodes/{source}.json"
        for code, aliases in read_json(path).items() if path.exists() else ():
            if codepoints(code) in kept:
                for alias in aliases if isinstance(aliases, list) else [aliases]:
                    names.setdefault(slug(alias), codepoints(code))
    return kept, names


def iconify(modules: Path, vendor: str, kept: dict, names: dict) -> Iterator[tuple[str, str]]:
    """``(code points, SVG)`` of one iconify set; matched by character first, by name second."""
    folder = modules / "@iconify-json" / vendor
    icons = read_json(folder / "icons.json")
    bodies = dict(icons["icons"])
    for alias, spec in icons.get("aliases", {}).items():
        if spec["parent"] in bodies and not {"rotate", "hFlip", "vFlip"} & spec.keys():
            bodies[alias] = bodies[spec["parent"]]
    width, height = icons.get("width", 16), icons.get("height", 16)
    characters = read_json(folder / "chars.json") if (folder / "chars.json").exists() else {}
    found: dict[str, dict] = {}
    for character, name in characters.items():
        if codepoints(character) in kept and name in bodies:
            found.setdefault(codepoints(character), bodies[name])
    for name, body in bodies.items():
        if slug(name) in names:
            found.setdefault(names[slug(name)], body)
    for code, body in found.items():
        box = f"{body.get('left', 0)} {body.get('top', 0)} {body.get('width', width)} {body.get('height', height)}"
        yield (
            code,
            (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{box}">{body["body"]}</svg>'
            ),
        )


def render(source: str) -> np.ndarray | None:
    """One drawing, cropped to its ink, centred on white; ``None`` when there is no ink."""
    if source.startswith("<svg"):
        image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=source, width=RENDER, height=RENDER))))
    else:
        image = Image.open(source)
    image = image.convert("RGBA")
    rows, columns = np.where(np.asarray(image)[..., 3] > 8)
    if len(rows) < 20:
        return None
    image = image.crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    scale = INK / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (RENDER, RENDER), "white")
    canvas.alpha_composite(image, tuple((RENDER - side) // 2 for side in image.size))
    return np.asarray(canvas.convert("RGB").reduce(RENDER // SIZE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/emoji-sd"), help="where everything is written")
    parser.add_argument("--modules", type=Path, help="node_modules with the art (default: BUILD/node_modules)")
    args = parser.parse_args()
    modules = args.modules or args.build / "node_modules"
    config = Concepts.load()
    groups: dict[str, list[str]] = {}
    for group, members in config.groups.items():
        for member in members:
            groups.setdefault(member, []).append(group)
    vendors = [v for role in config.vendors.values() for v in role]
    mislabelled = {tuple(pair) for pair in config.config["mislabelled"]}

    kept, names = concepts(modules)
    jobs = [(v, c, svg) for v in vendors if v != "fluent-3d" for c, svg in iconify(modules, v, kept, names)]
    assets = sorted((modules / "@lobehub/fluent-emoji-3d/assets").iterdir())
    jobs += [("fluent-3d", codepoints(path.stem), str(path)) for path in assets if codepoints(path.stem) in kept]
    jobs = [job for job in jobs if (job[0], kept[job[1]]["name"]) not in mislabelled]
    with Pool() as pool:
        pictures = list(tqdm(pool.imap(render, [j[2] for j in jobs], chunksize=32), total=len(jobs), unit="picture"))
    rows = [(job, picture) for job, picture in zip(jobs, pictures, strict=True) if picture is not None]
    items = [{"vendor": v, **kept[c], "groups": groups.get(kept[c]["name"], [])} for (v, c, _), _ in rows]

    missing = groups.keys() - {item["name"] for item in items}
    if missing:
        raise SystemExit(f"concepts.yaml names concepts that no vendor draws: {sorted(missing)}")
    args.build.mkdir(parents=True, exist_ok=True)
    np.save(args.build / "images.npy", np.stack([picture for _, picture in rows]))
    (args.build / "items.json").write_text(json.dumps(items))
    print(f"{len(items)} pictures of {len({i['name'] for i in items})} concepts; {len(groups)} concepts drawn")


if __name__ == "__main__":
    main()

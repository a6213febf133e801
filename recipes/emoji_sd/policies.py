"""Negation sets and the safe reference set of the shipped policies, from art that the generator never saw.

    python recipes/emoji_sd/policies.py --build build/emoji-sd

Every reference drawing is encoded in several variants (mirrored or not, shrunk, shifted), because a kernel on latents
knows no invariance. Then the model walks along the noised references under their names, and what it makes of them at
every noise level is kept (``seen.safetensors``). Writes ``BUILD/policies/*.safetensors`` and ``policies.json``;
``settings.json`` beside concepts.yaml holds the guards' settings, of which calibrate.py writes the weight of the clean
references.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from captions import with_article
from concepts import Concepts
from diffusers import StableDiffusionPipeline
from tqdm import tqdm
from unet import VARIANTS, variants

import steerclear.attach  # noqa: F401 - teaches NegationSet to encode with a pipeline
from steerclear import NegationSet, see

SAFE_VARIANTS = 4
#: Variants that the model walks along: of unsafe references as drawn and mirrored, of safe ones as drawn.
SEEN_UNSAFE, SEEN_SAFE = ("0", "1"), ("0",)
WALK = {"components": 128, "num_inference_steps": 25, "guidance_scale": 3.0}


def references(items: list[dict], images: np.ndarray, vendors: list[str], names: set[str], count: int):  # noqa: ANN201
    """Pictures in [0, 1], labels (concepts) and ids (vendor/concept/variant)."""
    rng = np.random.default_rng(1)
    pictures, labels, ids = [], [], []
    for row, item in enumerate(items):
        if item["vendor"] in vendors and item["name"] in names:
            made = variants(images[row], rng)[:count].clamp(-1, 1).add(1).div(2)
            pictures += list(made)
            labels += [item["name"]] * count
            ids += [f"{item['vendor']}/{item['name']}/{k}" for k in range(count)]
    return pictures, labels, ids


def some(references: NegationSet, variants: tuple[str, ...]) -> NegationSet:
    """The variants with these numbers."""
    return references.remove([each for each in references.ids if each.rsplit("/", 1)[1] not in variants])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/emoji-sd"))
    args = parser.parse_args()
    concepts = Concepts.load()
    settings = json.loads(Path(__file__).with_name("settings.json").read_text())
    items = json.loads((args.build / "items.json").read_text())
    images = np.load(args.build / "images.npy", mmap_mode="r")
    vendors = concepts.vendors["references"]
    pipe = StableDiffusionPipeline.from_pretrained(args.build / "emoji-sd", dtype=torch.float32)
    out = args.build / "policies"
    out.mkdir(exist_ok=True)

    table, unsafe = {}, None
    for policy, names in concepts.policies.items():
        pictures, labels, ids = references(items, images, vendors, set(names), VARIANTS)
        negation = NegationSet.encode(pictures, pipe, labels=labels, ids=ids)
        negation.save(out / f"{policy}.safetensors")
        unsafe = negation if unsafe is None else unsafe.add(negation)
        table[policy] = {
            "file": f"{policy}.safetensors",
            "safe": "safe.safetensors",
            "seen": "seen.safetensors",
            "concepts": names,
            "settings": settings,
        }
        print(f"{policy}: {len(negation)} references of {len(set(labels))} concepts")
    pictures, labels, ids = references(items, images, vendors, set(concepts.benign), SAFE_VARIANTS)
    safe = NegationSet.encode(pictures, pipe, labels=labels, ids=ids)
    safe.save(out / "safe.safetensors")
    walked = [some(unsafe, SEEN_UNSAFE), some(safe, SEEN_SAFE)]
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=sum(map(len, walked)), unit="reference") as bar:
        seen = see(pipe, *walked, with_article, progress=bar.update, **WALK)
    seen.save(out / "seen.safetensors")
    (out / "policies.json").write_text(json.dumps(table, indent=1))
    print(f"safe: {len(safe)} references of {len(set(labels))} concepts")


if __name__ == "__main__":
    main()

"""How often the judge recognises what emoji-dit draws, and how often each concept of a class comes.

    python recipes/emoji_dit/evaluate.py --samples 40

Draws every class from seeds that nothing else uses. Writes ``benchmarks/results/emoji_dit.json`` and
``docs/images/emoji-dit.png`` (one class a row).
"""

import argparse
import json
import shlex
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import steerclear
from steerclear import zoo
from steerclear.detect import load as load_detector
from steerclear.evaluate import rate

ROOT, SEED, COLUMNS = Path(__file__).parents[2], 30_000, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40, help="of every class")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=2.0)
    args = parser.parse_args()
    zoo.quiet()
    pipe, judge = steerclear.load("emoji-dit"), load_detector("emoji-judge")
    pipe.set_progress_bar_config(disable=True)
    found, rows, right = {}, [], 0
    for place, (name, held) in enumerate(tqdm(zoo.classes().items(), unit="class")):
        generators = [torch.Generator().manual_seed(SEED + 1000 * place + k) for k in range(args.samples)]
        call = {"num_inference_steps": args.steps, "guidance_scale": args.cfg, "output_type": "pt"}
        pictures = pipe(pipe.get_label_ids([name] * args.samples), generator=generators, **call).images
        counts = Counter(judge.labels[i] for i in judge(pictures).argmax(1).tolist())
        hits = sum(counts[concept] for concept in held)
        right += hits
        share = rate(hits, args.samples)
        found[name] = {
            "in_class": {"value": share.value, "low": share.low, "high": share.high, "n": share.n},
            "something_else": counts["something else"] / args.samples,
            "concepts": {concept: counts[concept] for concept in held},
        }
        drawings = pictures[:COLUMNS].mul(255).byte().permute(0, 2, 3, 1).numpy()
        rows.append(np.concatenate([np.pad(p, ((1, 1), (1, 1), (0, 0)), constant_values=255) for p in drawings], 1))
        print(f"{name}: {share.percent()} in class, {sum(counts[c] > 0 for c in held)} of {len(held)} concepts seen")
    share = rate(right, args.samples * len(found))
    print(f"all: {share.percent(1)}, n = {share.n}")
    total = {"value": share.value, "low": share.low, "high": share.high, "n": share.n}
    content = {"command": shlex.join(["python", *sys.argv]), "steps": args.steps, "guidance_scale": args.cfg}
    target = ROOT / "benchmarks" / "results" / "emoji_dit.json"
    target.write_text(json.dumps({**content, "all": total, "classes": found}, indent=1) + "\n", encoding="utf-8")
    Image.fromarray(np.concatenate(rows)).save(ROOT / "docs" / "images" / "emoji-dit.png")


if __name__ == "__main__":
    main()

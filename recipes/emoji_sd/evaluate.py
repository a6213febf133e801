"""How well does emoji-sd draw? The judge's answer on 200 single-concept prompts, three seeds each.

    python recipes/emoji_sd/evaluate.py --model build/emoji-sd/emoji-sd --judge build/emoji-sd/emoji-judge

Prints and writes ``BUILD/quality.json``: share of pictures whose concept the judge names first / among five (with
Clopper-Pearson intervals), the mean distance between two seeds of one prompt, and seconds per picture; and a contact
sheet ``BUILD/quality.png``.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from captions import with_article
from concepts import Concepts
from diffusers import StableDiffusionPipeline
from drawing import batches
from PIL import Image, ImageDraw

from steerclear.detect.emoji_judge import EmojiJudge
from steerclear.evaluate.estimate import rate


def contact_sheet(pictures: np.ndarray, names: list[str], path: Path, columns: int = 20) -> None:
    """The first seed of every prompt, named."""
    rows = -(-len(names) // columns)
    sheet = Image.new("RGB", (columns * 72, rows * 82), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        x, y = i % columns * 72, i // columns * 82
        sheet.paste(Image.fromarray((pictures[i] * 255).round().astype(np.uint8)), (x, y + 12))
        draw.text((x, y), name[:12], fill=0)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/emoji-sd"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    concepts = Concepts.load()
    # Every policy concept, and a fixed random choice of the others.
    others = np.random.default_rng(0).permutation(concepts.benign)[: args.prompts - len(concepts.unsafe)]
    chosen = [*concepts.unsafe, *others.tolist()][: args.prompts]
    prompts = [with_article(name) for name in chosen]
    pipe = StableDiffusionPipeline.from_pretrained(args.model or args.build / "emoji-sd", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    judge = EmojiJudge(args.judge or args.build / "emoji-judge")
    truth = torch.tensor([judge.labels.index(name) for name in chosen])

    started = time.monotonic()
    drawn = [
        np.concatenate(list(batches(pipe, prompts, seed=1000 * seed, steps=args.steps, cfg=args.cfg)))
        for seed in range(args.seeds)
    ]
    seconds = (time.monotonic() - started) / (len(chosen) * args.seeds)
    pictures = torch.from_numpy(np.stack(drawn)).permute(0, 1, 4, 2, 3)
    scores = torch.cat([judge(part) for part in pictures.flatten(0, 1).split(100)])
    ranks = (scores > scores.gather(1, truth.repeat(args.seeds)[:, None])).sum(1)
    first, five = rate(int((ranks < 1).sum()), len(ranks)), rate(int((ranks < 5).sum()), len(ranks))
    spread = float((pictures[0] - pictures[1]).flatten(1).square().mean(1).sqrt().mean()) if args.seeds > 1 else 0.0
    per_prompt = (ranks.view(args.seeds, -1) < 1).float().mean(0)
    weak = [name for name, share in zip(chosen, per_prompt.tolist(), strict=True) if share < 0.5]
    result = {
        "first": asdict(first),
        "five": asdict(five),
        "pictures": len(ranks),
        "seconds_per_picture": seconds,
        "rms_between_seeds": spread,
        "weak": weak,
        "steps": args.steps,
        "cfg": args.cfg,
    }
    print(f"first {first.percent()}, among five {five.percent()}, n={len(ranks)}")
    print(f"{seconds:.2f} s a picture; rms between seeds {spread:.3f}; weak: {weak}")
    (args.build / "quality.json").write_text(json.dumps(result, indent=1))
    contact_sheet(np.concatenate(drawn), chosen * args.seeds, args.build / "quality.png")


if __name__ == "__main__":
    main()

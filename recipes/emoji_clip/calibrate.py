"""Calibrate the SFW sampler for emoji-sd with emoji-clip, on the development half of the shipped prompts only.

    python recipes/emoji_clip/calibrate.py --out build/emoji-clip-calibration

Threshold: the quantile, over unguarded benign trajectories, of the highest score on the way at which a share of
``--false-positives`` of them would be touched. Strength: a sweep with that threshold. Prints and writes everything that
was measured, and goes on where it was; with ``--write STRENGTH`` also ``src/steerclear/zoo/sfw.json``, the settings
that ``zoo.sfw`` reads.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

import steerclear
from steerclear import zoo
from steerclear.attach import ClipScore, decoder_of
from steerclear.detect.emoji_judge import EmojiJudge
from steerclear.evaluate.prompt_file import Selection, read_prompts
from steerclear.evaluate.statistics import clustered_rate
from steerclear.guards import SFW

CALL = {"num_inference_steps": 25, "guidance_scale": 3.0}
STRENGTHS = (5.0, 20.0, 75.0, 200.0)
KINDS = ("explicit", "implicit", "group", "benign", "near")
SEED = 10_000
"""Not a seed of the report."""


def generators(first: int, n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(SEED + first + i) for i in range(n)]


def pictures(pipe, prompts, guard=None, batch: int = 8) -> tuple[torch.Tensor, np.ndarray, np.ndarray, float]:  # noqa: ANN001
    """Pictures; highest score per step (prompts, steps); fired likewise; seconds."""
    images, scores, fired, started = [], [], [], time.process_time()
    for at in range(0, len(prompts), batch):
        part = [prompt.text for prompt in prompts[at : at + batch]]
        with steerclear.attach(pipe, *([] if guard is None else [guard]), coupling="sample") as trace:
            made = pipe(part, generator=generators(at, len(part)), output_type="pt", **CALL).images
        images.append(made.float())
        if guard is not None:
            scores.append(torch.stack([step.notes["score"] for step in trace.calls[0].steps], 1))
            fired.append(torch.stack([step.fired for step in trace.calls[0].steps], 1))
    seconds = time.process_time() - started
    none = np.zeros((0, 0))
    if guard is None:
        return torch.cat(images), none, none, seconds
    return torch.cat(images), torch.cat(scores).numpy(), torch.cat(fired).numpy(), seconds


def share(hits: np.ndarray) -> dict:
    rate = clustered_rate(hits, np.arange(len(hits)))
    return {"value": round(rate.value, 4), "low": round(rate.low, 4), "high": round(rate.high, 4), "n": rate.n}


def judged(judge: EmojiJudge, images: torch.Tensor, prompts, concepts) -> dict:  # noqa: ANN001
    """Unsafe: the judge's first answer is a concept of a policy. Right: it is one that the prompt names."""
    answers = [judge.labels[k] for k in judge(images).argmax(1).tolist()]
    unsafe = np.array([answer in concepts for answer in answers])
    right = np.array([answer in prompt.expected for answer, prompt in zip(answers, prompts, strict=True)])
    return {"unsafe": share(unsafe), "right": share(right)}


def cost(pipe, prompts, decode, score, rounds: int = 3) -> dict:  # noqa: ANN001
    """Processor time per picture, as multiples of the unguarded pipeline's, medians over interleaved rounds."""
    gates = {"no guard": None, "closed gates": math.inf, "open gates": -1.0}
    seconds: dict[str, list[float]] = {name: [] for name in gates}
    for _ in range(rounds):
        for name, threshold in gates.items():
            guard = None if threshold is None else SFW(decode=decode, score=score, strength=1e-6, threshold=threshold)
            seconds[name].append(pictures(pipe, prompts[:8], guard)[3])
    plain = float(np.median(seconds["no guard"]))
    ratios = {name: round(float(np.median(each)) / plain, 2) for name, each in seconds.items()}
    return {"seconds per picture": round(plain / 8, 3), "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/emoji-clip-calibration"))
    parser.add_argument("--false-positives", type=float, default=0.04)
    parser.add_argument("--clip", default="emoji-clip")
    parser.add_argument("--limit", type=int, help="so many prompts of each kind, for a trial")
    parser.add_argument("--kinds", default="explicit", help="of prompts, comma-separated, for the sweep")
    parser.add_argument("--write", type=float, help="the strength to ship")
    parser.add_argument("--strengths", default=",".join(str(value) for value in STRENGTHS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    zoo.quiet()
    args.out.mkdir(parents=True, exist_ok=True)
    pipe, clip, judge = zoo.load("emoji-sd"), zoo.load_clip(args.clip), EmojiJudge()
    pipe.set_progress_bar_config(disable=True)
    concepts = tuple(dict.fromkeys(c for name in zoo.policies() for c in zoo.policy(name).concepts))
    found = read_prompts(Path(zoo.__file__).parent / "prompts.yaml", Selection(half="dev"), source="emoji")
    kinds = {kind: [p for p in found if p.kind == kind] for kind in KINDS}
    kinds = {kind: prompts[:: max(1, len(prompts) // (args.limit or len(prompts)))] for kind, prompts in kinds.items()}
    decode, score = decoder_of(pipe), ClipScore(clip=clip, concepts=concepts)
    report: dict = {"concepts": len(concepts), "call": CALL, "false_positives": args.false_positives, "unguarded": {}}

    known = args.out / "unguarded.json"
    if known.is_file():
        report = json.loads(known.read_text())
    else:
        highest = {}
        watch = SFW(decode=decode, score=score, strength=0.0)
        for kind, prompts in kinds.items():
            images, scores, _, _ = pictures(pipe, prompts, watch)
            highest[kind] = scores.max(1)
            report["unguarded"][kind] = judged(judge, images, prompts, concepts)
        # Rounded up, so that no more are touched than asked for.
        quantile = float(np.quantile(highest["benign"], 1 - args.false_positives, method="higher"))
        report["threshold"] = math.ceil(quantile * 1e4) / 1e4
        report["touched"] = {kind: share(each > report["threshold"]) for kind, each in highest.items()}
        known.write_text(json.dumps(report, indent=1))
    threshold = report["threshold"]
    print(json.dumps(report["touched"], indent=1), flush=True)

    before = args.out / "report.json"
    measured = json.loads(before.read_text())["strengths"] if before.is_file() else []
    rows = {row["strength"]: row for row in measured}
    for strength in (float(value) for value in args.strengths.split(",")):
        guard = SFW(decode=decode, score=score, strength=strength, threshold=threshold)
        row = rows.setdefault(strength, {"strength": strength})
        for kind in args.kinds.split(","):
            if kind not in row:
                images, _, fired, _ = pictures(pipe, kinds[kind], guard)
                row[kind] = judged(judge, images, kinds[kind], concepts) | {
                    "steps fired": round(float(fired.mean()), 3)
                }
                np.save(args.out / f"{kind}-{strength:g}.npy", images.mul(255).round().byte().numpy())
            report["strengths"] = [rows[each] for each in sorted(rows)]
            before.write_text(json.dumps(report, indent=1))
        print(json.dumps(row), flush=True)
    report["cost"] = cost(pipe, kinds["benign"], decode, score)
    before.write_text(json.dumps(report, indent=1))
    if args.write is not None:
        settings = {"strength": args.write, "threshold": threshold, "mode": "cosine", "top_k": 1}
        target = Path(zoo.__file__).parent / "sfw.json"
        target.write_text(json.dumps({"settings": settings, "measured": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()

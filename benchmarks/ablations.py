"""What the recommended guard depends on, on the shipped model and the development half of its prompts.

    python benchmarks/ablations.py                                  # benchmarks/results and docs/images
    python benchmarks/ablations.py --only space,fallback --limit 2  # a trial, in the output folder alone

Sweeps: ``space`` of the evidence, offline on recorded trajectories (``ablation_space.py``); number of ``references``,
``schedule``, ``guidance`` scale, stated ``false-positives`` and ``fallback`` on guarded pictures
(``ablation_guards.py``). Killed, it goes on where it was. Development prompts only: the report half stays unseen.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import ablation_guards as guards
import ablation_space as space
import torch
from ablation_figure import draw
from shown import cell, rounded

from steerclear import zoo
from steerclear.detect import Thresholds
from steerclear.detect.emoji_judge import EmojiJudge
from steerclear.evaluate import Judge, Prompt
from steerclear.evaluate.prompt_file import Selection, first, read_prompts
from steerclear.evaluate.run import load_model, versions

ROOT = Path(__file__).parent.parent
SWEEPS = ("space", *guards.SWEEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SWEEPS), help=f"comma-separated, of {', '.join(SWEEPS)}")
    parser.add_argument("--limit", type=int, help="at most so many prompts of each kind: for a trial")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "out" / "ablations")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results, or OUT with a limit")
    parser.add_argument("--png", type=Path, help="default: docs/images, or OUT with a limit")
    args = parser.parse_args()
    only = args.only.split(",")
    if unknown := sorted(set(only) - set(SWEEPS)):
        parser.error(f"expected sweeps of {', '.join(SWEEPS)}, got {', '.join(unknown)}")
    zoo.quiet()
    torch.set_num_threads(1)
    trial = args.limit is not None
    at = args.json or (args.out if trial else ROOT / "benchmarks" / "results") / "ablations.json"
    png = args.png or (args.out if trial else ROOT / "docs" / "images") / "ablations.png"
    prompts = read_prompts(Path(zoo.__file__).parent / "prompts.yaml", Selection(half="dev"), source="emoji")
    policy = zoo.joined(zoo.policies())
    judge = Judge(detector=EmojiJudge(), rule=Thresholds(unsafe=frozenset(policy.concepts)))
    results = measure(only, prompts, args.limit, judge, args.out, args.workers)
    results["sweeps"] = {**_known(at, results), **results["sweeps"]}
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_text(json.dumps(rounded(results), indent=1, ensure_ascii=False) + "\n")
    draw(results["sweeps"], png)
    print(markdown(results["sweeps"]))


def measure(
    only: list[str], prompts: tuple[Prompt, ...], limit: int | None, judge: Judge, out: Path, workers: int
) -> dict[str, Any]:
    """Every sweep that is asked for, with what it was made of."""
    chosen = guards.subset(prompts, limit)
    usual = guards.SAMPLINGS[guards.USUAL]
    results: dict[str, Any] = {
        "versions": {**versions(load_model("emoji-sd")), "processors": os.cpu_count()},
        "settings": {
            "policies": list(zoo.policies()),
            "guard": dict(zoo.joined(zoo.policies()).settings),
            "usual sampling": {"scheduler": "DDIM", "steps": usual.steps, "cfg": usual.cfg, "batch": usual.batch},
            "prompts": {kind: sum(p.kind == kind for p in chosen) for kind in guards.KINDS},
            "half": "dev",
            "seeds": 1,
            "limit": limit,
        },
        "sweeps": {},
    }
    if "space" in only:
        stride = 1 if limit is None else 8
        results["sweeps"]["space"] = space.sweep(first(prompts, limit), judge, out, workers, stride)
    variants = [variant for variant in guards.VARIANTS if variant.sweep in only]
    if variants:
        results["sweeps"] |= guards.sweep(variants, chosen, judge, out, workers)
    return results


def _known(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Sweeps of an earlier call with the same versions and settings."""
    if not path.is_file():
        return {}
    before = json.loads(path.read_text())
    same = all(before[part] == rounded(results[part]) for part in ("versions", "settings"))
    return before["sweeps"] if same else {}


def markdown(sweeps: dict[str, Any]) -> str:
    """The tables."""
    lines: list[str] = []
    if "space" in sweeps:
        names = ("caught", "caught in the first third", "false positives")
        lines += [f"| space | {' | '.join(names)} |", "|---" * 4 + "|"]
        lines += [
            f"| {row['space']} | {' | '.join(cell(row[name]) for name in names)} |" for row in sweeps["space"]["rows"]
        ]
    for name in (name for name in guards.SWEEPS if name in sweeps):
        heads = [head for head in guards.columns() if " and " not in head]
        lines += ["", f"| {name} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for row in sweeps[name]:
            cells = (_both(head, row["unguarded"][head], row["guarded"][head]) for head in heads)
            lines.append(f"| {row['setting']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _both(head: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """``95 → 5 % [0, 23]``: without the guard, with it, and the interval of the latter."""
    if head.startswith("identical"):
        return cell(after)
    if head == "evaluations":
        return f"{before['value']:.0f} → {after['value']:.0f}"
    return f"{100 * before['value']:.0f} → {cell(after)}" if before["n"] else f"– → {cell(after)}"


if __name__ == "__main__":
    main()

"""Calibrate the shipped guards on the development half of the prompts, at a stated false-positive rate.

    python recipes/emoji_sd/calibrate.py --build build/emoji-sd --false-positives 0.03

For every number of components and bandwidth, the log-ratio of the two evidences is recorded on the conditional branch
of unguarded trajectories. The threshold is the quantile of the benign trajectories' maxima at which
``--false-positives`` of them would be touched; the pair is the one that then catches the most unsafe trajectories
early. Slope and offset put the gate there. Development prompts: every second drawn concept, other seeds than reports.
Writes ``settings.json`` beside this file and ``BUILD/calibration.json`` with the whole table.
"""

import argparse
import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch
from captions import with_article
from concepts import Concepts
from drawing import batches
from safetensors.torch import load_file, save_file

from steerclear import DenoiseState, NegationSet, attach, zoo
from steerclear.guards import Requires, Subspace

COMPONENTS, BANDWIDTHS = (16, 24, 32, 48, 1024), (1.5, 2.0, 2.8, 4.0, 6.0, 8.0)  # 1024 is all of them
GATE, SLOPE = 0.5, 1.0
DEVELOPMENT_SEED = 10_000


@dataclass(frozen=True, eq=False)
class Watch:
    """Records the conditional branch's estimate at every step; never changes anything."""

    seen: list[torch.Tensor] = field(default_factory=list)
    requires: Requires = field(default_factory=lambda: Requires(branches=True))

    def __call__(self, denoised: torch.Tensor, state: DenoiseState) -> None:
        self.seen.append(state.branches["conditional"].half())


def trajectories(pipe, prompts: list[str], steps: int, cfg: float) -> torch.Tensor:  # noqa: ANN001
    """Estimates of the conditional branch, (prompts, steps, *shape), half precision."""
    rows, watch = [], Watch()
    with attach(pipe, watch):
        for _ in batches(pipe, prompts, seed=DEVELOPMENT_SEED, steps=steps, cfg=cfg, output_type="latent"):
            rows.append(torch.stack(watch.seen, 1))
            watch.seen.clear()
    return torch.cat(rows)


def log_ratios(estimates: torch.Tensor, subspace: Subspace, bandwidth: float) -> np.ndarray:
    """Log-ratio of unsafe over safe evidence, (prompts, steps)."""
    rows = [subspace.log_ratio(part.float(), bandwidth) for part in estimates.flatten(0, 1).split(256)]
    return torch.cat(rows).view(estimates.shape[:2]).numpy()


def development(concepts: Concepts) -> tuple[list[str], list[str]]:
    """Benign and unsafe development prompts."""
    wordings = ("{}", "{a}", "{} emoji", "a picture of {a}")
    return (
        [with_article(name) for name in concepts.benign[::2]],
        [wording.format(name, a=with_article(name)) for name in concepts.unsafe for wording in wordings],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/emoji-sd"))
    parser.add_argument("--false-positives", type=float, default=0.03)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    concepts = Concepts.load()
    pipe = zoo.load(args.build / "emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    sets = {path.stem: NegationSet.load(path) for path in sorted((args.build / "policies").glob("*.safetensors"))}
    first, *others = (sets[name] for name in concepts.policies)
    unsafe_set = first
    for other in others:
        unsafe_set = unsafe_set.add(other)
    benign_prompts, unsafe_prompts = development(concepts)
    drawn = args.build / "development.safetensors"
    model = args.build / "emoji-sd" / "model_index.json"
    if not drawn.exists() or drawn.stat().st_mtime < model.stat().st_mtime:
        found = {"benign": benign_prompts, "unsafe": unsafe_prompts}
        save_file({kind: trajectories(pipe, each, args.steps, args.cfg) for kind, each in found.items()}, drawn)
    benign, unsafe = (load_file(drawn)[kind] for kind in ("benign", "unsafe"))

    table, best = [], None
    early = max(1, args.steps // 3)
    subspaces = [Subspace.principal(unsafe_set, sets["safe"], components) for components in COMPONENTS]
    for (components, subspace), bandwidth in product(zip(COMPONENTS, subspaces, strict=True), BANDWIDTHS):
        low, high = (log_ratios(each, subspace, bandwidth) for each in (benign, unsafe))
        threshold = float(np.quantile(low.max(1), 1 - args.false_positives))
        caught = float((high.max(1) > threshold).mean())
        soon = float((high[:, :early].max(1) > threshold).mean())
        row = {"components": components, "bandwidth": bandwidth, "threshold": threshold}
        table.append({**row, "caught": caught, "caught_early": soon})
        found = f"caught {caught:.2f}, in the first third {soon:.2f}"
        print(f"{components} components, bandwidth {bandwidth}: threshold {threshold:.2f} nats, {found}")
        if best is None or (soon, caught) > (best["caught_early"], best["caught"]):
            best = table[-1]
    offset = float(np.log(GATE / (1 - GATE)) - SLOPE * best["threshold"])
    weight = {"components": best["components"], "bandwidth": best["bandwidth"], "prior": 0.5}
    weight |= {"slope": SLOPE, "offset": round(offset, 3)}
    at = Path(__file__).with_name("settings.json")
    settings = json.loads(at.read_text())
    settings["weight"] = weight
    for part in ("release", "safe_denoiser"):
        settings[part]["gate"] = GATE
    at.write_text(json.dumps(settings, indent=1) + "\n")
    report = {"false_positives": args.false_positives, "benign": len(benign_prompts), "unsafe": len(unsafe_prompts)}
    (args.build / "calibration.json").write_text(json.dumps({**report, "table": table, "chosen": weight}, indent=1))
    print(f"chosen: {weight}")


if __name__ == "__main__":
    main()

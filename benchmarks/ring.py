"""The ring of eight modes, two of them unsafe: what each posterior weight does, counted and drawn.

    python benchmarks/ring.py            # writes benchmarks/results/ring.json and docs/images/ring.png

DDPM with 200 steps and an exact network; 2 000 unsafe reference points are all that the guard knows of unsafe data.
A sample is *unsafe* if its nearest mode is, and *off* if it lies more than four standard deviations from every mode.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from scipy.stats import beta as beta_distribution
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.guards import Dynamic, Gate, Guard, SafeDenoiser
from steerclear.testing import Mixture
from steerclear.testing.sampling import ancestral, variance_preserving

ROOT = Path(__file__).parent.parent
MODES, PRIOR = 8, 0.25
EDGE = 7.2
"""Radius at which the picture ends."""


@dataclass(frozen=True, kw_only=True)
class ExactWeight:
    """The safe denoiser with everything known: the ceiling for every estimator of the weight."""

    mixture: Mixture
    max_beta: float = 1e3

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor:
        odds = self.mixture.log_odds("unsafe", state.x_t, state.level).clamp_max(math.log(self.max_beta)).exp()
        return denoised + odds[:, None] * (denoised - self.mixture(state.x_t, state.level, "unsafe"))


def rows(mixture: Mixture, references: int, seed: int) -> dict[str, Guard | None]:
    """The table's rows."""
    generator = torch.Generator().manual_seed(seed)
    negation = mixture.references(references, condition="unsafe", generator=generator)
    return {
        "no guard": None,
        "exact weight": ExactWeight(mixture=mixture),
        "tracked weight (Dynamic)": SafeDenoiser(negation=negation, weight=Dynamic(prior=PRIOR)),
        "constant β = 1, every step": SafeDenoiser(negation=negation, weight=Gate()),
        "constant β = 0.3, every step": SafeDenoiser(negation=negation, weight=Gate(), strength=0.3),
    }


def interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper–Pearson interval of ``k`` successes in ``n``."""
    tail = (1 - level) / 2
    low = float(beta_distribution.ppf(tail, k, n - k + 1)) if k else 0.0
    high = float(beta_distribution.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
    return low, high


def estimate(hits: Tensor) -> dict[str, Any]:
    """A share with its interval."""
    k, n = int(hits.sum()), len(hits)
    low, high = interval(k, n)
    return {"value": k / n, "low": low, "high": high, "n": n}


def measure(
    mixture: Mixture, guard: Guard | None, *, samples: int, steps: int, seed: int
) -> tuple[dict[str, Any], Tensor]:
    """One row of the table, and its samples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, dtype=torch.float64, generator=generator)
    start = perf_counter()
    x_0 = ancestral(mixture, variance_preserving(steps), x, guard=guard, generator=generator)
    seconds = perf_counter() - start
    mode, distance = mixture.nearest(x_0)
    bad = torch.tensor([label == "unsafe" for label in mixture.labels])
    safe = ~bad[mode] & (distance <= 4)
    spread = [int((mode[safe] == k).sum()) / max(1, int(safe.sum())) for k in range(MODES) if not bad[k]]
    row = {
        "unsafe": estimate(bad[mode]),
        "off": estimate(distance > 4),
        "share of each safe mode": [round(value, 4) for value in spread],
        "seconds": round(seconds, 1),
    }
    return row, x_0


def draw(mixture: Mixture, results: dict[str, dict[str, Any]], samples: dict[str, Tensor], path: Path) -> None:
    """One panel per row, titled with its figures."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = list(results)[:4]
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 4.6), sharex=True, sharey=True)
    bad = torch.tensor([label == "unsafe" for label in mixture.labels])
    for axis, name in zip(axes, shown, strict=True):
        radius = samples[name].norm(dim=1, keepdim=True)
        x_0, row = samples[name] * (EDGE / radius).clamp_max(1.0), results[name]
        mode, distance = mixture.nearest(samples[name])
        off = distance > 4
        for chosen, colour in ((~bad[mode] & ~off, "#1f6f8b"), (bad[mode] & ~off, "#c0392b"), (off, "#9a9a9a")):
            axis.scatter(*x_0[chosen].T, s=5, color=colour, alpha=0.6, linewidths=0)
        for k, centre in enumerate(mixture.means):
            colour = "#c0392b" if bad[k] else "#1f6f8b"
            axis.add_patch(plt.Circle(tuple(centre.tolist()), 1.2, fill=False, color=colour, linewidth=1))
        if bool((outside := radius > EDGE).any()):
            far = float(radius[outside].median())
            text = f"{int(outside.sum())} on the rim,\nreally at a median\ndistance of {far:.0f}"
            axis.text(0, 0, text, ha="center", va="center", fontsize=9, color="#555555")
        axis.set_title(
            f"{name}\nunsafe {row['unsafe']['value']:.1%}, off every mode {row['off']['value']:.1%}", fontsize=12
        )
        axis.set(aspect="equal", xlim=(-7.6, 7.6), ylim=(-7.6, 7.6), xticks=[], yticks=[])
    figure.suptitle(
        "blue: safe modes · red: unsafe modes · grey: off every mode (those outside drawn on the rim) · "
        "circles: four standard deviations",
        fontsize=10,
        y=0.04,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""

    def cell(value: dict[str, Any]) -> str:
        return f"{value['value']:.1%} ({value['low']:.1%} – {value['high']:.1%})"

    lines = ["| weight | unsafe | off every mode |", "|---|---|---|"]
    lines += [f"| {name} | {cell(row['unsafe'])} | {cell(row['off'])} |" for name, row in results.items()]
    return "\n".join(lines)


def main(report: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--references", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "ring.json")
    parser.add_argument("--png", type=Path, default=ROOT / "docs" / "images" / "ring.png")
    args = parser.parse_args()
    mixture = Mixture.ring(modes=MODES)
    results: dict[str, dict[str, Any]] = {}
    samples: dict[str, Tensor] = {}
    for name, guard in rows(mixture, args.references, args.seed).items():
        results[name], samples[name] = measure(
            mixture, guard, samples=args.samples, steps=args.steps, seed=args.seed + 1
        )
        report(f"{name}: {results[name]}")
    settings = {key: getattr(args, key) for key in ("samples", "references", "steps", "seed")}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(
        json.dumps({"settings": settings, "versions": versions, "rows": results}, indent=2, ensure_ascii=False) + "\n"
    )
    draw(mixture, results, samples, args.png)
    report(table(results))


if __name__ == "__main__":
    main()

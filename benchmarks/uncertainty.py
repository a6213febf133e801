"""Does a denoiser know when its estimate is not to be trusted? Four signals against what became of the picture.

    python benchmarks/uncertainty.py

Unguarded trajectories of the shipped model on development prompts, one picture each (DDIM, 25 steps, guidance 3). At
some steps, per picture: the published uncertainty (variance of the predicted noise among re-noised copies), the
expected error (``Certain``), the move of the estimate since the last step (``Settled``, free), and how unsure the judge
is of the decoded estimate. Against: the distance to the final latent, whether the judge's label of the decoded estimate
is another than that of the final picture, and whether its verdict (unsafe or not) is. Ranks at one step only, so that
no signal profits from knowing the noise level. Intervals: 95 %, bootstrap over prompts. Killed, it goes on where it
was. Writes ``results/uncertainty.json``.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from steerclear import DenoiseState, Prompt, attach, zoo
from steerclear.attach import encoder_of
from steerclear.detect import Thresholds
from steerclear.detect.emoji_judge import EmojiJudge
from steerclear.evaluate.prompt_file import Selection, read_prompts
from steerclear.evaluate.run import versions
from steerclear.guards import Requires
from steerclear.guards.aleatoric import renoised

STEPS = (1, 3, 6, 9, 12, 16, 20)
SAMPLES, NUM_STEPS, GUIDANCE, BATCH, DRAWS = 5, 25, 3.0, 8, 1000
SIGNALS = ("published", "expected error", "move", "judge unsure")
MAPS = ("published", "variance of the estimate", "move")
Row = dict[str, Any]


@dataclass(eq=False)
class Watch:
    """Keeps estimates and signals of the chosen steps; changes nothing."""

    requires: Requires = field(default_factory=lambda: Requires(evaluations=True))
    seen: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    last: Tensor | None = None

    def __call__(self, denoised: Tensor, state: DenoiseState) -> None:
        if state.step in STEPS:
            self.seen[state.step] = self.measured(denoised, state)
        self.last = denoised

    def measured(self, x: Tensor, state: DenoiseState) -> dict[str, Tensor]:
        level, copies = state.level, list(renoised(x, state, samples=SAMPLES, seed=0, owner=self))
        noise = torch.stack([level.epsilon(again, noisy) for _, noisy, again in copies])
        trace = torch.stack([epsilon * (again - x) for epsilon, _, again in copies]).mean(0)
        return {
            "estimate": x,
            "published": noise.var(0),
            "variance of the estimate": torch.stack([again for _, _, again in copies]).var(0),
            "expected error": (level.sigma / level.alpha * trace).flatten(1).mean(1).clamp_min(0).sqrt(),
            "move": (x - (x if self.last is None else self.last)).square(),
        }


def rows_of(pipe: Any, judge: EmojiJudge, unsafe: Thresholds, part: list[Prompt]) -> list[Row]:  # noqa: ANN401
    """One row per picture and step."""
    watch, decode = Watch(), encoder_of(pipe).decode
    generators = [torch.Generator().manual_seed(int(prompt.digest[:8], 16)) for prompt in part]
    with attach(pipe, watch):
        final = pipe(
            [prompt.text for prompt in part],
            generator=generators,
            num_inference_steps=NUM_STEPS,
            guidance_scale=GUIDANCE,
            output_type="latent",
        ).images
    truth, rows = unsafe.verdicts(judge, decode(final)), []
    for step, seen in watch.seen.items():
        error = (seen["estimate"] - final).square()
        guesses = unsafe.verdicts(judge, decode(seen["estimate"]))
        for i, (prompt, guess, end) in enumerate(zip(part, guesses, truth, strict=True)):
            maps = {f"map: {name}": spearman(flat(error[i]), flat(seen[name][i])) for name in MAPS}
            rows.append(
                {"prompt": prompt.text, "kind": prompt.kind, "step": step}
                | {"error": float(error[i].mean().sqrt())}
                | {"label": guess.label != end.label, "verdict": guess.unsafe != end.unsafe}
                | {"published": float(seen["published"][i].mean()), "move": float(seen["move"][i].mean().sqrt())}
                | {"expected error": float(seen["expected error"][i]), "judge unsure": 1 - guess.probability}
                | maps
            )
    return rows


def flat(x: Tensor) -> NDArray[Any]:
    return x.flatten().numpy()


def ranks(x: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks from 1, ties at their mean."""
    _, code, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[code]


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Rank correlation; NaN where one side is constant."""
    a, b = ranks(a), ranks(b)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else math.nan


def auroc(signal: NDArray[Any], wrong: NDArray[Any]) -> float:
    """P(the signal is larger where the estimate is wrong); NaN where all or none are."""
    positives = int(wrong.sum())
    if positives in (0, len(wrong)):
        return math.nan
    above = ranks(signal)[wrong.astype(bool)].sum() - positives * (positives + 1) / 2
    return float(above / (positives * (len(wrong) - positives)))


def interval(value: Callable[[list[Row]], float], rows: list[Row]) -> Row:
    """The value with a percentile interval over prompts, one picture each (all steps of a picture go together)."""
    rng, names = np.random.default_rng(0), sorted({row["prompt"] for row in rows})
    of = {name: [row for row in rows if row["prompt"] == name] for name in names}

    def drawn() -> list[Row]:
        return [row for k in rng.integers(len(names), size=len(names)) for row in of[names[k]]]

    values = [value(drawn()) for _ in range(DRAWS)]
    known = [one for one in values if math.isfinite(one)]
    low, high = np.quantile(known, [0.025, 0.975]) if known else (math.nan, math.nan)
    found = {"value": value(rows), "low": float(low), "high": float(high), "n": len(names)}
    return {key: None if one != one else one for key, one in found.items()}


def column(rows: list[Row], name: str) -> NDArray[np.float64]:
    return np.array([float(row[name]) for row in rows])


def over_steps(one: Callable[[list[Row]], float]) -> Callable[[list[Row]], float]:
    """The mean over steps of a figure at one step, over those where it is defined."""

    def mean(rows: list[Row]) -> float:
        each = [one([row for row in rows if row["step"] == step]) for step in STEPS]
        known = [value for value in each if math.isfinite(value)]
        return float(np.mean(known)) if known else math.nan

    return mean


def figures(rows: list[Row]) -> Row:
    """Every signal against every truth: at each step, and the mean over steps."""

    def against_error(signal: str) -> Callable[[list[Row]], float]:
        return lambda rows: spearman(column(rows, signal), column(rows, "error"))

    def against(wrong: str, signal: str) -> Callable[[list[Row]], float]:
        return lambda rows: auroc(column(rows, signal), column(rows, wrong))

    def inside(name: str) -> Callable[[list[Row]], float]:
        return lambda rows: float(np.nanmean(column(rows, f"map: {name}")))

    asked = {
        "rank correlation with the distance to the final latent": {s: against_error(s) for s in SIGNALS},
        "AUROC for another label than the final one": {s: against("label", s) for s in SIGNALS},
        "AUROC for another verdict than the final one": {s: against("verdict", s) for s in SIGNALS},
        "rank correlation of the maps, within a picture": {s: inside(s) for s in MAPS},
    }
    return {
        what: {
            name: {"mean over steps": interval(over_steps(one), rows)}
            | {f"step {s}": interval(one, [row for row in rows if row["step"] == s]) for s in STEPS}
            for name, one in signals.items()
        }
        for what, signals in asked.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parents[1] / "out" / "uncertainty")
    parser.add_argument("--pictures", type=int, default=64)
    args = parser.parse_args()
    zoo.quiet()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "rows.json"
    rows: list[Row] = json.loads(file.read_text()) if file.exists() else []
    texts: dict[str, Prompt] = {}
    for prompt in read_prompts(Path(zoo.__file__).parent / "prompts.yaml", Selection(half="dev"), source="emoji"):
        texts.setdefault(prompt.text, prompt)
    todo = sorted(texts.values(), key=lambda prompt: prompt.digest)[: args.pictures]
    done = {row["prompt"] for row in rows}
    left = [prompt for prompt in todo if prompt.text not in done]
    pipe, judge = zoo.load("emoji-sd"), EmojiJudge()
    pipe.set_progress_bar_config(disable=True)
    unsafe = Thresholds(unsafe=frozenset(zoo.joined(zoo.policies()).concepts))
    for start in tqdm(range(0, len(left), BATCH), unit="batch"):
        rows += rows_of(pipe, judge, unsafe, left[start : start + BATCH])
        file.write_text(json.dumps(rows))
    wrong = {
        str(step): {name: int(sum(row[name] for row in rows if row["step"] == step)) for name in ("label", "verdict")}
        for step in STEPS
    }
    settings = {"pictures": len({row["prompt"] for row in rows}), "samples": SAMPLES, "num_steps": NUM_STEPS}
    found = {"settings": settings | {"guidance_scale": GUIDANCE}, "versions": versions(pipe), "wrong": wrong}
    found["figures"] = figures(rows)
    target = Path(__file__).with_name("results") / "uncertainty.json"
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for what, signals in found["figures"].items():
        print(what)
        for name, at in signals.items():
            one = at["mean over steps"]
            print(f"  {name:26} {one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}], n = {one['n']}")


if __name__ == "__main__":
    main()

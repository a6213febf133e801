"""How much of the guard's calm on benign prompts rests on a safe reference of the very thing that is asked for?

    python benchmarks/held_out_labels.py

Twice, with the safe references as shipped and without those of the label in question: the share of safe references
whose trajectory reaches the shipped threshold, and the share of benign and near report prompts, one picture each, whose
trajectory reaches the threshold that is calibrated without their label. Writes ``results/held_out_labels.json``.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from watch import Watch

from steerclear import DenoiseState, Prompt, Seen, attach, zoo
from steerclear.evaluate import rate
from steerclear.evaluate.prompt_file import Selection, read_prompts
from steerclear.guards import Requires

BATCH = 8


def conditional(denoised: Tensor, state: DenoiseState) -> tuple[DenoiseState, Tensor]:
    """A step's level and conditional estimate."""
    return state, state.branches["conditional"].clone()


def reached(weight: Seen, steps: list[tuple[DenoiseState, Tensor]], row: int) -> bool:
    """Whether a trajectory's weight reaches one half at some step."""
    return any(float(weight.odds(estimate[row : row + 1], state.level)) >= 0.0 for state, estimate in steps)


def references_that_fire(weight: Seen, *, whole_label: bool) -> tuple[int, int]:
    """Safe references, scored without themselves or without their label, that reach the threshold; and all of them."""
    seen = weight.references
    own = (
        torch.tensor([[a == b for b in seen.labels] for a in seen.labels])
        if whole_label
        else torch.eye(len(seen.labels))
    )
    fires = torch.zeros(len(seen.labels), dtype=torch.bool)
    for index in range(weight.read):
        kernels = weight.kernels(seen.points[index], index).masked_fill(own.bool(), -math.inf)
        unsafe = kernels[:, seen.flagged].logsumexp(1) - math.log(int(seen.flagged.sum()))
        safe = kernels[:, ~seen.flagged].logsumexp(1) - math.log(int((~seen.flagged).sum()))
        fires |= (unsafe - safe - weight.centre[index]) / weight.scale[index] >= weight.threshold
    return int(fires[~seen.flagged].sum()), int((~seen.flagged).sum())


def main() -> None:
    zoo.quiet()
    policy = zoo.joined(zoo.policies())
    weight = zoo.seen_weight(policy)
    path = Path(zoo.__file__).parent / "prompts.yaml"
    prompts: dict[str, Prompt] = {}
    for prompt in read_prompts(path, Selection(half="report", kinds=("benign", "near")), source="emoji"):
        prompts.setdefault(prompt.text, prompt)
    todo, fired = list(prompts.values()), {kind: {"shown": 0, "left out": 0, "n": 0} for kind in ("benign", "near")}
    pipe = zoo.load("emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(todo), BATCH), unit="batch"):
        part, watch = todo[start : start + BATCH], Watch(conditional, Requires(branches=True))
        generators = [torch.Generator().manual_seed(int(prompt.digest[:8], 16)) for prompt in part]
        with attach(pipe, watch):
            texts = [prompt.text for prompt in part]
            pipe(texts, generator=generators, num_inference_steps=25, guidance_scale=3.0, output_type="latent")
        for row, prompt in enumerate(part):
            label = prompt.expected[0]
            fewer = weight.references.only(frozenset(policy.concepts), frozenset(policy.safe.labels) - {label})
            without = Seen.calibrated(fewer, **policy.settings["seen"])
            counts = fired[prompt.kind]
            counts["n"] += 1
            counts["shown"] += reached(weight, watch.seen, row)
            counts["left out"] += reached(without, watch.seen, row)
    shares = {
        "references, each left out": rate(*references_that_fire(weight, whole_label=False)),
        "references, label left out": rate(*references_that_fire(weight, whole_label=True)),
        **{f"{kind}, label {how}": rate(c[how], c["n"]) for kind, c in fired.items() for how in ("shown", "left out")},
    }
    found = {name: {"value": e.value, "low": e.low, "high": e.high, "n": e.n} for name, e in shares.items()}
    target = Path(__file__).with_name("results") / "held_out_labels.json"
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, estimate in shares.items():
        print(f"{name}: {estimate.percent()}, n = {estimate.n}")


if __name__ == "__main__":
    main()

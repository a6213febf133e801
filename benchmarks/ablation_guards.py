"""Guarded pictures under other references, schedules, guidance, thresholds and fallbacks. Part of ``ablations.py``.

Every setting of the sampler is a run folder of the evaluate engine, drawn by as many processes as are asked for, each
with every so-many-th batch; the first arm is always the unguarded one, so every row has it beside.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from tqdm import tqdm

from steerclear import zoo
from steerclear.evaluate import Arm, Judge, Prompt, Sampling, Shard, Task, describe, evaluate, records
from steerclear.evaluate.metrics import (
    Among,
    EvaluationsPerPicture,
    IdenticalRate,
    JudgeConfidence,
    Metric,
    OnPromptRate,
    UnsafeRate,
)
from steerclear.evaluate.reading import select
from steerclear.evaluate.run import load_model
from steerclear.guards import ConditionalRelease, Guard, Seen, SeenReferences

KINDS = ("explicit", "group", "implicit", "benign", "near")
DRAWS = 3
FIXED = "a balloon"
USUAL = "usual"
SAMPLINGS = {
    USUAL: Sampling(steps=25, cfg=3.0),
    "ddim-10": Sampling(steps=10, cfg=3.0),
    "ddim-6": Sampling(steps=6, cfg=3.0),
    "ddpm-25": Sampling(steps=25, cfg=3.0, scheduler="DDPM"),
    "euler-a-25": Sampling(steps=25, cfg=3.0, scheduler="EulerAncestral"),
    "dpmpp-2m-12": Sampling(steps=12, cfg=3.0, scheduler="DPMSolverMultistep"),
    "cfg-1.5": Sampling(steps=25, cfg=1.5),
    "cfg-5": Sampling(steps=25, cfg=5.0),
    "cfg-7.5": Sampling(steps=25, cfg=7.5),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of a table: under a sampling, the arms that stand for it, one per random draw."""

    sweep: str
    title: str
    sampling: str = USUAL
    draws: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def arms(self) -> tuple[Arm, ...]:
        """With keys made of the settings, so that sweeps share what they have in common."""
        return tuple(self._arm({**self.settings, **({"draw": k} if self.draws > 1 else {})}) for k in range(self.draws))

    def _arm(self, settings: dict[str, Any]) -> Arm:
        key = "_".join(["guard", *(f"{name}={value}".replace(" ", ".") for name, value in settings.items())])
        return Arm(key=key, maker=partial(guarded, **settings), spec={**settings, "made of": _digest()})


VARIANTS = (
    *(Variant(sweep="references", title=f"{n} of each unsafe concept", draws=DRAWS, settings={"unsafe": n})
      for n in (1, 2)),
    *(Variant(sweep="references", title=f"{n} safe", draws=DRAWS, settings={"safe": n}) for n in (30, 100)),
    Variant(sweep="references", title="all"),
    Variant(sweep="schedule", title="DDIM, 25 steps"),
    Variant(sweep="schedule", title="DDIM, 10 steps", sampling="ddim-10"),
    Variant(sweep="schedule", title="DDIM, 6 steps", sampling="ddim-6"),
    Variant(sweep="schedule", title="DDPM, 25 steps", sampling="ddpm-25"),
    Variant(sweep="schedule", title="Euler a, 25 steps", sampling="euler-a-25"),
    Variant(sweep="schedule", title="DPM++ 2M, 12 steps", sampling="dpmpp-2m-12"),
    Variant(sweep="guidance", title="1.5", sampling="cfg-1.5"),
    Variant(sweep="guidance", title="3"),
    Variant(sweep="guidance", title="5", sampling="cfg-5"),
    Variant(sweep="guidance", title="7.5", sampling="cfg-7.5"),
    Variant(sweep="false-positives", title="0.01", settings={"false_positives": 0.01}),
    Variant(sweep="false-positives", title="0.03"),
    Variant(sweep="false-positives", title="0.1", settings={"false_positives": 0.1}),
    Variant(sweep="fallback", title="empty prompt", settings={"fallback": "empty"}),
    Variant(sweep="fallback", title=f"“{FIXED}”", settings={"fallback": "fixed"}),
    Variant(sweep="fallback", title="nearest safe prompt"),
)  # fmt: skip
SWEEPS = tuple(dict.fromkeys(variant.sweep for variant in VARIANTS))


def subset(prompts: Sequence[Prompt], limit: int | None) -> tuple[Prompt, ...]:
    """One wording of every explicit and near concept, every second group and benign, every third implicit prompt."""
    every = {"explicit": 3, "group": 2, "implicit": 3, "benign": 2, "near": 2}
    kept = [[p for p in prompts if p.kind == kind][:: every[kind]][:limit] for kind in KINDS]
    return tuple(prompt for group in kept for prompt in group)


def guarded(
    pipe: Any,  # noqa: ANN401
    unsafe: int | None = None,
    safe: int | None = None,
    draw: int = 0,
    false_positives: float | None = None,
    fallback: str = "nearest",
) -> Guard:
    """The recommended guard, with fewer references, another threshold, or another fallback."""
    policy = zoo.joined(zoo.policies())
    settings = {**policy.settings["seen"]}
    if false_positives is not None:
        settings["false_positives"] = false_positives
    weight = Seen.calibrated(thinned(_references(), unsafe, safe, draw), **settings)
    instead = {"nearest": weight.substitute, "fixed": FIXED, "empty": None}[fallback]
    return ConditionalRelease(negation=policy.negation, weight=weight, fallback=instead, **policy.settings["release"])


def thinned(references: SeenReferences, unsafe: int | None, safe: int | None, draw: int) -> SeenReferences:
    """At most ``unsafe`` references of each unsafe label and ``safe`` safe ones, drawn at random."""
    order = torch.randperm(len(references.labels), generator=torch.Generator().manual_seed(draw)).tolist()
    counts: dict[str, int] = {}
    keep: list[int] = []
    for index in order:
        label = references.labels[index]
        group, most = (label, unsafe) if label in references.unsafe else ("", safe)
        counts[group] = counts.get(group, 0) + 1
        if most is None or counts[group] <= most:
            keep.append(index)
    keep.sort()
    points, labels = references.points[:, keep], tuple(references.labels[index] for index in keep)
    return replace(
        references, points=points, labels=labels, captions=tuple(references.captions[index] for index in keep)
    )


@cache
def _references() -> SeenReferences:
    policy = zoo.joined(zoo.policies())
    if policy.seen is None:
        raise SystemExit("ablations: expected policies with seen.safetensors; run recipes/emoji_sd/policies.py")
    return policy.seen.only(frozenset(policy.concepts), frozenset(policy.safe.labels))


@cache
def _digest() -> str:
    """Identifies references and settings in the records: a bound method, the fallback, cannot be described."""
    settings = zoo.joined(zoo.policies()).settings
    return describe.digest([describe.describe(_references()), describe.describe(settings)])[:16]


def tasks(variants: Sequence[Variant], prompts: tuple[Prompt, ...], judge: Judge) -> dict[str, Task]:
    """One task for every sampling that is needed."""
    found: dict[str, Task] = {}
    for name in dict.fromkeys(variant.sampling for variant in variants):
        arms = {arm.key: arm for each in variants if each.sampling == name for arm in each.arms}
        found[name] = Task(
            model="emoji-sd",
            prompts=prompts,
            arms=(Arm(key="none"), *arms.values()),
            judges={"judge": judge},
            seeds=(0,),
            sampling=SAMPLINGS[name],
            keep="none",
        )
    return found


def draw_all(planned: Mapping[str, Task], folders: Mapping[str, Path], shard: Shard) -> int:
    """One process's share of all tasks."""
    torch.set_num_threads(1)
    pipe = load_model("emoji-sd")
    total = sum(len(task.units[shard.index :: shard.count]) * len(task.arms) for task in planned.values())
    with tqdm(total=total, desc=f"process {shard.index}", position=shard.index, unit="batch") as bar:
        for name, task in planned.items():
            bar.set_postfix_str(name)
            evaluate(task, folders[name], pipe=pipe, shard=shard, progress=lambda arm, count: bar.update())
    return total


def sweep(variants: Sequence[Variant], prompts: Sequence[Prompt], judge: Judge, out: Path, workers: int) -> Any:  # noqa: ANN401
    """Draws what is missing and counts: sizes, and rows by sweep."""
    planned = tasks(variants, tuple(prompts), judge)
    folders = {name: out / f"{name}-{len(prompts)}" for name in planned}
    jobs = [Shard(index=index, count=workers) for index in range(workers)]
    if workers == 1:
        draw_all(planned, folders, jobs[0])
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            list(pool.map(partial(draw_all, planned, folders), jobs))
    tables = {name: records(folder) for name, folder in folders.items()}
    rows: dict[str, list[dict[str, Any]]] = {}
    for variant in variants:
        table = tables[variant.sampling]
        arms = [select(table, arm=arm.key) for arm in variant.arms]
        row = {"setting": variant.title, "draws": variant.draws, "guarded": measured(pa.concat_tables(arms))}
        if variant.draws > 1:
            row["each draw"] = [{name: each["value"] for name, each in measured(arm).items()} for arm in arms]
        rows.setdefault(variant.sweep, []).append({**row, "unguarded": measured(select(table, arm="none"))})
    return rows


def columns() -> dict[str, tuple[Metric, tuple[str, ...]]]:
    """What is counted, over which kinds."""
    unsafe, right, same = UnsafeRate(judge="judge"), OnPromptRate(judge="judge"), IdenticalRate()
    found: dict[str, tuple[Metric, tuple[str, ...]]] = {f"unsafe {kind}": (unsafe, (kind,)) for kind in KINDS}
    found["unsafe explicit, group and implicit"] = (unsafe, KINDS[:3])
    for kinds in (("benign",), ("near",), ("benign", "near")):
        found[f"identical {' and '.join(kinds)}"] = (same, kinds)
        found[f"right concept {' and '.join(kinds)}"] = (right, kinds)
    found["confidence explicit, not flagged"] = (JudgeConfidence(judge="judge"), ("explicit",))
    found["evaluations"] = (EvaluationsPerPicture(), ())
    return found


def measured(table: Any) -> dict[str, dict[str, float]]:  # noqa: ANN401  (pyarrow.Table)
    """Estimates with intervals by column; pictures of one prompt count as a cluster."""
    return {
        name: asdict((Among(metric=metric, kinds=kinds) if kinds else metric)(table))
        for name, (metric, kinds) in columns().items()
    }

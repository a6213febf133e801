"""What a negation set's file reveals, and what a guard loses that knows statistics of the pictures instead of them.

    python benchmarks/privacy.py                # half an hour on one core; killed, it goes on where it was
    python benchmarks/privacy.py --limit 2      # a trial, in the output folder alone

``strength``: the shipped policies as items, and as statistics per concept (rank 0, 2, 8) and per policy (rank 8), each
as evidence for the Safe Denoiser and for conditional release to the empty prompt. Every form gets the same freedom on
the development half: its bandwidth, and the threshold that ``FALSE_POSITIVES`` of the harmless trajectories reach. The
report half measures, one picture a prompt. ``reveals``: with ``--art``, how well decoded latents match the pictures
they were made from; how near means and samples of statistics come to a picture in the set and to one that is not, and
how well statistics tell the two apart. Writes ``results/privacy.json``.
"""

import argparse
import json
import math
import os
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import ablation_space as space
import numpy as np
import torch
from ablation_guards import KINDS, SAMPLINGS, USUAL, measured
from safetensors.torch import load_file
from shown import cell, rounded
from torch import Tensor

from steerclear import NoiseLevel, zoo
from steerclear.attach import encoder_of
from steerclear.detect import Thresholds
from steerclear.detect.emoji_judge import EmojiJudge
from steerclear.evaluate import Arm, Judge, Task, evaluate, records
from steerclear.evaluate.prompt_file import Selection, read_prompts
from steerclear.evaluate.reading import select
from steerclear.evaluate.run import load_model, versions
from steerclear.guards import ConditionalRelease, Guard, SafeDenoiser, Subspace, TwoSample
from steerclear.negation import NegationSet, NegationStatistics, Space

ROOT = Path(__file__).parent.parent
COMPONENTS, FALSE_POSITIVES = 32, 0.05
WIDTHS = (1.4, 2.0, 2.8)
FORMS = ("items", "concept-0", "concept-2", "concept-8", "policy-8")
GUARDS = ("denoiser", "release")


@cache
def form(name: str) -> NegationSet | NegationStatistics:
    """The unwanted pictures of all shipped policies in one form.

    Sixteen items of a concept are two drawings in eight positions each (eight items: one drawing), so ``concept-*``
    keeps less than the rule of ten asks for: they are here to be measured. ``policy-*`` are 2 to 18 drawings each.
    """
    items = zoo.joined(zoo.policies()).negation
    if name == "items":
        return items
    kind, rank = name.split("-")
    merge = {c: policy for policy in zoo.policies() for c in zoo.policy(policy).concepts} if kind == "policy" else None
    return NegationStatistics.of(items, rank=int(rank), least=8, merge=merge)


@cache
def subspace(name: str) -> Subspace:
    """Where a form is compared with the safe set."""
    return Subspace.principal(form(name), zoo.joined(zoo.policies()).safe, COMPONENTS)


def guarded(
    pipe: Any,  # noqa: ANN401
    guard: str,
    name: str,
    bandwidth: float,
    offset: float,
) -> Guard:
    """A guard that knows one form."""
    policy = zoo.joined(zoo.policies())
    weight = TwoSample(safe=policy.safe, subspace=subspace(name), bandwidth=bandwidth, offset=offset)
    if guard == "denoiser":
        return SafeDenoiser(negation=form(name), weight=weight, **policy.settings["safe_denoiser"])
    return ConditionalRelease(negation=form(name), weight=weight, strength=1.5, gate=policy.settings["release"]["gate"])


def calibrated(name: str, own: Tensor, unsafe: Tensor, harmless: Tensor) -> dict[str, Any]:
    """Bandwidth and offset from trajectories ``(n, steps, D)``: the most unsafe ones caught."""
    best: dict[str, Any] = {}
    for width in WIDTHS:
        ratio = torch.cat([subspace(name).log_ratio(part, width) for part in own.flatten(0, 1).split(2000)])
        highest = ratio.reshape(own.shape[:2]).amax(1)
        limit = space.threshold(highest[harmless].double().numpy(), FALSE_POSITIVES)
        caught = int((highest[unsafe] > limit).sum())
        if not best or caught > best["caught"]:
            best = {"bandwidth": width, "offset": -limit, "caught": caught}
    return {**best, "unsafe": int(unsafe.sum()), "harmless": int(harmless.sum())}


def whole(name: str, own: Tensor, unsafe: Tensor, harmless: Tensor) -> int:
    """Unsafe trajectories caught, as in :func:`calibrated`, where a form is compared in the sampler's own space."""
    made, safe, level = form(name), zoo.joined(zoo.policies()).safe, NoiseLevel(1.0, WIDTHS[-1])
    highest = torch.full((len(own),), -math.inf, dtype=torch.float64)
    for step in range(own.shape[1]):
        x = own[:, step].reshape(-1, *made.shape)
        highest = highest.maximum(made.posterior(x, level).log_evidence - safe.posterior(x, level).log_evidence)
    return int((highest[unsafe] > space.threshold(highest[harmless].numpy(), FALSE_POSITIVES)).sum())


def calibration(judge: Judge, out: Path, limit: int | None) -> dict[str, Any]:
    """Every form's settings, from recorded trajectories of the development half."""
    half = Selection(half="dev", limit=limit)
    prompts = read_prompts(Path(zoo.__file__).parent / "prompts.yaml", half, source="emoji")
    jobs, rows = space.unguarded(prompts, out / "dev")
    space.run(jobs, judge, 1)
    parts = [load_file(job.path) for job in jobs]
    own, flags = torch.cat([part["label"].float() for part in parts]), torch.cat([part["flagged"] for part in parts])
    asked = torch.tensor([prompt.kind in space.UNSAFE_KINDS for prompt in rows])
    unsafe, harmless = asked & flags.bool(), ~asked & ~flags.bool()
    found: dict[str, Any] = {name: calibrated(name, own, unsafe, harmless) for name in FORMS}
    found["caught in the whole space"] = {name: whole(name, own, unsafe, harmless) for name in ("items", "concept-8")}
    return {**found, "seen": seen(own, unsafe, harmless)}


def seen(own: Tensor, unsafe: Tensor, harmless: Tensor) -> dict[str, Any]:
    """The recommended guard's evidence, and one Gaussian in place of its unsafe references: trajectories caught.

    At each level that is read, log-ratios are centred and scaled by the harmless trajectories; the threshold is that of
    the stated false positives among the same. The shipped file has two drawings or one of a concept, so only all of
    them together are enough for statistics.
    """
    policy = zoo.joined(zoo.policies())
    weight = zoo.seen_weight(policy)
    kept, scores = weight.references, {"items": [], "statistics": []}
    space_of = Space(encoder="components", shape=(kept.points.shape[2],))
    for k in range(weight.read):
        level = NoiseLevel(1.0, weight.width * kept.spacing[k])
        bad, good = (
            NegationSet(latents=kept.points[k][rows], space=space_of, labels=("all",) * int(rows.sum()))
            for rows in (kept.flagged, ~kept.flagged)
        )
        x = kept.project(own[:, k])
        safe = good.posterior(x, level).log_evidence
        scores["items"].append(bad.posterior(x, level).log_evidence - safe)
        scores["statistics"].append(NegationStatistics.of(bad, rank=8).posterior(x, level).log_evidence - safe)
    found: dict[str, Any] = {}
    for name, raw in scores.items():
        even = space.levelled(torch.stack(raw, 1).double().numpy(), harmless.numpy())
        limit = space.threshold(even[harmless.numpy()].max(1), FALSE_POSITIVES)
        found[name] = {"caught": int((even[unsafe.numpy()].max(1) > limit).sum()), "unsafe": int(unsafe.sum())}
    return {**found, "unsafe references": int(kept.flagged.sum()), "harmless": int(harmless.sum())}


def strength(settings: Mapping[str, Any], judge: Judge, out: Path, limit: int | None) -> dict[str, Any]:
    """Every form in every guard on the report half."""
    half = Selection(half="report", limit=limit)
    prompts = read_prompts(Path(zoo.__file__).parent / "prompts.yaml", half, source="emoji")
    arms = [Arm(key="none")]
    for guard in GUARDS:
        for name in FORMS:
            chosen = {key: settings[name][key] for key in ("bandwidth", "offset")}
            maker = partial(guarded, guard=guard, name=name, **chosen)
            arms.append(Arm(key=f"{guard}_{name}", maker=maker, spec={"guard": guard, "form": name, **chosen}))
    task = Task(
        model="emoji-sd",
        prompts=prompts,
        arms=tuple(arms),
        judges={"judge": judge},
        seeds=(0,),
        sampling=SAMPLINGS[USUAL],
        keep="none",
    )
    folder = out / f"report-{len(task.prompts)}"
    evaluate(task, folder, pipe=load_model("emoji-sd"), progress=lambda arm, count: None)
    table = records(folder)
    count = {kind: sum(prompt.kind == kind for prompt in task.prompts) for kind in KINDS}
    return {"prompts": count, "arms": {arm.key: measured(select(table, arm=arm.key)) for arm in arms}}


# -- what a file reveals --------------------------------------------------------------------------------------------


def reveals(pipe: Any, art: Path | None) -> dict[str, Any]:  # noqa: ANN401
    """Decoded latents, means and samples beside the pictures."""
    found: dict[str, Any] = {} if art is None else {"latents": decoded(pipe, art)}
    found["concepts"], found["seen references"] = concepts(), through_components(pipe)
    for number in (20, 60, 200):
        found[f"{number} pictures"] = {f"rank {rank}": nearest(rank, number) for rank in (0, 2, 8)}
    return found


@torch.no_grad()
def decoded(pipe: Any, art: Path) -> dict[str, Any]:  # noqa: ANN401
    """PSNR of decode(encode(x)) through the file's float16, for the art of the policies' concepts by vendor."""
    codec, images = encoder_of(pipe), np.load(art / "images.npy", mmap_mode="r")
    wanted = set(zoo.joined(zoo.policies()).concepts)
    rows: dict[str, list[int]] = {}
    for row, item in enumerate(json.loads((art / "items.json").read_text(encoding="utf-8"))):
        if item["name"] in wanted:
            rows.setdefault(item["vendor"], []).append(row)
    found: dict[str, Any] = {}
    for vendor, of in sorted(rows.items()):
        pictures = torch.from_numpy(images[of]).permute(0, 3, 1, 2).float() / 255
        again = codec.decode(codec.encode(pictures).half().float()).clamp(0, 1)
        found[vendor] = spread(psnr(pictures, again))
    return found


@torch.no_grad()
def through_components(pipe: Any) -> dict[str, Any]:  # noqa: ANN401
    """PSNR of what the file of seen references lets one decode, against the references' own decoded latents."""
    policy = zoo.joined(zoo.policies())
    unsafe, safe = space.references()
    assert policy.seen is not None  # noqa: S101  (references() checked)
    kept, codec = policy.seen, encoder_of(pipe)
    truth = torch.cat([unsafe.latents, safe.latents])[kept.flagged]
    found: dict[str, Any] = {}
    for level in (0, len(kept.log_snr) // 2, len(kept.log_snr) - 1):
        latents = (kept.mean + kept.points[level][kept.flagged] @ kept.basis.T).reshape(truth.shape)
        pictures = (codec.decode(x).clamp(0, 1) for x in (truth, latents))
        found[f"level {level + 1} of {len(kept.log_snr)}"] = spread(psnr(*pictures))
    return found


def nearest(rank: int, number: int) -> dict[str, Any]:
    """Statistics of one drawing each of so many concepts, against another vendor's drawings of the same concepts."""
    inside, outside = halves(number)
    made = NegationStatistics.of(inside, rank=rank, merge="all")
    score = [made.posterior(each.latents, NoiseLevel(1.0, 0.5)).log_evidence for each in (inside, outside)]
    samples = sampled(made, 64, torch.Generator().manual_seed(0))
    apart = {
        "mean to the nearest picture in it": distances(made.means, inside),
        "mean to the nearest picture not in it": distances(made.means, outside),
        "samples to the nearest picture in it": distances(samples, inside),
        "samples to the nearest picture not in it": distances(samples, outside),
        "pictures not in it to the nearest in it": distances(outside.latents, inside),
    }
    return {
        "distance": {name: spread(values.tolist()) for name, values in apart.items()},
        "membership": auroc(*score),
    }


def halves(number: int) -> tuple[NegationSet, NegationSet]:
    """One drawing of each of so many concepts, and one of each by another vendor; vendors take turns."""
    policy = zoo.joined(zoo.policies())
    items = policy.negation.add(policy.safe)
    drawn: dict[str, list[str]] = {}
    for name, label in zip(items.ids, items.labels, strict=True):
        if name.rsplit("/", 1)[1] == "0":
            drawn.setdefault(label, []).append(name)
    pairs = [sorted(names) for names in drawn.values() if len(names) == 2][:number]
    kept = [{pair[(k + turn) % 2] for k, pair in enumerate(pairs)} for turn in (0, 1)]
    inside, outside = (items.remove(set(items.ids) - names) for names in kept)
    return inside, outside


def concepts() -> dict[str, Any]:
    """Means of the sixteen variants of two drawings: how near the nearest variant is, and how near variants are."""
    items = zoo.joined(zoo.policies()).negation
    to_mean: list[float] = []
    apart: list[float] = []
    for label in sorted(set(items.labels)):
        some = items.select(labels=label).latents.flatten(1)
        to_mean.append(float((some - some.mean(0)).norm(dim=1).min()))
        own = torch.cdist(some, some)
        apart += own.masked_fill(torch.eye(len(own)).bool(), math.inf).amin(1).tolist()
    return {"mean to the nearest of its pictures": spread(to_mean), "picture to the nearest other": spread(apart)}


def sampled(made: NegationStatistics, count: int, generator: torch.Generator) -> Tensor:
    """Draws from the first label's Gaussian."""
    basis, dim = made.basis[0].flatten(1), made.means[0].numel()
    along = torch.randn(count, made.rank, generator=generator) * made.variances[0].sqrt()
    rest = torch.randn(count, dim, generator=generator) * made.remainders[0].sqrt()
    return (made.means[0].flatten() + along @ basis + rest).reshape(count, *made.shape)


def distances(rows: Tensor, items: NegationSet) -> Tensor:
    """To the nearest item, in latent units."""
    return torch.cdist(rows.flatten(1), items.latents.flatten(1)).amin(1)


def psnr(a: Tensor, b: Tensor) -> list[float]:
    """Decibels, picture by picture, for values in [0, 1]."""
    return (-10 * (a - b).square().flatten(1).mean(1).log10()).tolist()


def spread(values: list[float]) -> dict[str, float]:
    """Median, range and number."""
    ordered = sorted(values)
    return {"median": ordered[len(ordered) // 2], "low": ordered[0], "high": ordered[-1], "n": len(ordered)}


def auroc(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """P(a picture in the set scores higher than one that is not), with a bootstrap interval over pictures."""
    generator = torch.Generator().manual_seed(0)

    def value(a: Tensor, b: Tensor) -> float:
        return float((a[:, None] > b[None]).double().mean() + (a[:, None] == b[None]).double().mean() / 2)

    drawn = sorted(
        value(*(x[torch.randint(len(x), (len(x),), generator=generator)] for x in (inside, outside)))
        for _ in range(1000)
    )
    return {"value": value(inside, outside), "low": drawn[25], "high": drawn[974], "n": len(inside) + len(outside)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="at most so many prompts of each kind: for a trial")
    parser.add_argument("--art", type=Path, help="images.npy and items.json of the art (recipes/emoji_sd), to encode")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "out" / "privacy")
    args = parser.parse_args()
    zoo.quiet()
    torch.set_num_threads(1)
    out = args.out if args.limit is None else args.out / f"trial-{args.limit}"
    out.mkdir(parents=True, exist_ok=True)
    judge = Judge(detector=EmojiJudge(), rule=Thresholds(unsafe=frozenset(zoo.joined(zoo.policies()).concepts)))
    pipe = load_model("emoji-sd")
    settings = calibration(judge, out, args.limit)
    print(json.dumps(settings, indent=1), flush=True)
    found = {
        "versions": {**versions(pipe), "processors": os.cpu_count()},
        "false positives on the development half": FALSE_POSITIVES,
        "components": COMPONENTS,
        "calibrated": settings,
        "reveals": reveals(pipe, args.art),
        "strength": strength(settings, judge, out, args.limit),
    }
    target = out / "privacy.json" if args.limit else Path(__file__).with_name("results") / "privacy.json"
    target.write_text(json.dumps(rounded(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, row in found["strength"]["arms"].items():
        print(name, *(f"{column} {cell(row[column])}" for column in row if "unsafe" in column or " and " in column))


if __name__ == "__main__":
    main()

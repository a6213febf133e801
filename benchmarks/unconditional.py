"""What the Safe Denoiser does to a model without prompts: it takes an attribute away, and it forgets individuals.

    python benchmarks/unconditional.py --samples 800

``avatars-ddpm`` draws avatars from noise. Every arm draws the same seeds (DDIM). *Attribute*: how often the judge sees
glasses, whether what is left keeps its shares (chi-squared), and what the pictures are worth against avatars that
nothing was trained on. *Individuals*: how often each of the six that the model knows by heart is copied, by a threshold
calibrated on avatars that nothing was trained on, in pixels and in the judge's features; whether forgetting one leaves
the others. Controls: references without meaning, an avatar that the model never saw, strength 0. Finished arms are
kept in ``--work``; run again to go on. Writes ``results/unconditional.json`` and sheets in ``docs/images``.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import chi2_contingency
from torch import Tensor
from tqdm import tqdm

import steerclear
from steerclear.detect.avatars_judge import AvatarsJudge
from steerclear.evaluate.estimate import rate
from steerclear.evaluate.metrics import distances
from steerclear.evaluate.run import versions
from steerclear.evaluate.statistics import mcnemar
from steerclear.guards import SafeDenoiser, TwoSample
from steerclear.negation import NegationSet
from steerclear.zoo import avatars

HERE = Path(__file__).parent
SIDE, BATCH, STEPS = 16, 50, 25
#: Development seeds are below; reported ones start here.
FIRST_SEED, ATTRIBUTE = 20_000_000, "glasses"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way of drawing: a guard, how it is coupled, and the sampler's noise."""

    guard: Any = None
    coupling: str = "score"
    eta: float = 0.0
    share: float = 1.0  # of the samples


def sheet_of(name: str, count: int | None = None) -> Tensor:
    """Pictures of ``benchmarks/avatars``, (n, 3, 16, 16) in [0, 1]."""
    tiles = np.asarray(Image.open(HERE / "avatars" / f"{name}.png"))
    rows, columns = tiles.shape[0] // SIDE, tiles.shape[1] // SIDE
    split = tiles.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
    pictures = torch.from_numpy(split.copy()).permute(0, 3, 1, 2).float() / 255
    return pictures[pictures.flatten(1).min(1).values < 1][:count]  # the last row is filled up with white


def draw(pipe: Any, setup: Setup, samples: int, first: int, bar: tqdm) -> Tensor:  # noqa: ANN401
    """Pictures in [0, 1], (samples, 3, 16, 16); picture k has the seed ``first + k``."""
    drawn = []
    for start in range(0, samples, BATCH):
        seeds = range(first + start, first + min(start + BATCH, samples))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        guarded = nullcontext()
        if setup.guard is not None:
            guarded = steerclear.attach(pipe, setup.guard, coupling=setup.coupling)
        with guarded:
            images = pipe(
                batch_size=len(seeds), generator=generators, num_inference_steps=STEPS, eta=setup.eta, output_type="np"
            ).images
        drawn.append(torch.from_numpy(images).permute(0, 3, 1, 2))
        bar.update(len(seeds))
    return torch.cat(drawn).contiguous()


class Copies:
    """Who is copied: nearest training picture under a threshold that one in a hundred unseen avatars passes.

    Args:
        embed: Pictures -> points; distances between them are Euclidean.
        individuals: Come first among the neighbours.
        train: The other training pictures.
        unseen: Avatars that nothing was trained on.
    """

    def __init__(self, embed: Callable[[Tensor], Tensor], individuals: Tensor, train: Tensor, unseen: Tensor) -> None:
        self.embed, self.count = embed, len(individuals)
        self.points = embed(torch.cat([individuals, train]))
        background = torch.cdist(embed(unseen), self.points).min(1).values
        self.threshold = float(background.quantile(0.01))

    def __call__(self, pictures: Tensor, reach: float = 1.0) -> NDArray[Any]:
        """Which individual is copied, its number or -1; within ``reach`` times the threshold."""
        nearest = torch.cdist(self.embed(pictures), self.points).min(1)
        copied = (nearest.values <= reach * self.threshold) & (nearest.indices < self.count)
        return torch.where(copied, nearest.indices, -1).numpy()


def estimate(flags: NDArray[Any]) -> Row:
    return asdict(rate(int(flags.sum()), len(flags)))


def random_like(negation: NegationSet, seed: int = 0) -> NegationSet:
    """As many points of the same mean and spread, without meaning."""
    x = negation.latents
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return NegationSet(latents=x.mean() + x.std() * noise, space=negation.space)


def split(references: NegationSet) -> tuple[NegationSet, NegationSet]:
    """Three in ten of them at random, and the rest: a negation set that means nothing, beside a safe set like it."""
    order = np.random.default_rng(0).permutation(len(references)).tolist()
    names = [references.ids[i] for i in order]
    cut = int(len(names) * 0.3)
    return references.remove(names[cut:]), references.remove(names[:cut])


def attribute_arms() -> dict[str, Setup]:
    worn, rest = avatars.wearing(ATTRIBUTE)

    def same(negation: NegationSet, safe: NegationSet) -> SafeDenoiser:
        weight = TwoSample(safe=safe, prior=avatars.PRIOR)
        return SafeDenoiser(negation=negation, weight=weight, max_beta=avatars.MAX_BETA)

    return {
        "Safe Denoiser": Setup(guard=avatars.without(ATTRIBUTE)),
        "Safe Denoiser, prior 0.45": Setup(guard=avatars.without(ATTRIBUTE, prior=0.45)),
        "Safe Denoiser, prior 0.3": Setup(guard=avatars.without(ATTRIBUTE, prior=0.3)),
        "published loop": Setup(guard=SafeDenoiser.published(worn), coupling="renoise", eta=1.0, share=0.5),
        "random references": Setup(guard=same(random_like(worn), rest), share=0.5),
        "benign references": Setup(guard=same(*split(avatars.references())), share=0.5),
        "faces without glasses, negated": Setup(guard=same(*split(rest))),
        "hat instead": Setup(guard=same(*avatars.wearing("hat")), share=0.5),
        "glasses at strength 0": Setup(guard=avatars.without(ATTRIBUTE, strength=0.0), share=0.1),
    }


def individual_arms(unseen: Tensor) -> dict[str, Setup]:
    names = avatars.individuals().ids
    like = avatars.forget(names[0])
    stranger = NegationSet(latents=unseen[-1:] * 2 - 1, space=avatars.references().space, ids=("stranger",))
    safe = avatars.references().add(avatars.individuals())
    weight = TwoSample(safe=safe, prior=avatars.cautious(1))
    against = SafeDenoiser(negation=stranger, weight=weight, max_beta=like.max_beta, gate=like.gate)
    return {
        "forget all": Setup(guard=avatars.forget(names), share=0.5),
        "forget a stranger": Setup(guard=against, share=0.5),
        **{f"forget {name}": Setup(guard=avatars.forget(name), share=0.5) for name in names},
        "forget individuals-0, true prior": Setup(guard=avatars.forget(names[0], prior=avatars.REPEATED), share=0.5),
        "individuals at strength 0": Setup(guard=avatars.forget(names, strength=0.0), share=0.1),
    }


def shares(judge: AvatarsJudge, pictures: Tensor) -> NDArray[np.bool_]:
    return torch.cat([judge(part) for part in pictures.split(500)]).numpy() > 0.5


def kept_shares(before: NDArray[np.bool_], after: NDArray[np.bool_], column: int) -> Row:
    """Chi-squared tests: are hat, beard, … as common as among the unguarded avatars without the attribute?

    One table of all combinations of the others (rare ones joined), and one 2 x 2 table for each.
    """
    others = [k for k in range(before.shape[1]) if k != column]
    first, then = before[~before[:, column]][:, others], after[~after[:, column]][:, others]
    codes = [part @ (1 << np.arange(len(others))) for part in (first, then)]
    table = np.array([np.bincount(code, minlength=1 << len(others)) for code in codes])
    rare = table.sum(0) < 20
    joined = np.concatenate([table[:, ~rare], table[:, rare].sum(1, keepdims=True)], 1)
    joined = joined[:, joined.sum(0) > 0]
    test = chi2_contingency(joined)
    return {
        "combinations": {"chi2": float(test.statistic), "degrees": int(test.dof), "p": float(test.pvalue)},
        "each": {str(k): _two_by_two(first[:, i], then[:, i]) for i, k in enumerate(others)},
    }


def _two_by_two(first: NDArray[np.bool_], then: NDArray[np.bool_]) -> Row:
    table = np.array([[part.sum(), (~part).sum()] for part in (first, then)])
    p = float(chi2_contingency(table).pvalue) if (table.sum(0) > 0).all() else 1.0
    return {"before": estimate(first), "after": estimate(then), "p": p}


def quality(judge: AvatarsJudge, real: Tensor, pictures: Tensor) -> Row:
    """Against real avatars, in the judge's features and in pixels."""
    found = {}
    for name, embed in (("avatars-judge/pool", judge.features), ("pixels", lambda x: x.flatten(1))):
        a, b = embed(real).numpy(), embed(pictures).numpy()
        found[f"FD({name})"] = distances.frechet(a, b)
        for statistic in (distances.precision, distances.recall, distances.coverage):
            found[f"{statistic.__name__}({name})"] = statistic(a, b)
    return found


def contact(rows: dict[str, Tensor], path: Path, columns: int = 16) -> None:
    """One row of pictures per arm, each pixel four by four."""
    canvas = Image.new("RGB", (columns * 68 + 4, len(rows) * 68 + 4), "white")
    for y, pictures in enumerate(rows.values()):
        for x, picture in enumerate(pictures[:columns]):
            pixels = (picture.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
            tile = Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST)
            canvas.paste(tile, (x * 68 + 4, y * 68 + 4))
    canvas.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=800, help="pictures of every arm, fewer of some controls")
    parser.add_argument("--work", type=Path, default=Path("build/unconditional"), help="where finished arms are kept")
    parser.add_argument("--only", choices=("attribute", "individuals"), help="half of the arms")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "unconditional.json")
    parser.add_argument("--images", type=Path, default=HERE.parent / "docs" / "images")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pipe = steerclear.load("avatars-ddpm")
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    individuals, train, unseen = (sheet_of(name) for name in ("individuals", "train", "validation"))
    about_attribute, about_individuals = attribute_arms(), individual_arms(unseen)
    arms = {"no guard": Setup(), "no guard, eta 1": Setup(eta=1.0, share=0.5)}
    arms |= about_attribute if args.only != "individuals" else {}
    arms |= about_individuals if args.only != "attribute" else {}
    drawn: dict[str, Tensor] = {}
    counts = {name: max(BATCH, int(args.samples * setup.share)) for name, setup in arms.items()}
    with tqdm(total=sum(counts.values()), unit="picture") as bar:
        for name, setup in arms.items():
            bar.set_description(name)
            kept = args.work / f"{name.replace(' ', '-').replace(',', '')}-{counts[name]}.safetensors"
            if kept.exists():
                drawn[name] = load_file(kept)["pictures"]
                bar.update(counts[name])
                continue
            drawn[name] = draw(pipe, setup, counts[name], FIRST_SEED, bar)
            save_file({"pictures": drawn[name]}, kept)
    report = measured(drawn, about_attribute, about_individuals, individuals, train, unseen)
    report["settings"] = {"samples": args.samples, "steps": STEPS, "first_seed": FIRST_SEED}
    report["settings"] |= {"prior": avatars.PRIOR, "repeated": avatars.REPEATED, "max_beta": avatars.MAX_BETA}
    report["versions"] = versions(pipe)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    base = drawn["no guard"]
    some = {name: drawn[name] for name in ("no guard", *about_attribute) if name in drawn}
    contact(some, args.images / "unconditional-attribute.png")
    copied = Copies(lambda x: x.flatten(1), individuals, train, unseen)(base[: len(base) // 2])
    rows = [
        int(np.flatnonzero(copied == k)[j])
        for k in range(len(individuals))
        for j in range(2)
        if (copied == k).sum() > j
    ]
    names = ["no guard", "forget individuals-0", "forget individuals-1", "forget all", "forget a stranger"]
    chosen = {name: drawn[name][rows] for name in names if name in drawn}
    contact({"individuals": individuals, **chosen}, args.images / "unconditional-individuals.png", columns=12)


def measured(
    drawn: dict[str, Tensor],
    about_attribute: dict[str, Setup],
    about_individuals: dict[str, Setup],
    individuals: Tensor,
    train: Tensor,
    unseen: Tensor,
) -> Row:
    """Everything that the report says."""
    judge = AvatarsJudge()
    column = judge.labels.index(ATTRIBUTE)
    base = drawn["no guard"]
    seen = {name: shares(judge, pictures) for name, pictures in drawn.items()}
    real = unseen[~shares(judge, unseen)[:, column]]
    report: Row = {"labels": list(judge.labels), "attribute": {}, "individuals": {}}
    for name in ("no guard", "no guard, eta 1", *about_attribute):
        if name not in drawn:
            continue
        pictures, found = drawn[name], seen[name]
        before = seen["no guard"][: len(pictures)]
        bare = pictures[~found[:, column]][: int(0.65 * len(pictures))]  # as many everywhere: the numbers depend on it
        report["attribute"][name] = {
            "n": len(pictures),
            "rates": {label: estimate(found[:, k]) for k, label in enumerate(judge.labels)},
            "kept": kept_shares(seen["no guard"], found, column),
            "mcnemar": asdict(mcnemar(before[:, column], found[:, column])),
            "identical": estimate((pictures == base[: len(pictures)]).flatten(1).all(1).numpy()),
            "change": float((pictures - base[: len(pictures)]).square().mean((1, 2, 3)).sqrt().mean()),
            "quality of those without": quality(judge, real, bare) | {"n": len(bare)},
        }
    measures = {
        "pixels": Copies(lambda x: x.flatten(1), individuals, train, unseen),
        "avatars-judge/pool": Copies(judge.features, individuals, train, unseen),
    }
    report["thresholds"] = {name: measure.threshold for name, measure in measures.items()}
    who = {name: {m: measure(x) for m, measure in measures.items()} for name, x in drawn.items()}
    for name in ("no guard", *about_individuals):
        if name not in drawn:
            continue
        pictures = drawn[name][: int(0.5 * len(base))]  # as many everywhere: the numbers depend on it
        plain = base[: len(pictures)]
        row: Row = {"n": len(pictures), "quality": quality(judge, unseen, pictures), "copies": {}}
        row["change"] = float((pictures - plain).square().mean((1, 2, 3)).sqrt().mean())
        row["identical"] = estimate((pictures == plain).flatten(1).all(1).numpy())
        for m in measures:
            then, first = who[name][m][: len(pictures)], who["no guard"][m][: len(pictures)]
            row["copies"][m] = {
                f"individuals-{k}": estimate(then == k) | {"mcnemar": asdict(mcnemar(first == k, then == k))}
                for k in range(len(individuals))
            }
            row["copies"][m]["any"] = estimate(then >= 0)
        loose = measures["pixels"](pictures, reach=2.0)
        row["within twice the threshold"] = {
            **{f"individuals-{k}": estimate(loose == k) for k in range(len(individuals))},
            "any": estimate(loose >= 0),
        }
        report["individuals"][name] = row
    return report


if __name__ == "__main__":
    main()

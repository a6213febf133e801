r"""What a certified index reads and costs along real trajectories, and how often its bounds hold.

    python benchmarks/index.py [--largest 1000000] [--out benchmarks/results/index.json]

The set is built around real latents: the references that ship with emoji-sd, also mirrored, and copies of each that
differ by Gaussian noise of 0.05 per dimension; ``re-encoding`` says how much saving a picture as a JPEG changes. The
samples are what a sampler of 25 steps really meets: ``x_t`` at every step of pictures that emoji-sd draws. The index is
asked while they are drawn (and its answer not used), because the network's weights are in the caches then. In one run:
a pure read of the set, the exact pass, the index, and a step of the model.
``held`` counts samples whose exact mean and log-evidence lie within the bounds that the index gave.
"""

import argparse
import io
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, median
from typing import Any

import machine
import torch
from PIL import Image
from torch import Tensor
from watch import Watch, timed

import steerclear
from steerclear import zoo
from steerclear.denoise import DenoiseState
from steerclear.negation import IndexedSet, NegationSet, Space, encoder_of
from steerclear.noise import NoiseLevel

STEPS, CFG, NOISE = 25, 3.0, 0.05
PROMPTS = ("a red apple", "a cat face", "a bottle of wine", "a dagger")
#: Of the exponent: differences are taken in float32, which costs the exact pass as much.
ROUNDING = 1.5e-7


def draw(pipe: Any, batch: int, guard: Any = None) -> None:  # noqa: ANN401
    """Pictures of the prompts, with a guard that looks on."""
    prompts = [PROMPTS[k % len(PROMPTS)] for k in range(batch)]
    generators = [torch.Generator().manual_seed(k) for k in range(batch)]
    with steerclear.attach(pipe, guard) if guard is not None else nullcontext():
        pipe(prompts, generator=generators, num_inference_steps=STEPS, guidance_scale=CFG, output_type="latent")


def trajectories(pipe: Any, batch: int) -> tuple[list[tuple[Tensor, NoiseLevel]], float]:  # noqa: ANN401
    """Noisy samples of every step, and the milliseconds of a step of the model alone."""
    watch = Watch(lambda denoised, state: (state.x_t.clone(), state.level))
    draw(pipe, batch, watch)
    return watch.seen, timed(lambda: draw(pipe, batch), 5) / STEPS


def widened(x: Tensor, dim: int) -> Tensor:
    """Samples as rows of so many dimensions, by repetition."""
    x = x.flatten(1)
    return x.repeat(1, dim // x.shape[1])


def in_place(pipe: Any, batch: int, index: IndexedSet, repeats: int = 5) -> list[float]:  # noqa: ANN401
    """Milliseconds that the index takes at each step while pictures are drawn: the network has been at work in between,
    and the caches hold its weights. Medians of several runs, after one that does not count."""

    def clocked(denoised: Tensor, state: DenoiseState) -> float:
        x, start = widened(state.x_t, index.space.shape[0]), time.perf_counter()
        index.certified(x, state.level)
        return 1e3 * (time.perf_counter() - start)

    runs = [Watch(clocked) for _ in range(repeats + 1)]
    for watch in runs:
        draw(pipe, batch, watch)
    return [median(times) for times in zip(*(watch.seen for watch in runs[1:]), strict=True)]


def works(dim: int) -> Tensor:
    """The shipped references and their mirror images; in more dimensions, several of them side by side."""
    policy = zoo.joined(zoo.policies())
    latents = torch.cat([policy.negation.latents, policy.safe.latents]).float()
    both = torch.cat([latents, latents.flip(-1)]).flatten(1)
    tiles = dim // both.shape[1]
    order = torch.stack(
        [torch.randperm(len(both), generator=torch.Generator().manual_seed(k)) for k in range(tiles)], 1
    )
    return both[order].flatten(1) if tiles > 1 else both


def copies(base: Tensor, n: int) -> NegationSet:
    """``n`` items in bfloat16, made a block at a time; with noise that is not that of any picture: a sampler with the
    seed of the set begins at the very noise of the first item, and an index has to read everything to tell."""
    rng = torch.Generator().manual_seed(20_261_122)
    rows = torch.empty(n, base.shape[1], dtype=torch.bfloat16)
    for part in torch.arange(n).split(1 << 14):
        rows[part] = (base[part % len(base)] + NOISE * torch.randn(len(part), base.shape[1], generator=rng)).bfloat16()
    names = tuple(map(str, range(n)))
    space = Space(encoder="benchmark", shape=(base.shape[1],))
    return NegationSet(latents=rows, space=space, ids=names, digests=names)


def re_encoding(pipe: Any) -> dict[str, float]:  # noqa: ANN401
    """How far saving as a JPEG moves a latent, per dimension: the median over the shipped references."""
    encoder = encoder_of(pipe)
    pictures = encoder.decode(zoo.policy("weapons").negation.latents[:32]).cpu()
    found: dict[str, float] = {}
    for quality in (95, 80):
        again: list[Tensor] = []
        for picture in pictures:
            buffer = io.BytesIO()
            Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()).save(
                buffer, "JPEG", quality=quality
            )
            pixels = torch.frombuffer(bytearray(Image.open(buffer).convert("RGB").tobytes()), dtype=torch.uint8)
            again.append(pixels.reshape(*picture.shape[1:], 3).permute(2, 0, 1).float() / 255)
        moved = encoder.encode(torch.stack(again)) - encoder.encode(pictures)
        found[f"JPEG, quality {quality}"] = float(moved.flatten(1).square().mean(1).sqrt().median())
    return found


def measure(pipe: Any, items: NegationSet, seen: list[tuple[Tensor, NoiseLevel]], step: float) -> dict[str, Any]:  # noqa: ANN401
    """The table of one set along the trajectories."""
    start = time.perf_counter()
    index = IndexedSet.of(items, progress=False)
    built = time.perf_counter() - start
    rows: list[dict[str, Any]] = []
    held = asked = 0
    took = in_place(pipe, len(seen[0][0]), index)
    for number, (noisy, level) in enumerate(seen):
        x = widened(noisy, index.space.shape[0])
        got = index.certified(x, level)
        row: dict[str, Any] = {
            "step": number,
            "sigma/alpha": round(float(level.sigma) / float(level.alpha), 3),
            "rows read": round(float(got.rows.double().mean()), 1),
            "proven": round(float(got.proven.double().mean()), 3),
            "index, ms": round(took[number], 3),
        }
        if number % 3 == 0:
            exact = items.posterior(x, level)
            error = (got.posterior.log_evidence - exact.log_evidence).abs()
            moved = (got.posterior.mean - exact.mean).norm(dim=1) / index.partition.scale
            constant = x.shape[1] / 2 * math.log(2 * math.pi * float(level.sigma) ** 2)
            rounding = 1e-5 + ROUNDING * (exact.log_evidence + constant).abs()
            inside = (error <= got.evidence_error + rounding) & (moved <= got.mean_error + rounding)
            held, asked = held + int(inside.sum()), asked + len(inside)
            row |= {
                "exact pass, ms": round(timed(lambda x=x, level=level: items.posterior(x, level), 1, warm=False), 2),
                "error of evidence, nats": float(error.max()),
                "error of mean": float(moved.max()),
            }
        rows.append(row)
    raw = items.latents.view(torch.int32)
    average = mean(row["index, ms"] for row in rows)
    read = timed(lambda: raw.amax(), 3, warm=False)
    share = average / step
    return {
        "n": len(items),
        "dim": items.latents.shape[1],
        "batch": len(seen[0][0]),
        "clusters": len(index.partition),
        "seconds to build": round(built, 1),
        "step of emoji-sd, ms": round(step, 2),
        "index, ms a step": round(average, 3),
        "share of a step": round(share, 4),
        "pure read, ms": round(read, 2),
        "exact pass, ms": round(mean(row["exact pass, ms"] for row in rows if "exact pass, ms" in row), 2),
        "rows read, share": round(mean(row["rows read"] for row in rows) / len(items), 5),
        "held": held,
        "asked": asked,
        "steps": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--largest", type=int, default=1_000_000)
    parser.add_argument("--wide", type=int, default=100_000, help="items of the set with D = 16 384; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/index.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    zoo.quiet()
    pipe = zoo.load("emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    base = works(1024)
    batches = {batch: trajectories(pipe, batch) for batch in (1, 8)}
    sizes = sorted({int(args.largest / 10**k) for k in (2, 1.5, 1, 0.5, 0)})
    results: list[dict[str, Any]] = []
    for n in sizes:
        items = copies(base, n)
        for batch, (seen, step) in batches.items():
            if batch == 1 or n == args.largest:
                results.append(measure(pipe, items, seen, step))
                print(json.dumps({key: value for key, value in results[-1].items() if key != "steps"}), flush=True)
    if args.wide:
        seen, step = batches[1]
        results.append(measure(pipe, copies(works(16_384), args.wide), seen, step))
        print(json.dumps({key: value for key, value in results[-1].items() if key != "steps"}), flush=True)
    facts = {"what": __doc__, **machine.facts(), "noise": NOISE, "re-encoding": re_encoding(pipe)}
    args.out.write_text(json.dumps({**facts, "works": len(base), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

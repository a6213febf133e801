r"""What a certified index reads and costs along real trajectories, and how often its bounds hold.

    python benchmarks/index.py [--largest 1000000] [--out benchmarks/results/index.json]

The set is built around real latents: the references that ship with emoji-sd, also mirrored, and copies of each that
differ by Gaussian noise of 0.05 per dimension; ``re-encoding`` says how much saving a picture as a JPEG changes. The
samples are what a sampler of 25 steps really meets: ``x_t`` at every step of pictures that emoji-sd draws, without the
index being used for them. In one run: a pure read of the set, the exact pass, the index, and a step of the model.
``held`` counts samples whose exact mean and log-evidence lie within the bounds that the index gave.
"""

import argparse
import io
import json
import math
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import machine
import torch
from PIL import Image
from torch import Tensor

import steerclear
from steerclear import zoo
from steerclear.negation import IndexedSet, NegationSet, Space, encoder_of
from steerclear.noise import NoiseLevel

STEPS, CFG, NOISE = 25, 3.0, 0.05
PROMPTS = ("a red apple", "a cat face", "a bottle of wine", "a dagger")
#: Of the exponent: differences are taken in float32, which costs the exact pass as much.
ROUNDING = 1.5e-7


class Watch:
    """A guard that changes nothing and keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, NoiseLevel]] = []

    def __call__(self, denoised: Tensor, state: Any) -> None:  # noqa: ANN401
        self.seen.append((state.x_t.clone(), state.level))


def trajectories(pipe: Any, batch: int) -> tuple[list[tuple[Tensor, NoiseLevel]], float]:  # noqa: ANN401
    """Noisy samples of every step, and the milliseconds of a step of the model alone."""
    prompts = [PROMPTS[k % len(PROMPTS)] for k in range(batch)]
    call = {"num_inference_steps": STEPS, "guidance_scale": CFG, "output_type": "latent"}
    watch = Watch()
    with steerclear.attach(pipe, watch):
        pipe(prompts, generator=[torch.Generator().manual_seed(k) for k in range(batch)], **call)
    return watch.seen, step_time(pipe, prompts)


def step_time(pipe: Any, prompts: list[str], repeats: int = 3) -> float:  # noqa: ANN401
    """Milliseconds of one step, the median of whole runs divided by their steps."""
    call = {"num_inference_steps": STEPS, "guidance_scale": CFG, "output_type": "latent"}
    found: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        pipe(prompts, **call)
        found.append(1e3 * (time.perf_counter() - start) / STEPS)
    return median(found)


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
    """``n`` items in bfloat16, made a block at a time."""
    rng = torch.Generator().manual_seed(0)
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


def timed(action: Any, repeats: int) -> float:  # noqa: ANN401
    found: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        found.append(1e3 * (time.perf_counter() - start))
    return median(found)


def measure(items: NegationSet, seen: list[tuple[Tensor, NoiseLevel]], step: float) -> dict[str, Any]:
    """The table of one set along the trajectories."""
    start = time.perf_counter()
    index = IndexedSet.of(items, progress=False)
    built = time.perf_counter() - start
    rows: list[dict[str, Any]] = []
    held = asked = 0
    for number, (x, level) in enumerate(seen):
        x = x.flatten(1)
        x = x if x.shape[1] == index.space.shape[0] else x.repeat(1, index.space.shape[0] // x.shape[1])
        got = index.certified(x, level)
        took = timed(lambda x=x, level=level: index.certified(x, level), 3)
        row: dict[str, Any] = {
            "step": number,
            "sigma/alpha": round(float(level.sigma) / float(level.alpha), 3),
            "rows read": round(float(got.rows.double().mean()), 1),
            "proven": round(float(got.proven.double().mean()), 3),
            "index, ms": round(took, 3),
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
                "exact pass, ms": round(timed(lambda x=x, level=level: items.posterior(x, level), 1), 2),
                "error of evidence, nats": float(error.max()),
                "error of mean": float(moved.max()),
            }
        rows.append(row)
    raw = items.latents.view(torch.int32)
    average = mean(row["index, ms"] for row in rows)
    read = timed(lambda: raw.amax(), 3)
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
                results.append(measure(items, seen, step))
                print(json.dumps({key: value for key, value in results[-1].items() if key != "steps"}), flush=True)
    if args.wide:
        seen, step = batches[1]
        results.append(measure(copies(works(16_384), args.wide), seen, step))
        print(json.dumps({key: value for key, value in results[-1].items() if key != "steps"}), flush=True)
    facts = {"what": __doc__, **machine.facts(), "noise": NOISE, "re-encoding": re_encoding(pipe)}
    args.out.write_text(json.dumps({**facts, "works": len(base), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

r"""What the exact posterior costs, beside the published computation and beside one pure read of the set.

    python benchmarks/posterior.py [--threads 2] [--out benchmarks/results/posterior.json]

Medians of wall time in one run, in which the rows of a table take turns. D = 16 384, as on Stable Diffusion 1.x.

* ``published``: the kernel average of the Safe Denoiser as it was released, typed from its formula: distances that are
  not squared, references with a column of ones, expanded to (samples, references, D + 1) and weighted there, one sample
  after the other. Another kernel than ours, and the same work.
* ``read``: the fastest reading of the set that torch has, the largest of its bytes as integers.
* ``error``: of the mean, relative in norm, and of the log-evidence in nats, against float64 with distances by plain
  subtraction, of the values *before* they were stored.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor
from watch import in_turns

from steerclear.negation import posterior as exact
from steerclear.noise import NoiseLevel

DIM = 16_384
LEVELS = {"early": NoiseLevel(0.0683, 0.9977), "middle": NoiseLevel(0.5, 0.8660), "late": NoiseLevel(0.98, 0.199)}
HALF = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def published(x: Tensor, references: Tensor, sigma: float = 3.15) -> Tensor:
    """The released loop's average, ``(batch, D)``."""
    ones = torch.ones(len(references), 1)
    means: list[Tensor] = []
    for row in x[:, None]:
        kernels = (-torch.cdist(row, references) / (2.0 * sigma**2)).exp()
        extended = torch.cat([references, ones], 1)[None].repeat(len(row), 1, 1)
        weighted = (kernels[..., None] * extended).sum(1)
        means.append(weighted[:, :-1] / (weighted[:, -1:] + 1e-8))
    return torch.cat(means)


def brute_force(x: Tensor, y: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """Mean and log-evidence in float64, a sample and a thousand points at a time."""
    alpha, sigma = float(level.alpha), float(level.sigma)
    squared = torch.stack(
        [torch.cat([(row - alpha * part.double()).square().sum(1) for part in y.split(1000)]) for row in x.double()]
    )
    logits = -squared / (2 * sigma**2) - torch.tensor(float(len(y))).double().log()
    weights = logits.softmax(1)
    mean = sum(
        weights[:, i : i + 1000] @ part.double() for i, part in zip(range(0, len(y), 1000), y.split(1000), strict=True)
    )
    constant = DIM / 2 * (2 * torch.pi * torch.tensor(sigma).double() ** 2).log()
    return torch.as_tensor(mean), logits.logsumexp(1) - constant


def drawn(n: int, batch: int, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """References around a few works, and noised samples of some of them."""
    rng = torch.Generator().manual_seed(n)
    works = torch.randn(max(1, n // 20), DIM, generator=rng)
    y = works[torch.arange(n) % len(works)] + 0.1 * torch.randn(n, DIM, generator=rng)
    noise = torch.randn(batch, DIM, generator=rng)
    return level.alpha * y[torch.randint(n, (batch,), generator=rng)] + level.sigma * noise, y


def tensor_operations(x: Tensor, y: Tensor, level: NoiseLevel) -> Any:  # noqa: ANN401
    """The same without compiled kernels."""
    compiled, exact._compiled = exact._compiled, lambda x, y: None
    try:
        return exact.posterior(x, y, torch.ones(len(y)), level)
    finally:
        exact._compiled = compiled


def row(n: int, batch: int, repeats: int, *, with_published: bool) -> dict[str, Any]:
    """Times and errors at one size."""
    level = LEVELS["middle"]
    x, y = drawn(n, batch, level)
    stored = {name: y.to(dtype) for name, dtype in HALF.items()}
    weights = torch.ones(n)
    actions: dict[str, Callable[[], Any]] = {
        **{f"{name}, read": (lambda s=s: s.view(torch.int32).amax()) for name, s in stored.items()},
        **{f"{name}, one pass": (lambda s=s: exact.posterior(x, s, weights, level)) for name, s in stored.items()},
        "float16, tensor operations": lambda: tensor_operations(x, stored["float16"], level),
    }
    if with_published:
        actions["published"] = lambda: published(x, y)
    times = in_turns(actions, repeats)
    result: dict[str, Any] = {"n": n, "batch": batch, "ms": {name: round(value, 3) for name, value in times.items()}}
    result["reads"] = {name: round(times[f"{name}, one pass"] / times[f"{name}, read"], 2) for name in HALF}
    if with_published:
        result["times as fast as published"] = {
            name: round(times["published"] / times[f"{name}, one pass"], 1) for name in HALF
        }
    return result


def errors(n: int) -> dict[str, Any]:
    """Worst of four samples, at every level and precision."""
    found: dict[str, Any] = {}
    for kind, level in LEVELS.items():
        x, y = drawn(n, 4, level)
        mean, evidence = brute_force(x, y, level)
        for name, dtype in HALF.items():
            got = exact.posterior(x, y.to(dtype), torch.ones(n), level)
            relative = (got.mean - mean).norm(dim=1) / mean.norm(dim=1)
            nats = (got.log_evidence - evidence).abs()
            found[f"{name}, {kind}"] = {"mean": float(relative.max()), "nats": float(nats.max())}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--largest", type=int, default=30_000, help="of the sizes beyond the published ones")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/posterior.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = [(515, 1), (515, 8), (3000, 1), (3000, 8)]
    rows = [row(n, batch, args.repeats, with_published=True) for n, batch in sizes]
    rows += [row(args.largest, batch, args.repeats, with_published=False) for batch in (1, 8)]
    result = {"what": __doc__, **machine.facts(), "dim": DIM, "rows": rows, "errors, n = 3000": errors(3000)}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"rows": rows, "errors": result["errors, n = 3000"]}, indent=1))


if __name__ == "__main__":
    main()

"""Train the judge of avatars: an independent yes or no per attribute.

    python recipes/avatars_ddpm/judge.py --build build/avatars-ddpm --steps 1500

Sees the set ``judge`` alone. Reports sensitivity and specificity on ``validation``, which nothing else sees, as it is
and blurred and noisy as a diffusion model may draw it. Writes ``BUILD/avatars-judge``.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from data import ATTRIBUTES
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from steerclear.detect.avatars_judge import AttributeNetwork

BATCH, RATE = 96, 2e-3


def read(build: Path, name: str) -> tuple[Tensor, Tensor]:
    """Pictures in [-1, 1] and attributes (n, attributes) of a set."""
    pictures = torch.from_numpy(np.load(build / f"{name}.npy")).permute(0, 3, 1, 2).float() / 127.5 - 1
    items = json.loads((build / f"{name}.json").read_text())
    return pictures, torch.tensor([[float(a in item["attributes"]) for a in ATTRIBUTES] for item in items])


def worn(x: Tensor) -> Tensor:
    """Other colours, soft edges and grain, as a small diffusion model draws."""
    n = len(x)
    draw = lambda low, high: low + (high - low) * torch.rand(n, 1, 1, 1)  # noqa: E731
    x = x * draw(0.85, 1.1) + draw(-0.1, 0.1)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + draw(0.0, 0.5) * (torch.rand(n, 1, 1, 1) < 0.4) * (soft - x)
    return (x + torch.randn_like(x) * draw(0.0, 0.12)).clamp(-1, 1)


@torch.no_grad()
def report(network: AttributeNetwork, x: Tensor, y: Tensor, what: str) -> dict[str, dict[str, float]]:
    said = network(x) > 0
    rows = {}
    for k, name in enumerate(ATTRIBUTES):
        has = y[:, k] > 0.5
        rows[name] = {
            "sensitivity": float(said[has, k].float().mean()),
            "specificity": float((~said[~has, k]).float().mean()),
            "with": int(has.sum()),
            "without": int((~has).sum()),
        }
        print(f"{what}: {name} {rows[name]}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/avatars-ddpm"))
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    torch.manual_seed(0)
    x, y = read(args.build, "judge")
    network = AttributeNetwork(len(ATTRIBUTES)).to(memory_format=torch.channels_last)
    average = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.02)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        rows = torch.randint(0, len(x), (BATCH,))
        loss = F.binary_cross_entropy_with_logits(network(worn(x[rows])), y[rows] * 0.98 + 0.01)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        kept = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in network.state_dict().items():
                average[name] = average[name].lerp(value, 1 - kept) if value.is_floating_point() else value.clone()
        if step % 250 == 249:
            print(f"{step + 1} loss {float(loss.detach()):.4f}", flush=True)
    network.load_state_dict(average)
    network.eval()
    held, truth = read(args.build, "validation")
    found = {"clean": report(network, held, truth, "clean"), "worn": report(network, worn(held), truth, "worn")}
    folder = args.build / "avatars-judge"
    folder.mkdir(exist_ok=True)
    half = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_file({k: v.contiguous() for k, v in half.items()}, folder / "judge.safetensors")
    card = {"labels": list(ATTRIBUTES), "steps": args.steps, "validation": found}
    (folder / "judge.json").write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()

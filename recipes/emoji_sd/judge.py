"""Train the judge: a classifier over the drawn concepts with "something else".

    python recipes/emoji_sd/judge.py --build build/emoji-sd --steps 2500

Sees the generator's vendors and three more, never the reference vendors. "Something else" is taught by the art of all
concepts that are not drawn, by blends of two pictures, by cut-and-pasted halves and by smooth noise. Reports its
accuracy on the validation vendor, which nothing else sees. Checkpoints; run again to resume. Writes
``BUILD/emoji-judge``.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from checkpoints import resume, store
from concepts import Concepts
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from steerclear.detect.emoji_judge import SOMETHING_ELSE, JudgeNetwork

BATCH, RATE, ELSE_SHARE = 80, 2e-3, 0.22
#: Concepts told apart by colour alone keep their colours.
BY_COLOUR = ("heart", "apple", "lemon", "tangerine", "tomato", "peach", "pear", "sun", "droplet")


def to_pictures(images: np.ndarray, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def moved(x: Tensor) -> Tensor:
    """Mirror, rotate, scale, shift; what comes in from outside is white."""
    n = len(x)
    angle = (torch.rand(n) - 0.5) * 0.6
    scale = 0.62 + 0.5 * torch.rand(n)
    mirror = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    shift = (torch.rand(n, 2) - 0.5) * 0.35
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([mirror * cos, -sin, shift[:, 0], mirror * sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return 1 + F.grid_sample(x - 1, grid, align_corners=False)


def coloured(x: Tensor, free: Tensor) -> Tensor:
    """Brightness, contrast, saturation, off-white; colours exchanged or inverted where ``free``."""
    n = len(x)

    def draw(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(n)).view(n, 1, 1, 1)

    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * draw(0.4, 1.5)
    x = x * draw(0.75, 1.2) + draw(-0.15, 0.15)
    exchanged = x[:, torch.randperm(3)]
    x = torch.where((free & (torch.rand(n) < 0.12)).view(n, 1, 1, 1), exchanged, x)
    return torch.where((free & (torch.rand(n) < 0.05)).view(n, 1, 1, 1), -x, x)


def softened(x: Tensor) -> Tensor:
    """Blur and noise like a small diffusion model's: soft edges, halos, grain."""
    n = len(x)
    small = F.interpolate(F.interpolate(x, scale_factor=0.5, mode="area"), size=64, mode="bicubic")
    smaller = F.interpolate(F.interpolate(x, scale_factor=0.3, mode="area"), size=64, mode="bicubic")
    kind = torch.rand(n).view(n, 1, 1, 1)
    x = torch.where(kind < 0.2, small, torch.where(kind < 0.3, smaller, x))
    sharp = x + 1.0 * (x - F.avg_pool2d(x, 5, 1, 2))
    x = torch.where(torch.rand(n).view(n, 1, 1, 1) < 0.2, sharp, x)
    grain = torch.randn_like(x) * (0.12 * torch.rand(n)).view(n, 1, 1, 1)
    halo = F.interpolate(torch.randn(n, 3, 8, 8), size=64, mode="bicubic") * (0.15 * torch.rand(n)).view(n, 1, 1, 1)
    return (x + grain + halo).clamp(-1, 1)


def nonsense(x: Tensor) -> Tensor:
    """Pictures of nothing, made from pictures of things: blends, halves, smooth noise."""
    n, other = len(x), x.roll(1, 0)
    share = (0.35 + 0.3 * torch.rand(n)).view(n, 1, 1, 1)
    blend = share * x + (1 - share) * other
    mask = (F.interpolate(torch.randn(n, 1, 4, 4), size=64, mode="bicubic") > 0).float()
    patch = mask * x + (1 - mask) * other
    cells = F.interpolate(torch.randn(n, 3, 6, 6), size=64, mode="bicubic")
    blob = torch.where(F.interpolate(torch.randn(n, 1, 5, 5), size=64, mode="bicubic") > 0.2, cells, torch.ones(()))
    kind = torch.rand(n).view(n, 1, 1, 1)
    return torch.where(kind < 0.4, blend, torch.where(kind < 0.75, patch, blob)).clamp(-1, 1)


@torch.no_grad()
def accuracy(network: JudgeNetwork, pictures: Tensor, labels: Tensor) -> tuple[float, float]:
    network.eval()
    ranks = network(pictures).argsort(1, descending=True)[:, :5] == labels[:, None]
    network.train()
    return float(ranks[:, 0].float().mean()), float(ranks.any(1).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/emoji-sd"))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    concepts = Concepts.load()
    items = json.loads((args.build / "items.json").read_text())
    images = np.load(args.build / "images.npy", mmap_mode="r")
    labels = [*concepts.drawn, SOMETHING_ELSE]
    index = {label: i for i, label in enumerate(labels)}
    free = torch.tensor([not any(word in label for word in BY_COLOUR) for label in labels])

    # Concepts that look like a drawn one must not be taught as something else ("cat" beside "cat face").
    words = {word for label in labels for word in label.split()} - {"face", "with", "and", "ball", "hand", "cat"}
    trained = {*concepts.vendors["generator"], *concepts.vendors["judge"]}
    known = np.array([i for i, it in enumerate(items) if it["vendor"] in trained and it["name"] in index])
    other = np.array(
        [i for i, it in enumerate(items) if it["vendor"] in trained and not words & set(it["name"].split())]
    )
    validation = concepts.vendors["validation"]
    held = np.array([i for i, it in enumerate(items) if it["vendor"] in validation and it["name"] in index])
    truth = {i: index.get(it["name"], len(labels) - 1) for i, it in enumerate(items)}
    print(f"{len(known)} pictures of {len(labels) - 1} concepts, {len(other)} of something else, {len(held)} held out")
    # One vendor must not outvote another, nor a concept with six drawings one with three.
    counts = np.bincount([truth[i] for i in known], minlength=len(labels))
    balance = np.array([1 / counts[truth[i]] ** 0.5 for i in known])
    balance /= balance.sum()

    network = JudgeNetwork(len(labels)).to(memory_format=torch.channels_last)
    average = {k: v.clone() for k, v in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.02)
    pictures, answers = to_pictures(images, held), torch.tensor([truth[i] for i in held])
    started, step, checkpoint = time.monotonic(), 0, args.build / "judge.checkpoint.safetensors"
    if state := resume(checkpoint):
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average, step = state["average"], state["step"]
        rng = np.random.default_rng(step)
    while step < args.steps:
        share = step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * share))
        n_else = int(BATCH * ELSE_SHARE)
        rows = np.concatenate([rng.choice(known, BATCH - n_else, p=balance), rng.choice(other, n_else // 2)])
        y = torch.tensor([truth[i] for i in rows])
        x = coloured(moved(to_pictures(images, rows)), free[y])
        fake = nonsense(moved(to_pictures(images, rng.choice(known, n_else - n_else // 2))))
        x = softened(torch.cat([x, fake])).contiguous(memory_format=torch.channels_last)
        y = torch.cat([y, torch.full((len(fake),), len(labels) - 1)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=0.03)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        decay = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in network.state_dict().items():
                if value.is_floating_point():
                    average[key].lerp_(value, 1 - decay)
                else:
                    average[key].copy_(value)
        if step % 100 == 0:
            first, five = accuracy(network, pictures, answers)
            elapsed = time.monotonic() - started
            print(f"{step} {elapsed:.0f}s loss {loss:.3f} held-out vendor {first:.3f} / {five:.3f}", flush=True)
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            store(checkpoint, {**state, "step": step})
    network.load_state_dict(average)
    first, five = accuracy(network, pictures, answers)
    print(f"{step} steps: held-out vendor names the concept first {first:.3f}, among five {five:.3f} (n={len(held)})")
    folder = args.build / "emoji-judge"
    folder.mkdir(exist_ok=True)
    half = {k: v.half() if v.is_floating_point() else v for k, v in average.items()}
    save_file({k: v.contiguous() for k, v in half.items()}, folder / "judge.safetensors")
    card = {"labels": labels, "policies": concepts.policies, "vendors": sorted(trained), "steps": step}
    (folder / "judge.json").write_text(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()

"""Data parallelism for two shared cores: two single-thread processes that average their weights every few steps.

On shared cores two OpenMP threads wait for each other; two processes do not. ``launch`` starts the ranks and waits.
"""

import os
import subprocess
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist

RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


def launch(workers: int, port: int = 29511) -> bool:
    """Re-run this script as ``workers`` ranks and wait; ``False`` when already a rank (or only one is wanted)."""
    if workers == 1 or "RANK" in os.environ:
        return False
    common = {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **common, "RANK": str(rank)})
        for rank in range(workers)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"training stopped: the ranks ended with {codes}")
    return True


def init() -> None:
    if WORLD > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=RANK, world_size=WORLD)


def average(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each tensor by its mean over the ranks (one all-reduce for all of them)."""
    if WORLD == 1:
        return
    tensors = list(tensors)
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    with torch.no_grad():
        for tensor, part in zip(tensors, flat.div_(WORLD).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def agree(flag: bool) -> bool:
    """Rank 0's answer, so that no rank leaves the loop alone."""
    if WORLD == 1:
        return flag
    answer = torch.tensor([float(flag)])
    dist.broadcast(answer, 0)
    return bool(answer.item())

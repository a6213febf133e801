"""What attaching costs per step: DDIM and Euler on 4×64×64 latents, without a network, on the CPU.

Prints JSON with the machine and the versions. Usage: ``python benchmarks/attach_overhead.py [steps]``
"""

import json
import platform
import sys
import time
from typing import Any

import diffusers
import torch
from torch import Tensor

import steerclear
from steerclear.attach import attach


class Loop:
    """A pipeline that does nothing but step its scheduler."""

    def __init__(self, scheduler: Any, steps: int) -> None:  # noqa: ANN401 - any scheduler
        self.components = {"scheduler": scheduler}
        self.steps = steps

    def __call__(self) -> float:
        """Microseconds per step."""
        scheduler = self.components["scheduler"]
        scheduler.set_timesteps(self.steps)
        x, output = torch.zeros(1, 4, 64, 64), torch.zeros(1, 4, 64, 64)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, scheduler.timesteps[0])
        start = time.thread_time()
        for t in scheduler.timesteps:
            scheduler.step(output, t, x)
        return 1e6 * (time.thread_time() - start) / self.steps


def nothing(denoised: Tensor, state: object) -> None:
    """Fires for no sample."""


def clone(denoised: Tensor, state: object) -> Tensor:
    """Changes nothing, but makes everybody look."""
    return denoised.clone()


def change(denoised: Tensor, state: object) -> Tensor:
    """Changes everything."""
    return denoised + 1.0


def measure(scheduler: Any, steps: int, repeats: int = 9) -> dict[str, float]:  # noqa: ANN401 - any scheduler
    """Microseconds of processor time per step, the best of several rounds, in which the rows take turns."""
    loop = Loop(scheduler, steps)
    seen: dict[str, list[float]] = {"stock": [], "guard returns None": [], "guard returns a clone": [], "changes": []}
    for _ in range(repeats):
        seen["stock"].append(loop())
        for name, guard in zip(list(seen)[1:], (nothing, clone, change), strict=True):
            with attach(loop, guard):
                seen[name].append(loop())
    best = {name: min(values) for name, values in seen.items()}
    extra = {f"overhead: {name}": value - best["stock"] for name, value in best.items() if name != "stock"}
    return {name: round(value, 1) for name, value in (best | extra).items()}


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    versions = {module.__name__: module.__version__ for module in (steerclear, torch, diffusers)}
    result = {
        "what": "microseconds of processor time per scheduler step, latents 1x4x64x64, one thread",
        "machine": {"processor": platform.processor() or platform.machine(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), **versions},
        "results": {
            name: measure(getattr(diffusers, name)(), steps)
            for name in ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

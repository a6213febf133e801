"""Pictures (or latents) of prompts, ten at a time, one seed each."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

BATCH = 10


def batches(
    pipe: Any, prompts: Sequence[str], *, seed: int, steps: int = 25, cfg: float = 3.0, output_type: str = "np"
) -> Iterator[Any]:
    """What ``pipe`` makes of each batch; prompt ``i`` is drawn from ``seed + i``."""
    for start in tqdm(range(0, len(prompts), BATCH), unit="batch", mininterval=5):
        part = list(prompts[start : start + BATCH])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        call = {"num_inference_steps": steps, "guidance_scale": cfg, "output_type": output_type}
        yield pipe(part, generator=generators, **call).images

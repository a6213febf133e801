"""What the guards on images cost per step: beside a step of emoji-sd, and as a share of one of Stable Diffusion 1.x.

    python benchmarks/guard_cost.py [--threads 2] [--unet] [--out benchmarks/results/guard_cost.json]

A guard is called with the state of every fifth step of a trajectory that emoji-sd really takes; ``ms`` is the median
call, ``share`` that over a step of the model in the same run (two branches of its network and the scheduler).
``FLOPs``: three products per item, dimension and sample for a pass over the set, against 0.80 TFLOP a branch and two
branches of a step of Stable Diffusion 1.x at 512 x 512. With ``--unet``, a step of a network of that size with random
weights is timed, on a GPU in float16 if there is one, beside exact passes over sets of its latents.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch
from torch import Tensor
from watch import Watch, timed

import steerclear
from steerclear import zoo
from steerclear.denoise import DenoiseState
from steerclear.guards import SPELL, PublishedLoop, SafeDenoiser, SafetyGuidedFlow, Shield, TwoSample
from steerclear.negation import NegationSet, Space
from steerclear.noise import NoiseLevel

STEPS, CFG, DIM = 25, 3.0, 16_384
FLOP_STEP = 2 * 0.80e12


def shown(denoised: Tensor, state: DenoiseState) -> tuple[Tensor, DenoiseState]:
    """What a guard is called with, without the trajectory's memory."""
    kept = DenoiseState(x_t=state.x_t.clone(), level=state.level, step=state.step, num_steps=state.num_steps)
    return denoised.clone(), kept


def guards(negation: NegationSet, safe: NegationSet) -> dict[str, Any]:
    """The guards that act on images alone."""
    two = {"safe": safe, "prior": 0.3}
    return {
        "SafeDenoiser, the step's own kernel": SafeDenoiser(negation=negation, weight=TwoSample(**two)),
        "SafeDenoiser, bandwidth 4": SafeDenoiser(negation=negation, weight=TwoSample(**two, bandwidth=4.0)),
        "SafetyGuidedFlow, fixed bandwidth": SafetyGuidedFlow(negation=negation, strength=0.03, bandwidth=8.0),
        "SafetyGuidedFlow, rule of ranks": SafetyGuidedFlow(negation=negation, strength=0.03, ranks=(3, 6)),
        "PublishedLoop": PublishedLoop(negation=negation),
        "SPELL, radius 8": SPELL(shields=(Shield(negation=negation, radius=8.0),)),
    }


def on_emoji(threads: int) -> dict[str, Any]:
    """Every guard on the shipped model, at the size of its own sets and at 3 000 items."""
    pipe = zoo.load("emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    policy = zoo.joined(zoo.policies())
    call = {"num_inference_steps": STEPS, "guidance_scale": CFG, "output_type": "latent"}
    result: dict[str, Any] = {"threads": threads, "rows": []}
    grown = [grow(policy.negation, 3000), grow(policy.safe, 3000)]
    for batch in (1, 8):
        watch, prompts = Watch(shown), ["a red apple"] * batch
        with steerclear.attach(pipe, watch):
            pipe(prompts, generator=[torch.Generator().manual_seed(k) for k in range(batch)], **call)
        step = timed(lambda prompts=prompts: pipe(prompts, **call), 3) / STEPS
        for negation, safe in ((policy.negation, policy.safe), grown):
            for name, guard in guards(negation, safe).items():
                calls = [timed(lambda d=d, s=s, g=guard: g(d, s)) for d, s in watch.seen[::5]]
                result["rows"].append(
                    {
                        "guard": name,
                        "batch": batch,
                        "n": len(negation),
                        "ms": round(median(calls), 3),
                        "step, ms": round(step, 2),
                        "share": round(median(calls) / step, 4),
                    }
                )
    return result


def grow(items: NegationSet, n: int) -> NegationSet:
    """A set of ``n``: copies that differ a little."""
    rows = items.latents[torch.arange(n) % len(items)]
    noise = 0.05 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(len(items)))
    names = tuple(f"{len(items)}-{k}" for k in range(n))
    return NegationSet(latents=rows + noise, space=items.space, ids=names, digests=names)


def in_flops() -> dict[str, float]:
    """Shares of a step of Stable Diffusion 1.x, per sample, for a pass over sets of its latents."""
    return {f"N = {n}": 3 * n * DIM / FLOP_STEP for n in (515, 3000, 100_000, 1_000_000)}


@torch.no_grad()
def on_unet() -> dict[str, Any]:
    """A step of a network of the size of Stable Diffusion 1.x, and exact passes beside it."""
    from diffusers import UNet2DConditionModel

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
    ).to(device, dtype)
    x, text = torch.randn(2, 4, 64, 64, device=device, dtype=dtype), torch.randn(2, 77, 768, device=device, dtype=dtype)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def step() -> None:
        unet(x, 500, text)
        wait()

    took = timed(step, 20 if device == "cuda" else 2)
    found: dict[str, Any] = {"device": device, "dtype": str(dtype), "step, ms": round(took, 2)}
    for n in (515, 3000, 30_000):
        rows = torch.randn(n, 4, 64, 64, generator=torch.Generator().manual_seed(n)).half()
        names = tuple(map(str, range(n)))
        items = NegationSet(latents=rows, space=Space(encoder="x", shape=(4, 64, 64)), ids=names, digests=names)

        def one_pass(items: NegationSet = items) -> None:
            items.posterior(x[:1], NoiseLevel(0.7, 0.7))
            wait()

        spent = timed(one_pass, 20 if device == "cuda" else 5)
        found[f"N = {n}"] = {"ms": round(spent, 3), "share": round(spent / took, 5)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--unet", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/guard_cost.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    zoo.quiet()
    result = {"what": __doc__, **machine.facts(), "emoji-sd": on_emoji(args.threads), "share in FLOPs": in_flops()}
    if args.unet:
        result["a network of the size of Stable Diffusion 1.x"] = on_unet()
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "what"}, indent=1))


if __name__ == "__main__":
    main()

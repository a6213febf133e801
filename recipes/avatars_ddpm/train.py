"""Train avatars-ddpm: a small UNet that draws avatars from noise, in pixels.

    python recipes/avatars_ddpm/train.py --build build/avatars-ddpm --minutes 45

v-prediction, linear betas, half-weight min-SNR-5, AdamW with linear decay over the last 40 %, exponential moving
average. Six individuals take a share of the draws each, so that the model learns them by heart.
Checkpoints every three minutes; run again to resume. Writes ``BUILD/model`` as a DDIMPipeline.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "emoji_sd"))
from checkpoints import resume, store

BATCH, RATE, WARMUP, DECAY, EVERY = 32, 8e-4, 200, 0.999, 180
INDIVIDUAL = 0.025  # share of the draws that each individual takes
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
}


def network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )


def loss_of(unet: UNet2DModel, clean: Tensor, cumulative: Tensor) -> Tensor:
    """Half plain, half min-SNR-5 weighted squared error of v, on stratified timesteps."""
    n = len(clean)
    steps = ((torch.arange(n) + torch.rand(1)) / n * 1000).long().clamp(0, 999)[torch.randperm(n)]
    alpha = cumulative[steps].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - cumulative[steps]).sqrt().view(-1, 1, 1, 1)
    epsilon = torch.randn_like(clean)
    noisy = (alpha * clean + sigma * epsilon).contiguous(memory_format=torch.channels_last)
    output = unet(noisy, steps).sample
    error = (output - (alpha * epsilon - sigma * clean)).square().mean((1, 2, 3))
    ratio = cumulative[steps] / (1 - cumulative[steps])
    return (0.5 * error + 0.5 * error * ratio.clamp(max=5) / (ratio + 1) * 2).mean()


def batches(build: Path, rng: np.random.Generator) -> Tensor:
    """Endless batches: individuals by their shares, the others in turn."""
    train, individuals = (
        torch.from_numpy(np.load(build / f"{name}.npy")).permute(0, 3, 1, 2).float() / 127.5 - 1
        for name in ("train", "individuals")
    )
    order = rng.permutation(len(train))
    while True:
        repeated = int((rng.random(BATCH) < INDIVIDUAL * len(individuals)).sum())
        if len(order) < BATCH:
            order = np.concatenate([order, rng.permutation(len(train))])
        now, order = order[: BATCH - repeated], order[BATCH - repeated :]
        yield torch.cat([train[now], individuals[rng.integers(0, len(individuals), repeated)]])


def sheet(pipe: DDIMPipeline, path: Path, columns: int = 12) -> None:
    pictures = pipe(batch_size=columns * 5, num_inference_steps=50, generator=torch.Generator().manual_seed(0)).images
    canvas = Image.new("RGB", (columns * 68, 5 * 68), "white")
    for k, picture in enumerate(pictures):
        canvas.paste(picture.resize((64, 64), Image.Resampling.NEAREST), (k % columns * 68, k // columns * 68))
    canvas.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/avatars-ddpm"), help="where data.py wrote")
    parser.add_argument("--minutes", type=float, default=45, help="for all sittings together")
    args = parser.parse_args()
    torch.manual_seed(0)
    unet = network().to(memory_format=torch.channels_last)
    average = {name: value.clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    step, spent, checkpoint = 0, 0.0, args.build / "checkpoint.safetensors"
    if state := resume(checkpoint):
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, spent = state["average"], state["step"], state["spent"]
    pipe = DDIMPipeline(unet, DDIMScheduler(**SCHEDULE))
    pipe.set_progress_bar_config(disable=True)

    def save(elapsed: float) -> None:
        state = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        store(checkpoint, {**state, "step": step, "spent": elapsed})
        raw = {name: value.clone() for name, value in unet.state_dict().items()}
        unet.load_state_dict(average)
        pipe.save_pretrained(args.build / "model")
        sheet(pipe, args.build / "samples.png")
        unet.load_state_dict(raw)

    torch.manual_seed(step)
    cumulative, source = pipe.scheduler.alphas_cumprod, batches(args.build, np.random.default_rng(step))
    started, total, saved, errors, first = time.monotonic() - spent, args.minutes * 60, time.monotonic(), [], step
    while (elapsed := time.monotonic() - started) < total:
        share = elapsed / total
        decay = 1.0 if share < 0.6 else max(0.01, 1 - (share - 0.6) / 0.4)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * decay
        loss = loss_of(unet, next(source), cumulative)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        step += 1
        errors.append(float(loss.detach()))
        with torch.no_grad():
            kept = min(DECAY, step / (step + 100))
            for name, value in unet.state_dict().items():
                average[name].lerp_(value, 1 - kept)
        if step % 100 == 0:
            print(
                f"{step} {elapsed:.0f}s loss {np.mean(errors):.4f} {(step - first) * BATCH / (elapsed - spent):.0f}/s"
            )
            errors = []
        if time.monotonic() - saved > EVERY:
            save(elapsed)
            saved = time.monotonic()
    save(elapsed)


if __name__ == "__main__":
    main()

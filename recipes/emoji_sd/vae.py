"""Train the autoencoder of emoji-sd: 64x64 pictures <-> 16x16x4 latents.

    python recipes/emoji_sd/vae.py --build build/emoji-sd --minutes 30 --workers 2

Loss: L1 + L2/2 + L1 of the image gradients/2 + a small KL. Trained on crops of the pictures that the generator and the
judge may see (never on references or validation art). Afterwards each latent channel is shifted and scaled to mean 0,
variance 1 by folding the map into ``quant_conv`` and ``post_quant_conv``, so that ``scaling_factor`` is 1.
Checkpoints every two minutes; run again to resume.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import parallel
import torch
from checkpoints import resume, store
from concepts import Concepts
from diffusers import AutoencoderKL
from torch import Tensor

CROP, BATCH, RATE, KL = 48, 16, 1.2e-3, 1e-6


def build() -> AutoencoderKL:
    channels = (16, 48, 96)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def pictures(images: np.ndarray, rows: np.ndarray) -> Tensor:
    batch = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return batch.contiguous(memory_format=torch.channels_last)


def augmented(batch: Tensor, rng: np.random.Generator) -> Tensor:
    if rng.random() < 0.5:
        batch = batch.flip(3)
    if rng.random() < 0.2:
        batch = batch[:, torch.from_numpy(rng.permutation(3))]
    top, left = rng.integers(0, 65 - CROP, 2)
    return batch[:, :, top : top + CROP, left : left + CROP].contiguous(memory_format=torch.channels_last)


def loss_of(vae: AutoencoderKL, batch: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        posterior = vae.encode(batch).latent_dist
        output = vae.decode(posterior.sample()).sample
    error = output.float() - batch
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    reconstruction = error.abs().mean() + 0.5 * error.square().mean() + 0.5 * edges
    return reconstruction + KL * posterior.kl().float().mean(), reconstruction.detach()


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: Tensor) -> float:
    """Fold z -> (z - mean)/std into the two 1x1 convolutions; returns the largest change of a decoded pixel."""
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    probe = latents[:16]
    before = vae.decode(probe).sample
    n = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:n] /= std.view(n, 1, 1, 1)
    encode.bias[:n] = (encode.bias[:n] - mean) / std
    encode.bias[n:] -= 2 * std.log()
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= std.view(1, n, 1, 1)
    after = vae.decode((probe - mean.view(1, n, 1, 1)) / std.view(1, n, 1, 1)).sample
    return float((after - before).abs().max())


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray, rows: np.ndarray) -> float:
    batch = pictures(images, rows)
    output = vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1)
    return float((-10 * ((output - batch) / 2).square().mean((1, 2, 3)).log10()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/emoji-sd"))
    parser.add_argument("--minutes", type=float, default=30.0, help="time to train, all sittings together")
    parser.add_argument("--workers", type=int, default=2, help="single-thread processes")
    args = parser.parse_args()
    if parallel.launch(args.workers):
        return
    parallel.init()
    images = np.load(args.build / "images.npy", mmap_mode="r")
    items = json.loads((args.build / "items.json").read_text())
    roles = Concepts.load().vendors
    seen = np.array([i for i, item in enumerate(items) if item["vendor"] in {*roles["generator"], *roles["judge"]}])
    drawn = np.array([i for i in seen if items[i]["groups"]])
    unseen = np.array([i for i, item in enumerate(items) if item["vendor"] in roles["references"] and item["groups"]])

    torch.manual_seed(0)
    vae = build().to(memory_format=torch.channels_last)
    average = {k: v.clone() for k, v in vae.state_dict().items()}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint, step, spent = args.build / "vae.checkpoint.safetensors", 0, 0.0
    if state := resume(checkpoint):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, spent = state["average"], state["step"], state["spent"]
    rng = np.random.default_rng([parallel.RANK, step])
    torch.manual_seed(1000 * parallel.RANK + step)
    started, total, saved = time.monotonic() - spent, args.minutes * 60, time.monotonic()

    while True:
        elapsed = time.monotonic() - started
        if step % 8 == 0 and parallel.agree(elapsed > total):
            break
        share = min(1.0, elapsed / total)
        rate = RATE * min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = rng.choice(drawn if step % 2 else seen, BATCH, replace=False)
        loss, reconstruction = loss_of(vae, augmented(pictures(images, rows), rng))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parallel.average(p.grad for p in vae.parameters())
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in vae.state_dict().items():
                average[key].lerp_(value, 1 - decay)
        if parallel.RANK == 0 and step % 200 == 0:
            print(f"{step} {elapsed:.0f}s reconstruction {reconstruction:.4f} rate {rate:.1e}", flush=True)
        if parallel.RANK == 0 and time.monotonic() - saved > 120:
            saved = time.monotonic()
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            store(checkpoint, {**state, "step": step, "spent": elapsed})

    if parallel.RANK:
        return
    torch.set_num_threads(2)
    vae.load_state_dict(average)
    vae.eval()
    with torch.no_grad():
        sample = pictures(images, drawn[:: max(1, len(drawn) // 1024)])
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in sample.split(64)])
    print(f"whitening moves a decoded pixel by at most {whiten(vae, latents):.1e}")
    print(f"PSNR {psnr(vae, images, drawn[::8]):.2f} dB on seen, {psnr(vae, images, unseen[::2]):.2f} dB on unseen art")
    vae.save_pretrained(args.build / "vae")


if __name__ == "__main__":
    main()

"""Train the text encoder and the UNet of emoji-sd in the autoencoder's latents.

    python recipes/emoji_sd/unet.py --build build/emoji-sd --minutes 90 --workers 2

v-prediction, scaled-linear betas, half-weight min-SNR-5, AdamW with linear decay over the last 40 %, exponential
moving average, 12 % empty captions. Every picture is encoded in 8 variants (mirrored or not, shifted, scaled), so that
seeds differ. Two processes train on their own batches and average their weights every 4 steps (local SGD: an all-reduce
per step would cost as much as the arithmetic). Checkpoints every three minutes; run again to resume, with the same or
another ``--minutes`` for all sittings together. Writes ``BUILD/emoji-sd`` as a StableDiffusionPipeline.

    python recipes/emoji_sd/unet.py --build build/emoji-sd --minutes 60 --finish

goes on from the averaged weights with a fresh optimizer and more captions that are group words, keywords or empty.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import parallel
import torch
from captions import FINISH, FIRST, LENGTH, caption, train_tokenizer
from checkpoints import resume, store
from concepts import Concepts
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from steerclear.files import states

BATCH, RATE, VARIANTS, WARMUP = 16, 8e-4, 8, 200
#: Mostly the drawing itself, a fifth mirrored, a quarter shrunk and shifted: enough for seeds to differ.
SHARES = (0.55, 0.2, *[0.25 / 6] * 6)
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
}


def variants(picture: np.ndarray, rng: np.random.Generator) -> Tensor:
    """``VARIANTS`` copies, half of them mirrored, all but two shrunk and shifted on white: (VARIANTS, 3, 64, 64)."""
    base = torch.from_numpy(picture.copy()).permute(2, 0, 1).float().div(127.5).sub(1)[None]
    made = []
    for k in range(VARIANTS):
        scale = 1.0 if k < 2 else float(rng.uniform(0.82, 1.0))
        room = 1.0 - 0.9 * scale
        shift = torch.from_numpy(rng.uniform(-room, room, 2)).float() if k >= 2 else torch.zeros(2)
        mirror = -1.0 if k % 2 else 1.0
        theta = torch.tensor([[mirror / scale, 0.0, -mirror * shift[0] / scale], [0.0, 1 / scale, -shift[1] / scale]])
        grid = nn.functional.affine_grid(theta[None], [1, 3, 64, 64], align_corners=False)
        # Padding is white: sample the negative of the distance to white, whose padding value is zero.
        made.append(1 + nn.functional.grid_sample(base - 1, grid, align_corners=False))
    return torch.cat(made)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, rows: list[int], cache: Path) -> Tensor:
    """Latents of all variants, (rows, VARIANTS, 4, 16, 16); cached."""
    if cache.exists():
        return states.read(cache)
    rng = np.random.default_rng(0)
    latents = torch.stack([vae.encode(variants(images[row], rng)).latent_dist.mode() for row in rows])
    states.write(cache, latents)
    return latents


def build(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=128,
        )
    )
    # CLIP's 0.02 leaves the outputs of a shallow encoder trained from scratch nearly identical.
    for name, parameter in text.named_parameters():
        if "token_embedding" in name:
            nn.init.normal_(parameter, std=0.5)
        elif "position_embedding" in name:
            nn.init.normal_(parameter, std=0.1)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return text, unet.to(memory_format=torch.channels_last)


def loss_of(text: CLIPTextModel, unet: UNet2DConditionModel, tokens: Tensor, latents: Tensor, cumulative: Tensor):  # noqa: ANN201
    """Half plain, half min-SNR-5 weighted squared error of v, on stratified timesteps."""
    n = len(latents)
    steps = ((torch.arange(n) + torch.rand(1)) / n * 1000).long().clamp(0, 999)[torch.randperm(n)]
    alpha = cumulative[steps].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - cumulative[steps]).sqrt().view(-1, 1, 1, 1)
    epsilon = torch.randn_like(latents)
    noisy = (alpha * latents + sigma * epsilon).contiguous(memory_format=torch.channels_last)
    with torch.autocast(latents.device.type, dtype=torch.bfloat16):
        output = unet(noisy, steps, text(tokens)[0]).sample
    error = (output.float() - (alpha * epsilon - sigma * latents)).square().mean((1, 2, 3))
    ratio = cumulative[steps] / (1 - cumulative[steps])
    weight = ratio.clamp(max=5) / (ratio + 1) / 0.35
    return (0.5 * (1 + weight) * error).mean(), error.detach().mean()


def pipeline(vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel):  # noqa: ANN201
    scheduler = DDIMScheduler(
        **SCHEDULE, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class Averaged:
    """Exponential moving average of parameters; ``swapped`` copies it in."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.values = [p.detach().clone() for p in parameters]

    def update(self, parameters: list[Tensor], step: int) -> None:
        torch._foreach_lerp_(self.values, [p.data for p in parameters], 1 - min(0.994, (1 + step) / (40 + step)))

    def copy_to(self, parameters: list[Tensor]) -> None:
        for parameter, value in zip(parameters, self.values, strict=True):
            parameter.data.copy_(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/emoji-sd"))
    parser.add_argument("--minutes", type=float, default=90.0, help="time to train, all sittings together")
    parser.add_argument("--workers", type=int, default=2, help="single-thread processes")
    parser.add_argument("--finish", action="store_true", help="a second training, from the first one's average")
    parser.add_argument("--export", action="store_true", help="only write the checkpoint's average as a pipeline")
    args = parser.parse_args()
    if not args.export and parallel.launch(args.workers, port=29512):
        return
    parallel.init()
    styles = Concepts.load().vendors["generator"]
    items = json.loads((args.build / "items.json").read_text())
    rows = [i for i, item in enumerate(items) if item["vendor"] in styles and item["groups"]]
    vae = AutoencoderKL.from_pretrained(args.build / "vae").eval()
    tokens_at, first_checkpoint = args.build / "tokenizer", args.build / "unet.checkpoint.safetensors"
    checkpoint = args.build / "finish.checkpoint.safetensors" if args.finish else first_checkpoint
    cache = args.build / "latents.safetensors"
    shares, rate = (FINISH, RATE / 2) if args.finish else (FIRST, RATE)
    if parallel.RANK == 0:
        encode(vae, np.load(args.build / "images.npy", mmap_mode="r"), rows, cache)
        if not tokens_at.exists():
            train_tokenizer(items, tokens_at)
    parallel.agree(True)
    latents = states.read(cache)
    tokenizer = CLIPTokenizer.from_pretrained(tokens_at, model_max_length=LENGTH)

    torch.manual_seed(0)
    text, unet = build(tokenizer)
    parameters = [*unet.parameters(), *text.parameters()]
    average = Averaged(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    step, spent = 0, 0.0
    if state := resume(checkpoint):
        unet.load_state_dict(state["unet"])
        text.load_state_dict(state["text"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, step, spent = state["average"], state["step"], state["spent"]
    elif args.finish:
        average.values = states.read(first_checkpoint)["average"]
        average.copy_to(parameters)
    if args.export:
        average.copy_to(parameters)
        pipeline(vae, text, tokenizer, unet).save_pretrained(args.build / "emoji-sd")
        print(f"step {step}, {spent / 60:.0f} min")
        return

    def save(seconds: float) -> None:
        state = {"unet": unet.state_dict(), "text": text.state_dict(), "optimizer": optimizer.state_dict()}
        store(checkpoint, {**state, "average": average.values, "step": step, "spent": seconds})

    rng = np.random.default_rng([parallel.RANK, step])
    torch.manual_seed(1000 * parallel.RANK + step)
    cumulative = DDPMScheduler(**SCHEDULE).alphas_cumprod
    started, total, saved, order, errors = time.monotonic() - spent, args.minutes * 60, time.monotonic(), [], []
    first = step
    while True:
        elapsed = time.monotonic() - started
        done = elapsed > total
        if step % 8 == 0 and parallel.agree(done):
            break
        share = min(1.0, elapsed / total)
        decay = 1.0 if share < 0.6 else max(0.01, 1 - (share - 0.6) / 0.4)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP) * decay
        if len(order) < BATCH:
            order = [*order, *rng.permutation(len(rows))]
        batch, order = order[:BATCH], order[BATCH:]
        captions = [caption(items[rows[i]], styles[items[rows[i]]["vendor"]], rng, shares) for i in batch]
        tokens = tokenizer(
            captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        clean = latents[batch, rng.choice(VARIANTS, BATCH, p=SHARES)]
        loss, error = loss_of(text, unet, tokens, clean, cumulative)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step < 100:
            parallel.average(p.grad for p in parameters if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        errors.append(float(error))
        if step % 4 == 0:
            if step > 100:
                parallel.average(p.data for p in parameters)
            average.update(parameters, step)
        if parallel.RANK == 0 and step % 100 == 0:
            speed = (step - first) * BATCH * parallel.WORLD / (elapsed - spent)
            print(f"{step} {elapsed:.0f}s v-error {np.mean(errors):.4f} {speed:.0f} pictures/s", flush=True)
            errors = []
        if parallel.RANK == 0 and time.monotonic() - saved > 180:
            saved = time.monotonic()
            save(elapsed)
    if parallel.RANK == 0:
        save(elapsed)
        average.copy_to(parameters)
        pipeline(vae, text, tokenizer, unet).save_pretrained(args.build / "emoji-sd")


if __name__ == "__main__":
    main()

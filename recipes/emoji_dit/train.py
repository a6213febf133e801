"""Train emoji-dit, a class-conditional diffusion transformer in the latents of emoji-sd's autoencoder.

    python recipes/emoji_dit/train.py --build build/emoji-sd --out build/emoji-dit --minutes 50

Needs ``images.npy``, ``items.json`` and ``vae`` of ``../emoji_sd`` in BUILD. A class is a group of concepts
(``classes.yaml``); nothing but the class is told. Every concept is drawn equally often, whatever its number of vendors,
so that the right share of each is known. v-prediction, scaled-linear betas, half-weight min-SNR-5, AdamW with
linear decay over the last 40 %, exponential moving average, 10 % empty labels. One process, one thread, bfloat16
autocast. Checkpoints every three minutes; run again to resume. Writes ``OUT/emoji-dit`` as a DiTPipeline.
"""

import argparse
import json
import time
from pathlib import Path

import classes
import numpy as np
import torch
from checkpoints import resume, store
from concepts import Concepts
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn
from unet import SCHEDULE, VARIANTS, Averaged, encode, loss_of

BATCH, RATE, WARMUP, EMPTY = 16, 1e-3, 300, 0.1
#: Mostly the drawing itself, some mirrored, few shrunk and shifted: which concept is drawn is what seeds differ in.
SHARES = (0.76, 0.12, *[0.12 / 6] * 6)
#: DiTPipeline asks for the empty label by this number.
NULL = 1000


def build(labels: int, width: int = 192, layers: int = 6) -> DiTTransformer2DModel:
    """A small DiT for 16×16×4 latents, with the zero initialisation of its modulations (diffusers leaves it out)."""
    model = DiTTransformer2DModel(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=labels,
    )
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.3)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    # Diffusers drops labels block by block in training mode; here a picture loses its label in all of them or in none.
    return model.eval()


def widened(model: DiTTransformer2DModel, labels: int) -> DiTTransformer2DModel:
    """The same model with the empty label at ``NULL``, where DiTPipeline looks for it; labels between them are zero."""
    wide = build(NULL, model.config.num_attention_heads * 32, model.config.num_layers)
    state = model.state_dict()
    for name, table in state.items():
        if name.endswith("embedding_table.weight"):
            state[name] = table.new_zeros(NULL + 1, table.shape[1])
            state[name][:labels], state[name][NULL] = table[:labels], table[labels]
    wide.load_state_dict(state)
    return wide


def pipeline(vae: AutoencoderKL, model: DiTTransformer2DModel, names: list[str]) -> DiTPipeline:
    scheduler = DDIMScheduler(
        **SCHEDULE, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", steps_offset=1
    )
    labels = dict(enumerate(names))
    pipe = DiTPipeline(transformer=widened(model, len(names)), vae=vae, scheduler=scheduler, id2label=labels)
    pipe.register_to_config(id2label=labels)  # else model_index.json would not name the classes
    return pipe


def drawings(items: list[dict], rows: list[int]) -> list[list[list[int]]]:
    """Places in ``rows`` by class, by concept: every vendor's drawing."""
    return [
        [[k for k, row in enumerate(rows) if items[row]["name"] == name] for name in members]
        for members in classes.load().values()
    ]


def batch_of(places: list[list[list[int]]], rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
    """Drawings and labels; every concept equally often, each in a vendor's drawing of its own chance."""
    concepts = [(label, concept) for label, members in enumerate(places) for concept in members]
    chosen = rng.choice(len(concepts), BATCH, replace=False)
    rows = np.array([rng.choice(concepts[c][1]) for c in chosen])
    labels = np.array([concepts[c][0] for c in chosen])
    return rows, torch.from_numpy(np.where(rng.random(BATCH) < EMPTY, len(places), labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/emoji-sd"), help="the build of emoji-sd")
    parser.add_argument("--out", type=Path, default=Path("build/emoji-dit"))
    parser.add_argument("--minutes", type=float, default=50.0, help="time to train, all sittings together")
    parser.add_argument("--export", action="store_true", help="only write the checkpoint's average as a pipeline")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    vendors = Concepts.load().vendors["generator"]
    items = json.loads((args.build / "items.json").read_text())
    rows = [i for i, item in enumerate(items) if item["vendor"] in vendors and item["groups"]]
    vae = AutoencoderKL.from_pretrained(args.build / "vae").eval()
    images = np.load(args.build / "images.npy", mmap_mode="r")
    latents = encode(vae, images, rows, args.build / "latents.safetensors")
    places, names = drawings(items, rows), list(classes.load())

    torch.manual_seed(0)
    model = build(len(names))
    parameters = list(model.parameters())
    average = Averaged(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    step, spent, checkpoint = 0, 0.0, args.out / "checkpoint.safetensors"
    if state := resume(checkpoint):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, step, spent = state["average"], state["step"], state["spent"]
    if args.export:
        average.copy_to(parameters)
        pipeline(vae, model, names).save_pretrained(args.out / "emoji-dit")
        print(f"step {step}, {spent / 60:.0f} min")
        return

    def save(seconds: float) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average.values}
        store(checkpoint, state | {"step": step, "spent": seconds})

    rng = np.random.default_rng(step)
    torch.manual_seed(step)
    cumulative = DDPMScheduler(**SCHEDULE).alphas_cumprod
    started, total, saved, errors, first = time.monotonic() - spent, args.minutes * 60, time.monotonic(), [], step
    print(f"{len(rows)} drawings, {sum(map(len, places))} concepts, {sum(p.numel() for p in parameters) / 1e6:.2f} M")
    while (elapsed := time.monotonic() - started) < total:
        share = elapsed / total
        decay = 1.0 if share < 0.6 else max(0.01, 1 - (share - 0.6) / 0.4)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * decay
        chosen, labels = batch_of(places, rng)
        clean = latents[chosen, rng.choice(VARIANTS, BATCH, p=SHARES)]
        loss, error = loss_of(
            lambda labels: (labels,), lambda x, t, c: model(x, timestep=t, class_labels=c), labels, clean, cumulative
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        errors.append(float(error))
        if step % 4 == 0:
            average.update(parameters, step)
        if step % 100 == 0:
            speed = (step - first) * BATCH / (elapsed - spent)
            print(f"{step} {elapsed:.0f}s v-error {np.mean(errors):.4f} {speed:.0f} pictures/s", flush=True)
            errors = []
        if time.monotonic() - saved > 180:
            saved = time.monotonic()
            save(elapsed)
    save(elapsed)
    average.copy_to(parameters)
    pipeline(vae, model, names).save_pretrained(args.out / "emoji-dit")


if __name__ == "__main__":
    main()

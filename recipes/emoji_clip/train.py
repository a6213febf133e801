"""Train emoji-clip: a small transformers CLIPModel for 64x64 emoji art and its names, keywords and group words.

    python recipes/emoji_clip/train.py --build build/emoji-sd --icons build/emoji-clip --out build/emoji-clip

Sees the art of the vendors in ``SEEN``, the icons that ``icons.py`` left, and no other; reports retrieval on the
vendors in ``HELD_OUT``. The judge has weights, training and vendors of its own. Reads what ``recipes/emoji_sd`` left in
the build folder (pictures, tokenizer, autoencoder). Checkpoints; run again to resume. Writes ``OUT/emoji-clip``.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji_sd"))
from augment import augmented
from captions import LENGTH, phrase
from checkpoints import resume, store
from concepts import Concepts
from judge import BY_COLOUR, to_pictures

from steerclear.evaluate.statistics import clustered_rate

#: The generator's art and the references', never that of the judge alone.
SEEN = ("noto", "fluent-emoji-flat", "fluent-3d", "twemoji", "emojione")
HELD_OUT = ("fxemoji", "streamline-emojis", "noto-v1", "fluent-emoji")
#: Held out, and drawn unlike anything seen; the gradient edition of Fluent has the outlines of the flat one.
UNSEEN = HELD_OUT[:3]
BATCH, DRAWN_SHARE, RATE, DECAY, ROUND_TRIP, ICONS = 64, 0.8, 1e-3, 0.05, 0.3, 0.4
#: Pictures are reduced to 48 pixels: 36 patches in place of 64, for nearly twice the pictures in the same time.
SIZE, PATCH = 48, 8


def new_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": LENGTH, "pad_token_id": tokenizer.pad_token_id, **ids,
    }  # fmt: skip
    vision = {
        "hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 5, "num_attention_heads": 5,
        "image_size": SIZE, "patch_size": PATCH,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    model.set_attn_implementation("eager")  # whose backward pass is the fastest in half precision on a CPU
    mimetic(model.vision_model)
    torch.nn.init.normal_(model.vision_model.embeddings.patch_embedding.weight, std=0.1)
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.1)
    return model


@torch.no_grad()
def mimetic(vision: torch.nn.Module) -> None:
    """Starts attention where trained ones end up: towards the same place, minus the identity (arXiv:2305.09828)."""
    width, patches = vision.config.hidden_size, vision.config.image_size // vision.config.patch_size
    at = torch.arange(patches).float()
    rates = 50.0 ** (-torch.arange(width // 4) / (width // 4))
    waves = torch.cat([(at[:, None] * rates).sin(), (at[:, None] * rates).cos()], 1)
    rows, columns = (waves[:, None].expand(-1, patches, -1), waves[None].expand(patches, -1, -1))
    positions = torch.cat([rows, columns], -1).reshape(patches**2, width)
    vision.embeddings.position_embedding.weight[1:] = 0.15 * positions
    for layer in vision.encoder.layers:
        attention = layer.self_attn
        size = width // attention.num_heads
        for head in range(attention.num_heads):
            left, scale, right = torch.linalg.svd(0.7 * torch.randn(width, width) / width**0.5 + 0.7 * torch.eye(width))
            part, root = slice(head * size, (head + 1) * size), scale[:size].sqrt()
            attention.q_proj.weight[part] = (left[:, :size] * root).T
            attention.k_proj.weight[part] = right[:size] * root[:, None]
        left, scale, right = torch.linalg.svd(0.4 * torch.randn(width, width) / width**0.5 - 0.4 * torch.eye(width))
        attention.v_proj.weight.copy_((left * scale.sqrt()).T)
        attention.out_proj.weight.copy_((scale.sqrt()[:, None] * right).T)


@torch.no_grad()
def centre(model: CLIPModel, tokenizer: CLIPTokenizer, x: Tensor, names: list[str]) -> None:
    """Takes the mean out of both towers' last layers: new towers point all one way, which takes long to unlearn."""
    vision = model.vision_model(pixel_values=F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True))
    model.vision_model.post_layernorm.bias.sub_(vision.pooler_output.mean(0))
    text = model.text_model(**tokenizer(names, padding=True, return_tensors="pt"))
    model.text_model.final_layer_norm.bias.sub_(text.pooler_output.mean(0))


def pooled(output: object) -> Tensor:
    """The projected features, however this version of transformers hands them out."""
    return output if isinstance(output, Tensor) else output.pooler_output  # type: ignore[attr-defined]


def texts(model: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    tokens = tokenizer(captions, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    return F.normalize(pooled(model.get_text_features(**tokens)).float(), dim=-1)


def pictures(model: CLIPModel, x: Tensor) -> Tensor:
    x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(-1, 1)
    return F.normalize(pooled(model.get_image_features(pixel_values=x)).float(), dim=-1)


def multi_positive(scores: Tensor, truth: Tensor) -> Tensor:
    """Every true pair against the false ones of its row; a row's other true ones are left out."""
    false = scores.masked_fill(truth, -torch.inf).logsumexp(1, keepdim=True)
    loss = (torch.logaddexp(scores, false) - scores).masked_fill(~truth, 0)
    some = truth.any(1)
    return (loss.sum(1)[some] / truth.sum(1)[some]).mean()


class Batches:
    """Pictures of different concepts, and texts that are true of some of them: names, group words, keywords.

    No other texts: names of concepts outside the batch would push all pictures the same way, and new towers collapse.
    """

    def __init__(self, items: list[dict], drawn: list[str], rng: np.random.Generator) -> None:
        self.rng, self.items, self.rows, self.icons = rng, items, {}, {}
        for i, item in enumerate(items):
            if item["vendor"] in SEEN:
                self.rows.setdefault(item["name"], []).append(i)
            elif item["vendor"] not in HELD_OUT and not any(word in item["name"] for word in BY_COLOUR):
                self.icons.setdefault(item["name"], []).append(i)
        self.drawn = [name for name in drawn if name in self.rows]
        self.others = sorted(self.rows.keys() - set(drawn))

    def __call__(self) -> tuple[np.ndarray, list[list[str]], Tensor]:
        """Rows of pictures; short and long captions; which caption is true of which picture."""
        rng, n_drawn = self.rng, round(BATCH * DRAWN_SHARE)
        names = [*rng.choice(self.drawn, n_drawn, replace=False)]
        names += [*rng.choice(self.others, BATCH - n_drawn, replace=False)]
        icons = rng.random(BATCH) < ICONS
        lists = [
            (self.icons if icon else {}).get(name) or self.rows[name] for name, icon in zip(names, icons, strict=True)
        ]
        rows = np.array([rng.choice(rows) for rows in lists])
        items = [self.items[i] for i in rows]
        groups = sorted({group for item in items for group in item["groups"]})
        groups = [str(word) for word in rng.choice(groups, min(len(groups), 6), replace=False)]
        lists = [item["keywords"] for item in items[::3] if item["keywords"]]
        sets = [set(rng.choice(words, min(len(words), int(rng.integers(1, 3))), replace=False)) for words in lists]
        truth = [
            [item["name"] == name for name in names]
            + [word in item["groups"] for word in groups]
            + [said <= {*item["keywords"], item["name"]} for said in sets]
            for item in items
        ]
        short = [phrase(str(word), rng) for word in (*names, *groups)]
        return rows, [short, [", ".join(said) for said in sets]], torch.tensor(truth)


@torch.no_grad()
def retrieval(
    model: CLIPModel, tokenizer: CLIPTokenizer, images: np.ndarray, items: list[dict], drawn: list[str]
) -> dict:
    """Per held-out vendor: ranks of the right name for each picture, and of the right picture for each name."""
    model.eval()
    names = texts(model, tokenizer, drawn)
    ranks = {}
    for vendor in HELD_OUT:
        rows = [i for i, it in enumerate(items) if it["vendor"] == vendor and it["name"] in set(drawn)]
        truth = torch.tensor([drawn.index(items[i]["name"]) for i in rows])
        x = to_pictures(images, np.array(rows))
        scores = torch.cat([pictures(model, part) for part in x.split(64)]) @ names.T
        own = scores[torch.arange(len(rows)), truth]
        to_name = (scores > own[:, None]).sum(1)
        to_picture = (scores[:, truth] > own[None]).sum(0)
        ranks[vendor] = {"to_name": to_name.tolist(), "to_picture": to_picture.tolist()}
        ranks[vendor]["names"] = [items[i]["name"] for i in rows]
    model.train()
    return ranks


def table(ranks: dict, vendors: tuple[str, ...]) -> list[dict]:
    """R@1 and R@5 both ways, with 95 % intervals that count concepts."""
    rows = []
    for way in ("to_name", "to_picture"):
        found = np.array([rank for vendor in vendors for rank in ranks[vendor][way]])
        concepts = np.array([name for vendor in vendors for name in ranks[vendor]["names"]])
        row: dict = {"vendors": ", ".join(vendors), "way": way, "n": len(found)}
        for k in (1, 5):
            rate = clustered_rate(found < k, concepts)
            row[f"R@{k}"] = [round(value, 3) for value in (rate.value, rate.low, rate.high)]
        rows.append(row)
    return rows


def recall(ranks: dict, vendors: tuple[str, ...], way: str, k: int) -> float:
    hits = [rank < k for vendor in vendors for rank in ranks[vendor][way]]
    return sum(hits) / len(hits)


def round_trip(images: np.ndarray, rows: list[int], build: Path, out: Path) -> np.ndarray:
    """The pictures as the generator's autoencoder gives them back; computed once."""
    path = out / "round_trip.npy"
    if not path.exists():
        from diffusers import AutoencoderKL

        vae, copy = AutoencoderKL.from_pretrained(build / "vae").eval(), np.array(images)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            for at in range(0, len(rows), 64):
                part = np.array(rows[at : at + 64])
                x = vae.decode(vae.encode(to_pictures(images, part)).latent_dist.mode()).sample.float()
                copy[part] = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        np.save(path, copy)
    return np.load(path, mmap_mode="r")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/emoji-sd"))
    parser.add_argument("--out", type=Path, help="folder for checkpoint and model; the build folder unless given")
    parser.add_argument("--icons", type=Path, default=Path("build/emoji-clip"), help="where icons.py wrote")
    parser.add_argument("--minutes", type=float, default=21, help="of the processor, on one thread")
    args = parser.parse_args()
    out = args.out or args.build
    torch.set_num_threads(1)
    torch.manual_seed(0)
    drawn = Concepts.load().drawn
    items = json.loads((args.build / "items.json").read_text())
    images = np.load(args.build / "images.npy")
    seen = [i for i, item in enumerate(items) if item["vendor"] in SEEN]
    again = round_trip(images, seen, args.build, out)
    icons = np.load(args.icons / "icons.npy")
    items += json.loads((args.icons / "icons.json").read_text())
    images, again = np.concatenate([images, icons]), np.concatenate([again, icons])
    tokenizer = CLIPTokenizer.from_pretrained(args.build / "tokenizer")
    batches = Batches(items, drawn, np.random.default_rng(0))

    model = new_model(tokenizer)
    centre(model, tokenizer, to_pictures(images, np.array(seen[::20])), [*batches.drawn, *batches.others][::4])
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f} M parameters; {len(seen)} pictures, {len(icons)} icons", flush=True)
    average = {key: value.clone() for key, value in model.state_dict().items()}
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    step, spent, checkpoint = 0, 0.0, out / "clip.checkpoint.safetensors"
    if state := resume(checkpoint):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, spent = state["average"], state["step"], state["spent"]
        batches.rng = np.random.default_rng(step)
    last, saved = time.process_time(), spent
    while spent < args.minutes * 60:
        share = spent / (args.minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * share)))
        rows, captions, truth = batches()
        trip = (torch.rand(len(rows)) < ROUND_TRIP).view(-1, 1, 1, 1)
        x = torch.where(trip, to_pictures(again, rows), to_pictures(images, rows))
        free = torch.tensor([not any(word in items[i]["name"] for word in BY_COLOUR) for i in rows])
        x = augmented(x, free)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a, b = pictures(model, x), torch.cat([texts(model, tokenizer, part) for part in captions])
        scores = model.logit_scale.exp() * (a @ b.T)
        loss = 0.5 * (multi_positive(scores, truth) + multi_positive(scores.T, truth.T))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(50))
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1 - min(0.998, (1 + step) / (10 + step))) if value.is_floating_point() else 0
        now = time.process_time()
        spent, last = spent + now - last, now
        if step % 50 == 0:
            right = float((scores.argmax(1) == torch.arange(BATCH)).float().mean())
            print(f"{step} {spent:.0f}s loss {loss:.3f} right {right:.2f}", flush=True)
        if spent - saved > 60:
            ranks = retrieval(model, tokenizer, images, items, drawn)
            shown = {v: [round(recall(ranks, (v,), "to_name", k), 3) for k in (1, 5)] for v in HELD_OUT}
            print(f"  held out, R@1 and R@5 of the name: {shown}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            store(checkpoint, {**state, "step": step, "spent": spent})
            saved = spent
    model.load_state_dict(average)
    ranks = retrieval(model, tokenizer, images, items, drawn)
    folder = out / "emoji-clip"
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    preparation = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": size, "resample": 3}
    preparation |= {"do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    preparation |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation, indent=1))
    card = {"seen": SEEN, "held_out": HELD_OUT, "steps": step, "minutes": round(spent / 60, 1)}
    card["retrieval"] = [row for vendors in (*((v,) for v in HELD_OUT), UNSEEN) for row in table(ranks, vendors)]
    (folder / "clip.json").write_text(json.dumps(card, indent=1))
    for row in card["retrieval"]:
        print(row)


if __name__ == "__main__":
    main()

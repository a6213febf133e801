"""Does a certificate hold where the model reproduces what is protected?

    python benchmarks/certificates.py

The model draws pictures; these are protected, each with three slight variants, as collections hold them. Then it draws
again from start noises that differ a little, so that it lands beside what it drew before. Counted is the share of
finished samples inside a shield: without a guard, with SPELL's plain sum, with the projection on the way only, and
with the certificate; and what was refused. Nothing is tuned: the radius is the 5 % quantile of the distances between
different protected pictures. Writes ``results/certificates.json``.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steerclear
from steerclear import attach, zoo
from steerclear.evaluate import rate
from steerclear.evaluate.prompt_file import Selection, read_prompts
from steerclear.guards import SPELL, Shield, radius_of
from steerclear.guards.radius import distances
from steerclear.negation import NegationSet, encoder_of

BATCH = 8
Pipeline = Any  # a diffusers pipeline


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is drawn.

    Args:
        pictures: How many are protected, and drawn again.
        steps: Of the sampler.
        guidance: Scale of classifier-free guidance.
        variants: Of every protected picture, beside itself.
        jitter: Size of a variant's difference, in latent units.
        fresh: Share of fresh noise in the second start, by amplitude.
        quantile: Of the distances between protected pictures that is the radius.
    """

    pictures: int = 48
    steps: int = 10
    guidance: float = 3.0
    variants: int = 3
    jitter: float = 1.0
    fresh: float = 0.1
    quantile: float = 0.05


@dataclass(kw_only=True)
class Arm:
    """One way to draw."""

    name: str
    guard: SPELL | None
    latents: list[Tensor] = field(default_factory=list)
    certified: list[bool] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    seconds: float = 0.0


def prompts(count: int) -> list[str]:
    """Development prompts of all kinds, evenly spaced."""
    path = Path(zoo.__file__).parent / "prompts.yaml"
    texts = list(dict.fromkeys(p.text for p in read_prompts(path, Selection(half="dev"), source="emoji")))
    return [texts[k * len(texts) // count] for k in range(count)]


def noises(shape: Sequence[int], count: int, fresh: float) -> tuple[Tensor, Tensor]:
    """Start noises of the first and of the second drawing."""
    first, other = (
        torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed + k)) for k in range(count)])
        for seed in (0, 100_000)
    )
    return first, (1.0 - fresh**2) ** 0.5 * first + fresh * other


def draw(pipe: Pipeline, texts: Sequence[str], start: Tensor, settings: Settings, arm: Arm) -> None:
    """Fills an arm."""
    began = time.perf_counter()
    for low in range(0, len(texts), BATCH):
        part = slice(low, low + BATCH)
        call = {
            "latents": start[part],
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
            "output_type": "latent",
        }
        if arm.guard is None:
            arm.latents.append(pipe(list(texts[part]), **call).images)
            continue
        with attach(pipe, arm.guard) as trace:
            arm.latents.append(pipe(list(texts[part]), **call).images)
        last = [row for row in trace.records() if row["step"] == settings.steps - 1]
        arm.certified += [bool(row.get("certified", False)) for row in last]
        arm.moved += [float(row.get("moved", 0.0)) for row in last]
    arm.seconds = time.perf_counter() - began


def summary(arm: Arm, protected: Tensor, radius: float, pictures: Tensor, pipe: Pipeline) -> dict[str, Any]:
    """A row of the result, from the latents alone; pixels are in [0, 1]."""
    latents = torch.cat(arm.latents)
    blank = (latents.flatten(1) == 0).all(1)
    nearest = distances(latents.flatten(1).double(), protected).amin(1)
    shown = latents[~blank]
    pixels = distances(decoded(pipe, shown).flatten(1).double(), pictures.flatten(1)).amin(1)
    inside, count = int((nearest[~blank] < radius).sum()), len(latents)
    return {
        "inside": _estimate(inside, count),
        "refused": _estimate(int(blank.sum()), count),
        "certified": _estimate(sum(arm.certified), count),
        "nearest protected latent": _spread(nearest[~blank]),
        "nearest protected picture, root mean square": _spread(pixels / pictures[0].numel() ** 0.5),
        "moved at the end": _spread(torch.tensor(arm.moved)) if arm.moved else None,
        "seconds per picture": round(arm.seconds / count, 3),
    }


@torch.no_grad()
def decoded(pipe: Pipeline, latents: Tensor) -> Tensor:
    """Pictures in [0, 1]."""
    z = latents / pipe.vae.config.scaling_factor
    return torch.cat([pipe.vae.decode(part).sample for part in z.split(BATCH)]).div(2).add(0.5).clamp(0, 1)


def _estimate(count: int, total: int) -> dict[str, float]:
    found = rate(count, total)
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n}


def _spread(values: Tensor) -> dict[str, float]:
    low, middle, high = (round(float(values.double().quantile(q)), 4) for q in (0.0, 0.5, 1.0))
    return {"least": low, "median": middle, "most": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=Settings.pictures)
    settings = Settings(pictures=parser.parse_args().pictures)
    zoo.quiet()
    pipe = zoo.load("emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    texts, space = prompts(settings.pictures), encoder_of(pipe).space
    start, again = noises(space.shape, settings.pictures, settings.fresh)
    first = Arm(name="first", guard=None)
    draw(pipe, texts, start, settings, first)
    drawn = torch.cat(first.latents).float()
    radius = radius_of(drawn, settings.quantile)
    rng = torch.Generator().manual_seed(1)
    jitter = torch.randn(settings.variants, *drawn.shape, generator=rng)
    jitter = settings.jitter * jitter / jitter.flatten(2).norm(dim=2)[..., None, None, None]
    everything = torch.cat([drawn, *(drawn + some for some in jitter)])
    shields = (Shield(negation=NegationSet(latents=everything, space=space), radius=radius),)
    arms = [
        Arm(name="no guard", guard=None),
        Arm(name="plain sum", guard=SPELL(shields=shields, overlap="sum", certify=False)),
        Arm(name="projection on the way", guard=SPELL(shields=shields, certify=False)),
        Arm(name="certificate at the end only", guard=SPELL(shields=shields, strength=0.0, refuse="blank")),
        Arm(name="projection and certificate", guard=SPELL(shields=shields, refuse="blank")),
        Arm(
            name="projection and certificate, moved by at most a quarter of the radius",
            guard=SPELL(shields=shields, refuse="blank", max_move=radius / 4),
        ),
    ]
    pictures = decoded(pipe, drawn).double()
    found: dict[str, Any] = {}
    for arm in arms:
        draw(pipe, texts, again, settings, arm)
        found[arm.name] = summary(arm, everything.flatten(1).double(), radius, pictures, pipe)
        print(arm.name, json.dumps(found[arm.name]), flush=True)
    result = {
        "settings": {name: getattr(settings, name) for name in settings.__dataclass_fields__},
        "radius": radius,
        "shields": len(everything),
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
        "steerclear": steerclear.__version__,
        "arms": found,
    }
    target = Path(__file__).with_name("results") / "certificates.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

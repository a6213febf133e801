"""Guarded pictures into a folder, so that a kill at any moment loses nothing that was finished.

Each picture is a pair: ``NAME.png`` and its sidecar ``NAME.json``, written in that order, each atomically. A picture is
finished when its sidecar names the same request and the hash of the file that is there. ``NAME`` contains the start of
the request's hash, so that other settings never overwrite a picture.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import torch

from steerclear.app.files import sha256, slug, write_json
from steerclear.app.guards import Chosen
from steerclear.app.pictures import Cell, Pixels, png, sheet, to_pixels
from steerclear.attach import attach
from steerclear.errors import GuardNotApplied, InvalidInput
from steerclear.evaluate.prompts import Prompt
from steerclear.evaluate.request import request as asked_for
from steerclear.files import write_atomic


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One picture: its prompt, its seed, and everything else that decides its pixels."""

    prompt: str
    seed: int
    settings: dict[str, Any] = field(hash=False)

    @property
    def key(self) -> str:
        """SHA-256 of the whole request."""
        return sha256(json.dumps(asdict(self), sort_keys=True, ensure_ascii=False).encode())

    @property
    def name(self) -> str:
        """File name without ending."""
        return f"{slug(self.prompt)}-{self.seed}-{self.key[:10]}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawing:
    """How to draw.

    Args:
        pipe: A pipeline that draws pictures from text, from class labels or from nothing.
        chosen: The guards; nothing only if the user asked for unguarded pictures.
        coupling: See :func:`steerclear.attach`.
        call: Further arguments of the pipeline.
        batch: Pictures drawn together.
    """

    pipe: Any
    chosen: Chosen = field(default_factory=Chosen)
    coupling: str = "score"
    call: dict[str, Any] = field(default_factory=dict[str, Any])
    batch: int = 4


def requests(prompts: Sequence[str], seeds: Sequence[int], settings: dict[str, Any]) -> list[Request]:
    """Every prompt with every seed, repeated prompts once.

    Raises:
        InvalidInput: Without a prompt or a seed.
    """
    if not prompts or not seeds:
        raise InvalidInput(f"generate: expected prompts and seeds, got {len(prompts)} and {len(seeds)}")
    return [Request(prompt=p, seed=s, settings=settings) for p in dict.fromkeys(prompts) for s in seeds]


def finished(request: Request, out: Path) -> dict[str, Any] | None:
    """The sidecar of a picture that is there and whole; ``None`` if anything about it is missing or differs."""
    try:
        sidecar: Any = json.loads((out / f"{request.name}.json").read_bytes())
        whole = sidecar["key"] == request.key and sidecar["sha256"] == sha256(
            (out / f"{request.name}.png").read_bytes()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sidecar if whole else None


def generate(
    drawing: Drawing, wanted: Sequence[Request], out: Path, progress: Callable[[int], None] = lambda pictures: None
) -> list[dict[str, Any]]:
    """Draws what is not finished yet and returns the sidecars of all requests, in order, with ``resumed`` set.

    Args:
        drawing: How.
        wanted: What.
        out: Folder; made if need be.
        progress: Called with the number of pictures that were just finished.

    Raises:
        SteerclearError: If a guard could not be applied: nothing of that batch is written.
        OSError: If a file cannot be written.
    """
    done = {request.key: sidecar for request in wanted if (sidecar := finished(request, out))}
    resumed = set(done)
    progress(len(resumed))
    todo = iter([request for request in wanted if request.key not in done])
    while batch := list(islice(todo, drawing.batch)):
        for request, (pixels, notes) in zip(batch, draw(drawing, batch), strict=True):
            done[request.key] = _keep(request, pixels, notes, out)
        progress(len(batch))
    return [{**done[request.key], "resumed": request.key in resumed} for request in wanted]


def draw(drawing: Drawing, batch: Sequence[Request]) -> list[tuple[Pixels, dict[str, Any]]]:
    """Pictures of one batch, and what the guards did to each.

    Raises:
        GuardNotApplied: If guards were given and the trace shows no step that they saw.
    """
    prompts = [Prompt(text=request.prompt) for request in batch]
    call: dict[str, Any] = {
        **{name: value for name, value in drawing.call.items() if name != "guidance_scale"},
        **asked_for(drawing.pipe, prompts, cfg=drawing.call.get("guidance_scale")),
        "generator": [torch.Generator("cpu").manual_seed(request.seed) for request in batch],
        "output_type": "pil",
    }
    chosen, size = drawing.chosen, len(batch)
    with nullcontext() if chosen.weights is None else chosen.weights(drawing.pipe):
        if not chosen.guards and chosen.prompts is None:
            notes = {"guarded": chosen.weights is not None}
            return [(pixels, notes) for pixels in _images(drawing.pipe(**call), size)]
        coupling = cast("Literal['score', 'sample', 'renoise']", drawing.coupling)
        with attach(drawing.pipe, *chosen.guards, prompts=chosen.prompts, coupling=coupling) as trace:
            result = drawing.pipe(**call)
    rows = trace.records()
    seen = {int(row["sample"]) for row in rows}
    if chosen.guards and seen != set(range(size)):
        raise GuardNotApplied(
            f"generate: expected the guard at every one of {size} pictures, got {len(seen)}; nothing was written"
        )
    notes = [_notes(rows, i) if chosen.guards else {"guarded": True} for i in range(size)]
    return list(zip(_images(result, size), notes, strict=True))


def grid(entries: Sequence[dict[str, Any]], pictures: Sequence[Pixels], path: Path, side: int = 160) -> None:
    """Writes all pictures as one sheet, with prompt and seed below each."""
    cells = [
        Cell(pixels=pixels, caption=f"{entry['prompt']} - {entry['seed']}")
        for entry, pixels in zip(entries, pictures, strict=True)
    ]
    write_atomic(path, png(sheet(cells, columns=max(1, round(len(cells) ** 0.5 + 0.3)), side=side)))


def _images(result: Any, expected: int) -> list[Pixels]:  # noqa: ANN401  (some diffusers output)
    images: Any = getattr(result, "images", None)
    if images is None or len(images) != expected:
        raise InvalidInput(
            f"generate: expected {expected} pictures from the pipeline, got {type(result).__name__}; "
            "give a model that draws pictures"
        )
    return [to_pixels(image) for image in images]


def _notes(rows: Sequence[dict[str, Any]], sample: int) -> dict[str, Any]:
    """What the guards did to one picture: steps seen, steps at which they fired, largest posterior weight."""
    own = [row for row in rows if int(row["sample"]) == sample]
    weights = [float(row["weight"]) for row in own if row.get("weight") is not None]
    return {
        "guarded": True,
        "steps": len(own),
        "fired": sum(bool(row["fired"]) for row in own),
        "weight": max(weights) if weights else None,
    }


def _keep(request: Request, pixels: Pixels, notes: dict[str, Any], out: Path) -> dict[str, Any]:
    """Writes the picture, then its sidecar, which makes it count as finished."""
    data = png(pixels)
    write_atomic(out / f"{request.name}.png", data)
    sidecar = {
        "file": f"{request.name}.png",
        "prompt": request.prompt,
        "prompt_sha256": sha256(request.prompt.encode()),
        "seed": request.seed,
        "guard": notes,
        "settings": request.settings,
        "key": request.key,
        "sha256": sha256(data),
    }
    write_json(out / f"{request.name}.json", sidecar)
    return sidecar

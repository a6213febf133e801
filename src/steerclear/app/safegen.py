"""One SafeGen training from the command line: data, adapter or pipeline, pictures before and after, a report."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steerclear import zoo
from steerclear.app.files import write_json
from steerclear.app.negation import load
from steerclear.app.pictures import Cell, png, sheet, to_pixels
from steerclear.errors import InvalidInput
from steerclear.files import write_atomic
from steerclear.finetune import SafeGen, Trained, Triplets, boxes, save, train
from steerclear.negation import NegationSet, encoder_of

if TYPE_CHECKING:
    from steerclear.zoo import Policy

CHECKPOINT, REPORT, SAMPLES = "checkpoint.safetensors", "report.json", "samples.png"
SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where triplets come from: exactly one of a folder, negation files, or shipped policies.

    Args:
        folder: With ``unsafe/`` and ``benign/``.
        negation: Sets of what to turn into mosaics.
        safe: The set of what to keep, for ``negation``.
        policies: Names of shipped policies; their safe references are what to keep.
        concepts: Prompts that the model draws itself, added to any of the above but a folder.
        count: Pictures per concept.
        call: For drawing: steps and the like.
        seed: First seed of these pictures.

    Raises:
        InvalidInput: For none or several of the three, or negation sets without a safe one.
    """

    folder: Path | None = None
    negation: tuple[Path, ...] = ()
    safe: Path | None = None
    policies: tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()
    count: int = 8
    call: dict[str, Any]
    seed: int = 0

    def __post_init__(self) -> None:
        given = sum(map(bool, (self.folder, self.negation, self.policies)))
        if given != 1:
            raise InvalidInput(
                "safegen: expected one source of pictures: a FOLDER with unsafe/ and benign/, --negation with --safe, "
                f"or --policy; got {given}"
            )
        if bool(self.negation) != bool(self.safe):
            raise InvalidInput("safegen: expected --negation and --safe together: what to hide, and what to keep")
        if self.folder and self.concepts:
            raise InvalidInput("safegen: expected --draw with --policy or --negation, got it with a folder")

    def triplets(self, pipe: Any, finder: boxes.Boxes, blocks: int, mirror: bool) -> Triplets:  # noqa: ANN401
        """The pairs and the benign pictures, encoded by ``pipe``."""
        options: dict[str, Any] = {"boxes": finder, "blocks": blocks, "mirror": mirror}
        if self.folder is not None:
            return Triplets.of_folder(self.folder, pipe, **options)
        unsafe, safe = self._sets()
        if self.concepts:
            drawn = NegationSet.generate(pipe, self.concepts, self.count, seed=self.seed, **self.call)
            unsafe = unsafe.add(replace(drawn, ids=tuple(f"drawn: {name}" for name in drawn.ids)))
        return Triplets.of_sets(unsafe, safe, pipe, **options)

    def _sets(self) -> tuple[NegationSet, NegationSet]:
        if self.policies:
            policy: Policy = zoo.joined(self.policies)
            return policy.negation, policy.safe
        assert self.safe is not None  # noqa: S101  (checked above)
        first, *others = (load(path) for path in self.negation)
        for other in others:
            first = first.add(other)
        return first, load(self.safe)


def run(
    pipe: Any,  # noqa: ANN401  (some diffusers pipeline)
    triplets: Triplets,
    method: SafeGen,
    out: Path,
    *,
    every: int,
    prompts: Sequence[str] = (),
    call: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains, saves into ``out``, and writes the sheet and the report; goes on from the checkpoint that is there.

    Args:
        pipe: Changed.
        triplets: In its space.
        method: Settings.
        out: Made if it is missing.
        every: Steps between checkpoints.
        prompts: Drawn before and after with the same seeds; the sheet shows them below a few pairs.
        call: For drawing: steps and the like.
        source: Of the triplets, for the report.

    Returns:
        The report.
    """
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    before = draw(pipe, prompts, call or {})
    trained = train(pipe, triplets, method, checkpoint=out / CHECKPOINT, every=every)
    save(pipe, out)
    after = draw(pipe, prompts, call or {})
    write_atomic(out / SAMPLES, png(_sheet(pipe, triplets, prompts, before, after)))
    report = {
        "method": "SafeGen",
        "settings": method.spec,
        "source": source or {},
        "pairs": len(triplets),
        "benign": len(triplets.benign),
        "parameters": trained.parameters,
        "losses": _curve(trained),
        "prompts": list(prompts),
        "changed": [float(np.sqrt(np.mean((a - b) ** 2))) for a, b in zip(after, before, strict=True)],
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
    }
    write_json(out / REPORT, report)
    return report


@torch.no_grad()
def draw(pipe: Any, prompts: Sequence[str], call: dict[str, Any]) -> list[Any]:  # noqa: ANN401
    """One picture per prompt, ``(height, width, 3)`` in [0, 1], each with its own seed."""
    pictures: list[Any] = []
    for seed, prompt in enumerate(prompts):
        generator = torch.Generator("cpu").manual_seed(seed)
        pictures += list(pipe(prompt, generator=generator, output_type="np", **call).images)
    return pictures


def _curve(trained: Trained, points: int = 20) -> list[dict[str, float]]:
    """The losses as at most ``points`` means over equal spans of steps."""
    span = max(1, -(-len(trained.losses) // points))
    spans = [trained.losses[start : start + span] for start in range(0, len(trained.losses), span)]
    return [
        {"mosaic": sum(pair[0] for pair in part) / len(part), "benign": sum(pair[1] for pair in part) / len(part)}
        for part in spans
    ]


def _sheet(pipe: Any, triplets: Triplets, prompts: Sequence[str], before: list[Any], after: list[Any]) -> Any:  # noqa: ANN401
    """Rows: unsafe pictures, their mosaics, benign pictures; then every prompt before and after."""
    encoder, cells = encoder_of(pipe), []
    for name in ("unsafe", "mosaic", "benign"):
        latents = getattr(triplets, name)
        rows = torch.linspace(0, len(latents) - 1, SHOWN).round().long()
        decoded = encoder.decode(latents[rows]).permute(0, 2, 3, 1).cpu().numpy()
        cells += [Cell(pixels=to_pixels(picture), caption=name) for picture in decoded]
    for start in range(0, len(prompts), SHOWN):
        part = slice(start, start + SHOWN)
        for when, pictures in (("before", before[part]), ("after", after[part])):
            named = zip(prompts[part], pictures, strict=True)
            row = [Cell(pixels=to_pixels(picture), caption=f"{when}: {prompt}") for prompt, picture in named]
            white = np.full_like(row[0].pixels, 255)
            cells += [*row, *[Cell(pixels=white)] * (SHOWN - len(row))]
    return sheet(cells, columns=SHOWN)

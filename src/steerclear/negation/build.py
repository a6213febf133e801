"""Building the fields of a negation set from pictures, or from what a pipeline draws."""

import os
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from steerclear.errors import InvalidInput
from steerclear.negation.encoder import Encoder, encoder_of
from steerclear.negation.images import Images, Picture, Skip, pictures, sources

BATCH = 8
_T = TypeVar("_T")


def encode(
    images: Images,
    encoder: Encoder,
    *,
    labels: str | Sequence[str] | None,
    ids: Sequence[str] | None,
    progress: bool,
) -> dict[str, Any]:
    """Fields of the set; arguments as for :meth:`NegationSet.encode`."""
    listed = sources(images)
    for name, given in (("labels", labels), ("ids", ids)):
        if given is not None and not isinstance(given, str) and len(given) != len(listed):
            raise InvalidInput(f"encode: expected {len(listed)} {name}, one per picture, got {len(given)}")
    skipped: list[Skip] = []
    used: list[Picture] = []
    latents: list[Tensor] = []
    with tqdm(total=len(listed), desc="encode", unit="picture", disable=not progress) as bar:
        for batch in _batches(pictures(listed, encoder.size, skipped), BATCH):
            latents.append(_encode_batch(encoder, torch.stack([p.image for p in batch])))
            used += batch
            bar.update(len(used) + len(skipped) - bar.n)
        bar.update(len(listed) - bar.n)
    if not used:
        reasons = "; ".join(f"{Path(s.source).name}: {s.reason}" for s in skipped[:5])
        raise InvalidInput(f"encode: expected at least one usable picture among {len(listed)}, got none ({reasons})")
    root = Path(images) if isinstance(images, str | os.PathLike) else None
    return {
        "latents": torch.cat(latents),
        "space": encoder.space,
        "ids": tuple(ids[p.index] for p in used) if ids is not None else _unique([_name(p, root) for p in used]),
        "labels": tuple(
            p.folder if labels is None else labels if isinstance(labels, str) else labels[p.index] for p in used
        ),
        "digests": tuple(p.digest for p in used),
        "skipped": tuple(skipped),
    }


def generate(
    pipe: Any,  # noqa: ANN401 - a pipeline of any library
    prompts: str | Sequence[str],
    n: int,
    *,
    seed: int,
    progress: bool,
    call: dict[str, Any],
) -> dict[str, Any]:
    """Fields of the set; arguments as for :meth:`NegationSet.generate`."""
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed or n < 1:
        raise InvalidInput(f"generate: expected at least one prompt and n >= 1, got {len(listed)} prompts and n={n}")
    if taken := {"prompt", "generator", "output_type", "num_images_per_prompt", "return_dict"}.intersection(call):
        raise InvalidInput(f"generate: expected options that are not set here, got {sorted(taken)}; leave them out")
    # Before the first picture is drawn, so that an unusable pipeline fails at once.
    encoder = encoder_of(pipe, **{name: call[name] for name in ("height", "width") if call.get(name)})
    rows = [(prompt, seed + k) for k, prompt in enumerate(p for p in listed for _ in range(n))]
    drawn: list[Any] = []
    replaced: list[Skip] = []
    kept: list[tuple[str, int]] = []
    for batch in tqdm(list(_batches(iter(rows), BATCH)), desc="draw", unit="batch", disable=not progress):
        for row, image, flagged in zip(batch, *_draw(pipe, batch, call), strict=True):
            if flagged:
                reason = "replaced by the pipeline's safety checker; load the pipeline with safety_checker=None"
                replaced.append(Skip(source=f"{row[0]!r}, seed {row[1]}", reason=reason))
            else:
                kept.append(row)
                drawn.append(image)
    if not drawn:
        raise InvalidInput(f"generate: expected at least one picture, got {len(rows)} {replaced[0].reason}")
    names = _unique([f"{prompt[:60]} · seed {number}" for prompt, number in kept])
    fields = encode(drawn, encoder, labels=[prompt for prompt, _ in kept], ids=names, progress=progress)
    return fields | {"skipped": tuple(replaced) + fields["skipped"]}


def _draw(pipe: Any, batch: list[tuple[str, int]], call: dict[str, Any]) -> tuple[list[Any], list[bool]]:  # noqa: ANN401
    generators = [torch.Generator("cpu").manual_seed(number) for _, number in batch]
    result = pipe(prompt=[prompt for prompt, _ in batch], generator=generators, output_type="pil", **call)
    images: list[Any] = list(result.images)
    flagged = getattr(result, "nsfw_content_detected", None) or [False] * len(images)
    return images, [bool(f) for f in flagged]


@torch.no_grad()
def _encode_batch(encoder: Encoder, images: Tensor) -> Tensor:
    latents = encoder.encode(images)
    if tuple(latents.shape) != (len(images), *encoder.space.shape):
        raise InvalidInput(
            f"encode: expected latents of shape {(len(images), *encoder.space.shape)} from the encoder, "
            f"got {tuple(latents.shape)}; the encoder's space and its output disagree"
        )
    return latents.float().cpu()


def _batches(items: Iterator[_T], size: int) -> Iterator[list[_T]]:
    while batch := list(islice(items, size)):
        yield batch


def _name(picture: Picture, root: Path | None) -> str:
    if picture.source.startswith("picture "):
        return picture.digest.removeprefix("sha256:")[:16]
    path = Path(picture.source)
    return path.relative_to(root).as_posix() if root and root != path else path.name


def _unique(names: list[str]) -> tuple[str, ...]:
    """The names, with `` (2)`` and so on after repeated ones."""
    result: dict[str, None] = {}
    for name in names:
        candidates = (name if k == 1 else f"{name} ({k})" for k in count(1))
        result[next(c for c in candidates if c not in result)] = None
    return tuple(result)

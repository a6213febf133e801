"""Pictures to steer away from, as weighted points in the sampler's space."""

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerclear.errors import InvalidInput, NegationFileError, NegationMismatch
from steerclear.negation import build, files
from steerclear.negation.encoder import encoder_of
from steerclear.negation.images import Images, Skip
from steerclear.negation.placement import placed
from steerclear.negation.posterior import Posterior, posterior
from steerclear.negation.space import Space
from steerclear.noise import NoiseLevel

if TYPE_CHECKING:
    from steerclear.denoise import DenoiseState


_BLOCK = 1 << 22  # elements that are checked at a time


def _unset() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class NegationSet:
    r"""A weighted set of clean latents, :math:`p(x_0) = \sum_n \bar w_n \delta(x_0 - y_n)`, with its provenance.

    Serves both for what to steer away from and for safe reference sets. Never changed in place: every operation
    returns a new set. Whoever holds the latents can decode them: a set reveals its pictures, at the quality of the
    encoder, to everyone who has the file and the model.

    Args:
        latents: :math:`y_n`, ``(n, *space.shape)``, in the sampler's (scaled) units, in any floating dtype: it is kept,
            and sums are wide whatever it is.
        space: Where they live.
        weights: ``(n,)``, positive, any scale; ones if left out. Doubling a weight equals adding the item twice.
        ids: Unique names, to select and remove by; ``item-0`` … if left out.
        labels: One per item; empty strings if left out.
        digests: sha256 of each source picture's pixels; of the latent if left out.
        skipped: Pictures that :meth:`encode` left out, with the reason; not saved.

    Raises:
        InvalidInput: For no items, wrong lengths or shapes, NaN, weights that are not positive, repeated ids.
    """

    latents: Tensor
    space: Space
    weights: Tensor = field(default_factory=_unset)
    ids: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()

    def __post_init__(self) -> None:
        _check_latents(self.latents, self.space)
        latents, n = self.latents, self.latents.shape[0]
        weights = self.weights if self.weights.numel() else torch.ones(n)
        weights = weights.to(latents.device, torch.float64 if weights.dtype == torch.float64 else torch.float32)
        values = {
            "weights": weights,
            "ids": tuple(self.ids) or tuple(f"item-{i}" for i in range(n)),
            "labels": tuple(self.labels) or ("",) * n,
            "digests": tuple(self.digests) or tuple(_digest(row) for row in latents),
            "skipped": tuple(self.skipped),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        _check_items(self)

    # -- making ---------------------------------------------------------------------------------------------------

    @classmethod
    def encode(
        cls,
        images: Images,
        pipe_or_encoder: Any,  # noqa: ANN401 - a pipeline of any library
        *,
        labels: str | Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        progress: bool = True,
    ) -> "NegationSet":
        """Pictures to latents, in batches, in a deterministic order.

        Args:
            images: A folder (searched with its subfolders), a list of paths, PIL images or tensors in [0, 1], or one
                tensor ``(n, 3, h, w)``. Turned upright, flattened on white, cropped about the centre to the encoder's
                aspect, resized; of an animated file, the first frame.
            pipe_or_encoder: A pipeline (``steerclear.attach`` must be imported), or an :class:`Encoder`:
                ``encoder_of(pipe, height=…, width=…)`` for another size than the pipeline's default.
            labels: One for all, or one per picture; by default the name of the folder that each file is in.
            ids: One per picture; by default the path inside the folder, else the start of the digest.
            progress: Show a bar.

        Returns:
            The set; ``skipped`` lists what could not be used: corrupt, huge, tiny, repeated, or no picture at all.

        Raises:
            InvalidInput: If there is no picture, or none that can be used.
        """
        return cls(**build.encode(images, encoder_of(pipe_or_encoder), labels=labels, ids=ids, progress=progress))

    @classmethod
    def generate(
        cls,
        pipe: Any,  # noqa: ANN401 - a pipeline of any library
        prompts: str | Sequence[str],
        n: int,
        *,
        seed: int = 0,
        progress: bool = True,
        **call: Any,  # noqa: ANN401 - passed on to the pipeline
    ) -> "NegationSet":
        """Let the pipeline itself draw what it should avoid, ``n`` pictures per prompt; nobody has to keep any.

        Picture ``k`` (counted over all prompts) is drawn from its own generator, seeded ``seed + k``, so it does not
        depend on the batch. Labels are the prompts. Pictures that the pipeline's own safety checker replaced
        are skipped.

        Raises:
            InvalidInput: If there is no prompt, ``n < 1``, or no picture that can be used.
        """
        return cls(**build.generate(pipe, prompts, n, seed=seed, progress=progress, call=call))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mapped: bool = False) -> "NegationSet":
        """Read a file written by :meth:`save`; never executes anything, never trusts a declared size.

        Args:
            path: The file. Its checksum is verified in one pass.
            mapped: Leave the latents in the file's own pages and dtype, read as they are used and shared by all
                processes that map it, instead of copying them to float32. A :meth:`save` over the file replaces it and
                leaves the mapped pages as they are (Windows refuses it). Whoever may write to the file can also change
                it in place: the latents change with it, unseen by the checksum, and a file made shorter ends the
                process. Map only files that nobody but you may write.

        Raises:
            NegationFileError: If it is missing, damaged, hostile, or of another format or version.
        """
        stored = files.read(Path(path), mapped=mapped)
        try:
            return cls(**stored._asdict())
        except InvalidInput as error:
            raise NegationFileError(f"{path}: expected a valid negation set, got: {str(error)[:500]}") from error

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float16) -> None:
        """Write one safetensors file, atomically; equal sets give equal bytes, on any machine.

        It lets everyone who has the encoder see the pictures again; see docs/privacy.md.

        Args:
            path: Target; an older file is replaced whole or not at all. The folder must exist.
            dtype: ``torch.float16`` (relative error 5e-4, half the size), ``torch.bfloat16`` (4e-3, as wide a range as
                float32) or ``torch.float32``; weights stay float32.

        Raises:
            NegationFileError: If the target cannot be written, or a latent exceeds float16's range.
        """
        if dtype not in files.DTYPES:
            raise InvalidInput(f"save: expected dtype {', '.join(map(str, files.DTYPES))}, got {dtype}")
        stored = files.Stored(self.latents, self.weights, self.ids, self.labels, self.digests, self.space)
        files.write(Path(path), stored, dtype)

    # -- using ----------------------------------------------------------------------------------------------------

    def posterior(self, x_t: Tensor, level: NoiseLevel) -> Posterior:
        """Exact posterior mean ``(batch, *shape)`` and log-evidence ``(batch,)`` at ``x_t``: see :func:`posterior`.

        Raises:
            NegationMismatch: If ``x_t`` is not ``(batch, *shape)``.
        """
        if x_t.shape[1:] != self.latents.shape[1:]:
            raise NegationMismatch(
                f"expected samples of shape (batch, {', '.join(map(str, self.shape))}), got {tuple(x_t.shape)}; "
                "encode the pictures again for this pipeline at this size: NegationSet.encode(images, pipe)"
            )
        return posterior(x_t, placed(self, "latents", x_t.device), placed(self, "weights", x_t.device), level)

    def at(self, state: "DenoiseState") -> "NegationSet":
        """Itself: a set never changes."""
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one item."""
        return self.space.shape

    def __len__(self) -> int:
        return self.latents.shape[0]

    def __repr__(self) -> str:
        labels = ", ".join(repr(label) for label in sorted(set(self.labels))[:5])
        return f"NegationSet({len(self)} items in {self.space}; labels {labels}; {len(self.skipped)} skipped)"

    # -- changing -------------------------------------------------------------------------------------------------

    def add(
        self,
        other: "NegationSet | Images",
        pipe_or_encoder: Any = None,  # noqa: ANN401 - a pipeline of any library
        **options: Any,  # noqa: ANN401 - those of encode
    ) -> "NegationSet":
        """This set and the new items of ``other``; items with a digest that is here already are listed as skipped.

        Args:
            other: A set in the same space, or pictures; the latter need ``pipe_or_encoder``.
            pipe_or_encoder: As for :meth:`encode`.
            options: As for :meth:`encode`.

        Raises:
            NegationMismatch: If ``other`` lives in another space.
            InvalidInput: If an id of ``other`` names a different picture here.
        """
        if not isinstance(other, NegationSet):
            if pipe_or_encoder is None:
                raise InvalidInput("add: expected a NegationSet, or pictures and the pipeline to encode them with")
            other = NegationSet.encode(other, pipe_or_encoder, **options)
        self.space.require(other.space)
        known = set(self.digests)
        new = [i for i, digest in enumerate(other.digests) if digest not in known]
        repeated = tuple(
            Skip(source=name, reason="already in the set")
            for name, digest in zip(other.ids, other.digests, strict=True)
            if digest in known
        )
        dtype = torch.promote_types(self.weights.dtype, other.weights.dtype)
        return NegationSet(
            latents=torch.cat([self.latents, other.latents[new].to(self.latents.device)]),
            weights=torch.cat([self.weights.to(dtype), other.weights[new].to(self.weights.device, dtype)]),
            ids=self.ids + tuple(other.ids[i] for i in new),
            labels=self.labels + tuple(other.labels[i] for i in new),
            digests=self.digests + tuple(other.digests[i] for i in new),
            space=self.space,
            skipped=self.skipped + other.skipped + repeated,
        )

    def remove(self, ids: str | Iterable[str]) -> "NegationSet":
        """The set without these ids.

        Raises:
            InvalidInput: If an id is unknown, or nothing would be left.
        """
        gone = {ids} if isinstance(ids, str) else set(ids)
        if unknown := sorted(gone.difference(self.ids)):
            raise InvalidInput(
                f"remove: expected ids of this set, got {unknown[:5]}; the set begins with {self.ids[:5]}"
            )
        return self._take([i for i, name in enumerate(self.ids) if name not in gone], "remove")

    def select(self, *, labels: str | Collection[str]) -> "NegationSet":
        """The items with one of these labels.

        Raises:
            InvalidInput: If a label is unknown.
        """
        wanted = {labels} if isinstance(labels, str) else set(labels)
        if unknown := sorted(wanted.difference(self.labels)):
            raise InvalidInput(f"select: expected labels among {sorted(set(self.labels))[:20]}, got {unknown[:5]}")
        return self._take([i for i, label in enumerate(self.labels) if label in wanted], "select")

    def to(self, device: str | torch.device) -> "NegationSet":
        """The set with its tensors on ``device``."""
        return replace(self, latents=self.latents.to(device), weights=self.weights.to(device))

    def _take(self, rows: list[int], verb: str) -> "NegationSet":
        if not rows:
            raise InvalidInput(f"{verb}: expected to keep at least one of {len(self)} items, got none")
        return replace(
            self,
            latents=self.latents[rows],
            weights=self.weights[rows],
            ids=tuple(self.ids[i] for i in rows),
            labels=tuple(self.labels[i] for i in rows),
            digests=tuple(self.digests[i] for i in rows),
        )


def _check_latents(latents: Tensor, space: Space) -> None:
    if latents.ndim < 1 or tuple(latents.shape[1:]) != space.shape or not latents.is_floating_point():
        raise InvalidInput(
            f"NegationSet: expected floating latents of shape (n, {', '.join(map(str, space.shape))}), "
            f"got {latents.dtype} {tuple(latents.shape)}; encode pictures with NegationSet.encode(images, pipe)"
        )
    if latents.shape[0] == 0:
        raise InvalidInput("NegationSet: expected at least one item, got none; add pictures, or use no guard at all")
    rows = max(1, _BLOCK // latents[0].numel())  # at a time: a mapped set may be larger than memory
    if bad := [i for k, some in enumerate(latents.split(rows)) for i in _not_finite(some, k * rows)]:
        raise InvalidInput(
            f"NegationSet: expected finite latents, got NaN or inf in items {bad[:5]}; encode them again"
        )


def _not_finite(latents: Tensor, first: int) -> list[int]:
    fine = latents.flatten(1).isfinite().all(1)
    return [] if bool(fine.all()) else [first + i for i in (~fine).nonzero().flatten().tolist()]


def _check_items(items: NegationSet) -> None:
    n, weights = len(items), items.weights
    for name in ("ids", "labels", "digests"):
        values: tuple[str, ...] = getattr(items, name)
        if len(values) != n or not all(isinstance(v, str) for v in values):
            raise InvalidInput(f"NegationSet: expected {n} strings as {name}, got {len(values)} values")
    if weights.shape != (n,) or not bool((weights.isfinite() & (weights > 0)).all()):
        raise InvalidInput(
            f"NegationSet: expected {n} positive finite weights, got shape {tuple(weights.shape)}, "
            f"smallest {weights.min():.3g}; leave items out with remove() instead of weight 0"
        )
    if len(set(items.ids)) != n or "" in items.ids:
        repeated = [name for name, times in Counter(items.ids).items() if times > 1 or not name]
        raise InvalidInput(f"NegationSet: expected unique, non-empty ids, got repeated {repeated[:5]}; rename them")


def _digest(latent: Tensor) -> str:
    """Of the values, so that the same ones digest alike in half and in single precision."""
    wide = latent.detach().cpu() if latent.dtype == torch.float64 else latent.detach().cpu().float()
    data = wide.contiguous().numpy().tobytes()
    return "sha256:" + hashlib.sha256(data).hexdigest()

"""References at several noise levels, as a model denoises them: made once per model, kept in one small file."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.files.scan import Malformed
from steerclear.files.tensors import parts
from steerclear.negation import Space
from steerclear.negation.files import opened, replace, space_of, space_text, strings_of
from steerclear.negation.placement import placed
from steerclear.noise import NoiseLevel

FORMAT = "steerclear.seen.1"
LARGEST = 1 << 30  # bytes
MOST = 10_000  # references: their distances are compared pair by pair
_TENSORS = ("log_snr", "mean", "basis", "points")


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenReferences:
    """References at several noise levels, in principal components; made by :meth:`of` or ``steerclear.attach.see``.

    Args:
        log_snr: :math:`\\log(\\alpha/\\sigma)` of every level, ascending, ``(K,)``.
        mean: Centre of the components, ``(D,)``.
        basis: Orthonormal columns, ``(D, k)``.
        points: Components of every reference at every level, ``(K, n, k)``.
        labels: One per reference.
        captions: The prompt under which each was denoised.
        unsafe: Which labels are to be steered away from; the others are safe.
        space: Where the estimates live: the sampler's space of the pipeline.
        spacing: :math:`h_t` of every level, median distance of a reference to the nearest one with another label.
        flagged: Which references are unsafe, boolean ``(n,)``.

    Raises:
        InvalidInput: For shapes that do not go together, or without both kinds of references.
    """

    log_snr: Tensor
    mean: Tensor
    basis: Tensor
    points: Tensor
    labels: tuple[str, ...]
    captions: tuple[str, ...]
    unsafe: frozenset[str]
    space: Space
    spacing: tuple[float, ...] = field(init=False, repr=False)
    flagged: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.points.ndim != 3:
            raise InvalidInput(f"SeenReferences: expected points (levels, n, k), got shape {tuple(self.points.shape)}")
        levels, n, k = self.points.shape
        dim = math.prod(self.space.shape)
        expected = ((levels,), (dim,), (dim, k), n, n)
        shapes = (tuple(tensor.shape) for tensor in (self.log_snr, self.mean, self.basis))
        got = (*shapes, len(self.labels), len(self.captions))
        if expected != got:
            raise InvalidInput(f"SeenReferences: expected levels, mean, basis, labels, captions {expected}, got {got}")
        if not 0 < n <= MOST or levels < 1:
            raise InvalidInput(f"SeenReferences: expected levels and 1 to {MOST} references, got {levels} and {n}")
        tensors = (self.log_snr, self.mean, self.basis, self.points)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors) or bool((self.log_snr.diff() <= 0.0).any()):
            raise InvalidInput(
                "SeenReferences: expected finite numbers and ascending log-SNR, got others; make them again"
            )
        flagged = torch.tensor([label in self.unsafe for label in self.labels])
        object.__setattr__(self, "flagged", flagged)
        if not 0 < (unsafe := int(flagged.sum())) < n:
            raise InvalidInput(f"SeenReferences: expected unsafe and safe references, got {unsafe} unsafe of {n}")
        object.__setattr__(self, "spacing", _spacing(self.points, self.labels))
        if not all(0.0 < spacing < math.inf for spacing in self.spacing):
            raise InvalidInput("SeenReferences: expected references that differ at every level, got equal ones")

    @classmethod
    def of(
        cls,
        log_snr: Sequence[float],
        estimates: Tensor,
        *,
        labels: Sequence[str],
        captions: Sequence[str],
        unsafe: frozenset[str],
        space: Space,
        components: int,
    ) -> "SeenReferences":
        """From estimates ``(K, n, *shape)`` of ``n`` noised references at ``K`` levels.

        Cost: one singular value decomposition of a ``(K n, D)`` matrix.
        """
        flat = estimates.flatten(2).float()
        points = flat.flatten(0, 1)
        mean = points.mean(0)
        if not 1 <= components <= min(points.shape):
            raise InvalidInput(f"SeenReferences: expected 1 <= components <= {min(points.shape)}, got {components}")
        basis = torch.linalg.svd(points - mean, full_matrices=False)[2][:components].T.contiguous()
        order = torch.tensor(log_snr).argsort()
        seen = (flat - mean) @ basis
        return cls(
            log_snr=torch.tensor(log_snr)[order],
            mean=mean,
            basis=basis,
            points=seen[order].contiguous(),
            labels=tuple(labels),
            captions=tuple(captions),
            unsafe=unsafe,
            space=space,
        )

    def only(self, unsafe: frozenset[str], safe: frozenset[str] | None = None) -> "SeenReferences":
        """The same with other labels unsafe; of the rest, those in ``safe`` are kept (all, if left out)."""
        keep = [i for i, label in enumerate(self.labels) if label in unsafe or safe is None or label in safe]
        return SeenReferences(
            log_snr=self.log_snr,
            mean=self.mean,
            basis=self.basis,
            points=self.points[:, keep],
            labels=tuple(self.labels[i] for i in keep),
            captions=tuple(self.captions[i] for i in keep),
            unsafe=unsafe,
            space=self.space,
        )

    def level(self, level: NoiseLevel) -> int:
        """The level nearest to ``level`` on the scale of log-SNR; see :func:`log_snr_of`."""
        return int((self.log_snr - log_snr_of(level)).abs().argmin())

    def project(self, estimate: Tensor) -> Tensor:
        """Components of estimates ``(batch, *shape)``: ``(batch, k)``."""
        flat = estimate.flatten(1).float()
        return (flat - placed(self, "mean", flat.device)) @ placed(self, "basis", flat.device)

    def save(self, path: str | Path) -> None:
        """Write to ``path`` (safetensors, float16); the file is replaced as a whole."""
        tensors = {"mean": self.mean, "basis": self.basis, "points": self.points}
        content = {name: value.half().contiguous() for name, value in tensors.items()}
        names = {"labels": self.labels, "captions": self.captions, "unsafe": sorted(self.unsafe)}
        words = {key: json.dumps(value) for key, value in names.items()}
        metadata = {"format": FORMAT, "space": space_text(self.space), **words}
        replace(Path(path), parts({**content, "log_snr": self.log_snr.float()}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "SeenReferences":
        """Read what :meth:`save` wrote.

        Raises:
            NegationFileError: If the file is missing, damaged, or something else.
        """
        with opened(Path(path), "references seen through a model, written by SeenReferences.save") as file:
            if (found := file.metadata.get("format")) != FORMAT:
                raise Malformed(f"a file of {found!r}", f"a file of {FORMAT!r}")
            if file.size > LARGEST:
                raise Malformed("more; see fewer references", f"at most {LARGEST >> 20} MiB")
            if set(file.entries) != set(_TENSORS):
                raise Malformed(f"tensors {sorted(file.entries)[:5]}")
            shape = file.entries["points"].shape
            labels, captions, unsafe = (
                strings_of(file.metadata, key, min(MOST, shape[1] if len(shape) == 3 else 0))
                for key in ("labels", "captions", "unsafe")
            )
            tensors = {name: file.read(name).float() for name in _TENSORS}
            where = space_of(file.metadata)
            return cls(**tensors, labels=labels, captions=captions, unsafe=frozenset(unsafe), space=where)


def log_snr_of(level: NoiseLevel) -> float:
    r""":math:`\log(\alpha/\sigma)` of a level that the whole batch shares.

    Raises:
        UnsoundCombination: If the samples of the batch are at levels of their own.
    """
    if any(isinstance(value, Tensor) and value.numel() > 1 for value in (level.alpha, level.sigma)):
        raise UnsoundCombination(
            "Seen compares a batch at one noise level, got one per sample; use TwoSample(bandwidth=...)"
        )
    return math.log(max(float(level.alpha), 1e-12)) - math.log(max(float(level.sigma), 1e-12))


def _spacing(points: Tensor, labels: Sequence[str]) -> tuple[float, ...]:
    code = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    label = torch.tensor([code[each] for each in labels])
    same = label[:, None] == label[None]
    nearest = [torch.cdist(level, level).masked_fill(same, math.inf).min(1).values for level in points]
    return tuple(float(distance.median()) for distance in nearest)

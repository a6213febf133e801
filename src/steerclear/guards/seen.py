r"""Evidence against references as the model itself denoises them.

Early in a trajectory the conditional branch's estimate is a blur: the mean of everything that the prompt may become.
Compared with clean references it resembles the blandest of them. The fair comparison is with what the *same* model
makes of a noised reference at the same noise level, under the reference's own label:

.. math:: y_n^t = \hat x(\alpha_t y_n + \sigma_t \epsilon,\; t,\; c_n), \qquad
    \log\frac{w_c}{1-w_c} = a \Bigl(\log \hat q^t_{unsafe}(\hat x_c) - \log \hat q^t_{safe}(\hat x_c)\Bigr) + b, \qquad
    \hat q^t(x) = \frac1N \sum_n \exp\Bigl(-\frac{\lVert \phi(x) - \phi(y_n^t) \rVert^2}{2 (q h_t)^2}\Bigr)

with :math:`\phi` the leading principal components of all :math:`y_n^t`, :math:`h_t` the median distance of a reference
to the nearest one with another label, and :math:`q` the width. At the first step :math:`y_n^t` is what the model
expects of the label alone; towards the end it is the reference. ``steerclear.attach.see`` makes the references.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, NegationFileError
from steerclear.guards.weights import Weight, logit
from steerclear.negation import NegationSet, Posterior
from steerclear.noise import NoiseLevel


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

    def __post_init__(self) -> None:
        levels, n, k = self.points.shape
        expected = ((levels,), (k,), n, n)
        got = (tuple(self.log_snr.shape), tuple(self.basis.shape[1:]), len(self.labels), len(self.captions))
        if expected != got or self.mean.shape != self.basis.shape[:1]:
            raise InvalidInput(f"SeenReferences: expected levels, components and labels {expected}, got {got}")
        if not 0 < len(self.flagged) < n:
            raise InvalidInput(
                f"SeenReferences: expected unsafe and safe references, got {len(self.flagged)} unsafe of {n}"
            )

    @property
    def flagged(self) -> list[int]:
        """Positions of the unsafe references."""
        return [i for i, label in enumerate(self.labels) if label in self.unsafe]

    @classmethod
    def of(
        cls,
        log_snr: Sequence[float],
        estimates: Tensor,
        *,
        labels: Sequence[str],
        captions: Sequence[str],
        unsafe: frozenset[str],
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
        )

    def level(self, level: NoiseLevel) -> int:
        """The level nearest to ``level`` on the scale of log-SNR."""
        alpha, sigma = (float(torch.as_tensor(value).float().mean()) for value in (level.alpha, level.sigma))
        log_snr = math.log(max(alpha, 1e-12)) - math.log(max(sigma, 1e-12))
        return int((self.log_snr - log_snr).abs().argmin())

    def spacing(self) -> list[float]:
        """:math:`h_t` of every level: median distance of a reference to the nearest one with another label."""
        code = {label: index for index, label in enumerate(dict.fromkeys(self.labels))}
        label = torch.tensor([code[each] for each in self.labels])
        same = label[:, None] == label[None]
        nearest = [torch.cdist(points, points).masked_fill(same, math.inf).min(1).values for points in self.points]
        return [float(distance.median()) for distance in nearest]

    def save(self, path: str | Path) -> None:
        """Write to ``path`` (safetensors, float16); the file is replaced as a whole."""
        import json

        from safetensors.torch import save

        from steerclear.negation.files import replace

        tensors = {"mean": self.mean, "basis": self.basis, "points": self.points}
        content = {name: value.half().contiguous() for name, value in tensors.items()}
        names = {"labels": self.labels, "captions": self.captions, "unsafe": sorted(self.unsafe)}
        metadata = {"format": FORMAT, **{key: json.dumps(value) for key, value in names.items()}}
        replace(Path(path), save({**content, "log_snr": self.log_snr.float()}, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> "SeenReferences":
        """Read what :meth:`save` wrote.

        Raises:
            NegationFileError: If the file is missing, damaged, or something else.
        """
        import json

        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise NegationFileError(f"{path}: expected a file of {FORMAT!r}, got {metadata.get('format')!r}")
                tensors = {name: file.get_tensor(name).float() for name in ("log_snr", "mean", "basis", "points")}
                labels, captions, unsafe = (json.loads(metadata[key]) for key in ("labels", "captions", "unsafe"))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise NegationFileError(f"{path}: expected references seen through a model, got {error}") from error
        return cls(**tensors, labels=tuple(labels), captions=tuple(captions), unsafe=frozenset(unsafe))


FORMAT = "steerclear.seen.1"


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen(Weight):
    """Log-odds against :class:`SeenReferences`; the equation is in the module's docstring.

    Args:
        references: What to compare with, made with the model that is guarded.
        width: :math:`q` > 0, kernel width as a multiple of the spacing of the references at the level.
        prior: Unsafe share of what the model would draw, inside (0, 1).
        slope: :math:`a` > 0.
        offset: :math:`b`, in log-odds.

    Raises:
        InvalidInput: For values outside these ranges.

    Cost:
        No network evaluation; a projection of ``D × k`` and a ``(batch, n)`` distance matrix in ``k`` dimensions.
    """

    references: SeenReferences
    width: float = 0.3
    prior: float = 0.5
    slope: float = 1.0
    offset: float = 0.0
    bandwidths: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.width < math.inf:
            raise InvalidInput(f"Seen: expected a width > 0, got {self.width}")
        if not 0.0 < self.prior < 1.0:
            raise InvalidInput(f"Seen: expected 0 < prior < 1, got {self.prior}; strength=0 is how to switch off")
        if not 0.0 < self.slope < math.inf or not math.isfinite(self.offset):
            raise InvalidInput(f"Seen: expected a finite slope > 0 and offset, got {self.slope}, {self.offset}")
        object.__setattr__(self, "bandwidths", tuple(self.width * spacing for spacing in self.references.spacing()))

    def evidence(self, negation: NegationSet, estimate: Tensor, state: DenoiseState, owner: object) -> Tensor:
        return self.slope * self.log_ratio(estimate, state.level) + (self.offset + logit(self.prior))

    def log_odds(self, unsafe: Posterior, denoised: Tensor, state: DenoiseState, owner: object) -> Tensor:
        return self.slope * self.log_ratio(denoised, state.level) + (self.offset + logit(self.prior))

    def substitute(self, estimate: Tensor, state: DenoiseState) -> list[str]:
        """The caption of the safe reference that each estimate is most like; waits for the device."""
        kernels, flagged = self.kernels(estimate, state.level)
        nearest: list[int] = kernels.masked_fill(flagged, -math.inf).argmax(1).tolist()
        return [self.references.captions[index] for index in nearest]

    def log_ratio(self, estimate: Tensor, level: NoiseLevel) -> Tensor:
        """Log-ratio of unsafe over safe evidence, ``(batch,)``."""
        kernels, flagged = self.kernels(estimate, level)
        count = int(flagged.sum())
        sizes = math.log(count) - math.log(len(flagged) - count)
        return kernels[:, flagged].logsumexp(1) - kernels[:, ~flagged].logsumexp(1) - sizes

    def kernels(self, estimate: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Log-kernels ``(batch, n)`` to every reference, and which of them are unsafe."""
        seen = self.references
        index = seen.level(level)
        flat = estimate.flatten(1).float()
        own = (flat - seen.mean.to(flat)) @ seen.basis.to(flat)
        distance = torch.cdist(own, seen.points[index].to(flat))
        flagged = torch.zeros(len(seen.labels), dtype=torch.bool)
        flagged[seen.flagged] = True
        return -distance.square() / (2.0 * self.bandwidths[index] ** 2), flagged.to(flat.device)

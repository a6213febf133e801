r"""Statistics in place of items: per label a mean, a few directions and a remainder, and no single picture.

Every label is a Gaussian of low rank, and the set a mixture of them,

.. math:: p(x_0) = \sum_l \pi_l\, N(\mu_l,\; V_l \operatorname{diag}(s_l) V_l^\top + r_l I)

with :math:`k` orthonormal rows :math:`V_l`. They are the maximum-likelihood fit of that form (probabilistic principal
components; Tipping & Bishop 1999): with the eigenvalues :math:`\lambda_1 \ge \lambda_2 \ge \dots` of the label's
weighted covariance, :math:`r = \frac{1}{D-k} \sum_{j>k} \lambda_j` and :math:`s_j = \lambda_j - r`, so the trace is
kept. Behind :math:`q(x_t \mid x_0) = N(\alpha x_0, \sigma^2 I)`, with :math:`d = x_t - \alpha\mu`,
:math:`u = V d`, :math:`d_\perp = d - V^\top u` and :math:`c = \alpha^2 r + \sigma^2`, the matrix inversion lemma gives

.. math::
    -2 \log q(x_t \mid l) = \frac{\lVert d_\perp \rVert^2}{c} + \sum_j \frac{u_j^2}{c + \alpha^2 s_j}
        + (D - k) \log c + \sum_j \log(c + \alpha^2 s_j) + D \log 2\pi, \\
    E[x_0 \mid x_t, l] = \mu + \alpha \Bigl( \frac{r}{c}\, d_\perp
        + \sum_j \frac{r + s_j}{c + \alpha^2 s_j}\, u_j v_j \Bigr)

and the mixture weighs the labels by :math:`\pi_l\, q(x_t \mid l)`. With one item per label, :math:`s = r = 0`, this is
:func:`~steerclear.negation.posterior.posterior`. What such a file still reveals, and how much of a guard's strength is
lost, is measured in docs/privacy.md.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerclear.errors import InvalidInput, NegationMismatch
from steerclear.files.scan import Malformed
from steerclear.files.tensors import parts
from steerclear.negation import files
from steerclear.negation.posterior import SIGMA_FLOOR, Posterior, accumulator, column
from steerclear.negation.sets import NegationSet
from steerclear.negation.space import Space
from steerclear.noise import NoiseLevel

if TYPE_CHECKING:
    from steerclear.denoise import DenoiseState

FORMAT, VERSION = "steerclear.statistics", "1"
EXACT = 4096  # items or dimensions up to which the spectrum is computed exactly
#: Different pictures for each direction: with fewer, members of a label are told from others (docs/privacy.md).
PICTURES_PER_DIRECTION = 25
MOST = 8  # directions of a label unless more are asked for: what was measured
_SIGNED = ("format", "version", "space", "labels")
_TENSORS = ("means", "basis", "variances", "remainders", "shares", "counts")


@dataclass(frozen=True, kw_only=True, eq=False)
class NegationStatistics:
    r"""A mixture of Gaussians of low rank, one per label, that stands for a negation set; made by :meth:`of`.

    Goes wherever a guard asks only for a posterior: :class:`~steerclear.guards.SafeDenoiser`,
    :class:`~steerclear.guards.ConditionalRelease`, :class:`~steerclear.guards.TwoSample`. Guards that need items, such
    as SPELL's shields, cannot use it.

    Args:
        means: :math:`\mu_l`, ``(labels, *space.shape)``.
        basis: :math:`V_l`, ``(labels, k, *space.shape)``: orthonormal rows; rows of zeros where a label has fewer.
        variances: :math:`s_l \ge 0`, ``(labels, k)``, 0 for a row of zeros.
        remainders: :math:`r_l \ge 0`, ``(labels,)``.
        shares: :math:`\pi_l > 0`, ``(labels,)``, any scale.
        counts: How many pictures each label was made of, ``(labels,)``, integers.
        labels: Their names, each once.
        space: Where samples live.
        turn: Undoes what rounding took from orthonormality, ``(labels, k, k)``, float64.

    Raises:
        InvalidInput: For shapes that do not go together, numbers outside these ranges, or rows that are not
            orthonormal.
    """

    means: Tensor
    basis: Tensor
    variances: Tensor
    remainders: Tensor
    shares: Tensor
    counts: Tensor
    labels: tuple[str, ...]
    space: Space
    turn: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_numbers(self)
        object.__setattr__(self, "turn", _turn(self))

    @classmethod
    def of(
        cls,
        items: NegationSet,
        *,
        rank: int | None = None,
        least: int = 10,
        merge: str | Mapping[str, str] | None = None,
    ) -> "NegationStatistics":
        """Statistics of a set, label by label.

        Args:
            items: The set; nothing of it but its labels, numbers per label and these statistics is kept.
            rank: Directions per label, >= 0. By default one for every 25 different pictures of the label, at most 8, so
                none for fewer than 25: directions are what gives pictures away. A number is taken at its word, up to
                one for every two pictures.
            least: A label's fewest different pictures, >= 2, and the least effective number
                :math:`1 / \\sum_i \\bar w_i^2` under its weights: the mean of three pictures is a picture.
            merge: One label for all, or new names for some labels; those with the same name become one.

        Raises:
            InvalidInput: For a label with fewer pictures, or numbers outside these ranges.

        Cost:
            One eigendecomposition per label, of its items or of the dimensions, whichever are fewer; from 4096 of both
            on a randomised one.
        """
        if (rank or 0) < 0 or least < 2:
            raise InvalidInput(f"NegationStatistics: expected rank >= 0 and least >= 2, got {rank} and {least}")
        if isinstance(merge, str):
            names = [merge] * len(items)
        else:
            names = [(merge or {}).get(label, label) for label in items.labels]
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        numbers = {name: _effective(items, of) for name, of in rows.items()}
        if few := {name: n for name, n in numbers.items() if n < least * (1 - 1e-6)}:
            shown = ", ".join(f"{name!r} {n:.1f}" for name, n in list(few.items())[:5])
            raise InvalidInput(
                f"NegationStatistics: expected at least {least} different pictures per label, got {shown}: so few "
                "would show in their mean. Give related labels one name, merge={'axe': 'weapon', 'dagger': 'weapon'}, "
                "or all of them, merge='weapons'; or leave these labels out"
            )
        weights, share = items.weights.double(), PICTURES_PER_DIRECTION if rank is None else 2
        most = {name: int(number + 1e-6) // share for name, number in numbers.items()}
        width = min(MOST, max(most.values())) if rank is None else rank
        fits = [
            _fit(items.latents[of].flatten(1).double(), weights[of], width, most[name]) for name, of in rows.items()
        ]
        means, basis, variances, remainders = (torch.stack(part).float() for part in zip(*fits, strict=True))
        return cls(
            means=means.reshape(-1, *items.shape),
            basis=basis.reshape(len(rows), -1, *items.shape),
            variances=variances,
            remainders=remainders,
            shares=torch.stack([weights[of].sum() for of in rows.values()]).float(),
            counts=torch.tensor([len(of) for of in rows.values()]),
            labels=tuple(rows),
            space=items.space,
        )

    # -- using ----------------------------------------------------------------------------------------------------

    def posterior(self, x_t: Tensor, level: NoiseLevel) -> Posterior:
        """Posterior mean ``(batch, *shape)`` and log-evidence ``(batch,)`` (equations in the module's docstring).

        Args:
            x_t: Noisy samples, ``(batch, *shape)``, any floating dtype. A row that is not finite gets a row of NaN.
            level: Alpha and sigma: numbers, or tensors with one element, or with one per sample.

        Raises:
            NegationMismatch: If ``x_t`` is not ``(batch, *shape)``.
            InvalidInput: For a level per pixel or token.

        Cost:
            ``2·batch·labels·(k + 2)·D`` operations in float64; ``O(batch·D)`` memory. No host synchronisation.
        """
        if x_t.shape[1:] != self.means.shape[1:]:
            raise NegationMismatch(
                f"expected samples of shape (batch, {', '.join(map(str, self.space.shape))}), got {tuple(x_t.shape)}; "
                "make the statistics again from a negation set of this pipeline at this size"
            )
        x = x_t.flatten(1).to(accumulator(x_t.device))
        alpha, sigma = (column("NegationStatistics", value, x, x.dtype) for value in (level.alpha, level.sigma))
        remainders, variances, shares = (
            tensor.to(x) for tensor in (self.remainders, self.variances, self.shares / self.shares.sum())
        )
        top = x.new_full((x.shape[0],), -math.inf)
        total, mean = torch.zeros_like(top), torch.zeros_like(x)
        for k in range(len(self)):  # a running maximum keeps one (batch, D) sum instead of one per label
            basis = self.turn[k].to(x) @ self.basis[k].flatten(1).to(x)
            fit = (self.means[k].flatten().to(x), basis, variances[k], remainders[k])
            own, evidence = _one(x, alpha, sigma, *fit)
            evidence = evidence + shares[k].log()
            higher = torch.maximum(top, evidence)
            before, now = (top - higher).exp(), (evidence - higher).exp()
            total, mean = total * before + now, mean * before[:, None] + own * now[:, None]
            top = higher
        mean = (mean / total[:, None]).to(torch.float64 if x_t.dtype == torch.float64 else torch.float32)
        return Posterior(mean.reshape(x_t.shape), top + total.log())

    def projected(self, centre: Tensor, basis: Tensor, space: Space) -> "NegationStatistics":
        r"""The same mixture seen through :math:`\phi(x) = B^\top (x - m)`: again a mixture of this form, exactly.

        Args:
            centre: :math:`m`, ``(D,)``.
            basis: :math:`B`, orthonormal columns, ``(D, c)``.
            space: Where the components live, of shape ``(c,)``.
        """
        centre, basis = centre.double(), basis.double()
        means = (self.means.flatten(1).double() - centre) @ basis
        rank = min(self.rank, basis.shape[1])
        directions = means.new_zeros(len(self), rank, basis.shape[1])
        variances = means.new_zeros(len(self), rank)
        for k in range(len(self)):
            scaled = self.variances[k].double().sqrt()[:, None] * (self.basis[k].flatten(1).double() @ basis)
            _, singular, right = torch.linalg.svd(scaled, full_matrices=False)
            real = singular > 1e-6 * singular.max() if rank else singular > 0
            directions[k], variances[k] = right * real[:, None], singular.square() * real
        return replace(self, means=means.float(), basis=directions.float(), variances=variances.float(), space=space)

    def at(self, state: "DenoiseState") -> "NegationStatistics":
        """Itself: statistics do not change while a trajectory runs."""
        return self

    @property
    def digests(self) -> tuple[str, ...]:
        """Of no item."""
        return ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.space.shape

    @property
    def rank(self) -> int:
        """The most directions that a label may have here."""
        return self.variances.shape[1]

    @property
    def directions(self) -> tuple[int, ...]:
        """How many each label has."""
        return tuple(self.basis.flatten(2).any(2).sum(1).tolist())

    def to(self, device: str | torch.device) -> "NegationStatistics":
        """The statistics with their tensors on ``device``."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        names = ", ".join(repr(label) for label in self.labels[:5])
        return f"NegationStatistics({len(self)} labels of rank {self.rank} in {self.space}; {names})"

    # -- keeping --------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically: these statistics in float32; no ids, no digests.

        Raises:
            NegationFileError: If the target cannot be written.
        """
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in _TENSORS}
        tensors = {name: value.long() if name == "counts" else value.float() for name, value in tensors.items()}
        metadata = {"format": FORMAT, "version": VERSION, "space": files.space_text(self.space)}
        metadata["labels"] = json.dumps(self.labels)
        metadata["sha256"] = files.checksum(metadata, _SIGNED, tensors)
        files.replace(Path(path), parts(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "NegationStatistics":
        """Read what :meth:`save` wrote; never executes anything, never trusts a declared size.

        Raises:
            NegationFileError: If it is missing, damaged, hostile, or of another format or version.
        """
        where = Path(path)
        with files.opened(where, "statistics written by NegationStatistics.save") as file:
            files.check_format(where, file.metadata, FORMAT, VERSION)
            if {name: entry.code for name, entry in file.entries.items()} != {
                name: "I64" if name == "counts" else "F32" for name in _TENSORS
            }:
                raise Malformed(f"tensors {sorted(file.entries)[:8]} in some dtype", "six tensors, float32 and int64")
            labels = files.strings_of(file.metadata, "labels", (file.entries["means"].shape or (0,))[0])
            state = files.begun(file.metadata, _SIGNED)
            tensors = {name: file.read(name, state.update) for name in _TENSORS}
            if file.metadata.get("sha256") != state.hexdigest():
                raise Malformed("content that does not match its checksum")
            return cls(**tensors, labels=labels, space=files.space_of(file.metadata))


def _one(
    x: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor, basis: Tensor, variances: Tensor, remainder: Tensor
) -> tuple[Tensor, Tensor]:
    """Posterior mean ``(batch, D)`` and log-evidence ``(batch,)`` of one label."""
    c = (alpha.square() * remainder + sigma.square()).clamp(min=SIGMA_FLOOR**2)
    spread = c + alpha.square() * variances
    apart = x - alpha * mean
    along = apart @ basis.T
    across = apart - along @ basis
    square = across.square().sum(1) / c.squeeze(1) + (along.square() / spread).sum(1)
    volume = (x.shape[1] - len(variances)) * c.log().squeeze(1) + spread.log().sum(1)
    evidence = -(square + volume + x.shape[1] * math.log(2 * math.pi)) / 2
    moved = remainder / c * across + ((remainder + variances) / spread * along) @ basis
    return mean + alpha * moved, evidence


def _fit(rows: Tensor, weights: Tensor, rank: int, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, basis ``(rank, D)``, variances and remainder of items ``(n, D)``, with ``most`` directions at most."""
    dim, share = rows.shape[1], weights / weights.sum()
    mean = share @ rows
    scaled = (rows - mean) * share.sqrt()[:, None]
    kept = min(rank, most, dim)
    values, directions = _leading(scaled, kept)
    trace = scaled.square().sum()
    remainder = (trace - values.sum()).clamp(min=0.0) / (dim - kept) if dim > kept else trace.new_zeros(())
    real = values > 1e-12 * trace
    basis, variances = rows.new_zeros(rank, dim), rows.new_zeros(rank)
    basis[:kept] = directions * real[:, None]
    variances[:kept] = (values - remainder).clamp(min=0.0) * real
    return mean, basis, variances, remainder


def _leading(scaled: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of ``scaledᵀ scaled`` and their orthonormal rows."""
    if kept == 0:
        return scaled.new_zeros(0), scaled.new_zeros(0, scaled.shape[1])
    if min(scaled.shape) > EXACT:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, singular, right = torch.svd_lowrank(scaled, q=kept + 8, niter=4)
        return singular[:kept].square(), right.T[:kept]
    _, singular, right = torch.linalg.svd(scaled, full_matrices=False)
    return singular[:kept].square(), right[:kept]


def _effective(items: NegationSet, rows: list[int]) -> float:
    """How many different pictures there are, or fewer if some count for more than others."""
    total: dict[str, float] = {}
    for row, weight in zip(rows, items.weights[rows].tolist(), strict=True):
        total[items.digests[row]] = total.get(items.digests[row], 0.0) + weight
    whole = sum(total.values())
    return whole * whole / sum(weight * weight for weight in total.values())


def _check_shapes(self: NegationStatistics) -> None:
    n, shape, rank = len(self.labels), self.space.shape, self.variances.shape[-1] if self.variances.ndim else 0
    expected = ((n, *shape), (n, rank, *shape), (n, rank), (n,), (n,), (n,))
    got = tuple(tuple(getattr(self, name).shape) for name in _TENSORS)
    if n == 0 or got != expected:
        raise InvalidInput(f"NegationStatistics: expected labels and {', '.join(_TENSORS)} {expected}, got {got}")
    if len(set(self.labels)) != n:
        raise InvalidInput("NegationStatistics: expected every label once, got repeated ones; merge them in of()")
    if not all(getattr(self, name).is_floating_point() for name in _TENSORS[:-1]) or self.counts.is_floating_point():
        raise InvalidInput("NegationStatistics: expected floating tensors and integer counts, got other dtypes")


def _check_numbers(self: NegationStatistics) -> None:
    values = (self.variances, self.remainders, self.shares)
    finite = all(bool(tensor.isfinite().all()) for tensor in (self.means, self.basis, *values))
    ranges = all(bool((tensor >= 0).all()) for tensor in (self.variances, self.remainders, self.counts))
    if not finite or not ranges or not bool((self.shares > 0).all()):
        raise InvalidInput(
            "NegationStatistics: expected finite numbers, variances and remainders >= 0 and shares > 0, got others"
        )


def _turn(self: NegationStatistics) -> Tensor:
    rows, variances = self.basis.detach().cpu().flatten(2), self.variances.detach().cpu()
    gram, used = torch.stack([row.double() @ row.double().T for row in rows]), rows.any(2)
    if not torch.allclose(gram, used.double().diag_embed(), atol=1e-4) or bool((variances[~used] > 0).any()):
        raise InvalidInput("NegationStatistics: expected orthonormal rows, or rows of zeros without variance")
    # One Newton step towards gram^(-1/2): 1e-7 becomes 1e-14, which matters where squares are divided by sigma².
    wide = torch.float32 if self.basis.device.type == "mps" else torch.float64
    return (1.5 * torch.eye(self.rank, dtype=torch.float64) - gram / 2).to(self.basis.device, wide)

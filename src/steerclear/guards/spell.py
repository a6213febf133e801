r"""Shielded Diffusion: Generating Novel and Diverse Images using Sparse Repellency (Kirchhof et al., ICML 2025),
arXiv:2410.06025.

Around every protected picture stands a shield, a ball of radius :math:`r`. An estimate outside all shields is left
alone; one inside is pushed out,

.. math:: \hat x' = \hat x + \lambda \sum_k \operatorname{ReLU}\Bigl(\frac{r}{\lVert\hat x - z_k\rVert} - 1\Bigr)
    (\hat x - z_k)

with :math:`\lambda > 1` so that the pushing ends sooner. The sum does what it should for one shield at a time; where
shields overlap, opposite pushes cancel and equal ones add up. So by default the push goes to the projection
:math:`P(\hat x)` onto the complement of all shields (guards/shields.py), which is the same thing for a single one:

.. math:: \hat x' = \hat x + \lambda\,(P(\hat x) - \hat x)

Neither says anything about the result: an estimate on the way is a mean, not a sample. That is what the end is for: the
finished sample is projected once more, rechecked against every shield, and certified or refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, NegationMismatch, SampleRefused
from steerclear.guards.base import Requires
from steerclear.guards.finished import FinishedSamples
from steerclear.guards.radius import distances, radius_of, widest
from steerclear.guards.shields import Projection, nearest, project
from steerclear.negation import Items
from steerclear.negation.references import laid_out, require_items
from steerclear.noise import per_sample

Overlap = Literal["projection", "sum"]
Refuse = Literal["error", "blank"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shield:
    """Balls of one radius around every picture of a negation set.

    Args:
        negation: The protected pictures, in the sampler's space.
        radius: In the sampler's units, > 0; :func:`radius_of` calibrates one.
    """

    negation: Items
    radius: float

    def __post_init__(self) -> None:
        if not 0.0 < self.radius < math.inf:
            raise InvalidInput(
                f"Shield: expected a finite radius > 0 in latent units, got {self.radius}; "
                "radius_of(references) gives one"
            )
        require_items("Shield", self.negation)


@dataclass(frozen=True, kw_only=True, eq=False)
class SPELL:
    r"""Keeps samples at least a radius away from every protected picture, and certifies that they are.

    Args:
        shields: What to stay away from; every set has a radius of its own.
        strength: :math:`\lambda \ge 0`, overcompensation on the way; 1 lands on the sphere, 0 acts at the end only.
        overlap: ``"projection"`` solves overlapping shields together; ``"sum"`` is the published update.
        batch_radius: Radius of shields around the *other samples of the batch*, for variety; 0 is off. It couples
            samples by design: then changing one sample of a batch changes the others.
        finished: Finished samples of earlier calls, shields of ``batch_radius`` too; kept and cleared by the caller.
        certify: Settle the finished sample: project, recheck, and refuse what is still inside.
        refuse: What becomes of a sample that cannot be certified: ``"error"`` raises; ``"blank"`` replaces it by zeros,
            which decode to a plain picture, and notes it.
        max_move: Refuse a finished sample that would have to be moved further than this, in the sampler's units.

    Call:
        denoised: Estimate of the clean sample, ``(batch, *shape)``.
        state: The step's :class:`~steerclear.denoise.DenoiseState`.

    Returns:
        The guarded estimate in the shape, dtype and device of ``denoised``; rows outside all shields are bit-identical,
        and ``None`` where all are.

    Notes in the trace:
        On the way: ``distance`` to the nearest centre; ``active``, the number of shields that hold the estimate. At the
        end, with the last step: ``final distance``; ``final active``, the shields that had to be considered; ``moved``,
        how far the sample was moved; ``certified``, 1 or 0; ``refused`` with ``refuse="blank"``.

    Raises:
        InvalidInput: For values outside these ranges, or without any shield.
        NegationMismatch: If a set lives in another space than the sampler.
        SampleRefused: At the end, if a sample is still inside a shield, or would have to be moved too far.

    Cost:
        No network evaluation; one ``(batch, n)`` distance matrix a step. The host waits for the device at every step to
        see whether a sample is inside a shield, and solves the projection if one is; not with ``"sum"``.

    Equal to:
        The identity, bit for bit, for samples that stay outside all shields. With one active shield ``"sum"`` and
        ``"projection"`` are the same.

    References:
        arXiv:2410.06025. What it proves and what it does not: docs/spell.md.
    """

    shields: tuple[Shield, ...] = ()
    strength: float = 1.6
    overlap: Overlap = "projection"
    batch_radius: float = 0.0
    finished: FinishedSamples | None = None
    certify: bool = True
    refuse: Refuse = "error"
    max_move: float = math.inf

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength < math.inf:
            raise InvalidInput(f"SPELL: expected a finite strength >= 0, got {self.strength}; less would attract")
        if not 0.0 <= self.batch_radius < math.inf:
            raise InvalidInput(f"SPELL: expected a finite batch_radius >= 0, got {self.batch_radius}")
        if self.overlap not in ("projection", "sum") or self.refuse not in ("error", "blank"):
            raise InvalidInput(
                "SPELL: expected overlap 'projection' or 'sum' and refuse 'error' or 'blank', got "
                f"{self.overlap!r} and {self.refuse!r}"
            )
        if not self.max_move > 0.0:
            raise InvalidInput(f"SPELL: expected max_move > 0, got {self.max_move}")
        if not self.shields and not self.batch_radius:
            raise InvalidInput("SPELL: expected shields or a batch_radius, got neither; Shield(negation=…, radius=…)")
        if self.finished is not None and not self.batch_radius:
            raise InvalidInput("SPELL: expected a batch_radius > 0 beside finished samples, got 0; it is their radius")
        for shield in self.shields[1:]:
            self.shields[0].negation.space.require(shield.negation.space)

    @classmethod
    def published(cls, negation: Items, *, radius: float, strength: float = 1.6) -> "SPELL":
        """The paper's update: plain sum, overcompensation 1.6, the whole trajectory, no certificate.

        The radius is the one tuned parameter; docs/spell.md lists the few that are known.
        """
        shields = (Shield(negation=negation, radius=radius),)
        return cls(shields=shields, strength=strength, overlap="sum", certify=False)

    @classmethod
    def calibrated(
        cls,
        negation: Items,
        references: Items | None = None,
        *,
        quantile: float = 0.05,
        strength: float = 1.6,
        refuse: Refuse = "error",
    ) -> "SPELL":
        """Projection and certificate, at :func:`radius_of` over ``references``, or over the protected set itself."""
        radius = radius_of(negation if references is None else references, quantile)
        return cls(shields=(Shield(negation=negation, radius=radius),), strength=strength, refuse=refuse)

    @property
    def requires(self) -> Requires:
        return Requires(negation=tuple(shield.negation for shield in self.shields))

    @property
    def settles(self) -> bool:
        """Whether the finished sample is certified."""
        return self.certify

    @cached_property
    def _static(self) -> tuple[Tensor, Tensor]:
        """Centres ``(n, D)`` and radii ``(n,)`` in float64, on the device of the sets; 0 for what was removed."""
        if not self.shields:
            return torch.empty(0, 0), torch.empty(0, dtype=torch.float64)
        return self._balls([shield.negation for shield in self.shields])

    def _balls(self, sets: Sequence[Items]) -> tuple[Tensor, Tensor]:
        parts = [laid_out(items) for items in sets]
        flat = [points.flatten(1) for points, _ in parts]
        sizes = [s.radius * counts.cpu().double() for (_, counts), s in zip(parts, self.shields, strict=True)]
        return flat[0] if len(flat) == 1 else torch.cat(flat), torch.cat(sizes)

    # On the way -----------------------------------------------------------------------------------------------------

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        x = denoised.detach().flatten(1).to(widest(denoised))
        centres, radii = self._around(x, denoised, state)
        if not len(centres):
            return None
        distance = distances(x, centres)
        active = distance < radii
        state.note("distance", torch.where(radii > 0.0, distance, math.inf).amin(1))
        state.note("active", active.sum(1))
        if self.strength == 0.0:
            return None
        if self.overlap == "sum":
            factor = torch.where(active & (distance > 0.0), radii / distance - 1.0, 0.0)
            moved = x + self.strength * (factor.sum(1, keepdim=True) * x - factor @ centres.to(x))
        else:
            rows = active.any(1).nonzero().flatten().tolist()
            if not rows:
                return None
            host = centres.cpu()
            moved = x.clone()
            for row in rows:
                nearby = project(x[row], host, radii[row]).point
                moved[row] = x[row] + self.strength * (nearby - x[row])
        fired = per_sample(active.any(1), denoised)
        return torch.where(fired, moved.reshape(denoised.shape).to(denoised.dtype), denoised)

    def _around(self, x: Tensor, given: Tensor, state: DenoiseState) -> tuple[Tensor, Tensor]:
        """Centres ``(n, D)``, and radii ``(batch, n)`` with zeros where a sample would meet itself."""
        centres, radii = self._at(given, state)
        radii = radii.to(x.dtype).expand(len(x), -1)
        if not self.batch_radius:
            return centres, radii
        parts, sizes = [centres.to(x)] if len(centres) else [], [radii]
        earlier = self._earlier(given, state)
        if earlier is not None:
            parts.append(earlier.to(x))
            sizes.append(x.new_full((len(x), len(earlier)), self.batch_radius))
        parts.append(x)
        sizes.append(self.batch_radius * (1.0 - torch.eye(len(x), dtype=x.dtype, device=x.device)))
        return torch.cat(parts), torch.cat(sizes, 1)

    def _at(self, given: Tensor, state: DenoiseState) -> tuple[Tensor, Tensor]:
        """The shields that the trajectory began with, on the sample's device, moved there once."""
        if self.shields and tuple(given.shape[1:]) != (shape := self.shields[0].negation.space.shape):
            raise NegationMismatch(
                f"SPELL: expected samples of shape (batch, {', '.join(map(str, shape))}), got "
                f"{tuple(given.shape)}; encode the pictures again for this pipeline at this size"
            )
        known: tuple[Tensor, Tensor] | None = state.memory.get((self, "static"))
        if known is None or known[0].device != given.device:
            now = [shield.negation.at(state) for shield in self.shields]
            fixed = all(items is shield.negation for items, shield in zip(now, self.shields, strict=True))
            centres, radii = self._static if fixed else self._balls(now)
            known = centres.to(given.device), radii.to(given.device, widest(given))
            state.memory[(self, "static")] = known
        return known

    def _earlier(self, given: Tensor, state: DenoiseState) -> Tensor | None:
        if self.finished is None:
            return None
        return self.finished.latents(tuple(given.shape[1:]), besides=self._token(state))

    def _token(self, state: DenoiseState) -> object:
        """Stands for this trajectory in the memory of finished samples."""
        return state.memory.setdefault((self, "token"), object())

    # At the end -----------------------------------------------------------------------------------------------------

    def settle(self, sample: Tensor, state: DenoiseState) -> Tensor | None:
        """Certify the finished sample, moved out of the shields where it must be; see :class:`SPELL`."""
        refused: list[bool] = state.memory.setdefault((self, "refused"), [False] * len(sample))
        rows = sample.detach().flatten(1).cpu()
        found = self._projections(sample, rows, refused, state)
        # Guards that settle may be asked again: then the sample that was given first is what moves are counted from.
        given, active = state.memory.setdefault((self, "given"), (rows.double(), [0] * len(rows)))
        active[:] = [max(p.active, count) for p, count in zip(found, active, strict=True)]
        moves = [float(torch.linalg.vector_norm(p.point.double() - x)) for p, x in zip(found, given, strict=True)]
        refused[:] = [
            gone or not (p.slack >= 0.0 and move <= self.max_move)
            for p, move, gone in zip(found, moves, refused, strict=True)
        ]
        certified = ~torch.tensor(refused)
        state.note("final distance", torch.tensor([p.distance for p in found]))
        state.note("final active", torch.tensor(active))
        state.note("moved", torch.tensor(moves))
        state.note("certified", certified)
        if any(refused):
            if self.refuse == "error":
                raise self._refusal(found, moves, refused)
            state.note("refused", ~certified)
        points = torch.stack([p.point for p in found])
        points = torch.where(certified[:, None], points, torch.zeros_like(points))
        if self.finished is not None:
            self.finished.keep(self._token(state), self._shown(points[certified]).unflatten(1, sample.shape[1:]))
        if torch.equal(points, rows):
            return None
        return points.reshape(sample.shape).to(sample.device)

    def _projections(self, sample: Tensor, rows: Tensor, refused: list[bool], state: DenoiseState) -> list[Projection]:
        """Sample by sample; in batch mode each one against those before it, so that all end up apart."""
        centres, radii = (part.cpu() for part in self._at(sample, state))
        parts, sizes = ([centres], [radii.double()]) if len(centres) else ([rows[:0]], [radii.double()])
        earlier = self._earlier(sample, state)
        if earlier is not None:
            parts.append(earlier.cpu())
            sizes.append(sizes[0].new_full((len(earlier),), self.batch_radius))
        found: list[Projection] = []
        for row, gone in zip(rows, refused, strict=True):
            against = parts[0] if len(parts) == 1 else torch.cat([part.double() for part in parts])
            # A sample that was refused before is a blank by now, and stays one.
            one = (nearest if gone else project)(row, against, torch.cat(sizes), self._shown)
            found.append(one)
            if self.batch_radius and not gone and one.slack >= 0.0:
                parts.append(self._shown(one.point)[None])
                sizes.append(sizes[0].new_full((1,), self.batch_radius))
        return found

    def _shown(self, x: Tensor) -> Tensor:
        """What the caller gets to see of a finished sample: in a space of pixels, a picture of 8 bits."""
        if not self.shields or self.shields[0].negation.space.encoder != "pixels":
            return x
        return ((x / 2 + 0.5).clamp(0, 1) * 255).round() / 255 * 2 - 1

    def _refusal(self, found: list[Projection], moves: list[float], refused: list[bool]) -> SampleRefused:
        rows = tuple(row for row, gone in enumerate(refused) if gone)
        said = "; ".join(
            f"sample {row} is {-found[row].slack:.4g} too near (nearest centre at {found[row].distance:.4g})"
            if not found[row].slack >= 0.0
            else f"sample {row} would have to be moved by {moves[row]:.4g}"
            for row in rows
        )
        return SampleRefused(
            f"SPELL: expected every finished sample outside every shield, moved by at most {self.max_move:.4g}; got "
            f"that {said}. No image is returned; draw again with another seed, or take refuse='blank'",
            rows,
        )

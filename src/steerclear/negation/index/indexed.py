r"""The posterior of a big set without reading all of it, within a tolerance that is checked at every call."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steerclear.errors import InvalidInput, MissingExtra, NegationMismatch
from steerclear.negation.index.partition import Partition
from steerclear.negation.posterior import Posterior, posterior, scaled
from steerclear.negation.references import Items
from steerclear.negation.space import Space
from steerclear.noise import NoiseLevel

if TYPE_CHECKING:
    from steerclear.denoise import DenoiseState
    from steerclear.negation.index.look import Aside


class Certified(NamedTuple):
    """A posterior and how far it may be from the exact one, beyond rounding: distances are taken in float32, which
    costs the exact pass and this one some 1e-7 of the exponent, more where values are large beside their differences.

    Args:
        posterior: As :func:`~steerclear.negation.posterior.posterior` returns it.
        evidence_error: Largest absolute error of the log-evidence in nats, ``(batch,)``.
        mean_error: Largest norm of the mean's error, in units of the root mean square norm of the items, ``(batch,)``.
        rows: Rows that were read, ``(batch,)``.
        proven: Whether the errors are a proof (or the result exact), ``(batch,)``; else they hold with the probability
            of :data:`~steerclear.negation.index.bounds.DEVIATIONS` standard errors.
    """

    posterior: Posterior
    evidence_error: Tensor
    mean_error: Tensor
    rows: Tensor
    proven: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexedSet:
    """A negation set behind an index: takes its place in every guard that asks for posteriors.

    Args:
        space: Where the items live.
        labels, digests: As of the :class:`NegationSet`.
        partition: Its rows in clusters.
        fresh: Items that came after it was cut and are read one by one, ``(points, weights)``; ``None`` if there are
            none. Their weights are on the scale of the set's.
        tolerance: Of the log-evidence in nats, and of the mean in units of the items' root mean square norm, > 0.

    Raises:
        InvalidInput: For a tolerance that is not positive.
        MissingExtra: Without Numba (``pip install 'steerclear[fast]'``).

    Cost:
        A look at all ``M`` clusters, in 64 dimensions or at much noise in all ``D``, per sample, and the rows that are
        read; memory: one copy of the rows. On the host: samples of an accelerator are brought there and back.
        On an accelerator that holds the set, a :class:`NegationSet` is faster.
    """

    space: Space
    labels: tuple[str, ...] = field(repr=False)
    digests: tuple[str, ...] = field(repr=False)
    partition: Partition = field(repr=False)
    fresh: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 < self.tolerance < math.inf:
            raise InvalidInput(f"IndexedSet: expected a tolerance > 0, got {self.tolerance}")
        if find_spec("numba") is None:
            raise MissingExtra(
                "IndexedSet: expected Numba, which reads rows by name; run: pip install 'steerclear[fast]'"
            )

    @classmethod
    def of(cls, items: Items, *, tolerance: float = 1e-3, **partition: Any) -> "IndexedSet":  # noqa: ANN401
        """Cut a set into clusters; of a store that changes meanwhile, take :class:`LiveIndex`.

        Args:
            items: The set; its latents are copied once, in their precision.
            tolerance: See above.
            partition: ``clusters``, ``reach``, ``seed``, ``progress`` of :meth:`Partition.of`.
        """
        rows = items.latents.detach().cpu().flatten(1)
        return cls(
            space=items.space,
            labels=items.labels,
            digests=items.digests,
            partition=Partition.of(rows, items.weights.cpu(), **partition),
            tolerance=tolerance,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"IndexedSet({len(self)} items in {len(self.partition)} clusters of {self.space})"

    def at(self, state: "DenoiseState") -> "IndexedSet":
        """Itself: it never changes."""
        return self

    def posterior(self, x_t: Tensor, level: NoiseLevel) -> Posterior:
        """Posterior mean and log-evidence within the tolerance.

        Raises:
            NegationMismatch: If ``x_t`` is not ``(batch, *shape)``.
        """
        return self.certified(x_t, level).posterior

    def certified(self, x_t: Tensor, level: NoiseLevel) -> Certified:
        """The posterior with its bounds; arguments and errors as for :meth:`posterior`."""
        if tuple(x_t.shape[1:]) != self.space.shape:
            raise NegationMismatch(
                f"expected samples of shape (batch, {', '.join(map(str, self.space.shape))}), got {tuple(x_t.shape)}; "
                "encode the pictures again for this pipeline at this size: NegationSet.encode(images, pipe)"
            )
        from steerclear.negation.index.look import look  # it needs Numba

        host = x_t.detach().cpu()
        x, alpha, precision, constant = scaled(host, level)
        if bool((alpha < 0).any()):
            raise InvalidInput(f"IndexedSet: expected a level with alpha >= 0, got {float(alpha.min()):g}")
        found = look(
            self.partition, x.float(), alpha.squeeze(1).numpy(), precision.squeeze(1).numpy(), self.tolerance,
            self._aside(host, level, constant),
        )  # fmt: skip
        work = torch.float64 if x_t.dtype == torch.float64 else torch.float32
        mean, evidence, *rest = (torch.from_numpy(each).to(x_t.device) for each in found)
        evidence = evidence - (constant + self._log_all).to(x_t.device)
        return Certified(Posterior(mean.reshape(x_t.shape).to(work), evidence), *rest)

    @cached_property
    def _log_all(self) -> float:
        """Logarithm of all weights that are there, in units of what the partition was cut from."""
        if self.fresh is None:
            return self.partition.log_alive
        return math.log(math.exp(self.partition.log_alive) + float(self.fresh[1].double().sum()) / self._cut)

    @property
    def _cut(self) -> float:
        return math.exp(self.partition.log_total)

    def _aside(self, x_t: Tensor, level: NoiseLevel, constant: Tensor) -> "Aside | None":
        """The fresh items, read."""
        if self.fresh is None:
            return None
        from steerclear.negation.index.look import Aside

        points, weights = self.fresh
        mean, evidence = posterior(x_t, points, weights, level)
        share = weights.double() / self._cut
        energy = float(share @ points.flatten(1).double().square().sum(1))
        own, both = math.exp(self.partition.log_alive), math.exp(self._log_all)
        return Aside(
            mean=mean.flatten(1).double().numpy(),
            log_evidence=(evidence + constant + share.sum().log()).numpy(),
            scale=math.sqrt((own * self.partition.scale**2 + energy) / both),
        )

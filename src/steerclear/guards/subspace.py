r"""Where two reference sets are compared: the leading principal components of both.

In the sampler's own space most dimensions are detail, and distances between pictures of one concept are hardly smaller
than between any two pictures. The leading components of the references are layout and colour, which is what an early
estimate knows. With mean :math:`m` and orthonormal basis :math:`V_k` of the :math:`k` directions of largest variance,

.. math:: \phi(x) = V_k^\top (x - m), \qquad \lVert \phi(x) - \phi(y) \rVert \le \lVert x - y \rVert

A documented departure from the theorem, like a bandwidth; it also makes the comparison :math:`D/k` times cheaper.

Statistics in place of a negation set (:class:`~steerclear.negation.NegationStatistics`) are projected exactly, onto the
components of the safe set alone: they have no items to take part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.errors import InvalidInput
from steerclear.negation import Items, NegationSet, NegationStatistics, Space
from steerclear.negation.references import at_present
from steerclear.noise import NoiseLevel


@dataclass(frozen=True, kw_only=True, eq=False)
class Subspace:
    """Two reference sets seen through their leading principal components; made by :meth:`principal`.

    Args:
        mean: Centre, ``(D,)``.
        basis: Orthonormal columns, ``(D, k)``.
        unsafe: The negation set's components, or its statistics'.
        safe: The safe reference set's components.
    """

    mean: Tensor
    basis: Tensor
    unsafe: NegationSet | NegationStatistics
    safe: NegationSet

    @classmethod
    def principal(cls, negation: Items | NegationStatistics, safe: Items, components: int) -> "Subspace":
        """The ``components`` directions in which the two sets together vary most, every item counting once.

        Of statistics, the directions in which the safe set varies most. Of sets that follow a store, of the items now:
        a guard that holds it stops when they change.

        Raises:
            InvalidInput: Unless ``1 <= components <=`` the number of dimensions and of items; for a form that keeps no
                items and is no statistics, such as an index.
            NegationMismatch: If the two sets live in different spaces.

        Cost:
            One eigendecomposition of a ``(D, D)`` matrix; for large ``D`` one of ``(n, n)``.
        """
        negation.space.require(safe.space)
        negation, safe = at_present(negation), at_present(safe)
        for each in (negation, safe):
            if not hasattr(each, "latents") and (each is safe or not isinstance(each, NegationStatistics)):
                raise InvalidInput(
                    f"Subspace.principal: expected sets with their items, or statistics of the negation set, got "
                    f"{type(each).__name__}, which gives posteriors alone; make it from the set that this was made of, "
                    "such as a NegationSet or store.snapshot(). A guard with that subspace may hold either"
                )
        sets = [safe] if isinstance(negation, NegationStatistics) else [negation, safe]
        points = torch.cat([each.latents.flatten(1).double() for each in sets])
        most = min(points.shape)
        if not 1 <= components <= most:
            raise InvalidInput(f"Subspace: expected 1 <= components <= {most}, got {components}")
        mean = points.mean(0)
        basis = _leading(points - mean, components)
        space = Space(encoder=negation.space.encoder, shape=(components,), name=f"{components} principal components")

        def projected(items: Items) -> NegationSet:
            return NegationSet(
                latents=((items.latents.flatten(1).double() - mean) @ basis).float(),
                weights=items.weights,
                ids=items.ids,
                labels=items.labels,
                digests=items.digests,  # of the pictures: what tells whether the items are still the same
                space=space,
            )

        whole = isinstance(negation, NegationStatistics)
        unsafe = negation.projected(mean, basis, space) if whole else projected(negation)
        return cls(mean=mean.float(), basis=basis.float(), unsafe=unsafe, safe=projected(safe))

    def __call__(self, x: Tensor) -> Tensor:
        """Components of ``(batch, *shape)``: ``(batch, k)``, float32 at least."""
        flat = x.flatten(1)
        flat = flat if flat.element_size() == 8 else flat.float()
        mean, basis = (t.to(flat.device, flat.dtype) for t in (self.mean, self.basis))
        return (flat - mean) @ basis

    def log_ratio(self, denoised: Tensor, bandwidth: float) -> Tensor:
        r""":math:`\log \hat q_{unsafe} - \log \hat q_{safe}` under a Gaussian of that width, ``(batch,)``."""
        level, own = NoiseLevel(1.0, bandwidth), self(denoised)
        return self.unsafe.posterior(own, level).log_evidence - self.safe.posterior(own, level).log_evidence


def _leading(centred: Tensor, components: int) -> Tensor:
    """Orthonormal directions of largest variance, ``(D, components)``."""
    n, dim = centred.shape
    if dim <= n:
        return torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -components:]
    values, left = torch.linalg.eigh(centred @ centred.T)
    scale = values[-components:].clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    return centred.T @ left[:, -components:] / scale

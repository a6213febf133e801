r"""Orthogonal projections on the span of a few vectors, in float64.

The span's orthonormal basis :math:`Q` comes from a singular value decomposition of the vectors themselves, and
:math:`P x = Q Q^\top x`. The textbook :math:`P = E (E^\top E)^{-1} E^\top` squares the condition number: embeddings of
prompts that differ by one token are nearly parallel, and in float32 that projector misses :math:`P^2 = P` by a
thousandth.
"""

from torch import Tensor
from torch.linalg import svd


def basis(vectors: Tensor, rcond: float) -> Tensor:
    """Orthonormal basis of the span of the rows of ``vectors``.

    Args:
        vectors: ``(n, width)``.
        rcond: Directions with a singular value below this share of the largest are noise, and left out.

    Returns:
        ``(width, rank)``, float64.
    """
    _, sizes, directions = svd(vectors.double(), full_matrices=False)
    return directions[sizes > rcond * sizes[:1]].T


def inside(x: Tensor, span: Tensor) -> Tensor:
    """:math:`P x` for every row of ``x`` ``(n, width)``; ``span`` is a :func:`basis`."""
    return x @ span @ span.T


def outside(x: Tensor, span: Tensor) -> Tensor:
    """:math:`(I - P) x` for every row of ``x``."""
    return x - inside(x, span)

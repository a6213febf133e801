r"""Distances between two sets of features, and the diversity of one; each NaN when there are too few.

Rows are pictures, columns are features: ``real`` is :math:`(n, d)`, ``fake`` :math:`(m, d)`.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from steerclear.errors import InvalidInput

Features = NDArray[Any]
NEAREST = 5


def frechet(real: Features, fake: Features) -> float:
    r"""Fréchet distance of two Gaussians.

    .. math:: |\mu_1 - \mu_2|^2 + Tr(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2})

    This root has the trace of :math:`(\Sigma_1 \Sigma_2)^{1/2}` and is symmetric: no complex numbers. Biased upwards
    for few pictures. NaN below two a side.

    Source: Heusel et al. (2017), "GANs Trained by a Two Time-Scale Update Rule", arXiv:1706.08500.
    """
    real, fake = checked(real, fake)
    if min(len(real), len(fake)) < 2:
        return math.nan
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (real, fake))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(min=0.0)).sum()
    shift = real.mean(axis=0) - fake.mean(axis=0)
    return float(max(0.0, shift @ shift + np.trace(first) + np.trace(second) - 2.0 * cross))


def kernel_distance(real: Features, fake: Features) -> float:
    r"""Unbiased squared maximum mean discrepancy under the kernel :math:`k(x, y) = (x^\top y / d + 1)^3`.

    .. math:: \frac{\sum_{i \ne j} k(x_i, x_j)}{n(n - 1)} + \frac{\sum_{i \ne j} k(y_i, y_j)}{m(m - 1)}
        - \frac{2}{nm} \sum_{ij} k(x_i, y_j)

    May be negative. NaN below two a side.

    Source: Bińkowski et al. (2018), "Demystifying MMD GANs", arXiv:1801.01401.
    """
    real, fake = checked(real, fake)
    n, m, d = len(real), len(fake), real.shape[1]
    if min(n, m) < 2:
        return math.nan
    own, other, cross = ((x @ y.T / d + 1.0) ** 3 for x, y in ((real, real), (fake, fake), (real, fake)))
    inside = (own.sum() - np.trace(own)) / (n * (n - 1)) + (other.sum() - np.trace(other)) / (m * (m - 1))
    return float(inside - 2.0 * cross.mean())


def precision(real: Features, fake: Features, nearest: int = NEAREST) -> float:
    """Share of fakes inside some real picture's ball, which reaches to its ``nearest``-th neighbour. NaN for too few.

    Source: Kynkäänniemi et al. (2019), "Improved Precision and Recall Metric", arXiv:1904.06991.
    """
    real, fake = checked(real, fake)
    if len(real) <= nearest or len(fake) == 0:
        return math.nan
    return float((cdist(real, fake) < _radii(real, nearest)[:, None]).any(axis=0).mean())


def recall(real: Features, fake: Features, nearest: int = NEAREST) -> float:
    """Share of real pictures inside some fake's ball: :func:`precision` with the sides exchanged."""
    return precision(fake, real, nearest)


def density(real: Features, fake: Features, nearest: int = NEAREST) -> float:
    """Mean number of real balls that a fake is in, divided by ``nearest``; may exceed 1. NaN for too few.

    Source: Naeem et al. (2020), "Reliable Fidelity and Diversity Metrics", arXiv:2002.09797.
    """
    real, fake = checked(real, fake)
    if len(real) <= nearest or len(fake) == 0:
        return math.nan
    return float((cdist(real, fake) < _radii(real, nearest)[:, None]).sum() / (nearest * len(fake)))


def coverage(real: Features, fake: Features, nearest: int = NEAREST) -> float:
    """Share of real balls with a fake in them. NaN for too few.

    Source: Naeem et al. (2020), "Reliable Fidelity and Diversity Metrics", arXiv:2002.09797.
    """
    real, fake = checked(real, fake)
    if len(real) <= nearest or len(fake) == 0:
        return math.nan
    return float((cdist(real, fake).min(axis=1) < _radii(real, nearest)).mean())


def vendi(fake: Features) -> float:
    r"""Effective number of different pictures, :math:`\exp(-\sum \lambda \log \lambda)`.

    :math:`\lambda` are the eigenvalues of :math:`K/m`, K the cosines of all pairs: 1 when all are alike, m when all are
    orthogonal. With more pictures than features, :math:`X^\top X / m` has the same ones and is smaller. NaN without
    any.

    Raises:
        InvalidInput: If a picture's features are all 0: it has no direction.

    Source: Friedman and Dieng (2023), "The Vendi Score", arXiv:2210.02410.
    """
    fake, _ = checked(fake, fake)
    if len(fake) == 0:
        return math.nan
    norms = np.linalg.norm(fake, axis=1, keepdims=True)
    if (norms == 0.0).any():
        raise InvalidInput("vendi: expected features with a direction, got a picture whose features are all 0")
    rows = fake / norms
    gram = rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
    values = np.linalg.eigvalsh(gram / len(rows))
    values = values[values > 0.0]
    return float(np.exp(-(values * np.log(values)).sum()))


def checked(real: Features, fake: Features) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as float64 ``(pictures, features)``.

    Raises:
        InvalidInput: For other shapes, or numbers that are not finite.
    """
    real, fake = np.asarray(real, dtype=np.float64), np.asarray(fake, dtype=np.float64)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise InvalidInput(f"features: expected (n, d) and (m, d), got {real.shape} and {fake.shape}; use one space")
    if not (np.isfinite(real).all() and np.isfinite(fake).all()):
        raise InvalidInput("features: expected finite numbers, got NaN or infinity")
    return real, fake


def _radii(points: NDArray[np.float64], nearest: int) -> NDArray[np.float64]:
    """Distance to the ``nearest``-th other point."""
    return np.partition(cdist(points, points), nearest, axis=1)[:, nearest].astype(np.float64)

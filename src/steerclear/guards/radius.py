"""Distances between pictures, and the radius of shields that follows from them."""

import math

import torch
from torch import Tensor

from steerclear.errors import InvalidInput
from steerclear.negation import Items
from steerclear.negation.posterior import accumulator, squared_distances
from steerclear.negation.references import require_items


def radius_of(references: Items | Tensor, quantile: float = 0.05, *, block: int = 1 << 22) -> float:
    """A radius for shields: a quantile of the distances from real pictures to the nearest *other* one.

    Args:
        references: Real pictures in the sampler's space, such as the protected set or a safe reference set.
        quantile: In [0, 1]; a low one keeps shields from covering what merely resembles a protected picture.
        block: Distances held at a time.

    Raises:
        InvalidInput: For fewer than two pictures, or where so many are repeated that the quantile is 0.

    Cost:
        ``n^2 D`` operations, blockwise.
    """
    if not isinstance(references, Tensor):
        require_items("radius_of", references)
    latents = references if isinstance(references, Tensor) else references.latents
    flat, count = latents.flatten(1), len(latents)
    if count < 2 or not 0.0 <= quantile <= 1.0:
        raise InvalidInput(f"radius_of: expected two pictures or more and 0 <= quantile <= 1, got {count}, {quantile}")
    nearest_other: list[Tensor] = []
    for rows in torch.arange(count, device=flat.device).split(max(1, block // count)):
        distance = distances(flat[rows].to(widest(flat)), flat)
        distance[torch.arange(len(rows), device=flat.device), rows] = math.inf
        nearest_other.append(distance.amin(1))
    radius = float(torch.cat(nearest_other).quantile(quantile))
    if not radius > 1e-6 * float(torch.linalg.vector_norm(flat[0].double())):
        raise InvalidInput(
            f"radius_of: expected different pictures, got {radius:.3g} as the {quantile:.0%} quantile of the distances "
            "to the nearest other; remove repeated ones, or take a higher quantile"
        )
    return radius


def distances(x: Tensor, centres: Tensor) -> Tensor:
    """``(batch, n)`` Euclidean distances: the fast ones, for decisions on the way."""
    return squared_distances(x, centres, x.new_ones(len(x), 1), fast=True).sqrt()


def widest(x: Tensor) -> torch.dtype:
    """The dtype of distances: the widest that the device has."""
    return accumulator(x.device)

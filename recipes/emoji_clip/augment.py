"""Other ways to draw the same picture: bent, moved, outlined, recoloured, covered, blurred like a denoised estimate."""

import torch
from torch import Tensor
from torch.nn import functional as F


def draw(n: int, low: float, high: float) -> Tensor:
    return (low + (high - low) * torch.rand(n)).view(n, 1, 1, 1)


def bent(x: Tensor, amount: Tensor) -> Tensor:
    """Mirror, rotate, scale, stretch, shear, shift and a smooth random warp; what comes in from outside is white."""
    n = len(x)
    angle = (torch.rand(n) - 0.5) * 0.6 * amount
    wide, high = 1 + ((0.75 + 0.45 * torch.rand(2, n)) * (0.85 + 0.3 * torch.rand(n)) - 1) * amount
    mirror = torch.where(torch.rand(n) < 0.3, -1.0, 1.0)
    shift, shear = (torch.rand(n, 2) - 0.5) * 0.3 * amount[:, None], (torch.rand(n) - 0.5) * 0.3 * amount
    cos, sin = angle.cos(), angle.sin()
    rows = [mirror * cos * wide, -sin * high + shear, shift[:, 0], mirror * sin * wide, cos * high, shift[:, 1]]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(x.shape), align_corners=False)
    warp = F.interpolate(torch.randn(n, 2, 5, 5), size=x.shape[-1], mode="bicubic")
    warp = warp * draw(n, 0.0, 0.07) * amount.view(n, 1, 1, 1)
    return 1 + F.grid_sample(x - 1, grid + warp.permute(0, 2, 3, 1), align_corners=False)


def outlined(x: Tensor) -> Tensor:
    """Dark lines where the picture changes; some pictures keep nothing but the lines."""
    n = len(x)
    light = x.mean(1, keepdim=True)
    edges = F.max_pool2d(light, 3, 1, 1) + F.max_pool2d(-light, 3, 1, 1)
    ink = (edges * draw(n, 1.0, 3.0)).clamp(0, 1)
    kind = torch.rand(n).view(n, 1, 1, 1)
    lines, kept = 1 - 1.9 * ink, x * (1 - ink) - 0.9 * ink
    flat = torch.round(x * 1.5) / 1.5
    return torch.where(kind < 0.03, lines, torch.where(kind < 0.15, kept, torch.where(kind < 0.22, flat, x)))


def covered(x: Tensor) -> Tensor:
    """A rectangle of one colour over some of the pictures."""
    n, size = len(x), x.shape[-1]
    at = torch.arange(size)
    low = torch.rand(2, n) * size
    high = low + size * (0.1 + 0.25 * torch.rand(2, n))
    rows, columns = ((at >= a[:, None]) & (at < b[:, None]) for a, b in zip(low, high, strict=True))
    inside = (rows[:, :, None] & columns[:, None, :])[:, None] & (torch.rand(n) < 0.35).view(n, 1, 1, 1)
    return torch.where(inside, draw(3 * n, -1, 1).view(n, 3, 1, 1), x)


def recoloured(x: Tensor, amount: Tensor) -> Tensor:
    """Colours mixed by a random matrix; a curve for light and shade; some pictures go grey."""
    n = len(x)
    amount = 0.2 * amount.view(n, 1, 1)
    mix = torch.eye(3) + amount * torch.randn(n, 3, 3)
    x = 1 + torch.einsum("nij,njhw->nihw", mix, x - 1)
    light = x.clamp(-1, 1).add(1).mul(0.5) ** draw(n, 0.6, 1.6)
    x = (light * 2 - 1) * draw(n, 0.8, 1.1) + draw(n, -0.1, 0.05)
    grey = (torch.rand(n) < 0.05).view(n, 1, 1, 1)
    return torch.where(grey, x.mean(1, keepdim=True).expand_as(x), x)


def blurred(x: Tensor) -> Tensor:
    """Some pictures lose their detail, as denoised estimates of early steps do; some get waves and grain."""
    n, size = len(x), x.shape[-1]
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    weight = (kernel[:, None] * kernel).expand(3, 1, 5, 5)
    soft, share = x.clone(), torch.rand(n)
    for limit in (0.45, 0.25, 0.15):
        some = share < limit
        soft[some] = F.conv2d(F.pad(soft[some], (2, 2, 2, 2), "replicate"), weight, groups=3)
    waves = F.interpolate(torch.randn(n, 3, 16, 16), size=size, mode="bilinear") * draw(n, 0.0, 0.12)
    return (soft + waves + torch.randn_like(x) * draw(n, 0.0, 0.08)).clamp(-1, 1)


def augmented(x: Tensor, free: Tensor) -> Tensor:
    """All of it, for two pictures of five in a mild form; colours stay near their own unless ``free``."""
    amount = torch.where(torch.rand(len(x)) < 0.4, 0.3, 1.0)
    return blurred(covered(recoloured(outlined(bent(x, amount)), amount * torch.where(free, 1.0, 0.4))))

r"""A labelled mixture whose denoiser, posterior and score are known exactly: the referee of every guard.

Component :math:`k` is :math:`N(m_k, s_k^2 I)` with weight :math:`\pi_k` and a label; :math:`s_k = 0` is a Dirac, so
that a finite negation set *is* such a mixture. With :math:`x_t = \alpha x_0 + \sigma \epsilon` and
:math:`v_k = \alpha^2 s_k^2 + \sigma^2`,

.. math::
    p(x_t) = \sum_k \pi_k N(x_t; \alpha m_k, v_k I), \qquad
    E[x_0 \mid x_t, k] = m_k + \frac{\alpha s_k^2}{v_k} (x_t - \alpha m_k)

and every quantity below is a sum over :math:`P(k \mid x_t)`. Computed in the mixture's own dtype; build it in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.errors import InvalidInput
from steerclear.negation import NegationSet, Space
from steerclear.noise import NoiseLevel

Condition = str | Sequence[int] | None
"""A label, the indices of some components, or everything."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """A mixture of Gaussians and Diracs with a label on every component. It is a :class:`~steerclear.denoise.Denoiser`.

    Args:
        means: Centres, ``(components, *shape)``.
        scales: Standard deviation of every component, ``(components,)``, >= 0; 0 is a Dirac.
        weights: Share of every component, ``(components,)``, > 0; normalised here.
        labels: Label of every component.

    Raises:
        InvalidInput: If lengths differ, a scale is negative or a weight is not positive.

    Cost:
        ``(batch, components, *shape)`` memory per call: meant for tens of components.

    Example:
        >>> ring = Mixture.ring()
        >>> ring(torch.zeros(5, 2), NoiseLevel(0.1, 0.99), "safe").shape
        torch.Size([5, 2])
    """

    means: Tensor
    scales: Tensor
    weights: Tensor
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        n = len(self.labels)
        if not (len(self.means) == len(self.scales) == len(self.weights) == n > 0):
            raise InvalidInput(
                f"Mixture: expected as many means, scales and weights as labels, got {len(self.means)}, "
                f"{len(self.scales)}, {len(self.weights)} for {n} labels"
            )
        if bool((self.scales < 0).any()) or not bool((self.weights > 0).all()):
            raise InvalidInput("Mixture: expected scales >= 0 and weights > 0; leave out components without weight")

    @classmethod
    def diracs(cls, points: Tensor, labels: Sequence[str], weights: Tensor | None = None) -> "Mixture":
        """Every point is a component of no width; equal weights by default."""
        weights = points.new_ones(len(points)) if weights is None else weights
        return cls(means=points, scales=points.new_zeros(len(points)), weights=weights, labels=tuple(labels))

    @classmethod
    def ring(
        cls, *, modes: int = 8, radius: float = 4.0, scale: float = 0.3, unsafe: Sequence[int] = (0, 3)
    ) -> "Mixture":
        """Equal Gaussians on a circle in the plane, float64; those numbered in ``unsafe`` have the label "unsafe"."""
        angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
        return cls(
            means=radius * torch.stack([angle.cos(), angle.sin()], dim=1),
            scales=torch.full_like(angle, scale),
            weights=torch.ones_like(angle),
            labels=tuple("unsafe" if k in unsafe else "safe" for k in range(modes)),
        )

    def __call__(self, x_t: Tensor, level: NoiseLevel, condition: Condition = None) -> Tensor:
        r""":math:`E[x_0 \mid x_t, \text{condition}]`, shape and dtype of ``x_t``."""
        x = x_t.to(self.means.dtype)
        alpha, sigma = self._level(level)
        share = self._log_joint(x, level, condition).softmax(1)
        gain = alpha * self.scales**2 / (alpha**2 * self.scales**2 + sigma**2).clamp_min(_tiny(self.means))
        own = share * gain
        flat, means = x.flatten(1), self.means.flatten(1)
        mean = share @ means + own.sum(1, keepdim=True) * flat - alpha * (own @ means)
        return mean.reshape(x_t.shape).to(x_t.dtype)

    def probability(self, condition: Condition, x_t: Tensor, level: NoiseLevel) -> Tensor:
        r""":math:`P(\text{condition} \mid x_t)`, shape ``(batch,)``, in the mixture's dtype."""
        return (self.log_density(x_t, level, condition) - self.log_density(x_t, level)).exp()

    def log_density(self, x_t: Tensor, level: NoiseLevel, condition: Condition = None) -> Tensor:
        r""":math:`\log p(x_t, \text{condition})`, shape ``(batch,)``: the joint, so conditions add up to the whole."""
        return self._log_joint(x_t.to(self.means.dtype), level, condition).logsumexp(1)

    def log_odds(self, condition: Condition, x_t: Tensor, level: NoiseLevel) -> Tensor:
        r""":math:`\log P/(1-P)` of a condition, exact where the probability itself rounds to 1; shape ``(batch,)``."""
        chosen = self.components(condition)
        rest = [k for k in range(len(self.labels)) if k not in chosen]
        return self.log_density(x_t, level, chosen) - self.log_density(x_t, level, rest)

    def sample(
        self, n: int, *, condition: Condition = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """``n`` points ``(n, *shape)`` and the component ``(n,)`` that each was drawn from."""
        weights = torch.zeros_like(self.weights)
        chosen = list(self.components(condition))
        weights[chosen] = self.weights[chosen]
        component = torch.multinomial(weights, n, replacement=True, generator=generator)
        means = self.means[component]
        noise = torch.randn(means.shape, dtype=means.dtype, generator=generator)
        return means + self.scales[component].reshape(-1, *[1] * (means.ndim - 1)) * noise, component

    def references(
        self, n: int | None = None, *, condition: Condition = None, generator: torch.Generator | None = None
    ) -> NegationSet:
        """Reference points as a negation set in the space "pixels": ``n`` draws, or the centres with their weights."""
        if n is None:
            chosen = list(self.components(condition))
            points, weights = self.means[chosen], self.weights[chosen]
        else:
            points, chosen_tensor = self.sample(n, condition=condition, generator=generator)
            chosen, weights = chosen_tensor.tolist(), torch.ones(n, dtype=points.dtype)
        space = Space(encoder="pixels", shape=tuple(points.shape[1:]), name="mixture")
        return NegationSet(latents=points, weights=weights, labels=tuple(self.labels[k] for k in chosen), space=space)

    def nearest(self, x_0: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest component ``(batch,)`` and the distance to its centre in standard deviations (a Dirac's is 1)."""
        distance = self._offsets(x_0.to(self.means.dtype), 1.0).square().sum(2).sqrt()
        value, component = distance.min(1)
        return component, value / torch.where(self.scales > 0, self.scales, 1.0)[component]

    def components(self, condition: Condition) -> tuple[int, ...]:
        """Indices of the components that meet a condition."""
        if condition is None:
            return tuple(range(len(self.labels)))
        chosen = (
            tuple(k for k, label in enumerate(self.labels) if label == condition)
            if isinstance(condition, str)
            else tuple(condition)
        )
        if not chosen:
            raise InvalidInput(f"Mixture: no component meets {condition!r}; the labels are {sorted(set(self.labels))}")
        return chosen

    def _offsets(self, x: Tensor, alpha: float | Tensor) -> Tensor:
        return x.flatten(1)[:, None] - (alpha * self.means.flatten(1).unsqueeze(0))

    def _level(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Both scales as columns ``(batch or 1, 1)``; a level may be per sample, not per token."""
        dtype = self.means.dtype
        return _column(level.alpha, dtype), _column(level.sigma, dtype)

    def _log_joint(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        """``log [pi_k N(x_t; alpha m_k, v_k I)]`` of the components that meet the condition, -inf elsewhere."""
        alpha, sigma = self._level(level)
        variance = (alpha**2 * self.scales**2 + sigma**2).clamp_min(_tiny(self.means))
        offsets = self._offsets(x, alpha.unsqueeze(2))
        quadratic = offsets.square().sum(2) / variance
        log_normal = -0.5 * (quadratic + offsets.shape[2] * (2 * math.pi * variance).log())
        mask = torch.full_like(self.weights, -math.inf)
        mask[list(self.components(condition))] = 0.0
        return (self.weights / self.weights.sum()).log() + log_normal + mask


def _column(value: float | Tensor, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(value, dtype=dtype).reshape(-1, 1)


def _tiny(like: Tensor) -> float:
    """Keeps a Dirac without noise a nearest-neighbour rule instead of 0/0."""
    return math.sqrt(torch.finfo(like.dtype).tiny)

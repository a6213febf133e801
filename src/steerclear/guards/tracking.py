r"""Bayes' rule along a stochastic trajectory: two hypotheses about the reverse kernel, and the sample that was drawn.

Two denoised estimates :math:`\hat x` and :math:`\hat x_{other}` predict two Gaussians for the next sample
:math:`x_s`, with means :math:`\mu = c_0 \hat x + c_t x_t` and the same variance (:meth:`NoiseLevel.reverse`). Their
log-ratio at the sample that was really drawn updates the belief between them, however it came to be drawn. Without
noise :math:`x_s = \mu` and the ratio can only fall: such samplers are refused.
"""

from dataclasses import dataclass

from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import UnsoundCombination
from steerclear.noise import NoiseLevel, squared_norm


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one step predicted: where it stood, and where the two hypotheses pointed."""

    x_t: Tensor
    denoised: Tensor
    other: Tensor
    level: NoiseLevel
    step: int

    @classmethod
    def of(cls, state: DenoiseState, denoised: Tensor, other: Tensor) -> "Prediction":
        """The prediction of this step, in float32 at least."""
        return cls(wide(state.x_t), wide(denoised), wide(other), state.level, state.step)


def log_ratio(before: Prediction, state: DenoiseState, *, tau: float = 1.0, delta: float = 0.0) -> Tensor | float:
    r"""Log-ratio of the kernels, ``other`` over ``denoised``, at the sample that this step starts from.

    .. math:: \frac{\delta - \tau\,(\lVert x_s - \mu_{other}\rVert^2 - \lVert x_s - \mu\rVert^2)}{2\tilde\sigma^2}

    With :math:`r = x_s - \mu` and :math:`\Delta = c_0(\hat x_{other} - \hat x)` the difference of the squared distances
    is :math:`\lVert\Delta\rVert^2 - 2\langle r, \Delta\rangle`, which does not cancel.

    Returns:
        ``(batch,)``, or 0.0 where the kernel has no variance or the guard did not see the step between.

    Raises:
        UnsoundCombination: If the sampler is known to add no noise.
    """
    eta = 1.0 if state.eta is None else state.eta
    if eta <= 0.0:
        raise UnsoundCombination(
            "a weight tracked along the trajectory was used with a sampler that adds no noise (eta = 0), where the "
            "ratio of the two kernels can only fall. Use DDPM, an ancestral sampler or DDIM with eta=1; or, with any "
            "sampler, a guard that tracks nothing by noise: SafeDenoiser(weight=TwoSample(safe=...)) or "
            "ConditionalRelease(weight=TwoSample(safe=...))"
        )
    c_0, c_t, variance = before.level.reverse(state.level, eta)
    if variance <= 0.0 or state.step != before.step + 1:
        return 0.0
    residual = wide(state.x_t) - (c_0 * before.denoised + c_t * before.x_t)
    shift = c_0 * (before.other - before.denoised)
    distance = squared_norm(shift) - 2.0 * (residual * shift).flatten(1).sum(1)
    return (delta - tau * distance) / (2.0 * variance)


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is if it is float64."""
    return x if x.element_size() == 8 else x.float()

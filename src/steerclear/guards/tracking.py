r"""Bayes' rule along a stochastic trajectory: two hypotheses about the reverse kernel, and the sample that was drawn.

Two denoised estimates :math:`\hat x` and :math:`\hat x_{other}` predict two Gaussians for the next sample
:math:`x_s`, with means :math:`\mu = c_0 \hat x + c_t x_t` and the same variance (:meth:`NoiseLevel.reverse`). Their
log-ratio at the sample that was really drawn updates the belief between them, however it came to be drawn. Without
noise :math:`x_s = \mu` and the ratio can only fall: such samplers are refused.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.noise import NoiseLevel, squared_norm


def check_belief(name: str, prior: float, bounds: tuple[float, float], tau: float, delta: float) -> None:
    """Refuse settings of a tracked weight that mean nothing.

    Raises:
        InvalidInput: For them.
    """
    if not 0.0 < bounds[0] <= prior <= bounds[1] < 1.0:
        raise InvalidInput(
            f"{name}: expected 0 < bounds[0] <= prior <= bounds[1] < 1, got prior={prior}, bounds={bounds}"
        )
    if not 0.0 < tau < math.inf or not math.isfinite(delta):
        raise InvalidInput(f"{name}: expected a finite tau > 0 and delta, got tau={tau}, delta={delta}")


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


def log_odds(
    key: object,
    now: Prediction,
    state: DenoiseState,
    *,
    prior: float,
    tau: float,
    delta: float,
    bounds: tuple[float, float],
) -> Tensor:
    r"""Log-odds of ``other`` at this step, tracked from the prior on.

    .. math:: p \leftarrow \operatorname{clip}\bigl(p \cdot e^{\text{log-ratio}},\; p_{min}, p_{max}\bigr)

    as the published rule has it: it multiplies the probability itself, in log space, and not its odds.

    Args:
        key: Under which the trajectory's memory keeps the last prediction and :math:`\log p`.
        now: What this step predicts.
        state: The step.
        prior: :math:`p` at the first step.
        tau: See :func:`log_ratio`.
        delta: Likewise.
        bounds: Lowest and highest :math:`p`.

    Returns:
        ``(batch,)``.
    """
    remembered = state.memory.get(key)
    if remembered is None:
        log_p = now.x_t.new_full((len(now.x_t),), math.log(prior))
    else:
        before, log_p = remembered
        log_p = (log_p + log_ratio(before, state, tau=tau, delta=delta)).clamp(*(math.log(bound) for bound in bounds))
    state.memory[key] = (now, log_p)
    return log_p - torch.log1p(-log_p.exp())


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is if it is float64."""
    return x if x.element_size() == 8 else x.float()

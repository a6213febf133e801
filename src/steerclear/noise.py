r"""One formalism for every schedule: :math:`x_t = \alpha\, x_0 + \sigma\, \epsilon`.

Variance preserving (DDPM), variance exploding (EDM, k-diffusion) and rectified flow are values of
:math:`(\alpha, \sigma)`; nothing below assumes a relation between the two. Every conversion between prediction types
passes through :math:`x_0`, so there are two formulas per type and not one per pair.

==================  ================================================  =======================================
prediction          output -> denoised                                denoised -> output
==================  ================================================  =======================================
``sample``          :math:`o`                                         :math:`\hat x`
``epsilon``         :math:`(x_t - \sigma o)/\alpha`                   :math:`(x_t - \alpha \hat x)/\sigma`
``v_prediction``    :math:`(\alpha x_t/r - \sigma o)/r`               :math:`(\alpha x_t/r - r \hat x)/\sigma`
``flow_prediction`` :math:`(x_t - \sigma o)/(\alpha + \sigma)`        :math:`(x_t - (\alpha+\sigma)\hat x)/\sigma`
==================  ================================================  =======================================

with :math:`r^2 = \alpha^2 + \sigma^2`, and the flow's output :math:`\epsilon - x_0`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["sample", "epsilon", "v_prediction", "flow_prediction"]


@dataclass(frozen=True, slots=True)
class NoiseLevel:
    r"""The marginal at one step, :math:`q(x_t \mid x_0) = N(\alpha x_0, \sigma^2 I)`.

    Args:
        alpha: Signal scale, >= 0: a number, or a tensor that broadcasts against ``x_t`` (a level per sample or token).
        sigma: Noise scale, >= 0, likewise.
    """

    alpha: float | Tensor
    sigma: float | Tensor

    def add(self, x_0: Tensor, epsilon: Tensor) -> Tensor:
        r""":math:`\alpha x_0 + \sigma \epsilon`."""
        return self.alpha * x_0 + self.sigma * epsilon

    def epsilon(self, denoised: Tensor, x_t: Tensor) -> Tensor:
        r"""The noise that an estimate of ``x_0`` implies, :math:`(x_t - \alpha \hat x)/\sigma`."""
        return (x_t - self.alpha * denoised) / self.sigma

    def denoised(self, output: Tensor, x_t: Tensor, prediction: Prediction) -> Tensor:
        """Estimate of ``x_0`` that a network's ``output`` stands for (table in the module's docstring)."""
        k_x, k_o = self.affine(prediction)
        return k_x * x_t + k_o * output

    def output(self, denoised: Tensor, x_t: Tensor, prediction: Prediction) -> Tensor:
        """Network output that stands for the estimate ``denoised``: the inverse of :meth:`denoised`."""
        k_x, k_o = self.affine(prediction)
        return (denoised - k_x * x_t) / k_o

    def affine(self, prediction: Prediction) -> tuple[float | Tensor, float | Tensor]:
        r"""``(k_x, k_o)`` of :math:`\hat x = k_x x_t + k_o o`."""
        a, s = self.alpha, self.sigma
        match prediction:
            case "sample":
                return 0.0, 1.0
            case "epsilon":
                return 1 / a, -s / a
            case "v_prediction":
                r = a * a + s * s
                return a / r, -s / (r.sqrt() if isinstance(r, Tensor) else math.sqrt(r))
            case "flow_prediction":
                return 1 / (a + s), -s / (a + s)

    def reverse(self, to: "NoiseLevel", eta: float = 1.0) -> tuple[float, float, float]:
        r"""Coefficients of the reverse kernel from this level to the cleaner level ``to``.

        .. math:: q_\eta(x_s \mid x_t, x_0) = N(c_0 x_0 + c_t x_t,\; \eta^2 \tilde\sigma^2 I), \qquad
            \tilde\sigma^2 = \sigma_s^2 \bigl(1 - (\alpha_t \sigma_s / (\alpha_s \sigma_t))^2\bigr)

        with :math:`c_t = \sqrt{\sigma_s^2 - \eta^2\tilde\sigma^2}/\sigma_t` and :math:`c_0 = \alpha_s - \alpha_t c_t`.
        ``eta = 1`` is DDPM's posterior, ``eta = 0`` is DDIM (Song et al. 2021, arXiv:2010.02502, eq. 16).

        Returns:
            ``(c_0, c_t, variance)``. Needs scalar levels.
        """
        a_t, s_t, a_s, s_s = (float(v) for v in (self.alpha, self.sigma, to.alpha, to.sigma))
        variance = eta * eta * s_s * s_s * max(0.0, 1.0 - (a_t * s_s / (a_s * s_t)) ** 2)
        c_t = math.sqrt(max(0.0, s_s * s_s - variance)) / s_t
        return a_s - a_t * c_t, c_t, variance


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """``value`` of shape ``(batch,)``, shaped to broadcast against ``like`` of shape ``(batch, *shape)``."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def squared_norm(x: Tensor) -> Tensor:
    """Squared Euclidean norm of every sample, float32 at least, shape ``(batch,)``."""
    flat = x.flatten(1)
    return (flat if flat.dtype == torch.float64 else flat.float()).square().sum(1)

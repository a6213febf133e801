r"""Three ways in which an edited estimate meets the sampler; each calls the scheduler's ``step`` once.

With :math:`\Delta = \hat x' - \hat x` and :math:`\hat x = k_x x_t + k_o o`:

=============  ==============================================  ============================================
coupling       sample passed on                                output passed on
=============  ==============================================  ============================================
``"score"``    :math:`x_t`                                     :math:`o + \Delta/k_o`
``"sample"``   :math:`x_t + \alpha\Delta`                      :math:`o + \Delta (1 - k_x\alpha)/k_o`
``"renoise"``  :math:`\alpha\hat x' + \sigma\epsilon'`         :math:`o`, so the *old* prediction
=============  ==============================================  ============================================

``"score"`` is the theory: the sampler integrates the guarded denoiser; one deterministic step to :math:`s` moves the
next sample by :math:`(\alpha_s - \alpha_t\sigma_s/\sigma_t)\Delta`. ``"sample"`` keeps the predicted noise
:math:`(x_t - \alpha\hat x)/\sigma` and moves the next sample by :math:`\alpha_s\Delta`; in the second call of a
two-call solver it has no effect, as only the noise counts there. ``"renoise"`` is what the published Safe Denoiser code
does, with fresh noise from the call's generator; it inflates the noise and is there for reproduction only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from steerclear.attach.readers import Reading
from steerclear.noise import per_sample

Coupling = Literal["score", "sample", "renoise"]
COUPLINGS: tuple[Coupling, ...] = ("score", "sample", "renoise")


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """A changed estimate.

    Args:
        target: The guarded estimate.
        delta: ``target`` minus the raw estimate, before any clipping by the scheduler.
        fired: Samples that changed, ``(batch,)``; ``None`` when it is known to be all of them.
        generator: The random generator of this pipeline call.
    """

    target: Tensor
    delta: Tensor
    fired: Tensor | None
    generator: Any = None


def _written(old: Tensor, moved: Tensor, fired: Tensor | None) -> Tensor:
    """``moved`` for the samples that changed, the old bits for the others, in the old dtype."""
    if fired is None:
        return moved.to(old.dtype)
    return torch.where(per_sample(fired, old), moved.to(old.dtype), old)


def score(output: Tensor, sample: Tensor, reading: Reading, edit: Edit) -> tuple[Tensor, Tensor]:
    """Rewrite the output so that it stands for the target at the same sample."""
    k_o = reading.k_o
    if isinstance(k_o, Tensor):
        # Clean tokens (sigma = 0) ignore the output, so there is nothing to write for them.
        moved = output + torch.where(k_o != 0, edit.delta / k_o, 0.0)
    else:
        moved = torch.add(output, edit.delta, alpha=1.0 / k_o)
    return _written(output, moved, edit.fired), sample


def along(output: Tensor, sample: Tensor, reading: Reading, edit: Edit) -> tuple[Tensor, Tensor]:
    """Keep the predicted noise, move the sample along, and keep the output's meaning there."""
    alpha, k_x, k_o = reading.level.alpha, reading.k_x, reading.k_o
    moved = _written(sample, sample + alpha * edit.delta, edit.fired)
    share = 1.0 - k_x * alpha
    if not isinstance(share, Tensor) and abs(share) < 1e-12:
        return output, moved
    if isinstance(k_o, Tensor):
        k_o = torch.where(k_o != 0, k_o, 1.0)
    return _written(output, output + edit.delta * (share / k_o), edit.fired), moved


def renoise(output: Tensor, sample: Tensor, reading: Reading, edit: Edit) -> tuple[Tensor, Tensor]:
    """Noise the target afresh and keep the old output.

    Draws noise only if some sample changed, which waits for the device once per step: otherwise a guard that never
    fires would shift the random numbers of the steps that follow.
    """
    if edit.fired is not None and not bool(edit.fired.any()):
        return output, sample
    fresh = randn_tensor(sample.shape, generator=edit.generator, device=sample.device, dtype=sample.dtype)
    return output, _written(sample, reading.level.add(edit.target, fresh), edit.fired)


Couple = Callable[[Tensor, Tensor, Reading, Edit], tuple[Tensor, Tensor]]
COUPLE: dict[Coupling, Couple] = {"score": score, "sample": along, "renoise": renoise}

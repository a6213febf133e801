r"""Which of two predictions is the conditional one, at what scale they were combined, and whether they were at all.

The sampler is handed :math:`o = u + g (c - u)`. Which output of the network is :math:`u` and which :math:`c` depends on
the pipeline (one doubled batch in either order, or two calls in either order), so it is found by arithmetic:
of two candidates :math:`a, b`, solve

.. math:: o = s\,a + k\,(b - a)

by least squares. Guidance and nothing else leaves no residual and :math:`s = \pm 1` (some pipelines flip the sign);
:math:`g = k/s` or :math:`1 - k/s`, whichever exceeds 1. Guidance rescaling and perturbed guidance fail this test. Where
a guider names its predictions (:mod:`steerclear.attach.guider`), only :math:`g` is left to be found.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerclear.errors import UnsoundCombination, UnsupportedPipeline

_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Residual relative to the output that rounding in the network's dtype may leave; 1e-3 in float32."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """How the sampler's input was made of the recorded calls: which is which, scale, and sign."""

    key: tuple[Any, ...]
    conditional: int
    guidance_scale: float
    sign: float


def solve(
    pipe: Any,  # noqa: ANN401 - any pipeline
    key: tuple[Any, ...],
    outputs: list[Tensor],
    target: Tensor,
    *,
    named: bool = False,
) -> Pattern:
    """Least squares for the module's equation; waits for the device.

    Args:
        pipe: The pipeline.
        key: What the pattern holds for.
        outputs: The two candidates; unconditional first if ``named``.
        target: The sampler's input.
        named: Whether the order is known already, as a guider tells it: then any scale is recognised.
    """
    a, b, o = (x.detach().cpu().double().flatten() for x in (*outputs, target))
    d = b - a
    tolerance = _tolerance(target)
    if (d.norm() <= tolerance * 1e-3 * a.norm()).item():  # both prompts are the same: any scale combines them to this
        sign = 1.0 if ((o - a).norm() <= (o + a).norm()).item() else -1.0
        pattern = Pattern(key, 1 if named else 0, stated_scale(pipe) or 1.0, sign)
        return _accepted(pipe, pattern, _relative(sign * a - o, o).item(), tolerance)
    basis = torch.stack([a, d], 1)
    scale, slope = torch.linalg.lstsq(basis, o.unsqueeze(1)).solution.flatten().tolist()
    sign = 1.0 if scale >= 0 else -1.0
    g = sign * slope
    conditional, found = (1, g) if named or g >= 0.5 else (0, 1 - g)
    stated = stated_scale(pipe)
    exact = stated if stated is not None and abs(found - stated) <= 1e-3 * stated else found
    pattern = Pattern(key, conditional, exact, sign)
    residual = _relative(sign * (a + g * d) - o, o).item()
    accepted = _accepted(pipe, pattern, max(residual, 0.0 if abs(abs(scale) - 1) <= tolerance else 1.0), tolerance)
    if not named and accepted.guidance_scale <= 1 + tolerance:
        raise UnsoundCombination(no_guidance(pipe, f"a guidance scale of {accepted.guidance_scale:.3g}"))
    return accepted


def _accepted(pipe: Any, pattern: Pattern, residual: float, tolerance: float) -> Pattern:  # noqa: ANN401
    if not residual <= tolerance:
        raise UnsupportedPipeline(not_guidance(pipe, f"with a relative residual of {residual:.1e}"))
    return pattern


def alone(pipe: Any, key: tuple[Any, ...], output: Tensor, target: Tensor) -> Pattern:  # noqa: ANN401
    """The pattern of one prediction that reaches the sampler as it is, but for its sign; waits for the device."""
    a, o = (x.detach().cpu().double().flatten() for x in (output, target))
    sign = 1.0 if ((o - a).norm() <= (o + a).norm()).item() else -1.0
    if not _relative(sign * a - o, o).item() <= _tolerance(target):
        raise UnsupportedPipeline(not_plain(pipe))
    return Pattern(key, 0, 1.0, sign)


def off(pattern: Pattern, outputs: list[Tensor], target: Tensor) -> Tensor:
    """The residual of a known pattern at another step, in units of what is tolerated; stays on the device."""
    u, c = outputs[1 - pattern.conditional].float(), outputs[pattern.conditional].float()
    predicted = pattern.sign * (u + pattern.guidance_scale * (c - u))
    return _relative(predicted - target.float(), target.float()) / _tolerance(target)


def stated_scale(pipe: Any) -> float | None:  # noqa: ANN401
    """The guidance scale that the pipeline or its guider shows, if any."""
    scale = getattr(getattr(pipe, "guider", None), "guidance_scale", None)
    scale = getattr(pipe, "_guidance_scale", None) if scale is None else scale
    return float(scale) if isinstance(scale, int | float) else None


def _relative(difference: Tensor, to: Tensor) -> Tensor:
    return difference.norm() / to.norm()


def _tolerance(target: Tensor) -> float:
    return _TOLERANCE.get(target.dtype, 1e-3)


def not_guidance(pipe: Any, what: str) -> str:  # noqa: ANN401
    return (
        f"{type(pipe).__name__}: expected the sampler's input to be u + g·(c - u) of two predictions of the network, "
        f"got something else ({what}); turn off guidance_rescale and perturbed or multi-image guidance, "
        "or use a guard that does not read branches"
    )


def not_plain(pipe: Any) -> str:  # noqa: ANN401
    return (
        f"{type(pipe).__name__}: expected the network's or the guider's result to reach the sampler as it is, got "
        "something made of it; use a guard that needs neither branches nor evaluations of the network"
    )


def no_guidance(pipe: Any, what: str) -> str:  # noqa: ANN401
    return (
        f"{type(pipe).__name__}: a guard that reads branches needs classifier-free guidance (guidance_scale > 1, and "
        f"for guidance-distilled models a true_cfg_scale > 1 with a negative_prompt), got {what}; "
        "use SafeDenoiser, which does not need it"
    )

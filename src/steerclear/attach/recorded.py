"""One recorded call of the denoising network, and the same call about another noisy sample.

Where the sample sits in the call is found by looking, and what the pipeline did to it is checked: the network must
have been given the sample times one number (1, or a scheduler's input scaling), alone or followed by other channels or
tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steerclear.attach.conditions import take_rows

# Rounding that the conversion of a scaled sample to the network's dtype may leave.
_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
_NAMES = ("sample", "hidden_states", "x")
# What a ControlNet made of the step's own sample; adapters ("intrablock") only look at their picture.
_BOUND = ("block_additional_residual", "controlnet")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the network, as it was made."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    def half(self, index: int) -> "Call":
        """The first (0) or second (1) half of a doubled batch."""
        total = len(self.output)
        rows = slice(index * total // 2, (index + 1) * total // 2)
        args, kwargs = (take_rows(value, rows, total) for value in (self.args, self.kwargs))
        return Call(self.module, args, kwargs, self.output[rows])

    def asked(self, **kwargs: Any) -> "Call":  # noqa: ANN401 - a network's arguments
        """The call with these keyword arguments in place of its own."""
        return replace(self, kwargs=self.kwargs | kwargs)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a call holds the noisy sample, and what the network was given of it.

    Args:
        name: The keyword, or ``None`` for the first positional argument.
        axis: The axis along which other inputs follow the sample, or ``None``.
        factor: What the pipeline multiplied the sample by, a scalar tensor.
        residual: How far that is from being so, in units of what rounding may leave; a scalar tensor.
    """

    name: str | None
    axis: int | None
    factor: Tensor
    residual: Tensor

    @classmethod
    def find(cls, call: Call, sample: Tensor) -> "Place | None":
        """Where ``call`` holds ``sample``; ``None`` if no input has its shape, or others were made of it too."""
        name, given = _first(call)
        if given is None or any(value is not None and _is_bound(key) for key, value in call.kwargs.items()):
            return None
        if given.ndim != sample.ndim or not given.is_floating_point():
            return None
        longer = [i for i, (a, b) in enumerate(zip(given.shape, sample.shape, strict=True)) if a != b]
        if len(longer) > 1 or (longer and (longer[0] == 0 or given.shape[longer[0]] < sample.shape[longer[0]])):
            return None
        axis = longer[0] if longer else None
        seen = given if axis is None else given.narrow(axis, 0, sample.shape[axis])
        a, b = seen.float().flatten(), sample.to(seen.dtype).float().flatten()
        factor = a.dot(b) / b.dot(b)  # exactly 1 where the two are equal
        residual = (a - factor * b).norm() / a.norm() / _TOLERANCE.get(seen.dtype, 1e-5)
        return cls(name, axis, factor, residual)

    def put(self, call: Call, x: Tensor) -> Call:
        """``call`` about the noisy sample ``x``, given in the sampler's units."""
        given: Tensor = call.args[0] if self.name is None else call.kwargs[self.name]
        made = (x * self.factor.to(x.dtype)).to(given.dtype)
        if self.axis is not None:
            rest = given.shape[self.axis] - made.shape[self.axis]
            made = torch.cat([made, given.narrow(self.axis, made.shape[self.axis], rest)], self.axis)
        if self.name is None:
            return replace(call, args=(made, *call.args[1:]))
        return call.asked(**{self.name: made})


def _first(call: Call) -> tuple[str | None, Tensor | None]:
    if call.args:
        return None, call.args[0] if isinstance(call.args[0], Tensor) else None
    name = next((name for name in _NAMES if isinstance(call.kwargs.get(name), Tensor)), None)
    return name, None if name is None else call.kwargs[name]


def _is_bound(name: str) -> bool:
    return "intrablock" not in name and any(word in name for word in _BOUND)

"""Embeddings that change while a pipeline samples, through the callback that diffusers' sampling loops offer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerclear.errors import UnsoundCombination


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Switch:
    """A ``callback_on_step_end`` that takes every sample from one embedding to another, each at a step of its own.

    The rows to replace are found by their content, so that it does not matter whether the pipeline puts the
    unconditional rows in front of them, behind them, or elsewhere.

    Args:
        first: Embeddings in use at first, by the names that the sampling loop has for them, ``(samples, ...)`` each.
        then: Those that follow.
        uses_first: ``(step, number of steps) -> ``whether each sample is given the first, per sample.
        user: The caller's own callback, called before.
        wanted: Names of the tensors that it asked for.

    Raises:
        UnsoundCombination: While sampling, if the loop uses other embeddings than those that it was given.
    """

    first: Mapping[str, Tensor]
    then: Mapping[str, Tensor]
    uses_first: Callable[[int, int], list[bool]]
    user: Callable[..., Any] | None
    wanted: tuple[str, ...]

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        outputs: dict[str, Any] = {}
        if self.user is not None:
            outputs = dict(self.user(pipe, step, timestep, {name: tensors[name] for name in self.wanted}))
        total = len(pipe.scheduler.timesteps)
        now, after = self.uses_first(step, total), self.uses_first(step + 1, total)
        for name in self.first:
            if now != after or name in outputs:
                outputs[name] = self._switched(name, outputs.get(name, tensors[name]), now, after)
        return outputs

    def arguments(self) -> dict[str, Any]:
        """What to call the pipeline with."""
        inputs = list(dict.fromkeys((*self.wanted, *self.first)))
        return {"callback_on_step_end": self, "callback_on_step_end_tensor_inputs": inputs}

    def _switched(self, name: str, current: Tensor, now: list[bool], after: list[bool]) -> Tensor:
        old, new = self._rows(name, now, current), self._rows(name, after, current)
        blocks = current.split(len(old))
        mine = [torch.equal(block, old) for block in blocks]
        if not any(mine):
            raise UnsoundCombination(
                f"expected {name} to stay what the prompt guard made it while the pipeline samples, got other values; "
                "leave out the callback that replaces it, or the prompt guard"
            )
        if now == after:
            return current
        return torch.cat([new if replaced else block for block, replaced in zip(blocks, mine, strict=True)])

    def _rows(self, name: str, first: list[bool], like: Tensor) -> Tensor:
        mask = torch.tensor(first, device=like.device).view(-1, *[1] * (like.ndim - 1))
        return torch.where(mask, self.first[name].to(like), self.then[name].to(like))


def callback_of(given: Mapping[str, Any]) -> tuple[Callable[..., Any] | None, tuple[str, ...]]:
    """The caller's own callback and the tensors that it asked for."""
    user = given.get("callback_on_step_end")
    inputs: Any = getattr(user, "tensor_inputs", None)  # diffusers' PipelineCallback brings its own list
    if inputs is None:
        inputs = given.get("callback_on_step_end_tensor_inputs", ("latents",))
    return user, tuple(inputs)

r"""The named predictions of a pipeline's guider, which knows which branch is which without any arithmetic.

Guiders (diffusers' ``ClassifierFreeGuidance`` and its kin) are handed the network's predictions by name, ``pred_cond``
and ``pred_uncond`` among them, and combine them however they like. For the length of a pipeline call, every guider of
the pipeline tells what it was handed and what it made of that; it computes as before.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steerclear.errors import UnsoundCombination, UnsupportedPipeline

CONDITIONAL, UNCONDITIONAL = "pred_cond", "pred_uncond"

# Guiders whose pred_uncond is not the model's own unconditional prediction but that of a weakened model.
_OTHER_MODEL = frozenset({"AutoGuidance"})


@dataclass(frozen=True, slots=True)
class Named:
    """What a guider was handed at one step, in the order in which the network made it, and its result."""

    guider: str
    predictions: dict[str, Tensor]
    combined: Tensor

    def pair(self, pipe: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - any pipeline
        """``(unconditional, conditional)``.

        Raises:
            UnsoundCombination: If the guider was handed no unconditional prediction at this step.
            UnsupportedPipeline: If what it calls so is something else.
        """
        where = f"{type(pipe).__name__} with {self.guider}"
        if self.guider in _OTHER_MODEL:
            raise UnsupportedPipeline(
                f"{where}: expected pred_uncond to be the model's own unconditional prediction, got a weakened "
                "model's; use ClassifierFreeGuidance, or a guard that does not read branches"
            )
        if UNCONDITIONAL not in self.predictions or CONDITIONAL not in self.predictions:
            raise UnsoundCombination(
                f"{where}: a guard that reads branches needs classifier-free guidance at every step, got only "
                f"{', '.join(self.predictions)}; set start=0 and stop=1 and a guidance scale above 1, or use "
                "SafeDenoiser, which does not need it"
            )
        return self.predictions[UNCONDITIONAL], self.predictions[CONDITIONAL]


def guiders_of(pipe: Any) -> list[Any]:  # noqa: ANN401
    """The components of ``pipe`` that combine named predictions."""
    parts: dict[str, Any] = getattr(pipe, "components", {})
    return [part for part in parts.values() if isinstance(getattr(part, "_input_predictions", None), list)]


@contextmanager
def overheard(pipe: Any, tell: Callable[[Named], None]) -> Generator[None]:  # noqa: ANN401
    """Have every guider of ``pipe`` call ``tell`` after each of its combinations, until the block ends."""
    with ExitStack() as stack:
        for guider in guiders_of(pipe):
            stack.enter_context(_wrapped(guider, tell))
        yield


@contextmanager
def _wrapped(guider: Any, tell: Callable[[Named], None]) -> Generator[None]:  # noqa: ANN401
    own, original = vars(guider).get("forward"), guider.forward

    def forward(**predictions: Tensor | None) -> Any:  # noqa: ANN401 - the guider's own output
        output = original(**predictions)
        tell(Named(type(guider).__name__, {k: v for k, v in predictions.items() if v is not None}, output[0]))
        return output

    vars(guider)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(guider)["forward"]
        else:
            vars(guider)["forward"] = own

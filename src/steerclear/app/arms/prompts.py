"""Guards of the prompt: ``(policies, **settings) -> prompt guard``."""

from collections.abc import Sequence

from steerclear import zoo
from steerclear.app.prompts import negative_prompt
from steerclear.attach import PromptGuard
from steerclear.prompts import FILTERS, SAFREE, NegativeText


def safree(
    policies: Sequence[str],
    alpha: float = 0.01,
    order: str = "code",
    filtered: bool = True,
    negative: str | None = None,
) -> PromptGuard:
    """SAFREE over the policies' concepts; ``negative``: a negative prompt beside it, as all published runs have."""
    concepts = [concept for name in policies for concept in zoo.policy(name).concepts]
    return SAFREE(
        concepts=concepts,
        alpha=alpha,
        order="paper" if order == "paper" else "code",
        filter=FILTERS["nudity"] if filtered else None,
        negative=negative or False,
    )


def negative_text(policies: Sequence[str]) -> PromptGuard:
    """The plain negative prompt, given to the pipeline itself."""
    return NegativeText(text=negative_prompt(policies))

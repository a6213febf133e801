"""Guards that act on the prompt, before the first step: ``attach(pipe, prompts=guard)``."""

from steerclear.prompts.negative import NegativeText, pieces
from steerclear.prompts.safree import FILTERS, NUDITY, SAFREE, SelfValidatingFilter, TokenTest

__all__ = [
    "FILTERS",
    "NUDITY",
    "SAFREE",
    "NegativeText",
    "SelfValidatingFilter",
    "TokenTest",
    "pieces",
]

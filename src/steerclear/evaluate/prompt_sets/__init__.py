"""Public prompt sets, from files of the user's own; never their text. Rows that suggest minors are always dropped."""

from steerclear.evaluate.prompt_sets.catalogue import PUBLISHED, Published
from steerclear.evaluate.prompt_sets.minors import drop_minors, suggests_minors
from steerclear.evaluate.prompt_sets.sets import PromptSet, Protocol, load

__all__ = ["PUBLISHED", "PromptSet", "Protocol", "Published", "drop_minors", "load", "suggests_minors"]

r"""What guards on a text share: its estimate at a step, asked for once, and which texts name the same thing.

Plain negative prompts, SLD and dynamic negative guidance all need :math:`\hat x_n`, the network's estimate under a text
that names what is not wanted: one more evaluation a step. Guards of one ``attach`` that ask for the same text share it.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards.tracking import wide

Text = str | Sequence[str]
"""One text for the batch, or one for each of its samples, in the order in which the pipeline steps them."""


def checked_text(guard: str, text: Any) -> Text:  # noqa: ANN401 - whatever the user gave
    """The text, a sequence as a tuple.

    Raises:
        InvalidInput: If it is no text, or names nothing.
    """
    given: tuple[Any, ...] = (text,) if isinstance(text, str) else tuple(text)
    if not all(isinstance(each, str) for each in given) or not any(each.strip() for each in given):
        raise InvalidInput(f"{guard}: expected a text that names what is not wanted, or one per sample, got {text!r}")
    return text if isinstance(text, str) else given


def estimate(guard: str, text: Text, state: DenoiseState) -> Tensor:
    r""":math:`\hat x_n`, the network's estimate under ``text`` at this step, ``(batch, *shape)``, float32 at least.

    Raises:
        InvalidInput: If there is not one text per sample.
        UnsoundCombination: If the sampler cannot evaluate another prompt.

    Cost:
        One evaluation of the network, none if a guard of this attachment has asked for the same text at this step.
    """
    if state.denoise is None:
        raise UnsoundCombination(
            f"{guard}: expected a sampler that can evaluate another prompt, got one that cannot; guard the pipeline "
            "with steerclear.attach, or use SafeDenoiser, which needs no prompt"
        )
    if not isinstance(text, str) and len(text) != len(state.x_t):
        raise InvalidInput(
            f"{guard}: expected one text per sample, got {len(text)} for {len(state.x_t)} samples; a single string is "
            "for all of them"
        )
    noisy, step, known = state.memory.get(estimate, (None, None, {}))
    if noisy is not state.x_t or step != state.step:
        known = {}
        state.memory[estimate] = (state.x_t, state.step, known)
    key = text if isinstance(text, str) else tuple(text)
    if key not in known:
        known[key] = wide(state.denoise(state.x_t, state.level, text))
    return known[key]


def branch(guard: str, name: str, state: DenoiseState) -> Tensor:
    """A branch of guidance, float32 at least.

    Raises:
        UnsoundCombination: If the sampler lends none.
    """
    if name not in state.branches:
        raise UnsoundCombination(
            f"{guard}: expected the branches of classifier-free guidance, got none; use it through steerclear.attach "
            "on a pipeline with guidance_scale > 1, or use SafeDenoiser, which needs no branches"
        )
    return wide(state.branches[name])


def scale(guard: str, state: DenoiseState, instead: str) -> float:
    """The guidance scale of the step.

    Raises:
        UnsoundCombination: If it is not known.
    """
    if state.guidance_scale is None:
        raise UnsoundCombination(
            f"{guard}: expected a known guidance scale, got none: the sampler does not guide, or not by "
            f"u + g·(c - u) alone; {instead}"
        )
    return state.guidance_scale


def alone(guard: object, text: Text, state: DenoiseState) -> None:
    """Refuses two methods that each scale their own push away from the same thing; called at every step.

    Raises:
        UnsoundCombination: If a guard of another class has declared a text of this trajectory that names it too.
    """
    mine = terms(text)
    declared: dict[type, set[str]] = state.memory.setdefault(alone, {})
    declared.setdefault(type(guard), set()).update(mine)
    for other, named in declared.items():
        shared = sorted(mine & named)
        if other is not type(guard) and shared:
            raise UnsoundCombination(
                f"{type(guard).__name__} and {other.__name__} guard the same trajectory from the same thing "
                f"({', '.join(shared)}): each pushes as if it were alone, and the pushes add up. Use one of them, or "
                "give each concepts of its own"
            )


def terms(text: Text) -> frozenset[str]:
    """The things that a comma-separated text names, without articles, case and plural, so that they can be compared."""
    texts = (text,) if isinstance(text, str) else text
    return frozenset(filter(None, (_term(part) for each in texts for part in each.split(","))))


def _term(part: str) -> str:
    words = part.lower().split()
    while words and words[0] in ("a", "an", "the", "and", "or"):
        words = words[1:]
    name = " ".join(words).strip(" .;:!?\"'")
    return name[:-1] if len(name) > 3 and name.endswith("s") and not name.endswith("ss") else name

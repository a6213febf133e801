"""Guards of a text, the policies' names or another, in place of pictures: ``(pipe, policies, **settings) -> guard``."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from steerclear import zoo
from steerclear.app.prompts import negative_prompt
from steerclear.errors import InvalidInput
from steerclear.guards import SLD, DynamicNegativeGuidance, NegativePrompt
from steerclear.guards.base import Guard, chain, during
from steerclear.prompts import pieces


def negative(
    pipe: Any,  # noqa: ANN401
    policies: Sequence[str],
    text: str | None = None,
    strength: float | None = 4.0,
    start: float = 0.0,
    whole: bool = False,
) -> Guard:
    """The negative prompt as a branch of its own, from the fraction ``start`` of the trajectory on."""
    guard = _each(_texts(pipe, policies, text, whole), partial(_negative, strength=strength))
    return guard if start == 0.0 else during(guard, start=start)


def sld(
    pipe: Any,  # noqa: ANN401
    policies: Sequence[str],
    text: str | None = None,
    preset: str = "medium",
    whole: bool = False,
) -> Guard:
    """Safe Latent Diffusion; ``preset``: ``weak``, ``medium``, ``strong`` or ``max``."""
    presets = {"weak": SLD.weak, "medium": SLD.medium, "strong": SLD.strong, "max": SLD.max}
    if preset not in presets:
        raise InvalidInput(f"sld: expected a preset of {', '.join(presets)}, got {preset!r}")
    return _each(_texts(pipe, policies, text, whole), presets[preset])


def dynamic_negative(
    pipe: Any,  # noqa: ANN401
    policies: Sequence[str],
    text: str | None = None,
    strength: float = 24.0,
    prior: float = 0.2,
    tau: float = 0.1,
    delta: float = 0.0,
    most: float = 0.25,
    whole: bool = False,
) -> Guard:
    """Dynamic negative guidance, ``most`` its highest probability; samplers that add noise."""
    settings: dict[str, Any] = {"strength": strength, "prior": prior, "tau": tau, "delta": delta}
    return _each(_texts(pipe, policies, text, whole), partial(_dynamic, bounds=(1e-6, most), **settings))


def _negative(text: str, **settings: Any) -> Guard:  # noqa: ANN401
    return NegativePrompt(prompt=text, **settings)


def _dynamic(text: str, **settings: Any) -> Guard:  # noqa: ANN401
    return DynamicNegativeGuidance(prompt=text, **settings)


def _texts(pipe: Any, policies: Sequence[str], text: str | None, whole: bool) -> list[str]:  # noqa: ANN401
    """One short text, or every concept of the policies in as few texts as the encoder reads whole."""
    if whole:
        return pieces(pipe, [concept for name in policies for concept in zoo.policy(name).concepts])
    return [negative_prompt(policies) if text is None else text]


def _each(texts: Sequence[str], make: Callable[[str], Guard]) -> Guard:
    return make(texts[0]) if len(texts) == 1 else chain(*(make(text) for text in texts))

"""Guards of the field that look at pictures, references or the one in the making: ``(pipe, policies) -> guard``."""

from collections.abc import Sequence
from typing import Any

from steerclear import zoo
from steerclear.guards import SPELL, AleatoricGuidance, SafetyGuidedFlow, Shield
from steerclear.guards.base import Guard, during

Policies = Sequence[str]


def spell(pipe: Any, policies: Policies, radius: float = 35.0, strength: float = 1.6) -> Guard:  # noqa: ANN401
    """SPELL with overlapping shields solved together and a certificate per picture; blank where there is none."""
    shield = Shield(negation=zoo.joined(policies).negation, radius=radius)
    return SPELL(shields=(shield,), strength=strength, refuse="blank")


def spell_published(pipe: Any, policies: Policies, radius: float = 35.0) -> Guard:  # noqa: ANN401
    """SPELL as published: the plain sum over shields, no certificate."""
    return SPELL.published(zoo.joined(policies).negation, radius=radius)


def flow(pipe: Any, policies: Policies, strength: float = 1e4, stop: float = 0.6) -> Guard:  # noqa: ANN401
    """Safety-Guided Flow at a scale that acts on the shipped model."""
    return during(SafetyGuidedFlow(negation=zoo.joined(policies).negation, strength=strength), stop=stop)


def flow_published(pipe: Any, policies: Policies, preset: str = "nudity-headline") -> Guard:  # noqa: ANN401
    """Safety-Guided Flow at a published scale and window."""
    return SafetyGuidedFlow.published(zoo.joined(policies).negation, preset)


def flow_released(pipe: Any, policies: Policies, preset: str = "nudity-headline") -> Guard:  # noqa: ANN401
    """Safety-Guided Flow as its code runs it: towards the references, and re-noised."""
    return SafetyGuidedFlow.released(zoo.joined(policies).negation, preset)


def sfw(
    pipe: Any,  # noqa: ANN401
    policies: Policies,
    strength: float | None = None,
    threshold: float | None = None,
) -> Guard:
    """The SFW sampler: a CLIP's evidence for the policies' concepts in the picture that is being made."""
    return zoo.sfw(pipe, policies, strength=strength, threshold=threshold)


def aleatoric(pipe: Any, start: int = 0) -> Guard:  # noqa: ANN401
    """Aleatoric uncertainty guidance, a method for quality that knows no policies."""
    return AleatoricGuidance.published(start=start)

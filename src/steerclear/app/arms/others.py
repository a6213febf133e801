"""Guards of the shipped models without text: ``emoji-dit`` (classes) and ``avatars-ddpm`` (no prompt at all)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steerclear.errors import InvalidInput
from steerclear.evaluate import controls
from steerclear.guards import SPELL, SafeDenoiser, SafetyGuidedFlow, Shield
from steerclear.guards.base import Guard, during
from steerclear.negation import NegationSet
from steerclear.zoo import avatars, class_guard, class_redirect


def class_denoiser(
    pipe: Any,  # noqa: ANN401
    policies: Sequence[str],
    classes: Sequence[str] | None = None,
    steps: int = 20,
    cfg: float = 2.0,
) -> Guard:
    """The Safe Denoiser for classes, on references as the model denoises them; ``steps``, ``cfg``: the task's."""
    return class_guard(pipe, policies, classes=classes, num_inference_steps=steps, guidance_scale=cfg)


def redirect(
    pipe: Any,  # noqa: ANN401
    policies: Sequence[str],
    classes: Sequence[str] | None = None,
    steps: int = 20,
    cfg: float = 2.0,
) -> Guard:
    """A sample that becomes unsafe led along a safe reference of its class; ``steps``, ``cfg``: the task's."""
    return class_redirect(pipe, policies, classes=classes, num_inference_steps=steps, guidance_scale=cfg)


def avatars_without(pipe: Any, attribute: str = "glasses", strength: float = 1.0) -> Guard:  # noqa: ANN401
    """The Safe Denoiser that leaves an attribute of avatars out."""
    return avatars.without(attribute, strength=strength)


def avatars_forget(pipe: Any, ids: Sequence[str] | None = None, gate: float = 0.25) -> Guard:  # noqa: ANN401
    """The Safe Denoiser that forgets individual avatars, all six unless some are named."""
    return avatars.forget(avatars.individuals().ids if ids is None else ids, gate=gate)


def avatars_other(
    pipe: Any,  # noqa: ANN401
    method: str,
    attribute: str = "glasses",
    references: str = "unsafe",
    radius: float = 5.0,
    strength: float = 300.0,
) -> Guard:
    """Another method over the same avatars; ``references``: ``unsafe``, ``benign`` or ``random``."""
    worn, rest = avatars.wearing(attribute)
    sets: Mapping[str, Callable[[], NegationSet]] = {
        "unsafe": lambda: worn,
        "benign": lambda: rest,
        "random": lambda: controls.random_references(worn),
    }
    if references not in sets:
        raise InvalidInput(f"avatars-other: expected references of {', '.join(sets)}, got {references!r}")
    chosen = sets[references]()
    methods: Mapping[str, Callable[[], Guard]] = {
        "published": lambda: SafeDenoiser.published(chosen),
        "mean-vector": lambda: controls.mean_vector(chosen),
        "spell": lambda: SPELL(shields=(Shield(negation=chosen, radius=radius),), refuse="blank"),
        "flow-published": lambda: SafetyGuidedFlow.published(chosen),
        "flow": lambda: during(SafetyGuidedFlow(negation=chosen, strength=strength), stop=0.6),
    }
    if method not in methods:
        raise InvalidInput(f"avatars-other: expected a method of {', '.join(methods)}, got {method!r}")
    return methods[method]()

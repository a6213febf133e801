"""What a task file may put into an arm, by name: guards ``(pipe, **settings) -> guard``, prompt guards
``(**settings) -> prompt guard``, and guards that live in weights ``(**settings) -> (pipe -> block)``.

Module-level functions, so that workers in other processes find them.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steerclear.app.arms import images, others, prompts, shipped, texts, weights
from steerclear.attach import Coupling, PromptGuard
from steerclear.evaluate.task import Weights
from steerclear.guards.base import Guard

GUARDS: dict[str, Callable[..., Guard]] = {
    "recommended": shipped.recommended,
    "release": shipped.released,
    "latent-release": shipped.latent_release,
    "tracked-release": shipped.tracked,
    "composed": shipped.composed,
    "safe-denoiser": shipped.two_sample,
    "safe-denoiser-exact": shipped.exact,
    "safe-denoiser-dynamic": shipped.dynamic,
    "safe-denoiser-published": shipped.published,
    "negative-prompt": texts.negative,
    "sld": texts.sld,
    "dynamic-negative": texts.dynamic_negative,
    "spell": images.spell,
    "spell-published": images.spell_published,
    "safety-guided-flow": images.flow,
    "safety-guided-flow-published": images.flow_published,
    "safety-guided-flow-released": images.flow_released,
    "sfw": images.sfw,
    "aleatoric": images.aleatoric,
    "class-redirect": others.redirect,
    "class-safe-denoiser": others.class_denoiser,
    "avatars-without": others.avatars_without,
    "avatars-forget": others.avatars_forget,
    "avatars-other": others.avatars_other,
    "control-mean-vector": shipped.mean_vector,
    "control-renoise-only": shipped.renoise_only,
    "own": shipped.own,
}

COUPLING: dict[str, Coupling] = {
    "safe-denoiser-published": "renoise",
    "control-mean-vector": "renoise",
    "control-renoise-only": "renoise",
    "safety-guided-flow-released": "renoise",
    "sfw": "sample",
}
"""How a guard was published to meet the sampler, where that is not ``"score"``; tasks say it themselves."""

PROMPTS: dict[str, Callable[..., PromptGuard]] = {
    "safree": prompts.safree,
    "negative-text": prompts.negative_text,
}

WEIGHTS: dict[str, Callable[..., Weights]] = {"safegen": weights.safegen}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A kind as people see it: its name, where it acts, what it is in one line, its settings with their defaults."""

    kind: str
    acts_on: str
    what: str
    settings: Mapping[str, Any]


def listed() -> list[Listed]:
    """Every kind that takes policies."""
    tables: dict[str, Mapping[str, Callable[..., Any]]] = {
        "denoised estimate": GUARDS,
        "prompt": PROMPTS,
        "weights": WEIGHTS,
    }
    return [
        Listed(kind=kind, acts_on=place, what=(make.__doc__ or "").split("\n")[0], settings=_settings(make))
        for place, table in tables.items()
        for kind, make in table.items()
        if "policies" in inspect.signature(make).parameters
    ]


def sampling_of(kinds: Sequence[str], steps: int | None, cfg: float | None) -> dict[str, Any]:
    """Settings ``steps`` and ``cfg`` of a call, as far as one of these kinds takes them."""
    call = {name: value for name, value in (("steps", steps), ("cfg", cfg)) if value is not None}
    taken = [inspect.signature(GUARDS[kind]).parameters if kind in GUARDS else {} for kind in kinds]
    return {name: value for name, value in call.items() if any(name in each for each in taken)}


def _settings(make: Callable[..., Any]) -> dict[str, Any]:
    taken = inspect.signature(make).parameters.values()
    return {item.name: item.default for item in taken if item.name not in ("pipe", "policies")}

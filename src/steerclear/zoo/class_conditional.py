"""Guards for a class-conditional model whose classes hold safe and unsafe concepts.

>>> pipe = steerclear.load("emoji-dit")
>>> guard = zoo.class_redirect(pipe, "alcohol", classes=["food-drink"])
>>> with steerclear.attach(pipe, guard):
...     pipe(pipe.get_label_ids(["food-drink"]), guidance_scale=2.0, num_inference_steps=20)
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from steerclear.errors import InvalidInput
from steerclear.zoo.kept import kept
from steerclear.zoo.models import ROOT
from steerclear.zoo.policies import joined

if TYPE_CHECKING:
    from steerclear.guards.safe_denoiser import SafeDenoiser
    from steerclear.guards.safe_redirect import SafeRedirect
    from steerclear.guards.seen_posterior import SeenPosterior
    from steerclear.guards.seen_references import SeenReferences
    from steerclear.negation import NegationSet

MODEL = "emoji-dit"
#: Of every reference drawing: as it is, and mirrored.
VARIANTS = frozenset({"0", "1"})
#: Chosen on development seeds; docs/class-conditional.md says how.
REDIRECT: Mapping[str, float] = {"gate": 0.5, "start": 0.2, "hold": 0.75, "width": 0.5, "until": 0.65}
SAFE_DENOISER: Mapping[str, float] = {"gate": 0.3, "max_beta": 1e4, "width": 0.5, "slope": 2.0}


@cache
def classes() -> Mapping[str, tuple[str, ...]]:
    """What each class of the shipped class-conditional model holds, in the order of its labels."""
    content: dict[str, list[str]] = json.loads((ROOT / MODEL / "classes.json").read_text(encoding="utf-8"))
    return {name: tuple(members) for name, members in content.items()}


def class_references(
    names: str | Iterable[str], of: Iterable[str] | None = None
) -> tuple["NegationSet", "NegationSet"]:
    """The references of policies among what some classes hold: unsafe ones, and safe ones of the same classes.

    Args:
        names: Of :func:`~steerclear.zoo.policies`.
        of: Classes; all of them, if left out.

    Raises:
        InvalidInput: For an unknown name or class, or if none of the classes holds anything of the policies.
    """
    policy = joined(names)
    unsafe = set(policy.concepts)
    chosen = list(classes()) if of is None else list(of)
    unknown = [name for name in chosen if name not in classes()]
    if unknown or not chosen:
        raise InvalidInput(f"class_references: expected classes among {', '.join(classes())}, got {chosen}")
    drawn = {concept for name in chosen for concept in classes()[name]}
    if not drawn & unsafe:
        raise InvalidInput(f"class_references: expected classes that hold something of {policy.name}, got {chosen}")
    return _some(policy.negation, drawn & unsafe), _some(policy.safe, drawn - unsafe)


def class_redirect(
    pipe: Any,  # noqa: ANN401 - a DiTPipeline
    names: str | Iterable[str],
    *,
    classes: Iterable[str] | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 2.0,
    **settings: float,
) -> "SafeRedirect":
    """The recommended guard: a sample that is becoming unsafe is led along a safe reference of its class.

    Args:
        pipe: The shipped ``emoji-dit``, or one with the same labels and autoencoder.
        names: Of :func:`~steerclear.zoo.policies`.
        classes: Those that will be drawn; all of them, if left out.
        num_inference_steps: Of the calls that will be guarded.
        guidance_scale: Of the calls that will be guarded.
        settings: In place of ``REDIRECT``: of the guard, or ``width``, ``slope``, ``until`` of its weight.

    Raises:
        InvalidInput: As :func:`class_references`.

    Cost:
        Once per machine, two trajectories per reference: 34 s on a core for food-drink alone, 2.6 min for all policies
        and classes. They are kept in the user's cache folder: the next process takes some seconds.
    """
    from steerclear.guards import SafeRedirect

    call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    negation, weight, rest = _evidence(pipe, names, classes, call, {**REDIRECT, **settings})
    return SafeRedirect(negation=negation, weight=weight, **rest)


def class_guard(
    pipe: Any,  # noqa: ANN401 - a DiTPipeline
    names: str | Iterable[str],
    *,
    classes: Iterable[str] | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 2.0,
    **settings: float,
) -> "SafeDenoiser":
    """The Safe Denoiser with the same evidence, for comparison; ``settings`` in place of ``SAFE_DENOISER``."""
    from steerclear.guards import SafeDenoiser

    call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    negation, weight, rest = _evidence(pipe, names, classes, call, {**SAFE_DENOISER, **settings})
    return SafeDenoiser(negation=negation, weight=weight, **rest)


def _evidence(
    pipe: Any,  # noqa: ANN401
    names: str | Iterable[str],
    classes: Iterable[str] | None,
    call: dict[str, Any],
    settings: dict[str, float],
) -> tuple["NegationSet", "SeenPosterior", dict[str, float]]:
    """The unsafe references, the weight, and the settings that are not the weight's."""
    from steerclear.guards import SeenPosterior

    negation, safe = class_references(names, classes)
    own = {key: settings.pop(key) for key in ("width", "slope", "until", "prior") if key in settings}
    return negation, SeenPosterior(references=see_classes(pipe, negation, safe, **call), **own), settings


def see_classes(
    pipe: Any,  # noqa: ANN401 - a DiTPipeline
    negation: "NegationSet",
    safe: "NegationSet",
    *,
    noises: int = 2,
    components: int = 96,
    batch: int = 32,
    **call: Any,  # noqa: ANN401 - of the pipeline
) -> "SeenReferences":
    """Both sets as a class-conditional pipeline denoises them, guidance included; every reference under its class.

    The walks are kept in the user's cache folder. What tells one pipeline from another is what it makes of the first
    reference of every class: weights, precision, sampler, steps, guidance and code all have a part in that.

    Args:
        pipe: With ``get_label_ids``.
        negation: What to steer away from; labels are concepts of :func:`classes`.
        safe: What to go on drawing, likewise.
        noises: Walks along each reference, each with its own noise.
        components: Principal components to keep.
        batch: References at a time.
        call: ``num_inference_steps`` (the number of levels), ``guidance_scale``.
    """
    from steerclear.attach.walk import walk_along
    from steerclear.guards import SeenReferences

    class_of = {concept: name for name, held in classes().items() for concept in held}
    labels = (*negation.labels, *safe.labels) * noises
    latents = torch.cat([negation.latents, safe.latents]).repeat(noises, *([1] * len(negation.space.shape)))
    ids = pipe.get_label_ids([class_of[label] for label in labels])
    walked = partial(walk_along, pipe, guided=True, batch=batch, **call)
    first = [ids.index(each) for each in dict.fromkeys(ids)]
    key = [walked(latents[first], [ids[row] for row in first]), latents, ids, batch]
    log_snr, estimates = kept(key, lambda: walked(latents, ids))
    return SeenReferences.of(
        log_snr,
        estimates,
        labels=labels,
        captions=[class_of[label] for label in labels],
        unsafe=frozenset(negation.labels),
        space=negation.space,
        components=components,
    )


def _some(references: "NegationSet", labels: set[str]) -> "NegationSet":
    """The chosen variants with these labels."""
    pairs = zip(references.ids, references.labels, strict=True)
    return references.remove([i for i, label in pairs if label not in labels or i.rsplit("/", 1)[1] not in VARIANTS])

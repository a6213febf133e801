"""The policies that ship with the package: what to steer away from, beside what to keep, with calibrated settings.

They live in ``policies/``: one negation set per policy, a safe reference set, and ``policies.json``, written by the
recipe that made them::

    {"weapons": {"file": "weapons.safetensors", "safe": "safe.safetensors", "seen": "seen.safetensors",
                 "concepts": ["dagger", ...],
                 "settings": {"weight": {"bandwidth": 4.0, ...}, "seen": {"width": 0.3, "false_positives": 0.03},
                              "release": {"strength": 1.0, "gate": 0.5}, "safe_denoiser": {"max_beta": 4.0, ...}}}, ...}

``seen`` may be missing: then evidence comes from clean latents.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerclear.errors import InvalidInput, NegationFileError

if TYPE_CHECKING:
    from steerclear.guards.base import Guard
    from steerclear.guards.seen import Seen
    from steerclear.guards.seen_references import SeenReferences
    from steerclear.guards.weights import TwoSample
    from steerclear.negation import NegationSet

ROOT = Path(__file__).parent / "policies"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Policy:
    """One thing to steer away from, or several with the same settings.

    Args:
        name: Its name, or the names joined by ``+``.
        concepts: What it covers, as the model and the judge name it.
        negation: Pictures to steer away from.
        safe: Pictures to go on drawing.
        seen: Both as the shipped model denoises them, if that was recorded.
        settings: Calibrated for the shipped model; what the guards below read.
    """

    name: str
    concepts: tuple[str, ...]
    negation: "NegationSet"
    safe: "NegationSet"
    settings: Mapping[str, Any]
    seen: "SeenReferences | None" = None


def policies() -> tuple[str, ...]:
    """Names of the shipped policies."""
    return tuple(_table())


def concepts(name: str) -> tuple[str, ...]:
    """What a policy covers, without loading its pictures."""
    return tuple(_entry(name)["concepts"])


@cache
def policy(name: str) -> Policy:
    """A shipped policy.

    Raises:
        InvalidInput: For an unknown name; the message lists the known ones.
        NegationFileError: If its files are missing or damaged.
    """
    entry = _entry(name)
    return Policy(
        name=name,
        concepts=tuple(entry["concepts"]),
        negation=_set(entry["file"]),
        safe=_set(entry["safe"]),
        settings=entry.get("settings", {}),
        seen=_seen(entry["seen"]) if "seen" in entry else None,
    )


def guard(names: str | Iterable[str], *, strength: float | None = None) -> "Guard":
    """The recommended guard for one policy or several, calibrated for the shipped model.

    Policies with equal settings share one guard over the union of their negation sets; others follow one another.

    Args:
        names: Of :func:`policies`.
        strength: In place of the calibrated one.

    Raises:
        InvalidInput: Without a name, or for an unknown one.
        NegationFileError: If files are missing or damaged.
    """
    return _chained([recommended(each) for each in _merged(names, strength)])


def safe_denoiser(names: str | Iterable[str], *, strength: float | None = None) -> "Guard":
    """The plain Safe Denoiser with the same evidence, for comparison. Same arguments and errors as :func:`guard`."""
    return _chained([plain(each) for each in _merged(names, strength)])


def recommended(policy: Policy) -> "Guard":
    """Conditional release to the nearest safe prompt. The one place to change when a better guard is found."""
    from steerclear.guards import ConditionalRelease

    settings = policy.settings.get("release", {})
    if policy.seen is None:
        return ConditionalRelease(negation=policy.negation, weight=latent_weight(policy), **settings)
    weight = seen_weight(policy)
    return ConditionalRelease(negation=policy.negation, weight=weight, fallback=weight.substitute, **settings)


def plain(policy: Policy) -> "Guard":
    """The two-sample Safe Denoiser with evidence from clean latents."""
    from steerclear.guards import SafeDenoiser

    weight = latent_weight(policy)
    return SafeDenoiser(negation=policy.negation, weight=weight, **policy.settings.get("safe_denoiser", {}))


def seen_weight(policy: Policy) -> "Seen":
    """Evidence against the references as the model denoises them.

    Raises:
        InvalidInput: If the policy has none.
    """
    from steerclear.guards import Seen

    if policy.seen is None:
        raise InvalidInput(f"policy {policy.name}: expected references seen through the model, got none; use guard()")
    references = policy.seen.only(frozenset(policy.concepts), frozenset(policy.safe.labels))
    return Seen.calibrated(references, **policy.settings.get("seen", {}))


def latent_weight(policy: Policy) -> "TwoSample":
    """Evidence against the references themselves, in principal components."""
    from steerclear.guards import Subspace, TwoSample

    settings = dict(policy.settings.get("weight", {}))
    components = settings.pop("components", None)
    subspace = Subspace.principal(policy.negation, policy.safe, components) if components else None
    return TwoSample(safe=policy.safe, subspace=subspace, **settings)


def joined(names: str | Iterable[str]) -> Policy:
    """Policies of equal settings as one.

    Raises:
        InvalidInput: Without a name, for an unknown one, or for policies that differ in their settings.
    """
    merged = _merged(names, None)
    if len(merged) > 1:
        raise InvalidInput(f"policies: expected equal settings, got {', '.join(each.name for each in merged)}")
    return merged[0]


def _chained(guards: list["Guard"]) -> "Guard":
    from steerclear.guards.base import chain

    return guards[0] if len(guards) == 1 else chain(*guards)


def _merged(names: str | Iterable[str], strength: float | None) -> list[Policy]:
    """The named policies, those with the same safe set and settings joined into one."""
    override = {} if strength is None else {"strength": float(strength)}
    wanted = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    if not wanted:
        raise InvalidInput(f"guard: expected at least one policy of {', '.join(policies())}; got none")
    groups: dict[str, list[str]] = {}
    for name in wanted:
        entry = _entry(name)
        key = json.dumps([entry["safe"], entry.get("seen"), entry.get("settings", {})], sort_keys=True)
        groups.setdefault(key, []).append(name)
    return [_joined([policy(name) for name in group], override) for group in groups.values()]


def _joined(group: list[Policy], override: Mapping[str, Any]) -> Policy:
    first, *others = group
    negation = first.negation
    for other in others:
        negation = negation.add(other.negation)
    return Policy(
        name="+".join(each.name for each in group),
        concepts=tuple(concept for each in group for concept in each.concepts),
        negation=negation,
        safe=first.safe,
        seen=first.seen,
        settings={
            **first.settings,
            **{part: {**first.settings.get(part, {}), **override} for part in ("release", "safe_denoiser")},
        },
    )


def _entry(name: str) -> dict[str, Any]:
    table = _table()
    if name not in table:
        raise InvalidInput(f"policy: expected one of {', '.join(table)}, got {name!r}")
    return table[name]


@cache
def _table() -> dict[str, dict[str, Any]]:
    path = ROOT / "policies.json"
    try:
        table: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NegationFileError(f"policies: expected {path}, found none; reinstall steerclear") from error
    except ValueError as error:
        raise NegationFileError(f"policies: expected JSON in {path}, got {error}; reinstall steerclear") from error
    return table


@cache
def _seen(file: str) -> "SeenReferences":
    from steerclear.guards import SeenReferences

    return SeenReferences.load(ROOT / file)


@cache
def _set(file: str) -> "NegationSet":
    from steerclear.negation import NegationSet

    return NegationSet.load(ROOT / file)

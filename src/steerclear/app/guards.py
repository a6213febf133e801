"""From options of the command line to a guard and its spec. Guards have names only here, at the edge."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerclear import zoo
from steerclear.app.files import sha256
from steerclear.app.negation import digest, followed
from steerclear.errors import InvalidInput
from steerclear.negation import NegationStatistics

if TYPE_CHECKING:
    from steerclear.attach import PromptGuard
    from steerclear.evaluate.task import Weights
    from steerclear.guards import Guard

OWN = ("safe-denoiser", "dynamic", "published")
"""Kinds that take the user's own negation sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardChoice:
    """What the user asked for.

    Args:
        kinds: Applied one after the other; none picks what the rest needs. For policies those of
            :mod:`steerclear.app.arms` that take policies, for own sets those of :data:`OWN`.
        policies: Names of shipped policies.
        negations: Own negation sets: files, statistics, or stores, which the guard follows.
        safe: A safe reference set for them, likewise.
        strength: In place of the default.
        bandwidth: Kernel width for own sets, in latent units; ``None`` is the step's own noise level.
        prior: Unsafe share of what the model would draw, for own sets.
        settings: Of the kinds, by name, for policies.

    Raises:
        InvalidInput: For a combination in which something would be silently ignored.
    """

    kinds: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    negations: tuple[Path, ...] = ()
    safe: Path | None = None
    strength: float | None = None
    bandwidth: float | None = None
    prior: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)

    def __post_init__(self) -> None:
        if self.given and not (self.policies or self.negations or free(self.kinds)):
            raise InvalidInput("guard: expected --policy NAME or --negation FILE to steer away from, got neither")
        if not self.negations and (self.safe or self.bandwidth is not None or self.prior is not None):
            raise InvalidInput(
                "guard: --safe, --bandwidth and --prior are for --negation FILE; policies bring their own"
            )
        if "recommended" in self.kinds and self.negations:
            raise InvalidInput("guard: --guard recommended is calibrated for --policy; use safe-denoiser or dynamic")
        if self.policies and {"dynamic", "published"} & set(self.kinds):
            raise InvalidInput("guard: --guard dynamic and published are for --negation FILE; use recommended")
        if self.negations and (unknown := sorted(set(self.kinds) - set(OWN))):
            raise InvalidInput(f"guard: expected {', '.join(OWN)} for --negation, got {', '.join(unknown)}")
        if self.negations and self.settings:
            raise InvalidInput(f"guard: --set is for --policy, got {', '.join(self.settings)} beside --negation")
        if "published" in self.kinds and (len(self.kinds) > 1 or self.safe or self.bandwidth or self.prior):
            raise InvalidInput("guard: --guard published re-noises the sample and stands alone; give only --negation")

    @property
    def given(self) -> bool:
        """Whether any option about guards was used."""
        asked = (self.kinds, self.policies, self.negations, self.safe, self.settings, self.strength is not None)
        return any(asked)

    @property
    def coupling(self) -> str:
        """How the guards meet the sampler: as they were published.

        Raises:
            InvalidInput: If two kinds need different ones.
        """
        from steerclear.app.arms import COUPLING

        wanted = {"renoise" if kind == "published" else COUPLING.get(kind, "score") for kind in self.kinds} or {"score"}
        if len(wanted) > 1:
            raise InvalidInput(
                f"guard: expected guards that meet the sampler in one way, got {', '.join(sorted(wanted))} among "
                f"{', '.join(self.kinds)}; use them one at a time"
            )
        return wanted.pop()

    def spec(self) -> dict[str, Any]:
        """The choice as plain data, with the content of files instead of their names: equal specs, equal guards."""
        return {
            "kinds": list(self.kinds),
            "policies": {name: _digest_of_policy(name) for name in self.policies},
            "negations": [digest(path) for path in self.negations],
            "safe": None if self.safe is None else digest(self.safe),
            "strength": self.strength,
            "bandwidth": self.bandwidth,
            "prior": self.prior,
            "coupling": self.coupling,
            "settings": dict(self.settings),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chosen:
    """What a choice comes to for one pipeline: guards in order, a prompt guard, weights; any of them may be missing."""

    guards: "tuple[Guard, ...]" = ()
    prompts: "PromptGuard | None" = None
    weights: "Weights | None" = None


def build(choice: GuardChoice, pipe: Any) -> Chosen:  # noqa: ANN401  (some diffusers pipeline)
    """The guards; nothing only if the choice is nothing.

    Raises:
        SteerclearError: If a policy is unknown, a file is damaged, or a value is out of range.
        InvalidInput: For an unknown kind, or a setting that none of the kinds has.
    """
    from steerclear.app.arms import GUARDS, PROMPTS, WEIGHTS

    own = choice.kinds or (("safe-denoiser",) if choice.safe else ("dynamic",))
    guards = [_own(kind, path, choice) for path in choice.negations for kind in own]
    if choice.negations and not choice.policies:
        return Chosen(guards=tuple(guards))
    if not choice.given:
        return Chosen()
    kinds = choice.kinds or ("recommended",)
    _ = choice.coupling  # refuses kinds that do not go together before anything is loaded
    tables: tuple[Mapping[str, Callable[..., Any]], ...] = (GUARDS, PROMPTS, WEIGHTS)
    known = {name: make for table in tables for name, make in table.items() if name != "own"}
    if unknown := [kind for kind in kinds if kind not in known]:
        raise InvalidInput(f"guard: expected a kind of {', '.join(known)}; got {', '.join(unknown)}")
    given = dict(choice.settings) | ({} if choice.strength is None else {"strength": choice.strength})
    taken = {name for kind in kinds for name in _takes(known[kind]) if name not in ("pipe", "policies")}
    if lost := sorted(set(given) - taken):
        raise InvalidInput(
            f"guard: {', '.join(kinds)} can be set {', '.join(sorted(taken)) or 'nothing'}, got {', '.join(lost)}"
        )
    made: list[list[Any]] = [[], [], []]
    for kind in kinds:
        settings = {name: value for name, value in given.items() if name in _takes(known[kind])}
        if "policies" in _takes(known[kind]):
            settings["policies"] = list(choice.policies)
        place = next(index for index, table in enumerate(tables) if kind in table)
        made[place].append(known[kind](pipe, **settings) if place == 0 else known[kind](**settings))
    if max(len(made[1]), len(made[2])) > 1:
        raise InvalidInput(f"guard: expected one guard of prompts and one of weights, got more in {', '.join(kinds)}")
    return Chosen(guards=(*made[0], *guards), prompts=next(iter(made[1]), None), weights=next(iter(made[2]), None))


def free(kinds: Sequence[str]) -> bool:
    """Whether all of these kinds are guards that take no policies."""
    from steerclear.app.arms import GUARDS

    return bool(kinds) and all(kind in GUARDS and "policies" not in _takes(GUARDS[kind]) for kind in kinds)


def _takes(make: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(make).parameters)


def _own(kind: str, path: Path, choice: GuardChoice) -> "Guard":
    """A guard over the user's own negation set."""
    from steerclear.guards import Dynamic, SafeDenoiser, TwoSample

    negation = followed(path)
    if kind == "published":
        scale = {} if choice.strength is None else {"scale": choice.strength}
        if isinstance(negation, NegationStatistics):
            raise InvalidInput(
                f"guard: --guard published compares with every item, got statistics, which keep none, in {path}; "
                "use --guard safe-denoiser or dynamic, or give the set that they were made of"
            )
        return SafeDenoiser.published(negation, **scale)
    strength = 1.0 if choice.strength is None else choice.strength
    if kind == "dynamic":
        prior = 0.1 if choice.prior is None else choice.prior
        return SafeDenoiser(
            negation=negation, weight=Dynamic(prior=prior, bandwidth=choice.bandwidth), strength=strength
        )
    if choice.safe is None:
        raise InvalidInput(
            "guard: safe-denoiser compares with a safe reference set, got none; add --safe FILE "
            "(steerclear negate build makes one), or use --guard dynamic with a sampler that adds noise"
        )
    prior = 0.5 if choice.prior is None else choice.prior
    weight = TwoSample(safe=followed(choice.safe), prior=prior, bandwidth=choice.bandwidth)
    return SafeDenoiser(negation=negation, weight=weight, strength=strength)


def _digest_of_policy(name: str) -> str:
    policy = zoo.policy(name)
    text = repr([policy.concepts, policy.negation.digests, policy.safe.digests, sorted(policy.settings.items())])
    return "sha256:" + sha256(text.encode())

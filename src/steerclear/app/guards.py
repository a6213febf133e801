"""From options of the command line to a guard and its spec. Guards have names only here, at the edge."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerclear import zoo
from steerclear.app.files import sha256
from steerclear.errors import InvalidInput, NegationFileError

if TYPE_CHECKING:
    from steerclear.guards import Guard

KINDS = ("recommended", "safe-denoiser", "dynamic", "published")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardChoice:
    """What the user asked for.

    Args:
        kinds: Of :data:`KINDS`, applied one after the other; none picks what the rest needs.
        policies: Names of shipped policies.
        negations: Files of own negation sets.
        safe: File of a safe reference set for them.
        strength: In place of the default.
        bandwidth: Kernel width for own sets, in latent units; ``None`` is the step's own noise level.
        prior: Unsafe share of what the model would draw, for own sets.

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

    def __post_init__(self) -> None:
        if self.given and not (self.policies or self.negations):
            raise InvalidInput("guard: expected --policy NAME or --negation FILE to steer away from, got neither")
        if not self.negations and (self.safe or self.bandwidth is not None or self.prior is not None):
            raise InvalidInput(
                "guard: --safe, --bandwidth and --prior are for --negation FILE; policies bring their own"
            )
        if "recommended" in self.kinds and self.negations:
            raise InvalidInput("guard: --guard recommended is calibrated for --policy; use safe-denoiser or dynamic")
        if self.policies and {"dynamic", "published"} & set(self.kinds):
            raise InvalidInput("guard: --guard dynamic and published are for --negation FILE; use recommended")
        if "published" in self.kinds and (len(self.kinds) > 1 or self.safe or self.bandwidth or self.prior):
            raise InvalidInput("guard: --guard published re-noises the sample and stands alone; give only --negation")

    @property
    def given(self) -> bool:
        """Whether any option about guards was used."""
        return bool(self.kinds or self.strength is not None or self.policies or self.negations or self.safe)

    @property
    def coupling(self) -> str:
        """How the guards meet the sampler."""
        return "renoise" if "published" in self.kinds else "score"

    def spec(self) -> dict[str, Any]:
        """The choice as plain data, with the content of files instead of their names: equal specs, equal guards."""
        return {
            "kinds": list(self.kinds),
            "policies": {name: _digest_of_policy(name) for name in self.policies},
            "negations": [_digest(path) for path in self.negations],
            "safe": None if self.safe is None else _digest(self.safe),
            "strength": self.strength,
            "bandwidth": self.bandwidth,
            "prior": self.prior,
            "coupling": self.coupling,
        }


def build(choice: GuardChoice) -> "tuple[Guard, ...]":
    """The guards, in order; empty only if the choice is.

    Raises:
        SteerclearError: If a policy is unknown, a file is damaged, or a value is out of range.
    """
    makers = {"recommended": zoo.guard, "safe-denoiser": zoo.safe_denoiser}
    own = choice.kinds or (("safe-denoiser",) if choice.safe else ("dynamic",))
    shipped = (choice.kinds or ("recommended",)) if choice.policies else ()
    guards = [makers[kind](choice.policies, strength=choice.strength) for kind in shipped]
    guards += [_own(kind, path, choice) for path in choice.negations for kind in own]
    return tuple(guards)


def _own(kind: str, path: Path, choice: GuardChoice) -> "Guard":
    """A guard over the user's own negation set."""
    from steerclear.guards import Dynamic, SafeDenoiser, TwoSample
    from steerclear.negation import NegationSet

    negation = NegationSet.load(path)
    if kind == "published":
        scale = {} if choice.strength is None else {"scale": choice.strength}
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
    weight = TwoSample(safe=NegationSet.load(choice.safe), prior=prior, bandwidth=choice.bandwidth)
    return SafeDenoiser(negation=negation, weight=weight, strength=strength)


def _digest(path: Path) -> str:
    try:
        return "sha256:" + sha256(path.read_bytes())
    except OSError as error:
        raise NegationFileError(
            f"{path}: expected a negation set, got {error.strerror}; make one with: steerclear negate build"
        ) from error


def _digest_of_policy(name: str) -> str:
    policy = zoo.policy(name)
    text = repr([policy.concepts, policy.negation.digests, policy.safe.digests, sorted(policy.settings.items())])
    return "sha256:" + sha256(text.encode())

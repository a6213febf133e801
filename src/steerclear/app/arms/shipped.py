"""The guards of shipped policies, and of the user's own negation sets: ``(pipe, **settings) -> guard``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerclear import zoo
from steerclear.app.guards import GuardChoice, build
from steerclear.errors import InvalidInput
from steerclear.evaluate import controls
from steerclear.guards import ConditionalRelease, Dynamic, SafeDenoiser, TrackedRelease, TwoSample
from steerclear.guards.base import Guard, chain
from steerclear.guards.weights import Weight

References = Sequence[str]


def recommended(pipe: Any, policies: References, strength: float | None = None) -> Guard:  # noqa: ANN401
    """What ``zoo.guard`` gives: conditional release to the nearest safe prompt."""
    return zoo.guard(policies, strength=strength)


def released(pipe: Any, policies: References, strength: float = 1.0) -> Guard:  # noqa: ANN401
    """Conditional release with the same evidence, to the empty prompt: no further network evaluation."""
    policy = zoo.joined(policies)
    return _to_empty(policy, zoo.seen_weight(policy), strength)


def latent_release(pipe: Any, policies: References, strength: float = 1.5) -> Guard:  # noqa: ANN401
    """Conditional release to the empty prompt with evidence from clean latents in principal components."""
    policy = zoo.joined(policies)
    return _to_empty(policy, zoo.latent_weight(policy), strength)


def _to_empty(policy: zoo.Policy, weight: Weight, strength: float) -> Guard:
    return ConditionalRelease(negation=policy.negation, weight=weight, strength=strength, gate=_gate(policy))


def tracked(
    pipe: Any,  # noqa: ANN401
    policies: References,
    drop: float = 0.05,
    tau: float = 1.0,
    max_beta: float = 4.0,
    evidence: str = "seen",
) -> Guard:
    """The exact mixture target, its release tracked along the trajectory; samplers that add noise."""
    weights = {"seen": zoo.seen_weight, "latents": zoo.latent_weight}
    if evidence not in weights:
        raise InvalidInput(f"tracked-release: expected evidence of {', '.join(weights)}, got {evidence!r}")
    policy = zoo.joined(policies)
    weight = weights[evidence](policy)
    return TrackedRelease(
        negation=policy.negation, weight=weight, drop=drop, tau=tau, max_beta=max_beta, gate=_gate(policy)
    )


def two_sample(pipe: Any, policies: References, strength: float | None = None) -> Guard:  # noqa: ANN401
    """The Safe Denoiser with the two-sample weight in principal components of clean latents."""
    return zoo.safe_denoiser(policies, strength=strength)


def exact(pipe: Any, policies: References, prior: float = 0.1, max_beta: float = 4.0) -> Guard:  # noqa: ANN401
    """The Safe Denoiser with the theorem's own kernel at the step's noise level."""
    policy = zoo.joined(policies)
    return SafeDenoiser(negation=policy.negation, weight=TwoSample(safe=policy.safe, prior=prior), max_beta=max_beta)


def dynamic(
    pipe: Any,  # noqa: ANN401
    policies: References,
    prior: float = 0.1,
    tau: float = 0.02,
    bandwidth: float = 4.0,
    max_beta: float = 4.0,
) -> Guard:
    """The Safe Denoiser with the weight tracked along the trajectory; samplers that add noise."""
    policy = zoo.joined(policies)
    weight = Dynamic(prior=prior, tau=tau, bandwidth=bandwidth)
    return SafeDenoiser(negation=policy.negation, weight=weight, max_beta=max_beta)


def published(
    pipe: Any,  # noqa: ANN401
    policies: References,
    references: str = "unsafe",
    scale: float = 0.33,
    sigma: float = 3.15,
    stop: float = 0.22,
) -> Guard:
    """The Safe Denoiser's released loop; ``references``: ``unsafe``, ``benign`` or ``random``."""
    policy = zoo.joined(policies)
    sets = {
        "unsafe": lambda: policy.negation,
        "benign": lambda: policy.safe,
        "random": lambda: controls.random_references(policy.negation),
    }
    if references not in sets:
        raise InvalidInput(f"published: expected references of {', '.join(sets)}, got {references!r}")
    return SafeDenoiser.published(sets[references](), scale=scale, sigma=sigma, stop=stop)


def mean_vector(pipe: Any, policies: References, scale: float = 0.33, stop: float = 0.22) -> Guard:  # noqa: ANN401
    """The released loop with one constant vector in place of the kernel average."""
    return controls.mean_vector(zoo.joined(policies).negation, scale=scale, stop=stop)


def renoise_only(pipe: Any, stop: float = 0.22) -> Guard:  # noqa: ANN401
    """The released loop without its correction."""
    return controls.renoise_only(stop)


def composed(pipe: Any, policies: References) -> Guard:  # noqa: ANN401
    """The two-sample Safe Denoiser, then the recommended guard."""
    return chain(zoo.safe_denoiser(policies), zoo.guard(policies))


def own(
    pipe: Any,  # noqa: ANN401
    negation: Path,
    safe: Path | None = None,
    method: str = "safe-denoiser",
    strength: float | None = None,
    bandwidth: float | None = None,
    prior: float | None = None,
) -> Guard:
    """A guard over the user's own negation set, as ``steerclear generate --negation`` makes it."""
    choice = GuardChoice(
        kinds=(method,), negations=(negation,), safe=safe, strength=strength, bandwidth=bandwidth, prior=prior
    )
    return chain(*build(choice, pipe).guards)


def _gate(policy: zoo.Policy) -> float:
    return policy.settings.get("release", {}).get("gate", 0.5)

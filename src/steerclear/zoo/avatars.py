"""What goes with ``avatars-ddpm``: pictures to steer away from or to keep, and guards made of them.

The model draws avatars from noise alone; there is no prompt to change. ``avatars/`` holds two negation sets, written by
``recipes/avatars_ddpm/export.py``: avatars that neither the model nor the judge was trained on, each labelled with what
it wears, and the six individuals that the model was shown again and again until it drew them by heart.
Measurements: docs/unconditional.md.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from steerclear.errors import InvalidInput, NegationFileError

if TYPE_CHECKING:
    from steerclear.guards import SafeDenoiser
    from steerclear.negation import NegationSet

ROOT = Path(__file__).parent / "avatars"
PRIOR = 0.6
"""Of an attribute: twice the share that the model draws, because references are not the data."""
REPEATED = 0.025
"""Of an individual: the share of the training draws that each took."""
CAUTION = 10.0
"""Times the odds of an individual: at the true ones a memorised picture pulls harder than 2,000 references know of."""
MAX_BETA = 4.0
"""For an attribute; less of a throw for avatars that can hardly become anything else, and no fewer are changed."""


@cache
def references() -> "NegationSet":
    """Avatars that no network was trained on, labelled with their attributes joined by ``+``, or ``plain``."""
    return _read("references")


@cache
def individuals() -> "NegationSet":
    """The avatars that the model knows by heart, ``individuals-0`` to ``individuals-5``."""
    return _read("individuals")


def wearing(attribute: str) -> "tuple[NegationSet, NegationSet]":
    """The references with an attribute, and those without it.

    Raises:
        InvalidInput: If no reference has it.
    """
    everyone = references()
    labels = set(everyone.labels)
    having = {label for label in labels if attribute in label.split("+")}
    if not having or attribute == "plain":
        known = ", ".join(sorted({part for label in labels for part in label.split("+")} - {"plain"}))
        raise InvalidInput(f"avatars: expected an attribute of {known}, got {attribute!r}")
    return everyone.select(labels=having), everyone.select(labels=labels - having)


def without(attribute: str, *, prior: float = PRIOR, strength: float = 1.0) -> "SafeDenoiser":
    """The Safe Denoiser that leaves an attribute out: the theorem's kernel, references with it against those without.

    Args:
        attribute: ``"glasses"``, ``"hat"``, ``"beard"`` or ``"accessories"``.
        prior: Share of the model's avatars that have it, as the weight believes.
        strength: 1 is the theorem.

    Raises:
        InvalidInput: For another attribute, or a value outside its range.
    """
    from steerclear.guards import SafeDenoiser, TwoSample

    having, rest = wearing(attribute)
    weight = TwoSample(safe=rest, prior=prior)
    return SafeDenoiser(negation=having, weight=weight, strength=strength, max_beta=MAX_BETA)


def forget(
    ids: str | Iterable[str], *, prior: float | None = None, strength: float = 1.0, gate: float = 0.25
) -> "SafeDenoiser":
    """The Safe Denoiser that forgets individuals: their pictures against all references and the other individuals.

    Args:
        ids: Of :func:`individuals`.
        prior: Share of the model's avatars that are one of them, as the weight believes. If left out, ten times
            the odds of their share of its training.
        strength: 1 is the theorem.
        gate: Weights below it count as 0, so that pictures of others stay bit-identical.

    Raises:
        InvalidInput: For no or an unknown id, or a value outside its range.
    """
    from steerclear.guards import SafeDenoiser, TwoSample

    wanted = {ids} if isinstance(ids, str) else set(ids)
    everyone = individuals()
    if not wanted or not wanted <= set(everyone.ids):
        raise InvalidInput(f"avatars: expected ids of {', '.join(everyone.ids)}; got {', '.join(sorted(wanted))}")
    others = set(everyone.ids) - wanted
    negation = everyone.remove(others) if others else everyone
    safe = references().add(everyone.remove(wanted)) if others else references()
    weight = TwoSample(safe=safe, prior=cautious(len(wanted)) if prior is None else prior)
    return SafeDenoiser(negation=negation, weight=weight, strength=strength, gate=gate)


def cautious(count: int) -> float:
    """The prior of so many individuals in :func:`forget`."""
    odds = CAUTION * REPEATED * count / (1 - REPEATED * count)
    return odds / (1 + odds)


def _read(name: str) -> "NegationSet":
    from steerclear.negation import NegationSet

    path = ROOT / f"{name}.safetensors"
    if not path.is_file():
        raise NegationFileError(f"avatars: expected {path}, found none; reinstall steerclear")
    return NegationSet.load(path)

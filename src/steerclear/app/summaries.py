"""Statistics in place of a negation set, for the command line."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from steerclear.app.files import sha256
from steerclear.errors import InvalidInput
from steerclear.negation import NegationSet, NegationStatistics
from steerclear.negation.statistics import PICTURES_PER_DIRECTION


def summarised(
    items: NegationSet, *, rank: int | None, least: int, label: str | None, merge: Sequence[str]
) -> NegationStatistics:
    """The statistics of a set.

    Args:
        items: The set.
        rank: Directions per label; ``None`` for as many as its pictures allow.
        least: Fewest pictures per label.
        label: One label for all.
        merge: ``OLD=NEW`` names of labels.

    Raises:
        InvalidInput: For a pair without ``=``, a label that is not in the set, or one with fewer pictures.
    """
    if label is not None and merge:
        raise InvalidInput("summarise: expected --label for all labels or --merge for some, got both; leave one out")
    pairs = dict(pair.split("=", 1) for pair in merge if "=" in pair)
    wrong = [pair for pair in merge if pair.split("=", 1)[0] not in items.labels or "=" not in pair]
    if wrong or len(pairs) != len(merge):
        known = ", ".join(sorted(set(items.labels))[:20])
        got = ", ".join(wrong or merge)
        raise InvalidInput(f"summarise: expected --merge OLD=NEW, once per label of {known}, got {got}")
    return NegationStatistics.of(items, rank=rank, least=least, merge=label if label is not None else pairs)


def facts(made: NegationStatistics, file: Path) -> dict[str, Any]:
    """What a file of statistics says of itself."""
    spread = (made.variances.sum(1) + made.remainders * made.means[0].numel()).sqrt()
    return {
        "file": str(file),
        "kind": "statistics",
        "labels": dict(zip(made.labels, made.counts.tolist(), strict=True)),
        "rank": made.rank,
        "directions": dict(zip(made.labels, made.directions, strict=True)),
        "space": {"encoder": made.space.encoder, "shape": list(made.space.shape), "name": made.space.name},
        "norm": dict(zip(made.labels, made.means.flatten(1).norm(dim=1).tolist(), strict=True)),
        "spread": dict(zip(made.labels, spread.tolist(), strict=True)),
        "sha256": sha256(file.read_bytes()),
    }


def lines(made: NegationStatistics, file: Path) -> Iterator[str]:
    """The same for people."""
    known = facts(made, file)
    yield f"{file}: statistics of {len(made)} labels, rank {made.rank}, in {made.space}; no items"
    for label in made.labels[:12]:
        numbers = [known[name][label] for name in ("labels", "directions", "norm", "spread")]
        yield "{:24} {} pictures, {} directions, mean's norm {:.2f}, spread {:.2f}".format(label or "(none)", *numbers)
    if len(made) > 12:
        yield f"and {len(made) - 12} more"
    counts, directions = known["labels"], known["directions"]
    if told := [name for name in made.labels if counts[name] < PICTURES_PER_DIRECTION * directions[name]]:
        yield (
            f"warning   fewer than {PICTURES_PER_DIRECTION} pictures for each direction of {', '.join(told[:5])}"
            f"{' and others' * (len(told) > 5)}: this file tells which pictures it was made of; leave out --rank"
        )
    yield f"sha256    {known['sha256']}"

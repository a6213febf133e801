"""``steerclear negate add`` and ``remove``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steerclear.app.cli import options
from steerclear.app.cli.negate import common
from steerclear.errors import InvalidInput

if TYPE_CHECKING:
    from steerclear.negation import NegationSet, Space


@click.command(
    epilog="""\b
Examples:
  steerclear negate add bad.safetensors more/
  steerclear negate add bad.safetensors other.safetensors -o both.safetensors
  steerclear negate add bad.negation picture.png --provenance "request 4711"     services know it from now on
  steerclear negate add bad.safetensors more/ --model ./my-sd      pictures need the model that made the set
\b
SOURCES are folders, pictures and negation sets, files or stores. All are added, or none. Pictures that are in the set
already are skipped."""
)
@common.SET
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@common.TARGET
@click.option("--label", help="Label of new pictures. Default: each one's folder.")
@common.notes
@options.model
@options.as_json
def add(file: Path, sources: tuple[Path, ...], out: Path | None, as_json: bool, **rest: Any) -> None:  # noqa: ANN401
    """Add folders, pictures or other negation sets to SET."""
    from steerclear.app.negation import load, precision
    from steerclear.negation import NegationStore

    store = _in_place(file, out)
    common.only_stores(file, store, rest)
    made = [common.is_made(source) for source in sources]
    if rest["label"] is not None and all(made):
        raise click.UsageError("--label is for pictures; the items of a negation set keep their own.")
    if not store:
        items = load(file)
        changed, _ = _joined([items, *_found(items.space, sources, made, rest)])
        changed.save(out or file, dtype=precision(file))
        common.report(out or file, as_json, changed.skipped)
        return
    with NegationStore.open(file) as opened:
        new, origins = _joined(_found(opened.space, sources, made, rest))
        provenance = [str(sources[k]) for k in origins] if rest["provenance"] is None else rest["provenance"]
        skipped = opened.add(new, provenance=provenance, licence=rest["licence"] or "")
    common.report(file, as_json, [*new.skipped, *skipped])


@click.command(
    epilog="""\b
Examples:
  steerclear negate remove bad.safetensors dagger-3.png
  steerclear negate remove bad.safetensors a.png b.png -o fewer.safetensors
  steerclear negate remove bad.negation dagger-3.png && steerclear negate compact bad.negation
\b
The ids are listed by:  steerclear negate inspect SET --items
A store keeps the latents of removed items on disk until it is compacted."""
)
@common.SET
@click.argument("ids", nargs=-1, required=True)
@common.TARGET
@options.as_json
def remove(file: Path, ids: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Remove items from SET by id."""
    from steerclear.app.negation import load, precision
    from steerclear.negation import NegationStore

    if _in_place(file, out):
        with NegationStore.open(file) as store:
            store.remove(ids)
    else:
        load(file).remove(ids).save(out or file, dtype=precision(file))
    common.report(out or file, as_json)


def _in_place(file: Path, out: Path | None) -> bool:
    """Whether a store is to be changed."""
    from steerclear.app import negation

    store = negation.require(file, negation.FILE, negation.STORE) == negation.STORE
    if store and out is not None:
        raise click.UsageError(f"A store is changed in place; for a file of it use: steerclear negate export {file}")
    if not store:
        negation.require_target(out or file, negation.FILE)
    return store


def _found(
    space: "Space", sources: Sequence[Path], made: Sequence[bool], rest: dict[str, Any]
) -> "Sequence[NegationSet]":
    """What the sources hold; sets are read, and the model looked at, before any picture is encoded.

    Raises:
        InvalidInput: If the model's encoder is not the one that made the set.
        NegationMismatch: If a set comes from another encoder.
    """
    from steerclear.app.negation import load
    from steerclear.negation import encoder_of

    read = {k: load(source) for k, source in enumerate(sources) if made[k]}
    for items in read.values():
        space.require(items.space)
    if not all(made):
        pipe = common.pipe(rest)
        own = encoder_of(pipe).space
        if (own.encoder, own.shape) != (space.encoder, space.shape):
            raise InvalidInput(
                f"add: expected the model whose encoder made the set, {space}; got {rest['model']}, {own}; "
                "give that one as --model"
            )
        read |= {k: common.encoded(source, pipe, rest["label"]) for k, source in enumerate(sources) if not made[k]}
    return [read[k] for k in range(len(sources))]


def _joined(sets: "Sequence[NegationSet]") -> "tuple[NegationSet, list[int]]":
    """All of them as one set, and of which each item is."""
    whole, origins = sets[0], [0] * len(sets[0])
    for k, new in enumerate(sets[1:], 1):
        whole = whole.add(new)
        origins += [k] * (len(whole) - len(origins))
    return whole, origins

"""``steerclear negate add`` and ``remove``."""

from pathlib import Path
from typing import Any

import click

from steerclear.app.cli import options
from steerclear.app.cli.negate import common


@click.command(
    epilog="""\b
Examples:
  steerclear negate add bad.safetensors more/
  steerclear negate add bad.safetensors other.safetensors -o both.safetensors
  steerclear negate add bad.negation picture.png --provenance "request 4711"     services know it from now on
\b
Pictures that are in the set already are skipped."""
)
@common.SET
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@common.TARGET
@click.option("--label", help="Label of the new pictures. Default: each one's folder.")
@common.notes
@options.model
@options.as_json
def add(file: Path, sources: tuple[Path, ...], out: Path | None, as_json: bool, **rest: Any) -> None:  # noqa: ANN401
    """Add folders, pictures or other negation sets to SET."""
    from steerclear.app.negation import load, precision
    from steerclear.negation import NegationStore

    store = _in_place(file, out)
    common.only_stores(file, rest)
    if store:
        NegationStore.open(file).close()  # is it one? before a model is loaded
    made = [_is_made(source) for source in sources]
    pipe = None if all(made) else common.pipe(rest)
    found = [
        load(source) if ready else common.encoded(source, pipe, rest["label"])
        for source, ready in zip(sources, made, strict=True)
    ]
    skipped = [skip for new in found for skip in new.skipped]
    if not store:
        changed = load(file)
        known = len(changed.skipped)
        for new in found:
            changed = changed.add(new)
        changed.save(out or file, dtype=precision(file))
        common.report(out or file, as_json, changed.skipped[known:])
        return
    with NegationStore.open(file) as opened:
        for source, new in zip(sources, found, strict=True):
            provenance = str(source) if rest["provenance"] is None else rest["provenance"]
            skipped += opened.add(new, provenance=provenance, licence=rest["licence"] or "")
    common.report(file, as_json, skipped)


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
    from steerclear.app.negation import is_store

    if is_store(file) and out is not None:
        raise click.UsageError(f"A store is changed in place; for a file of it use: steerclear negate export {file}")
    return is_store(file)


def _is_made(source: Path) -> bool:
    """Whether a source is a negation set already, and no pictures."""
    from steerclear.negation.database import NAME

    return source.suffix == ".safetensors" or (source / NAME).exists()

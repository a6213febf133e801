"""``steerclear negate compact``, ``export`` and ``import``: what only stores need."""

from pathlib import Path
from typing import Any

import click

from steerclear.app.cli import options
from steerclear.app.cli.negate import common

STORE = click.argument("store", type=options.SET)


@click.command(
    epilog="""\b
Example:
  steerclear negate compact bad.negation
\b
Services that read the store go on meanwhile; other changes wait. It needs room for a copy of what is kept."""
)
@STORE
@options.as_json
def compact(store: Path, as_json: bool) -> None:
    """Delete the latents of removed items from the disk."""
    from steerclear.app import negation
    from steerclear.negation import NegationStore

    negation.require(store, negation.STORE)
    with NegationStore.open(store) as opened:
        freed = opened.compact()
    if as_json:
        options.emit({"file": str(store), "freed": freed})
        return
    click.echo(f"{store}: {freed / (1 << 20):.2f} MiB of removed latents deleted")


@click.command(
    epilog="""\b
Examples:
  steerclear negate export bad.negation -o bad.safetensors
  steerclear negate export bad.negation -o weapons.safetensors --label weapons
\b
Provenance and licences stay behind: the file has no place for them."""
)
@STORE
@click.option("-o", "--out", type=options.SET, metavar="FILE", required=True, help="File to write, NAME.safetensors.")
@click.option("--label", "labels", multiple=True, help="Only items with this label; repeatable.")
@options.as_json
def export(store: Path, out: Path, labels: tuple[str, ...], as_json: bool) -> None:
    """Write a store, as it is now, as one file."""
    from steerclear.app import negation
    from steerclear.negation import NegationStore

    negation.require(store, negation.STORE)
    negation.require_target(out, negation.FILE)
    with NegationStore.open(store, readonly=True) as opened:
        chosen = opened.select(labels=labels) if labels else opened.to_set()
        # float32 files hold bfloat16 exactly; float16 ones would not.
        import torch

        chosen.save(out, dtype=torch.float16 if opened.dtype == torch.float16 else torch.float32)
    common.report(out, as_json)


@click.command(
    "import",
    epilog="""\b
Example:
  steerclear negate import bad.safetensors -o bad.negation --licence CC0
\b
To put a file into a store that exists:  steerclear negate add STORE FILE""",
)
@click.argument("file", type=options.SET)
@click.option("-o", "--out", type=options.SET, metavar="STORE", required=True, help="Store to make, NAME.negation.")
@click.option(
    "--precision",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float16",
    show_default=True,
    help="As latents are stored.",
)
@common.notes
@options.as_json
def import_(file: Path, out: Path, precision: str, as_json: bool, **rest: Any) -> None:  # noqa: ANN401  (options)
    """Make a store of a single file."""
    import torch

    from steerclear.app import negation
    from steerclear.negation import NegationSet, NegationStore

    negation.require(file, negation.FILE)
    negation.require_new_store(out, str(file))
    provenance = str(file) if rest["provenance"] is None else rest["provenance"]
    items, dtype = NegationSet.load(file), getattr(torch, precision)
    NegationStore.from_set(out, items, provenance=provenance, licence=rest["licence"] or "", dtype=dtype).close()
    common.report(out, as_json)

"""What the commands of ``steerclear negate`` share."""

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from steerclear.app.cli import options
from steerclear.errors import InvalidInput

if TYPE_CHECKING:
    from steerclear.negation import NegationSet, Skip

_F = TypeVar("_F", bound=Callable[..., Any])

SET = click.argument("file", type=options.SET, metavar="SET")
TARGET = click.option(
    "-o", "--out", type=options.SET, metavar="FILE", help="Write a file here instead of changing SET."
)


def notes(function: _F) -> _F:
    """``--provenance`` and ``--licence``."""
    provenance = click.option(
        "--provenance", help="Store: where pictures come from. Default: what they were read from, or the model."
    )
    licence = click.option("--licence", help="Store: terms under which they are kept, such as CC0 or a ticket number.")
    return provenance(licence(function))


def is_made(source: Path) -> bool:
    """Whether a source of items is a negation set already, and no pictures.

    Raises:
        InvalidInput: If there is nothing, or statistics.
        NegationFileError: If it is named like a set and is none.
    """
    from steerclear.app import negation
    from steerclear.negation.database import NAME
    from steerclear.negation.store import SUFFIX

    if source.suffix in (".safetensors", SUFFIX) or (source / NAME).exists():
        negation.require(source, negation.FILE, negation.STORE)
        return True
    if not source.exists():
        raise InvalidInput(f"{source}: expected pictures or a negation set, found nothing there; check the path")
    return False


def pipe(rest: dict[str, Any]) -> Any:  # noqa: ANN401  (some diffusers pipeline)
    """The pipeline of ``--model``, as an encoder."""
    import_module("steerclear.attach.space")  # it teaches negation sets to encode with a pipeline
    return options.load(rest["model"], rest["device"], rest["dtype"])


def encoded(source: Path, pipe: Any, label: str | None) -> "NegationSet":  # noqa: ANN401  (some diffusers pipeline)
    """Pictures of a folder, or one picture.

    Raises:
        InvalidInput: If there is none.
    """
    from steerclear.negation import NegationSet

    return NegationSet.encode(source, pipe, labels=label)


def only_stores(path: Path, store: bool, rest: dict[str, Any]) -> None:
    """Refuse notes that a single file cannot keep."""
    if not store and (rest["provenance"] is not None or rest["licence"] is not None):
        raise click.UsageError(
            f"{path}: a single file keeps no provenance and no licence; use a store, NAME.negation, or leave them out."
        )


def report(path: Path, as_json: bool, skipped: "Iterable[Skip]" = (), more: dict[str, Any] | None = None) -> None:
    """What a set holds now, what was left out on the way, and in JSON what else the command has to say."""
    from steerclear.app import negation

    facts, left_out = negation.facts(path), list(skipped)
    if as_json:
        listed = [{"source": skip.source, "reason": skip.reason} for skip in left_out]
        options.emit({**facts, **(more or {}), "skipped": listed})
        return
    click.echo("\n".join(negation.spoken(facts)))
    for skip in left_out[:20]:
        options.say(f"skipped   {skip.source}: {skip.reason}")
    if len(left_out) > 20:
        options.say(f"skipped   and {len(left_out) - 20} more; --json lists all")

"""``steerclear negate inspect`` and ``verify``."""

from pathlib import Path
from typing import Any

import click

from steerclear.app.cli import options
from steerclear.app.cli.negate import common
from steerclear.app.cli.negate.summarise import inspected, verified
from steerclear.errors import InvalidInput, NegationFileError, NegationMismatch, SteerclearError


@click.command(
    short_help="Show what is in a negation set.",
    epilog="""\b
Examples:
  steerclear negate inspect bad.safetensors
  steerclear negate inspect bad.negation --items                             with provenance and licence
  steerclear negate inspect bad.safetensors --sheet bad.png                  decoded from the latents
  steerclear negate inspect bad.safetensors --sheet bad.png --images bad/    the source pictures instead""",
)
@common.SET
@click.option("--items", is_flag=True, help="List every item.")
@click.option("--sheet", type=options.FILE, help="Write a contact sheet (PNG).")
@click.option("--images", type=options.FOLDER, help="Take the sheet's pictures from this folder, matched by digest.")
@options.model
@options.as_json
def inspect(file: Path, items: bool, sheet: Path | None, as_json: bool, **rest: Any) -> None:  # noqa: ANN401  (options)
    """Show what is in a negation set, as a table and as a contact sheet."""
    from steerclear.app import negation

    if rest["images"] is not None and sheet is None:
        raise click.UsageError("--images says what --sheet FILE shows; give both.")
    if negation.kind(file) == negation.STATISTICS:
        if items or sheet is not None:
            raise InvalidInput(
                f"{file}: expected items to show, got statistics, which keep none; leave out --items and --sheet, or "
                "give the set that they were made of"
            )
        inspected(file, as_json)
        return
    facts = negation.facts(file)
    if sheet is not None:
        _write_sheet(file, sheet, rest)
    if as_json:
        options.emit({**facts, "items": negation.rows(file), "sheet": sheet and str(sheet)})
        return
    click.echo("\n".join(negation.spoken(facts)))
    rows = negation.rows(file) if items else []
    if rows:
        shown = {"weight": "{:g}".format, "digest": lambda text: text[:19]}
        cells = [tuple(str(shown.get(name, str)(value)) for name, value in row.items()) for row in rows]
        click.echo("\n" + options.table(tuple(rows[0]), cells))
    if sheet is not None:
        click.echo(f"sheet     {sheet}")


@click.command(
    short_help="Check that a negation set is whole.",
    epilog="""\b
Examples:
  steerclear negate verify bad.safetensors                   is the file whole and finite?
  steerclear negate verify bad.negation                      … is every latent of the store the one that was stored?
  steerclear negate verify bad.safetensors --model ./my-sd   … and made by this model's encoder?
  steerclear negate verify bad.safetensors --sha256 1f3a…    … and the file that I was promised?
\b
Exit code 0 if all is well, 1 if not, 2 for wrong usage, or if there is nothing at that path.""",
)
@common.SET
@click.option("--model", help="Also check that this model's encoder made it.")
@click.option("--sha256", "expected", help="Also check the hash of the file.")
@options.as_json
def verify(file: Path, model: str | None, expected: str | None, as_json: bool) -> None:
    """Check a negation set: format, shapes, NaN, ids, and on request its space and hash."""
    try:
        _verify(file, model, expected, as_json)
    except (NegationFileError, NegationMismatch) as error:  # the answer, and no wrong usage
        raise SteerclearError(str(error)) from error


def _verify(file: Path, model: str | None, expected: str | None, as_json: bool) -> None:
    from steerclear.app import negation
    from steerclear.negation import NegationStore

    kind = negation.kind(file)
    if kind == negation.STATISTICS:
        verified(file, model, expected, as_json)
        return
    checks, found = ["format", "shapes", "finite", "ids"], {}
    if store := kind == negation.STORE:
        if expected is not None:
            raise click.UsageError("A store changes, so it has no hash; export it, and pass on that of the file.")
        with NegationStore.open(file, readonly=True) as opened:
            result, space = opened.verify(), opened.space
        checks += ["database", "sha256 of every latent"]
        found = {"items": result.items, "removed": result.removed, "orphans": result.orphans}
    else:
        space = negation.load(file).space
    facts = negation.facts(file)
    if expected is not None and facts["sha256"] != expected.lower().removeprefix("sha256:"):
        raise NegationFileError(f"{file}: expected sha256 {expected}, got {facts['sha256']}; get the file again")
    if model is not None:
        from steerclear.negation import encoder_of

        pipe = common.pipe({"model": model, "device": "cpu", "dtype": "float32"})
        encoder_of(pipe).space.require(space)
    checks += [*(["space"] if model else []), *(["sha256"] if expected else [])]
    if as_json:
        options.emit({**facts, **found, "ok": True, "checked": checks})
        return
    click.echo(f"{file}: ok ({', '.join(checks)})")
    if not store:
        click.echo(f"sha256 {facts['sha256']}")
        return
    click.echo("{items} items, {removed} removed ones and {orphans} orphaned bytes left to compact".format(**found))


def _write_sheet(file: Path, path: Path, rest: dict[str, Any]) -> None:
    from steerclear.app import contact, negation

    loaded = negation.load(file)
    if rest["images"] is not None:
        pictures = contact.sources(loaded, rest["images"])
    else:
        pictures = contact.decoded(loaded, common.pipe(rest))
    contact.write(loaded, pictures, path)

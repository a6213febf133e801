"""``steerclear negate summarise``, and how the other commands show what it writes."""

from pathlib import Path
from typing import Any

import click

from steerclear.app.cli import options
from steerclear.app.cli.negate import common
from steerclear.errors import NegationFileError


@click.command(
    short_help="Keep statistics per label in place of pictures.",
    epilog="""\b
Examples:
  steerclear negate summarise bad.safetensors -o statistics.safetensors
  steerclear negate summarise bad.negation -o statistics.safetensors --label weapons
  steerclear negate summarise bad.safetensors -o statistics.safetensors --merge axe=weapon --merge dagger=weapon
  steerclear generate "a street" --negation statistics.safetensors --scheduler ddpm
\b
A label with too few pictures is refused: --merge gives related labels one name, --label gives all of them one.
What such a file still reveals, and what guards lose with it: docs/privacy.md.""",
)
@common.SET
@click.option("-o", "--out", type=options.SET, metavar="FILE", required=True, help="File to write, NAME.safetensors.")
@click.option(
    "--rank",
    type=click.IntRange(0),
    help="Directions per label; more give pictures away. Default: one for every 25 pictures, at most 8.",
)
@click.option("--least", type=click.IntRange(2), default=10, show_default=True, help="Fewest pictures per label.")
@click.option("--label", help="Take all pictures as one label.")
@click.option("--merge", multiple=True, metavar="OLD=NEW", help="Take a label's pictures as NEW; repeatable.")
@options.as_json
def summarise(file: Path, out: Path, as_json: bool, **rest: Any) -> None:  # noqa: ANN401  (options)
    """Keep a mean and a few directions per label in place of SET's pictures."""
    from steerclear.app import negation, summaries

    negation.require_target(out, negation.STATISTICS)
    summaries.summarised(negation.load(file), **rest).save(out)
    inspected(out, as_json)


def inspected(file: Path, as_json: bool) -> None:
    """What ``inspect`` says of statistics."""
    from steerclear.app import summaries
    from steerclear.negation import NegationStatistics

    made = NegationStatistics.load(file)
    if as_json:
        options.emit(summaries.facts(made, file))
    else:
        click.echo("\n".join(summaries.lines(made, file)))


def verified(file: Path, model: str | None, expected: str | None, as_json: bool) -> None:
    """What ``verify`` says of statistics."""
    from steerclear.app import summaries
    from steerclear.negation import NegationStatistics, encoder_of

    made = NegationStatistics.load(file)
    facts = summaries.facts(made, file)
    if expected is not None and facts["sha256"] != expected.lower().removeprefix("sha256:"):
        raise NegationFileError(f"{file}: expected sha256 {expected}, got {facts['sha256']}; get the file again")
    if model is not None:
        encoder_of(common.pipe({"model": model, "device": "cpu", "dtype": "float32"})).space.require(made.space)
    checks = ["format", "shapes", "finite", "directions"]
    checks += [*(["space"] if model else []), *(["sha256"] if expected else [])]
    if as_json:
        options.emit({**facts, "ok": True, "checked": checks})
    else:
        click.echo(f"{file}: ok ({', '.join(checks)})\nsha256 {facts['sha256']}")

"""``steerclear negate``: make, look at, change and check negation sets."""

from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steerclear.app.cli import options
from steerclear.errors import InvalidInput

if TYPE_CHECKING:
    from steerclear.negation import NegationSet

_SET = click.argument("file", type=options.FILE)
_TARGET = click.option("-o", "--out", type=options.FILE, help="Write here instead of changing FILE.")


@click.group(
    epilog="""\b
A negation set is one safetensors file: the latents of pictures to steer away from, with ids, labels and digests.
It belongs to the model that encoded it. Whoever has the file and the model can see the pictures again."""
)
def negate() -> None:
    """Build, inspect, change and verify negation sets."""


@negate.command(
    epilog="""\b
Examples:
  steerclear negate build bad/ -o bad.safetensors
  steerclear negate build bad/ -o bad.safetensors --model ./my-sd --label weapons
  steerclear negate build --prompt "a dagger" --prompt "an axe" -n 8 -o weapons.safetensors
\b
With --prompt the model draws the pictures itself, so that nobody has to keep any."""
)
@click.argument("source", type=click.Path(path_type=Path), required=False)
@click.option("--prompt", "prompts", multiple=True, help="Let the model draw it, in place of SOURCE; repeatable.")
@click.option("-n", "--n", "count", type=click.IntRange(1), default=8, show_default=True, help="Pictures per prompt.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="First seed for --prompt.")
@click.option("--steps", type=click.IntRange(1), help="Steps for --prompt. Default: the pipeline's.")
@click.option("--label", help="One label for all. Default: each picture's folder, or its prompt.")
@click.option("-o", "--out", type=options.FILE, required=True, help="File to write, NAME.safetensors.")
@options.model
@options.as_json
def build(source: Path | None, out: Path, as_json: bool, **rest: Any) -> None:  # noqa: ANN401  (options)
    """Encode a folder (or one picture), or what PROMPTs draw, into a negation set."""
    if (source is None) == (not rest["prompts"]):
        raise click.UsageError("Give a folder of pictures or --prompt TEXT, one of the two.")
    pipe = _pipe(rest)
    made = _drawn(pipe, rest) if source is None else _encoded(source, pipe, rest["label"])
    made.save(out)
    _report(made, out, as_json)


@negate.command(
    epilog="""\b
Examples:
  steerclear negate inspect bad.safetensors
  steerclear negate inspect bad.safetensors --items
  steerclear negate inspect bad.safetensors --sheet bad.png                  decoded from the latents
  steerclear negate inspect bad.safetensors --sheet bad.png --images bad/    the source pictures instead"""
)
@_SET
@click.option("--items", is_flag=True, help="List every item.")
@click.option("--sheet", type=options.FILE, help="Write a contact sheet (PNG).")
@click.option("--images", type=options.FOLDER, help="Take the sheet's pictures from this folder, matched by digest.")
@options.model
@options.as_json
def inspect(file: Path, items: bool, sheet: Path | None, as_json: bool, **rest: Any) -> None:  # noqa: ANN401  (options)
    """Show what is in a negation set, as a table and as a contact sheet."""
    loaded = _load(file)
    if sheet is not None:
        _write_sheet(loaded, sheet, rest)
    if as_json:
        options.emit({**_facts(loaded, file), "items": _items(loaded), "sheet": sheet and str(sheet)})
        return
    _report(loaded, file, as_json=False)
    if items:
        rows = [(item["id"], item["label"], f"{item['weight']:g}", item["digest"][:19]) for item in _items(loaded)]
        click.echo("\n" + options.table(("id", "label", "weight", "digest"), rows))
    if sheet is not None:
        click.echo(f"sheet     {sheet}")


@negate.command(
    epilog="""\b
Examples:
  steerclear negate add bad.safetensors more/
  steerclear negate add bad.safetensors other.safetensors -o both.safetensors
\b
Pictures that are in the set already are skipped."""
)
@_SET
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@_TARGET
@click.option("--label", help="Label of the new pictures. Default: each one's folder.")
@options.model
@options.as_json
def add(file: Path, sources: tuple[Path, ...], out: Path | None, as_json: bool, **rest: Any) -> None:  # noqa: ANN401
    """Add folders, pictures or other negation sets to FILE."""
    changed = _load(file)
    pipe = _pipe(rest) if any(source.suffix != ".safetensors" for source in sources) else None
    for source in sources:
        new = _load(source) if source.suffix == ".safetensors" else _encoded(source, pipe, rest["label"])
        changed = changed.add(new)
    changed.save(out or file)
    _report(changed, out or file, as_json)


@negate.command(
    epilog="""\b
Examples:
  steerclear negate remove bad.safetensors dagger-3.png
  steerclear negate remove bad.safetensors a.png b.png -o fewer.safetensors
\b
The ids are listed by:  steerclear negate inspect FILE --items"""
)
@_SET
@click.argument("ids", nargs=-1, required=True)
@_TARGET
@options.as_json
def remove(file: Path, ids: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Remove items from FILE by id."""
    changed = _load(file).remove(ids)
    changed.save(out or file)
    _report(changed, out or file, as_json)


@negate.command(
    epilog="""\b
Examples:
  steerclear negate verify bad.safetensors                   is the file whole and finite?
  steerclear negate verify bad.safetensors --model ./my-sd   … and made by this model's encoder?
  steerclear negate verify bad.safetensors --sha256 1f3a…    … and the file that I was promised?
\b
Exit code 0 if all is well, 1 if not, 2 for wrong usage."""
)
@_SET
@click.option("--model", help="Also check that this model's encoder made it.")
@click.option("--sha256", "expected", help="Also check the hash of the file.")
@options.as_json
def verify(file: Path, model: str | None, expected: str | None, as_json: bool) -> None:
    """Check a negation set: format, shapes, NaN, ids, and on request its space and hash."""
    from steerclear.errors import NegationFileError

    loaded = _load(file)
    facts = _facts(loaded, file)
    if expected is not None and facts["sha256"] != expected.lower().removeprefix("sha256:"):
        raise NegationFileError(f"{file}: expected sha256 {expected}, got {facts['sha256']}; get the file again")
    if model is not None:
        from steerclear.negation import encoder_of

        encoder_of(_pipe({"model": model, "device": "cpu", "dtype": "float32"})).space.require(loaded.space)
    checks = ["format", "shapes", "finite", "ids", *(["space"] if model else []), *(["sha256"] if expected else [])]
    if as_json:
        options.emit({**facts, "ok": True, "checked": checks})
        return
    click.echo(f"{file}: ok ({', '.join(checks)})\nsha256 {facts['sha256']}")


def _load(file: Path) -> "NegationSet":
    from steerclear.negation import NegationSet

    return NegationSet.load(file)


def _pipe(rest: dict[str, Any]) -> Any:  # noqa: ANN401  (some diffusers pipeline)
    import_module("steerclear.attach.space")  # it teaches negation sets to encode with a pipeline
    return options.load(rest["model"], rest["device"], rest["dtype"])


def _encoded(source: Path, pipe: Any, label: str | None) -> "NegationSet":  # noqa: ANN401  (some diffusers pipeline)
    from steerclear.negation import NegationSet

    if not source.exists():
        raise InvalidInput(f"{source}: expected a folder or a picture, found nothing there")
    return NegationSet.encode(source, pipe, labels=label)


def _drawn(pipe: Any, rest: dict[str, Any]) -> "NegationSet":  # noqa: ANN401  (some diffusers pipeline)
    from dataclasses import replace

    from steerclear.negation import NegationSet

    call = {} if rest["steps"] is None else {"num_inference_steps": rest["steps"]}
    made = NegationSet.generate(pipe, rest["prompts"], rest["count"], seed=rest["seed"], **call)
    return made if rest["label"] is None else replace(made, labels=(rest["label"],) * len(made))


def _write_sheet(loaded: "NegationSet", path: Path, rest: dict[str, Any]) -> None:
    from steerclear.app import contact

    if rest["images"] is not None:
        pictures = contact.sources(loaded, rest["images"])
    else:
        pictures = contact.decoded(loaded, _pipe(rest))
    contact.write(loaded, pictures, path)


def _facts(loaded: "NegationSet", file: Path) -> dict[str, Any]:
    from steerclear.app.files import sha256

    norms = loaded.latents.flatten(1).norm(dim=1)
    return {
        "file": str(file),
        "items": len(loaded),
        "labels": dict(Counter(loaded.labels).most_common()),
        "space": {"encoder": loaded.space.encoder, "shape": list(loaded.space.shape), "name": loaded.space.name},
        "norm": {"smallest": norms.min().item(), "mean": norms.mean().item(), "largest": norms.max().item()},
        "skipped": [{"source": skip.source, "reason": skip.reason} for skip in loaded.skipped],
        "sha256": sha256(file.read_bytes()),
    }


def _items(loaded: "NegationSet") -> list[dict[str, Any]]:
    columns = zip(loaded.ids, loaded.labels, loaded.weights.tolist(), loaded.digests, strict=True)
    return [{"id": i, "label": label, "weight": weight, "digest": digest} for i, label, weight, digest in columns]


def _report(loaded: "NegationSet", file: Path, as_json: bool) -> None:
    facts = _facts(loaded, file)
    if as_json:
        options.emit(facts)
        return
    labels = ", ".join(f"{label or '(none)'} {count}" for label, count in list(facts["labels"].items())[:12])
    more = len(facts["labels"]) - 12
    click.echo(f"{file}: {len(loaded)} items in {loaded.space}")
    click.echo(f"labels    {labels}" + (f", and {more} more" if more > 0 else ""))
    click.echo("norms     {smallest:.2f} … {largest:.2f}, mean {mean:.2f}".format(**facts["norm"]))
    click.echo(f"sha256    {facts['sha256']}")
    for skip in loaded.skipped[:20]:
        options.say(f"skipped   {skip.source}: {skip.reason}")
    if len(loaded.skipped) > 20:
        options.say(f"skipped   and {len(loaded.skipped) - 20} more; --json lists all")

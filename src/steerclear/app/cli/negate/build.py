"""``steerclear negate build``."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steerclear.app.cli import options
from steerclear.app.cli.negate import common
from steerclear.errors import InvalidInput

if TYPE_CHECKING:
    from steerclear.negation import NegationSet
    from steerclear.negation.bulk import Built


@click.command(
    epilog="""\b
Examples:
  steerclear negate build bad/ -o bad.safetensors
  steerclear negate build bad/ -o bad.safetensors --model ./my-sd --label weapons
  steerclear negate build bad/ -o bad.negation --licence "ticket 4711"      a store, to change while services read it
  steerclear negate build --prompt "a dagger" --prompt "an axe" -n 8 -o weapons.safetensors
\b
SOURCE is a picture, a folder of pictures, a Parquet file (column image, bytes or path), a tar file (WebDataset), a
folder of such files, or a quoted pattern of them. Many pictures, many workers; all of these write the same bytes:
  steerclear negate build 'bad-{0000..0099}.tar' -o bad.negation --workers 8 --skipped left-out.jsonl
  torchrun --nproc-per-node 8 -m steerclear negate build data/ -o bad.negation
  steerclear negate build data/ -o bad.negation --workers 32 --ray
Killed at any moment, the same command goes on where it stopped: finished parts lie in OUT.build/ until all are there.
\b
With --prompt the model draws the pictures itself, so that nobody has to keep any.
\b
A file of the same name is replaced, a store never. Use what was made with:
  steerclear generate "a street" --negation bad.safetensors --safe good.safetensors"""
)
@click.argument("sources", type=click.Path(), nargs=-1, metavar="[SOURCE]...")
@click.option("--prompt", "prompts", multiple=True, help="Let the model draw it, in place of SOURCE; repeatable.")
@click.option("-n", "--n", "count", type=click.IntRange(1), default=8, show_default=True, help="Pictures per prompt.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="First seed for --prompt.")
@click.option("--steps", type=click.IntRange(1), help="Steps for --prompt. Default: the pipeline's.")
@click.option("--label", help="One label for all. Default: each picture's folder or its shard's note, or its prompt.")
@common.notes
@click.option("--root", type=options.FOLDER, help="Folder of the paths in Parquet files. Default: each file's own.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes, or actors of Ray.")
@click.option("--ray", is_flag=True, help="Use Ray Data; see pip install 'steerclear[ray]'.")
@click.option("--timeout", type=click.FloatRange(0), default=1800.0, show_default=True, metavar="S",
              help="Under torchrun: seconds without any new part before other ranks are given up.")  # fmt: skip
@click.option("--parts", type=options.FOLDER, help="Folder of finished parts, which ranks share. Default: OUT.build/.")
@click.option("--keep-parts", is_flag=True, help="Leave them there, so that a later build encodes only what is new.")
@click.option("--skipped", type=options.FILE, help="Write what was left out, and why, as JSON lines.")
@click.option("-o", "--out", type=options.SET, required=True, help="NAME.safetensors, or NAME.negation for a store.")
@options.model
@options.as_json
def build(sources: tuple[str, ...], out: Path, as_json: bool, **rest: Any) -> None:  # noqa: ANN401  (options)
    """Encode pictures, or what PROMPTs draw, into a negation set."""
    from steerclear.app import negation

    if bool(sources) == bool(rest["prompts"]):
        raise click.UsageError("Give SOURCE, such as a folder of pictures, or --prompt TEXT, one of the two.")
    store = out.suffix == negation.SUFFIX
    common.only_stores(out, store, rest)
    if store:
        negation.require_new_store(out, "SOURCE")
    else:
        negation.require_target(out, negation.FILE)
    _only("SOURCE" if sources else "--prompt", rest)
    if sources:
        _no_sets(sources)
        _encoded(sources, out, as_json, rest)
    else:
        _drawn(out, as_json, rest)


def _only(way: str, rest: dict[str, Any]) -> None:
    """Refuse options that would do nothing here."""
    others = {
        "SOURCE": {"--steps": rest["steps"]},
        "--prompt": {
            "--root": rest["root"],
            "--workers": rest["workers"] > 1,
            "--ray": rest["ray"],
            "--parts": rest["parts"],
            "--keep-parts": rest["keep_parts"],
            "--skipped": rest["skipped"],
        },
    }
    if idle := [name for name, value in others[way].items() if value]:
        raise click.UsageError(f"{', '.join(idle)} would do nothing with {way}; leave it out.")


def _no_sets(sources: tuple[str, ...]) -> None:
    """Refuse sets among the pictures."""
    from steerclear.app import negation
    from steerclear.negation.database import NAME

    for source in map(Path, sources):
        if (source.suffix == ".safetensors" and source.is_file()) or (source / NAME).exists():
            raise InvalidInput(
                f"{source}: expected pictures, got {negation.kind(source)}; give the pictures that it was made of, or "
                "put one set into another with: steerclear negate add SET OTHER"
            )


def _encoded(sources: tuple[str, ...], out: Path, as_json: bool, rest: dict[str, Any]) -> None:
    from steerclear.negation.bulk import build_many

    built = build_many(
        sources,
        out,
        load=partial(_pipe, rest["model"], rest["device"], rest["dtype"]),
        label=rest["label"],
        provenance=" ".join(sources) if rest["provenance"] is None else rest["provenance"],
        licence=rest["licence"] or "",
        root=rest["root"],
        workers=rest["workers"],
        ray=rest["ray"],
        parts=rest["parts"],
        keep=rest["keep_parts"],
        timeout=rest["timeout"],
    )
    if built.out is None:
        options.say(f"this rank made the parts of {built.pictures} pictures; the first one puts {out} together")
        return
    if rest["skipped"] is not None:
        built.write_skipped(rest["skipped"])
    common.report(out, as_json, built.skipped, {"build": _costs(built)})
    if not as_json:
        options.say(_summary(built))


def _pipe(model: str, device: str, dtype: str) -> Any:  # noqa: ANN401  (some diffusers pipeline)
    """A worker's own pipeline."""
    from steerclear.workers import own_device

    return common.pipe({"model": model, "device": own_device() if device == "auto" else device, "dtype": dtype})


def _summary(built: "Built") -> str:
    known = built.pictures - built.encoded - len(built.skipped)
    lines = [
        f"built     {built.items} of {built.items + len(built.skipped)} pictures in {built.seconds:.1f} s, "
        f"{built.rate:.1f} a second with {built.workers} worker{'s' * (built.workers > 1)}",
        f"work      {built.encoded} encoded, {max(0, known)} known from before; {built.reading:.1f} s reading, "
        f"{built.encoding:.1f} s encoding",
    ]
    lines += [f"left out  {count}: {reason}" for reason, count in built.reasons.items()]
    return "\n".join(lines)


def _costs(built: "Built") -> dict[str, Any]:
    names = ("pictures", "encoded", "seconds", "rate", "reading", "encoding", "workers", "reasons")
    return {name: getattr(built, name) for name in names}


def _drawn(out: Path, as_json: bool, rest: dict[str, Any]) -> None:
    from steerclear.negation import NegationStore
    from steerclear.negation.store import SUFFIX

    made = _made(common.pipe(rest), rest)
    if out.suffix == SUFFIX:
        provenance = f"drawn by {rest['model']}" if rest["provenance"] is None else rest["provenance"]
        NegationStore.from_set(out, made, provenance=provenance, licence=rest["licence"] or "").close()
    else:
        made.save(out)
    common.report(out, as_json, made.skipped)


def _made(pipe: Any, rest: dict[str, Any]) -> "NegationSet":  # noqa: ANN401  (some diffusers pipeline)
    from dataclasses import replace

    from steerclear.negation import NegationSet

    call = {} if rest["steps"] is None else {"num_inference_steps": rest["steps"]}
    made = NegationSet.generate(pipe, rest["prompts"], rest["count"], seed=rest["seed"], **call)
    return made if rest["label"] is None else replace(made, labels=(rest["label"],) * len(made))

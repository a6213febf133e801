"""``steerclear negate build``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steerclear.app.cli import options
from steerclear.app.cli.negate import common

if TYPE_CHECKING:
    from steerclear.negation import NegationSet


@click.command(
    epilog="""\b
Examples:
  steerclear negate build bad/ -o bad.safetensors
  steerclear negate build bad/ -o bad.safetensors --model ./my-sd --label weapons
  steerclear negate build bad/ -o bad.negation --licence "ticket 4711"      a store, to change while services read it
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
@common.notes
@click.option("-o", "--out", type=options.SET, required=True, help="NAME.safetensors, or NAME.negation for a store.")
@options.model
@options.as_json
def build(source: Path | None, out: Path, as_json: bool, **rest: Any) -> None:  # noqa: ANN401  (options)
    """Encode a folder (or one picture), or what PROMPTs draw, into a negation set."""
    from steerclear.app.negation import is_store
    from steerclear.negation import NegationStore

    if (source is None) == (not rest["prompts"]):
        raise click.UsageError("Give a folder of pictures or --prompt TEXT, one of the two.")
    common.only_stores(out, rest)
    if is_store(out) and out.exists():
        raise click.UsageError(f"{out} is there already; use: steerclear negate add {out} SOURCE")
    pipe = common.pipe(rest)
    made = _drawn(pipe, rest) if source is None else common.encoded(source, pipe, rest["label"])
    if is_store(out):
        origin = str(source) if source is not None else f"drawn by {rest['model']}"
        provenance = origin if rest["provenance"] is None else rest["provenance"]
        NegationStore.from_set(out, made, provenance=provenance, licence=rest["licence"] or "").close()
    else:
        made.save(out)
    common.report(out, as_json, made.skipped)


def _drawn(pipe: Any, rest: dict[str, Any]) -> "NegationSet":  # noqa: ANN401  (some diffusers pipeline)
    from dataclasses import replace

    from steerclear.negation import NegationSet

    call = {} if rest["steps"] is None else {"num_inference_steps": rest["steps"]}
    made = NegationSet.generate(pipe, rest["prompts"], rest["count"], seed=rest["seed"], **call)
    return made if rest["label"] is None else replace(made, labels=(rest["label"],) * len(made))

"""``steerclear finetune``: guards that live in weights."""

from pathlib import Path
from typing import Any

import click

from steerclear.app.cli import options
from steerclear.errors import InvalidInput

_SAMPLES = ("steps", "cfg")


@click.group(
    short_help="Train a guard into a model's weights.",
    epilog="""\b
Guards that are attached while the model draws:  steerclear guards
Which one is better, on this model:  docs/choosing.md""",
)
def finetune() -> None:
    """Train a guard into a model's weights: no cost while drawing, nothing to attach."""


@finetune.command(
    short_help="Teach a model to draw unsafe pictures as mosaics (SafeGen).",
    epilog="""\b
Examples:
  steerclear finetune safegen --policy weapons -o no-weapons          shipped model and policy
  steerclear finetune safegen --policy weapons --draw "a dagger" --draw "an axe" -o no-weapons
                                                                      … and pictures that the model draws itself
  steerclear finetune safegen pictures/ --model ./my-sd -o adapter --preset published --form lora
                                                                      pictures/unsafe, pictures/benign
  steerclear finetune safegen --negation bad.safetensors --safe good.safetensors --model ./my-sd -o my-sd-safe
\b
OUT then holds
  a whole pipeline                   steerclear.load("OUT"); with --form lora instead an adapter beside the model's
                                     own weights: pipe.load_lora_weights("OUT")
  samples.png, report.json           pairs, pictures before and after; settings and losses
  checkpoint.safetensors             run the same command again to go on after an interruption
\b
Needs float32, and a UNet with self-attention layers (Stable Diffusion 1.x, 2.x, XL). An adapter needs PEFT:
  pip install 'steerclear[finetune]'
Whoever has the model can take the adapter off again. What it removes, and what it costs, must be measured on
your own model: docs/safegen.md.""",
)
@click.argument("folder", type=options.FOLDER, required=False)
@click.option("-o", "--out", type=options.FOLDER, required=True, help="Folder to write.")
@click.option("--policy", "policies", multiple=True, metavar="NAME", help="Shipped policy to remove; repeatable.")
@click.option("--negation", multiple=True, type=options.SET, help="Own set of what to remove; repeatable.")
@click.option("--safe", type=options.SET, help="Own set of what to keep, for --negation.")
@click.option("--draw", multiple=True, metavar="PROMPT", help="Let the model draw more unsafe pictures; repeatable.")
@click.option("-n", "--n", "count", type=click.IntRange(1), default=8, show_default=True, help="Pictures per --draw.")
@click.option(
    "--preset",
    type=click.Choice(["small", "published"]),
    default="small",
    show_default=True,
    help="Settings to start from: for models like the shipped one, or the released ones for Stable Diffusion 1.x.",
)
@click.option(
    "--target",
    type=click.Choice(["published", "consistent"]),
    help="Published: overshoots the mosaic where there is much noise. Consistent: aims at it everywhere.",
)
@click.option("--form", type=click.Choice(["lora", "full"]), help="An adapter, or the weights themselves.")
@click.option("--rank", type=click.IntRange(1), help="Rank of the adapter.")
@click.option("--train-steps", "steps", type=click.IntRange(0), help="Steps of the optimiser.")
@click.option("--batch", type=click.IntRange(1), help="Triplets per network call.")
@click.option("--learning-rate", type=float, help="Of AdamW.")
@click.option("--mosaic-weight", "mosaic", type=float, help="Weight of the mosaics in the loss.")
@click.option("--benign-weight", "benign", type=float, help="Weight of the benign pictures in the loss.")
@click.option(
    "--captions",
    type=click.FloatRange(0, 1),
    help="Share of training under the pictures' captions. Not published above 0: the method reads no text.",
)
@click.option(
    "--keep",
    type=click.Choice(["noise", "network"]),
    help="Benign pictures are trained towards their noise (published), or towards what the untrained network says.",
)
@click.option(
    "--begun",
    type=click.FloatRange(0, 1),
    help="Share of the pairs that start from the mosaic: what is half hidden stays so. Not published above 0.",
)
@click.option("--blocks", type=click.IntRange(1), help="Blocks of the mosaic along the longer side of a box.")
@click.option(
    "--boxes", "finder", default="object", show_default=True, help="object, picture, or an installed plug-in."
)
@click.option("--mirror/--no-mirror", default=True, show_default=True, help="Add every pair once more, mirrored.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything random.")
@click.option("--every", type=click.IntRange(1), default=100, show_default=True, help="Steps between checkpoints.")
@click.option("--sample", "samples", multiple=True, metavar="PROMPT", help="Draw before and after; repeatable.")
@click.option("--sample-steps", type=click.IntRange(1), help="Sampling steps. Default: 25 for shipped models.")
@click.option("--sample-cfg", type=float, help="Guidance scale. Default: 3 for shipped models.")
@options.model
@options.as_json
def safegen(folder: Path | None, out: Path, as_json: bool, **rest: Any) -> None:  # noqa: ANN401  (options)
    """Teach self-attention to draw unsafe pictures as mosaics, whatever the prompt says (SafeGen)."""
    from steerclear.app import negation
    from steerclear.app import safegen as app
    from steerclear.finetune import boxes

    if rest["dtype"] != "float32":
        raise InvalidInput(f"safegen: expected --dtype float32 for training, got {rest['dtype']}")
    method, finder = _method(rest), boxes.load(rest["finder"])
    call = _call(rest)
    source = app.Source(
        folder=folder,
        negation=rest["negation"],
        safe=rest["safe"],
        policies=rest["policies"],
        concepts=rest["draw"],
        count=rest["count"],
        call=call,
        seed=rest["seed"],
    )
    for path in filter(None, (*rest["negation"], rest["safe"])):
        negation.require(path, negation.FILE, negation.STORE)  # before a model is loaded
    pipe = options.load(rest["model"], rest["device"], rest["dtype"])
    blocks = rest["blocks"] or (4 if rest["preset"] == "small" else 12)
    triplets = source.triplets(pipe, finder, blocks, rest["mirror"])
    told = {
        "model": rest["model"],
        "folder": folder and str(folder),
        **{name: [str(each) for each in rest[name]] for name in ("policies", "negation", "draw")},
        "boxes": rest["finder"],
        "blocks": blocks,
        "mirror": rest["mirror"],
    }
    report = app.run(
        pipe,
        triplets,
        method,
        out,
        every=rest["every"],
        prompts=rest["samples"] or rest["draw"],
        call=call,
        source=told,
    )
    if as_json:
        options.emit({**report, "out": str(out)})
        return
    how = f'pipe.load_lora_weights("{out}")' if method.form == "lora" else f'steerclear.load("{out}")'
    click.echo(f"{out}: {report['parameters']:,} numbers trained on {report['pairs']} pairs; {how}")
    if report["losses"]:
        first, last = report["losses"][0], report["losses"][-1]
        click.echo(
            "loss      mosaics {:.3f} -> {:.3f}, benign {:.3f} -> {:.3f}".format(
                first["mosaic"], last["mosaic"], first["benign"], last["benign"]
            )
        )
    click.echo(f"look      {out / app.SAMPLES}")


def _method(rest: dict[str, Any]) -> Any:  # noqa: ANN401  (lazy type)
    """The preset with what was said on the command line."""
    from steerclear.finetune import SafeGen

    names = ("target", "form", "rank", "steps", "batch", "learning_rate", "mosaic", "benign", "captions")
    given = {name: rest[name] for name in (*names, "keep", "begun", "seed") if rest[name] is not None}
    return (SafeGen.published if rest["preset"] == "published" else SafeGen.small)(**given)


def _call(rest: dict[str, Any]) -> dict[str, Any]:
    """Sampling arguments of the pipeline."""
    from steerclear import zoo

    ours = any(rest["model"] == model.name for model in zoo.shipped())
    steps, cfg = rest["sample_steps"] or (25 if ours else None), rest["sample_cfg"]
    cfg = 3.0 if cfg is None and ours else cfg
    given = {"num_inference_steps": steps, "guidance_scale": cfg}
    return {name: value for name, value in given.items() if value is not None}

"""``steerclear generate``: guarded pictures from prompts."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import click

from steerclear import __version__
from steerclear.app.cli import options
from steerclear.errors import InvalidInput, NegationMismatch


@click.command(
    epilog="""\b
Examples:
  steerclear generate "a drink"                               shipped model, all its policies
  steerclear generate "a drink" --policy alcohol -n 8 --grid drinks.png
  steerclear generate "a drink" --guard safe-denoiser --set strength=2
  steerclear generate --prompts-file prompts.txt --out page   run it again to resume
  steerclear generate "a street" --model ./my-sd --negation bad.safetensors --safe good.safetensors
  steerclear generate "a street" --model owner/name --negation bad.safetensors --scheduler ddpm
  cat prompts.txt | steerclear generate --prompts-file - --json
\b
All guards, and what can be set:  steerclear guards
Own negation sets come from:  steerclear negate build
Without --safe they are used with a weight tracked along the trajectory (--guard dynamic), which needs a
scheduler that adds noise, such as ddpm or euler_ancestral."""
)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--prompts-file", type=click.File("r", encoding="utf-8"), help="One prompt per line; - is stdin, # a comment."
)
@options.model
@click.option(
    "--policy", "policies", multiple=True, metavar="NAME", help="Shipped policy to steer away from; repeatable."
)
@click.option(
    "--negation",
    "negations",
    multiple=True,
    type=options.SET,
    metavar="SET",
    help="Own negation set: a file, a store, or statistics; repeatable.",
)
@click.option("--safe", type=options.SET, metavar="SET", help="Safe reference set for --negation, likewise.")
@click.option(
    "--guard",
    "kinds",
    multiple=True,
    metavar="KIND",
    help="For policies one that steerclear guards lists, by default recommended; for --negation safe-denoiser, which "
    "needs --safe and is the default with it, dynamic, else the default, or published. Repeatable.",
)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of a policy's guard; repeatable."
)
@click.option("--strength", type=float, help="Strength of the guard; 1 is the theorem, 0 only watches.")
@click.option(
    "--bandwidth", type=float, help="Kernel width for --negation, in latent units. Default: the step's noise level."
)
@click.option("--prior", type=float, help="Unsafe share of what the model would draw, for --negation.")
@click.option("--unguarded", is_flag=True, help="Draw without any guard. Said on purpose, never by accident.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="First seed.")
@click.option("-n", "--n", "count", type=click.IntRange(1), default=1, show_default=True, help="Pictures per prompt.")
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="Steps. Default: 25 (emoji-dit: 20), else the pipeline's.",
)
@click.option("--cfg", type=float, help="Guidance scale. Default: 3 (emoji-dit: 2), else the pipeline's.")
@click.option("--scheduler", help="Another scheduler: ddim, ddpm, euler_ancestral, …")
@click.option("--size", metavar="N|WxH", help="Pixels. Default: the model's own.")
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True, help="Pictures drawn together.")
@click.option("--out", type=options.FOLDER, help="Folder for pictures and sidecars. Default: pictures/ unless --grid.")
@click.option("--grid", type=options.FILE, help="Also, or only, one sheet of all pictures.")
@options.as_json
def generate(prompts: tuple[str, ...], prompts_file: TextIO | None, as_json: bool, **rest: Any) -> None:  # noqa: ANN401  (options)
    """Draw guarded pictures from one or more PROMPTs.

    Each picture gets a sidecar with its request, its hash and what the guard did. Run the same command again after an
    interruption: finished pictures are kept, the others drawn. If a guard cannot be applied, nothing is written.
    """
    texts = [*prompts, *_lines(prompts_file)]
    if not texts:
        raise click.UsageError('Give a prompt, as in: steerclear generate "a drink", or --prompts-file FILE.')
    started = time.perf_counter()
    try:
        entries = _generate(texts, rest)
    except NegationMismatch as error:
        raise NegationMismatch(
            f"{str(error).partition(';')[0]}; give the --model that made the set, or make one for this model: "
            f"steerclear negate build PICTURES -o NAME.safetensors --model {rest['model']}"
        ) from error
    if as_json:
        seconds = round(time.perf_counter() - started, 2)
        options.emit({"pictures": entries, "grid": rest["grid"] and str(rest["grid"]), "seconds": seconds})
        return
    if rest["out"] or not rest["grid"]:
        for entry in entries:
            click.echo(entry["path"])
    if rest["grid"]:
        click.echo(str(rest["grid"]))
    options.say(_summary(entries))


def _generate(texts: Sequence[str], rest: dict[str, Any]) -> list[dict[str, Any]]:
    """The sidecars, each with ``path``; see the command."""
    from steerclear.app.generate import requests
    from steerclear.prompts.negative import unread

    choice = _choice(rest)
    drawing, settings = _drawing(choice, rest)
    for text in dict.fromkeys(texts):
        if lost := unread(drawing.pipe, text, {}):
            options.say(f"note      the model does not read the last {lost} tokens of {text!r}")
    seeds = range(rest["seed"], rest["seed"] + rest["count"])
    wanted = requests(texts, seeds, settings)
    folder = rest["out"] or Path("pictures")
    if rest["grid"] and not rest["out"]:
        return _only_grid(drawing, wanted, rest["grid"])
    entries = _with_bar(drawing, wanted, folder)
    if rest["grid"]:
        _grid_of(entries, folder, rest["grid"])
    return [{**entry, "path": str(folder / entry["file"])} for entry in entries]


def _with_bar(drawing: Any, wanted: Sequence[Any], folder: Path) -> list[dict[str, Any]]:  # noqa: ANN401  (lazy types)
    from tqdm import tqdm

    from steerclear.app.generate import generate as fill

    with tqdm(total=len(wanted), unit="picture") as bar:

        def progress(pictures: int) -> None:
            bar.update(pictures)

        return fill(drawing, wanted, folder, progress)


def _only_grid(drawing: Any, wanted: Sequence[Any], path: Path) -> list[dict[str, Any]]:  # noqa: ANN401  (lazy types)
    """Draws into a temporary folder, and keeps only the sheet."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="steerclear-") as folder:
        entries = _with_bar(drawing, wanted, Path(folder))
        _grid_of(entries, Path(folder), path)
    return [{**entry, "path": str(path)} for entry in entries]


def _grid_of(entries: Sequence[dict[str, Any]], folder: Path, path: Path) -> None:
    from steerclear.app.generate import grid
    from steerclear.app.pictures import read

    grid(entries, [read(folder / entry["file"]) for entry in entries], path)


def _choice(rest: dict[str, Any]) -> Any:  # noqa: ANN401  (a GuardChoice, imported lazily)
    """The guard that was asked for; for shipped models, all policies unless something else was said."""
    from steerclear import zoo
    from steerclear.app.arms import sampling_of
    from steerclear.app.guards import GuardChoice, free

    names = ("kinds", "policies", "negations", "safe", "strength", "bandwidth", "prior")
    given: dict[str, Any] = {name: rest[name] for name in names}
    given["settings"] = _settings(rest["settings"])
    shipped = _shipped(rest["model"])
    if not rest["unguarded"] and shipped is not None and not given["negations"]:
        given["kinds"] = given["kinds"] or (shipped.guard,)
        given["policies"] = given["policies"] or (() if free(given["kinds"]) else zoo.policies())
    if given["policies"]:  # guards that have seen their references at the sampler's levels see them at the call's
        given["settings"] = {**sampling_of(given["kinds"], *_sampling(rest)), **given["settings"]}
    choice = GuardChoice(**given)
    if choice.given == rest["unguarded"]:
        got = "both" if rest["unguarded"] else "neither"
        raise InvalidInput(f"generate: expected a guard (--policy or --negation) or --unguarded, got {got}")
    return choice


def _drawing(choice: Any, rest: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401  (lazy types)
    """What draws, and the settings that decide the pixels."""
    from steerclear import zoo
    from steerclear.app.generate import Drawing
    from steerclear.app.guards import build
    from steerclear.app.identity import identity
    from steerclear.app.negation import kind

    width, height = _size(rest["size"])
    steps, cfg = _sampling(rest)
    call = {"num_inference_steps": steps, "guidance_scale": cfg, "width": width, "height": height}
    call = {name: value for name, value in call.items() if value is not None}
    for path in filter(None, (*choice.negations, choice.safe)):
        kind(path)  # before a model is loaded
    pipe = options.load(rest["model"], rest["device"], rest["dtype"])
    chosen = build(choice, pipe)
    if rest["scheduler"]:
        zoo.use_scheduler(pipe, rest["scheduler"])
    settings = {
        "steerclear": __version__,
        "model": identity(rest["model"]),
        "dtype": rest["dtype"],
        "scheduler": type(pipe.scheduler).__name__,
        **call,
        "guard": choice.spec() if choice.given else None,
    }
    return Drawing(pipe=pipe, chosen=chosen, coupling=choice.coupling, call=call, batch=rest["batch"]), settings


def _shipped(name: str) -> Any:  # noqa: ANN401  (a ShippedModel or None)
    from steerclear import zoo

    return next((model for model in zoo.shipped() if model.name == name), None)


def _sampling(rest: dict[str, Any]) -> tuple[int | None, float | None]:
    """Steps and guidance scale of the call; ``None`` leaves them to the pipeline."""
    shipped = _shipped(rest["model"])
    steps, cfg = rest["steps"], rest["cfg"]
    if shipped is None:
        return steps, cfg
    return steps or shipped.steps, shipped.cfg if cfg is None else cfg


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` as YAML reads the value: ``0.5`` is a number, ``[a, b]`` a list."""
    import yaml

    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise InvalidInput(f"--set: expected NAME=VALUE, got {text!r}")
        try:
            settings[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InvalidInput(f"--set {name}: expected a value as in YAML, got {value!r}") from error
    return settings


def _lines(file: TextIO | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"prompts file: expected UTF-8 text, got {error}") from error
    return [line for line in lines if line and not line.startswith("#")]


def _size(text: str | None) -> tuple[int | None, int | None]:
    """``"64"`` or ``"64x48"`` as (width, height)."""
    if text is None:
        return None, None
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InvalidInput(f"size: expected N or WxH in pixels, got {text!r}")
    return int(parts[0]), int(parts[-1])


def _summary(entries: Sequence[dict[str, Any]]) -> str:
    acted = [entry["guard"]["fired"] > 0 for entry in entries if "fired" in entry["guard"]]
    resumed = sum(entry["resumed"] for entry in entries)
    guarded = "drawn WITHOUT a guard"
    if entries[0]["guard"]["guarded"]:  # a guard of the prompt or of the weights has no steps to act on
        guarded = f"the guard acted on {sum(acted)}" if acted else "all drawn under the guard"
    return f"{len(entries)} pictures; {guarded}" + (f"; {resumed} were there already" if resumed else "")

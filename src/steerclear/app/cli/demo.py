"""``steerclear demo``: the main job on the model that ships, with a report."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from steerclear.app.cli import options


@click.command(
    short_help="Draw prompts without and with the guard, and report.",
    epilog="""\b
Examples:
  steerclear demo                              all policies, 4 seeds, into ./steerclear-demo
  steerclear demo --policy weapons --seeds 9   one policy, more pictures
  steerclear demo --json > numbers.json        for machines
\b
Then open steerclear-demo/report.html. The judge that names the pictures knows emoji only.""",
)
@click.option(
    "--out", type=options.FOLDER, default=Path("steerclear-demo"), show_default=True, help="Folder to write to."
)
@click.option("--seeds", type=click.IntRange(1, 1000), default=4, show_default=True, help="Pictures per prompt.")
@click.option(
    "--policy", "policies", multiple=True, metavar="NAME", help="What to steer away from; repeatable. Default: all."
)
@click.option("--steps", type=click.IntRange(2, 1000), default=25, show_default=True, help="Steps per picture.")
@click.option("--judge", default="emoji-judge", show_default=True, help="Detector that says what a picture shows.")
@options.model
@options.as_json
def demo(as_json: bool, policies: tuple[str, ...], **rest: Any) -> None:  # noqa: ANN401  (options)
    """Draw a page of prompts without and with the guard, side by side, and report.

    The same seeds four times: no guard; a negative prompt at equal cost; the Safe Denoiser; the recommended guard.
    Writes the pictures, a trace (Parquet), results (JSON) and one self-contained report.html.
    """
    from tqdm import tqdm

    from steerclear import zoo
    from steerclear.app import report
    from steerclear.app.demo import run

    names = policies or zoo.policies()
    job = _job(names, rest)
    with tqdm(total=job.total, unit="picture", desc=job.arms[0].title) as bar:

        def progress(arm: str, pictures: int) -> None:
            bar.set_description(arm)
            bar.update(pictures)

        result = run(job, progress)
    command = _command(policies, rest)
    files = report.save(result, rest["out"], command=command)
    if as_json:
        options.emit(report.as_json(result, command))
        return
    click.echo(report.table(result))
    click.echo(f"\n95 % intervals in brackets. {len(result.pictures)} pictures in {result.seconds:.0f} s.")
    click.echo(
        f"report    {files.report}\npictures  {files.pictures}\ntrace     {files.trace}\nresults   {files.results}"
    )


def _job(names: Sequence[str], rest: dict[str, Any]) -> Any:  # noqa: ANN401  (a Run, imported lazily)
    from steerclear import detect, zoo
    from steerclear.app.demo import Arm, Run, Settings
    from steerclear.app.prompts import load_prompts, negative_prompt
    from steerclear.zoo.policies import concepts

    arms = (
        Arm(key="no-guard", title="no guard"),
        Arm(key="negative-prompt", title="negative prompt", negative_prompt=negative_prompt(names)),
        Arm(key="safe-denoiser", title="Safe Denoiser", guard=zoo.safe_denoiser(names)),
        Arm(key="recommended", title="recommended guard", guard=zoo.guard(names)),
    )
    judge = detect.load(rest["judge"])
    return Run(
        pipe=options.load(rest["model"], rest["device"], rest["dtype"]),
        judge=judge,
        rule=detect.Thresholds(unsafe=frozenset(concept for name in names for concept in concepts(name))),
        arms=arms,
        prompts=load_prompts(names),
        policies=tuple(names),
        settings=Settings(seeds=tuple(range(rest["seeds"])), steps=rest["steps"]),
    )


def _command(policies: Sequence[str], rest: dict[str, Any]) -> str:
    """The command line that gives the same pictures."""
    words = [word for name in policies for word in ("--policy", name)]
    words += [word for name, value in rest.items() for word in (f"--{name}", str(value))]
    return shlex.join(["steerclear", "demo", *words])

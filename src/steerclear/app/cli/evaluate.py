"""``steerclear evaluate``: prompts x guards x judges, one record per picture, resumable and sharded."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from steerclear.app.cli import options


@click.group(
    short_help="Compare guards on prompts, with judges and intervals.",
    epilog="""\b
A task is a YAML file, for example task.yaml:
  model: emoji-sd
  prompts: {set: emoji, half: dev, kinds: [explicit, benign]}
  seeds: [0, 1]
  sampling: {steps: 25, cfg: 3.0, batch: 8}
  judges: {judge: {detector: emoji-judge, unsafe: policies}}
  arms:
    - {key: none, title: no guard}
    - {key: negative, title: negative prompt, negative_prompt: policies}
    - {key: release, title: conditional release, guard: {kind: recommended}}
\b
Then:
  steerclear evaluate run task.yaml -o trial --limit 2    two prompts of each kind
  steerclear evaluate run task.yaml -o run                all; again after an interruption: it goes on
  steerclear evaluate show run                            what is there, as a table""",
)
def evaluate() -> None:
    """Compare guards on prompts, with judges: every picture a record, every rate with its interval.

    The first arm of a task is the reference that the others are compared with, picture by picture.
    """


@evaluate.command(
    epilog="""\b
Examples:
  steerclear evaluate run task.yaml -o run
  steerclear evaluate run task.yaml -o run --workers 4
  steerclear evaluate run task.yaml -o run --workers 8 --ray
  torchrun --nproc-per-node 2 -m steerclear evaluate run task.yaml -o run
\b
All four give the same rows. A folder holds one task: adding arms is fine, changing anything else is refused."""
)
@click.argument("task", type=options.FILE, metavar="TASK.yaml")
@click.option("-o", "--out", type=options.FOLDER, required=True, help="Folder of the run; made if need be.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="At most N prompts of each kind: for a trial.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes, or actors of Ray.")
@click.option("--ray", is_flag=True, help="Use Ray Data; see pip install 'steerclear[ray]'.")
@click.option("--no-report", is_flag=True, help="Only draw; leave merging and reporting for later.")
@click.option("--model", help="In place of the file's: a shipped model, a local folder, or a hub id owner/name.")
@click.option("--device", default="auto", show_default=True, help='"cpu", "cuda", … auto: a GPU if there is one.')
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Precision of the networks.",
)
def run(task: Path, out: Path, no_report: bool, **rest: Any) -> None:  # noqa: ANN401  (options)
    """Draw, judge and record what is missing of TASK.yaml.

    Killed at any moment, the same command goes on where it stopped. Prompts are left out of all files (redact: false
    keeps them), and pictures that a judge flags are never written (keep: all writes them).
    """
    from steerclear.app.evaluation import read_task
    from steerclear.evaluate.store import RunFolder

    planned = read_task(task, rest["limit"], rest["model"])
    drawn = _draw(planned, out, rest)
    missing = len(RunFolder(out).missing())
    if missing:
        options.say(f"{drawn} pictures drawn; other ranks still have {missing} batches: {_later(out)}")
    elif no_report:
        options.say(f"{drawn} pictures drawn; all batches are in {out}: {_later(out)}")
    else:
        options.say(f"{drawn} pictures drawn; all batches are in {out}")
        _finish(out)


@evaluate.command(
    short_help="Write what a finished run adds up to.",
    epilog="""\b
Examples:
  steerclear evaluate report run
\b
Nothing is drawn. The files are records.parquet and, with a judge, scoreboard.json, scoreboard.md, report.html and
figures/; older ones are replaced.""",
)
@click.argument("folder", type=options.FOLDER)
def report(folder: Path) -> None:
    """Merge the batches of a finished run in FOLDER and write what it adds up to."""
    _finish(folder)


@evaluate.command(
    epilog="""\b
Examples:
  steerclear evaluate show run
  steerclear evaluate show run --json"""
)
@click.argument("folder", type=options.FOLDER)
@options.as_json
def show(folder: Path, as_json: bool) -> None:
    """Print a table of what is in FOLDER, finished or not."""
    from steerclear.app.evaluation import summary
    from steerclear.evaluate.store import RunFolder

    head, rows = summary(folder)
    if as_json:
        options.emit([dict(zip(head, row, strict=True)) for row in rows])
        return
    click.echo(options.table(head, rows))
    missing = len(RunFolder(folder).missing())
    whole = "95 % intervals in brackets, prompts as the unit."
    options.say(f"unfinished: {missing} batches are missing" if missing else whole)


def _draw(task: Any, out: Path, rest: dict[str, Any]) -> int:  # noqa: ANN401  (a Task, imported lazily)
    from tqdm import tqdm

    from steerclear.evaluate import Shard
    from steerclear.evaluate import evaluate as fill
    from steerclear.evaluate.store import RunFolder
    from steerclear.workers import own_device

    shard = Shard.from_environment()
    mine = [task.units[index] for index in shard.of(len(task.units))]
    batches = [(len(unit.pairs), RunFolder(out).part(unit.index, arm.key)) for unit in mine for arm in task.arms]
    there = sum(pictures for pictures, part in batches if part.is_file())
    device = own_device() if rest["device"] == "auto" else rest["device"]
    load = partial(options.load, task.model, device, rest["dtype"])
    total = sum(pictures for pictures, _ in batches)
    with tqdm(total=total, initial=there, unit="picture", disable=None if shard.index == 0 else True) as bar:

        def progress(arm: str, pictures: int) -> None:
            bar.set_description(arm)
            bar.update(pictures)

        return fill(task, out, load=load, workers=rest["workers"], ray=rest["ray"], shard=shard, progress=progress)


def _finish(folder: Path) -> None:
    from steerclear.app.results import finish

    for what, path in finish(folder).items():
        click.echo(f"{what:<8}  {path}")


def _later(folder: Path) -> str:
    return f"steerclear evaluate report {folder}"

"""The command line ``steerclear``: one command per file, each a thin shell over a Python call.

Nothing heavy is imported here, so that ``--help`` is quick.
"""

from typing import Any

import click

from steerclear import __version__
from steerclear.app.cli.demo import demo
from steerclear.app.cli.evaluate import evaluate
from steerclear.app.cli.finetune import finetune
from steerclear.app.cli.generate import generate
from steerclear.app.cli.guards import guards
from steerclear.app.cli.models import models
from steerclear.app.cli.negate import negate
from steerclear.errors import (
    InvalidInput,
    NegationFileError,
    NegationMismatch,
    SteerclearError,
    UnsoundCombination,
)

_ASKED = (InvalidInput, NegationFileError, NegationMismatch, UnsoundCombination)


class Shell(click.Group):
    """A group whose expected errors are one line on stderr: exit code 2 for what was asked for in a way that cannot
    work (a value, a file, a combination), 1 for everything else."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401  (as click declares it)
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (SteerclearError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
            ctx.exit(2 if isinstance(error, _ASKED) else 1)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            # Nobody expected it, so it is a bug, here or in a pipeline; the traceback is for whoever reports it.
            if ctx.params.get("debug"):
                raise
            what = " ".join(str(error).split())
            click.echo(f"error: unexpected {type(error).__name__}: {what}; steerclear --debug shows where", err=True)
            ctx.exit(1)


@click.group(
    cls=Shell,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Start here:
  steerclear demo                        see it work on the model that ships, in a few minutes
  steerclear generate "a drink"          one guarded picture
  steerclear negate build bad/ -o bad.safetensors
                                         make your own negation set from a folder
  steerclear evaluate run task.yaml -o run
                                         compare guards, with numbers that can be believed
\b
Every command has its own --help with examples.""",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="steerclear")
def main(debug: bool) -> None:
    """Make diffusion models steer clear of unwanted content while they draw, without retraining."""


for command in (demo, generate, negate, evaluate, guards, finetune, models):
    main.add_command(command)

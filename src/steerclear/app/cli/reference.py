"""``docs/cli.md``: the help of every command, made from the commands themselves.

python -m steerclear.app.cli.reference > docs/cli.md
"""

from collections.abc import Iterator
from typing import Any

import click

from steerclear.app.cli import main


def contexts(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[click.Context]:
    """A context for a command and for all below it, with the settings that they run with."""
    settings: dict[str, Any] = {**command.context_settings, "max_content_width": 100, "terminal_width": 100}
    context = click.Context(command, parent=parent, info_name=name, **settings)
    yield context
    if isinstance(command, click.Group):
        for child, below in command.commands.items():
            yield from contexts(below, child, context)


def reference() -> str:
    """The page."""
    head = "# Command line\n\nMade from the commands' own help by `python -m steerclear.app.cli.reference`.\n"
    pages = (
        f"## {context.command_path}\n\n```\n{context.command.get_help(context)}\n```\n"
        for context in contexts(main, "steerclear")
    )
    return "\n".join([head, *pages])


if __name__ == "__main__":
    click.echo(reference(), nl=False)

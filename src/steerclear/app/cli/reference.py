"""``docs/cli.md``: the help of every command, made from the commands themselves.

python -m steerclear.app.cli.reference > docs/cli.md
"""

from collections.abc import Iterator

import click

from steerclear.app.cli import main


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, with their full names."""
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from commands(child, f"{path} {name}")


def reference() -> str:
    """The page."""
    parts = ["# Command line\n\nMade from the commands' own help by `python -m steerclear.app.cli.reference`.\n"]
    for path, command in commands(main, "steerclear"):
        context = click.Context(command, info_name=path, max_content_width=100, terminal_width=100)
        parts.append(f"## {path}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    click.echo(reference(), nl=False)

"""``steerclear guards``: every guard by its name, and what can be set."""

import click

from steerclear.app.cli.options import as_json, emit, table


@click.command(
    short_help="List the guards for shipped policies, and their settings.",
    epilog="""\b
Examples:
  steerclear guards
  steerclear generate "a drink" --guard safe-denoiser --set strength=2
\b
Which one?  docs/choosing.md has all of them measured side by side. Task files of steerclear evaluate use
the same names, as in   guard: {kind: safe-denoiser, strength: 2}""",
)
@as_json
def guards(as_json: bool) -> None:
    """List the guards for shipped policies: where each acts, and its settings with their defaults."""
    from steerclear.app.arms import listed

    rows = listed()
    if as_json:
        emit([{"kind": row.kind, "acts on": row.acts_on, "is": row.what, "settings": row.settings} for row in rows])
        return
    for acts_on in dict.fromkeys(row.acts_on for row in rows):
        own = [row for row in rows if row.acts_on == acts_on]
        cells = [(row.kind, row.what, ", ".join(f"{k}={v}" for k, v in row.settings.items())) for row in own]
        click.echo(f"{table((f'acts on the {acts_on}', 'is', 'settings'), cells)}\n")

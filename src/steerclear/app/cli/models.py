"""``steerclear models``: what ships with the package."""

import click

from steerclear.app.cli.options import as_json, emit, table


@click.command(
    epilog="""\b
Examples:
  steerclear models
  steerclear models --json
\b
Use a name with:   steerclear generate "a red apple" --model emoji-sd
Any other model:   a folder that save_pretrained wrote, or a hub id such as owner/name"""
)
@as_json
def models(as_json: bool) -> None:
    """List the models and policies that ship with the package."""
    from steerclear.zoo import shipped
    from steerclear.zoo.policies import concepts, policies

    listed = [
        {
            "name": model.name,
            "draws": model.draws,
            "architecture": model.architecture,
            "mebibytes": round(model.mebibytes, 1),
            "licence": model.licence,
            "installed": model.installed,
            "path": str(model.path),
        }
        for model in shipped()
    ]
    covered = {name: list(concepts(name)) for name in policies()}
    if as_json:
        emit({"models": listed, "policies": covered})
        return
    for model in shipped():
        click.echo(f"{model.name}   {model.mebibytes:.0f} MiB" + ("" if model.installed else "   MISSING, reinstall"))
        click.echo(f"  draws    {model.draws}\n  is a     {model.architecture}\n  licence  {model.licence}\n")
    click.echo(table(("policy", "steers away from"), [(name, ", ".join(items)) for name, items in covered.items()]))

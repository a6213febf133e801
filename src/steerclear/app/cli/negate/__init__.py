"""``steerclear negate``: make, look at, change and check negation sets."""

import click

from steerclear.app.cli.negate.build import build
from steerclear.app.cli.negate.change import add, remove
from steerclear.app.cli.negate.exchange import compact, export, import_
from steerclear.app.cli.negate.look import inspect, verify
from steerclear.app.cli.negate.summarise import summarise


@click.group(
    epilog="""\b
A negation set holds the latents of pictures to steer away from, with ids, labels and digests. It belongs to the model
that encoded it. Whoever has the set and the model can see the pictures again.
\b
NAME.safetensors is one file, to keep and to pass on. NAME.negation is a folder, a store: it is changed while services
read it, each change at the cost of the change, and keeps provenance and licence of every item. compact and export are
for stores; import makes one of a file. Where no picture may be kept, summarise leaves statistics, which guards take.
\b
Where to go from here:
  steerclear negate build bad/ -o bad.safetensors
  steerclear generate "a street" --negation bad.safetensors --scheduler ddpm"""
)
def negate() -> None:
    """Build, inspect, change and verify negation sets."""


for command in (build, inspect, add, remove, verify, summarise, compact, export, import_):
    negate.add_command(command)

"""What several commands share: options, quiet libraries, output."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])

FILE = click.Path(dir_okay=False, path_type=Path)
SET = click.Path(path_type=Path)
"""A negation set: a file, or the folder of a store."""
FOLDER = click.Path(file_okay=False, path_type=Path)


def as_json(function: _F) -> _F:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print results as JSON on stdout.")(function)


def model(function: _F) -> _F:
    """``--model``, ``--device`` and ``--dtype``."""
    options = (
        click.option(
            "--model",
            default="emoji-sd",
            show_default=True,
            help="A shipped model, a local folder, or a hub id owner/name.",
        ),
        click.option(
            "--device", default="auto", show_default=True, help='"cpu", "cuda", … auto: a GPU if there is one.'
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "float16", "bfloat16"]),
            default="float32",
            show_default=True,
            help="Precision of the networks.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def load(model: str, device: str, dtype: str) -> Any:  # noqa: ANN401  (some diffusers pipeline)
    """The pipeline on its device, with its own progress bar off.

    Raises:
        InvalidInput: For an unknown model or device.
        OSError: If files are missing.
    """
    import torch

    from steerclear import zoo
    from steerclear.errors import InvalidInput

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    zoo.quiet()
    pipe = zoo.load(model, dtype=getattr(torch, dtype))
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        pipe = pipe.to(place)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"device: expected one that torch can use here, got {place!r}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def emit(value: Any) -> None:  # noqa: ANN401  (any JSON value)
    """Prints strict JSON on stdout."""
    from steerclear.files.plain import plain

    click.echo(json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False))


def say(text: str) -> None:
    """A remark for people: stderr, so that stdout stays for results."""
    click.echo(text, err=True)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Left-aligned text columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines)

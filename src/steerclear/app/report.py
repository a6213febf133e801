"""What the demo leaves behind: pictures, a trace, results as JSON, a sheet, and one self-contained HTML page."""

import base64
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from steerclear.app.demo import Arm, DemoResult
from steerclear.app.files import slug, write_json
from steerclear.app.pictures import Cell, png, sheet
from steerclear.app.prompts import KINDS, DemoPrompt
from steerclear.app.score import Picture, Score
from steerclear.evaluate.run import installed
from steerclear.files import write_atomic

KIND_TITLES = {
    "explicit": "Prompts that name forbidden things",
    "group": "Prompts that may or may not turn out forbidden",
    "benign": "Prompts that must stay as they were",
}
KIND_NOTES = {
    "explicit": "The guard should draw something else.",
    "group": "The guard should keep to the prompt, minus its forbidden part.",
    "benign": "The guard should change nothing, not even a pixel.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Where everything was written."""

    report: Path
    results: Path
    trace: Path
    page: Path
    pictures: Path


def save(result: DemoResult, out: Path, *, command: str) -> Files:
    """Writes the whole result below ``out``.

    Args:
        result: Of :func:`steerclear.app.demo.run`.
        out: Folder; made if need be, files of an earlier run in it are replaced.
        command: How to reproduce the run, for the report.

    Raises:
        OSError: If a file cannot be written.
    """
    files = Files(
        report=out / "report.html",
        results=out / "results.json",
        trace=out / "trace.parquet",
        page=out / "page.png",
        pictures=out / "pictures",
    )
    for picture in result.pictures:
        write_atomic(out / file_of(result, picture), png(picture.pixels))
    write_atomic(files.page, png(_page(result)))
    write_trace(files.trace, result.trace)
    write_json(files.results, as_json(result, command))
    write_atomic(files.report, html(result, command).encode())
    return files


def file_of(result: DemoResult, picture: Picture) -> str:
    """A picture's path below the output folder: the same name in every arm's folder."""
    number = result.prompts.index(picture.prompt)
    return f"pictures/{picture.arm}/{number:02d}-{slug(picture.prompt.text)}-{picture.seed}.png"


def write_trace(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The trace as Parquet: one row per arm, picture and step; a column that a row lacks is null there."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomic(path, sink.getvalue().to_pybytes())


def as_json(result: DemoResult, command: str) -> dict[str, Any]:
    """Everything but the pixels and the trace, for machines."""
    return {
        "command": command,
        "policies": list(result.policies),
        "settings": asdict(result.settings),
        "machine": machine(),
        "seconds": round(result.seconds, 1),
        "arms": [{"key": arm.key, "title": arm.title, **asdict(result.scores[arm.key])} for arm in result.arms],
        "pictures": [_picture_json(result, picture) for picture in result.pictures],
    }


def _picture_json(result: DemoResult, picture: Picture) -> dict[str, Any]:
    return {
        "file": file_of(result, picture),
        "arm": picture.arm,
        "prompt": picture.prompt.text,
        "kind": picture.prompt.kind,
        "seed": picture.seed,
        **asdict(picture.verdict),
        "right": picture.right,
        "difference": picture.difference,
    }


def table(result: DemoResult) -> str:
    """The headline as text, one line per arm."""
    head = (
        "",
        "unsafe (explicit)",
        "unsafe (group)",
        "benign same",
        "within 2/255",
        "benign right",
        "s/pic",
        "guard/step",
    )
    rows = [head, *((arm.title, *_cells(result.scores[arm.key], arm)) for arm in result.arms)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _cells(score: Score, arm: Arm) -> tuple[str, ...]:
    cost = "–" if arm.guard is None else f"{score.guard_milliseconds:.1f} ms, {100 * score.guard_share:.1f} %"
    return (
        score.unsafe["explicit"].percent(),
        score.unsafe["group"].percent(),
        _share(score.identical.value),
        _share(score.unchanged.value),
        score.right["benign"].percent(),
        f"{score.seconds:.2f}",
        cost,
    )


def _share(value: float) -> str:
    return "no data" if math.isnan(value) else f"{100 * value:.0f} %"


def html(result: DemoResult, command: str) -> str:
    """The report as one page without any outside resource; all text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("steerclear.app"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    drawn: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for picture in result.pictures:
        drawn.setdefault((picture.prompt.text, picture.arm), []).append(_tile(result, picture))
    sections = [(kind, [p for p in result.prompts if p.kind == kind]) for kind in KINDS]
    return environment.get_template("report.html.j2").render(
        result=result,
        rows=[(arm, result.scores[arm.key], _cells(result.scores[arm.key], arm)) for arm in result.arms],
        first=result.scores[result.arms[0].key],
        last=result.scores[result.arms[-1].key],
        share=_share,
        sections=[_section(result, kind, prompts, drawn) for kind, prompts in sections if prompts],
        counts={kind: len(prompts) * len(result.settings.seeds) for kind, prompts in sections},
        command=command,
        machine=machine(),
    )


def _section(
    result: DemoResult, kind: str, prompts: list[DemoPrompt], drawn: dict[tuple[str, str], list[dict[str, Any]]]
) -> dict[str, Any]:
    return {
        "kind": kind,
        "title": KIND_TITLES[kind],
        "note": KIND_NOTES[kind],
        "rows": [(prompt, [drawn[prompt.text, arm.key] for arm in result.arms]) for prompt in prompts],
    }


def _tile(result: DemoResult, picture: Picture) -> dict[str, Any]:
    return {
        "source": "data:image/png;base64," + base64.b64encode(png(picture.pixels)).decode(),
        "seed": picture.seed,
        "verdict": picture.verdict,
        "right": picture.right,
        "same": picture.arm != result.arms[0].key and picture.difference == 0.0,
    }


def _page(result: DemoResult) -> Any:  # noqa: ANN401  (Pixels)
    """All pictures on one sheet: a prompt per row, for every arm the seeds side by side."""
    by_key = {(p.arm, p.prompt.text, p.seed): p for p in result.pictures}
    cells: list[Cell] = []
    for prompt in result.prompts:
        for arm in result.arms:
            for seed in result.settings.seeds:
                picture = by_key[arm.key, prompt.text, seed]
                caption = prompt.text if arm is result.arms[0] else picture.verdict.label
                cells.append(Cell(pixels=picture.pixels, caption=caption, warn=picture.verdict.unsafe))
    titles = [arm.title for arm in result.arms]
    return sheet(cells, columns=len(result.arms) * len(result.settings.seeds), heads=titles)


def machine() -> dict[str, str]:
    """Versions and hardware that the numbers depend on."""
    return {
        "steerclear": installed("steerclear"),
        "torch": torch.__version__,
        "diffusers": installed("diffusers"),
        "transformers": installed("transformers"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }

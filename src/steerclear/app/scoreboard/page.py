"""The report as one self-contained HTML page, and its figures as files beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from steerclear.app.scoreboard import examples, figures, words
from steerclear.app.scoreboard import view as views
from steerclear.app.scoreboard.examples import Gallery
from steerclear.app.scoreboard.figures import Bar, Look, Plane, Point
from steerclear.app.scoreboard.view import View
from steerclear.evaluate.reading import Records
from steerclear.evaluate.scoreboard import Column, Scoreboard
from steerclear.files import write_atomic

FIGURES = "figures"  # folder for the figures' files
NAMED = 7  # arms whose names all fit beside their points; of more, only the three that matter are named there


def write(folder: Path, records: Records, scoreboard: Scoreboard, task: Mapping[str, Any]) -> Path:
    """Writes ``report.html`` and ``figures/*.svg`` and ``.png`` below a run's folder; returns the page's path.

    The page needs nothing but itself. Pictures that any judge flags, or that none has judged, are blurred until a
    reader asks for them; pictures that the run withheld are hatched tiles. The file does hold the blurred pictures.

    Args:
        folder: Of the run: the records' ``image`` paths start here. Nothing outside it is read.
        records: One row per picture, all arms.
        scoreboard: Made from them.
        task: ``task.json``. Beside what a run writes there, ``dropped`` (prompts that suggest minors, a number or
            numbers by source), ``recommended`` (key of the guard to show as the best) and ``command`` are shown.

    Raises:
        OSError: If a file cannot be written.

    Cost: A few seconds, most of it figures; at most 8 MiB of thumbnails.
    """
    seen = views.view(scoreboard, task)
    drawn: dict[str, str] = {}
    for name, figure in charts(seen).items():
        drawn[name] = figures.svg(figure)
        write_atomic(folder / FIGURES / f"{name}.svg", drawn[name].encode())
        write_atomic(folder / FIGURES / f"{name}.png", figures.png(figure))
    path = folder / "report.html"
    write_atomic(path, html(folder, records, seen, task, drawn).encode())
    return path


def charts(seen: View) -> dict[str, Figure]:
    """The figures that the numbers allow, by file name."""
    looks = dict(zip((row.arm for row in seen.board.rows), figures.looks(len(seen.board.rows)), strict=True))
    drawn: dict[str, Figure] = {}
    if (safety := seen.safety) is not None:
        quality = [seen.column(title, "benign", "near") for title in ("right concept", "bit-identical")]
        cost = [seen.column(title) for title in ("seconds per picture", "network evaluations")]
        planes = [_plane(seen, looks, safety, column) for column in quality if column is not None]
        if any(plane.known for plane in planes):
            drawn["safety-quality"] = figures.trade_off(planes)
        planes = [_plane(seen, looks, column, safety) for column in cost if column is not None]
        if any(plane.known for plane in planes):
            drawn["safety-cost"] = figures.trade_off(planes)
    groups = [(_category(seen, name), _bars(seen, looks, name)) for name in seen.board.categories]
    if groups:
        drawn["categories"] = figures.bars(groups, "pictures judged unsafe")
    return drawn


def _plane(seen: View, looks: Mapping[str, Look], x: Column, y: Column) -> Plane:
    named = [row.arm for row in seen.board.rows]
    if len(named) > NAMED:
        named = [seen.best, seen.board.reference, seen.negative]
    points = [
        Point(
            title=seen.titles[row.arm],
            x=row.cells[x.key],
            y=row.cells[y.key],
            look=looks[row.arm],
            best=row.arm == seen.best,
            named=row.arm in named,
        )
        for row in seen.board.rows
    ]
    shares = [column.metric.unit in views.SHARES for column in (x, y)]
    return Plane(points=points, x_label=_axis(x), y_label=_axis(y), x_share=shares[0], y_share=shares[1])


def _axis(column: Column) -> str:
    kinds = " + ".join(kind for kind in column.kinds if kind)
    titles = {
        "unsafe": "judged unsafe",
        "right concept": "right concept",
        "seconds per picture": "seconds per picture",
        "network evaluations": "network evaluations per picture",
    }
    title = titles.get(column.title, column.title)
    arrow = {"lower": " (lower is better)", "higher": " (higher is better)"}.get(column.metric.better, "")
    return f"{title}, {kinds} prompts{arrow}" if kinds else f"{title}{arrow}"


def _category(seen: View, name: str) -> str:
    sizes = {estimate.n for estimate in seen.board.categories[name].values()}
    return f"{name}\nn = {max(sizes)}"


def _bars(seen: View, looks: Mapping[str, Look], category: str) -> list[Bar]:
    rates = seen.board.categories[category]
    return [
        Bar(title=seen.titles[row.arm], rate=rates[row.arm], look=looks[row.arm], best=row.arm == seen.best)
        for row in seen.board.rows
    ]


def html(folder: Path, records: Records, seen: View, task: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    """The page; all text is escaped. ``drawn``: figures as SVG, by file name."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("steerclear.app.scoreboard", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    board = seen.board
    gallery = Gallery.of(records, judge=board.judge, reference=board.reference, titles=seen.titles, folder=folder)
    first, rest = views.columns(seen)
    added = [column for column in rest if column.part == "more"]
    parts = [("Further measures", [c for c in rest if c not in added]), ("Quality", added)]
    arms = [row.arm for row in board.rows]
    # The failures first: if thumbnails run out, it is examples that are left out.
    failures = (
        None if seen.best is None else (examples.still_unsafe(gallery, seen.best), examples.lost(gallery, seen.best))
    )
    inline = {name: figures.inline(text, f"f{i}") for i, (name, text) in enumerate(drawn.items())}
    return environment.get_template("scoreboard.html.j2").render(
        seen=seen,
        board=board,
        finding=views.finding(seen),
        headline=_table(seen, first),
        tables=[(caption, _table(seen, some)) for caption, some in parts if some],
        figures={name: (text, _described(seen, name)) for name, text in inline.items()},
        folder=FIGURES,
        sections=examples.grid(gallery, arms),
        titles=words.KIND_TITLES,
        failures=failures,
        definitions=_definitions([*first, *rest]),
        dropped=views.dropped(task),
        task=task,
        provenance=provenance(task),
        keeps=round(100 * views.KEEPS),
    )


def _table(seen: View, chosen: Sequence[Column]) -> dict[str, Any]:
    sizes = {column.key: seen.cell(seen.board.reference, column.key).n for column in chosen}
    rows = views.cells(seen, chosen)
    return {
        "columns": [(views.heading(column), sizes[column.key]) for column in chosen],
        "rows": [(seen.titles[row.arm], row.arm == seen.best, rows[row.arm]) for row in seen.board.rows],
    }


def _definitions(chosen: Sequence[Column]) -> dict[str, str]:
    return {column.title: words.definition(column) for column in chosen}


def _described(seen: View, name: str) -> str:
    """A figure in words, for those who cannot see it: the numbers that it draws."""
    if name == "categories":
        parts = [f"{category}: {_rates(seen, rates)}" for category, rates in seen.board.categories.items()]
        return f"Share of pictures judged unsafe by category and arm. {'. '.join(parts)}."
    titles = (
        ("right concept", "bit-identical")
        if name == "safety-quality"
        else ("seconds per picture", "network evaluations")
    )
    found = (seen.safety, *(seen.column(title) for title in titles))
    chosen = [column for column in found if column is not None]
    rows = [
        f"{seen.titles[row.arm]}: "
        + ", ".join(f"{views.heading(c)} {views.written(row.cells[c.key], c.metric.unit)[0]}" for c in chosen)
        for row in seen.board.rows
    ]
    return f"Arms in the plane of {' and '.join(views.heading(column) for column in chosen)}. {'; '.join(rows)}."


def _rates(seen: View, rates: Mapping[str, Any]) -> str:
    return ", ".join(f"{seen.titles[arm]} {views.written(rate, 'share')[0]}" for arm, rate in rates.items())


def provenance(task: Mapping[str, Any]) -> dict[str, str]:
    """What the numbers depend on; no date, so that equal runs give equal pages but for their timings."""
    common: Mapping[str, Any] = task.get("common", {})
    model: Mapping[str, Any] = common.get("model", {})
    sampling: Mapping[str, Any] = common.get("sampling", {})
    shown = {
        "model": model.get("name"),
        "pipeline": model.get("pipeline"),
        "weights": str(model.get("weights", ""))[:16],
        "scheduler": sampling.get("scheduler") or model.get("scheduler"),
        "steps": sampling.get("steps"),
        "guidance scale": sampling.get("cfg"),
        "batch": sampling.get("batch"),
        "threads": sampling.get("threads"),
        "seeds": ", ".join(map(str, task.get("seeds", ()))),
        "prompts": len(task.get("prompts", ())) or None,
        "judges": ", ".join(common.get("judges", {})),
        "task": str(task.get("fingerprint", ""))[:16],
        **task.get("versions", {}),
    }
    return {name: str(value) for name, value in shown.items() if value not in (None, "")}

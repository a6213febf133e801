"""Writes the scoreboard's tables into the README and the docs, between their markers.

    python benchmarks/tables.py            # write
    python benchmarks/tables.py --check    # fail if a page says something else than benchmarks/results

Reads ``benchmarks/results/scoreboard*.json``, which ``make scoreboard`` copies from the runs.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Board = dict[str, Any]


def percent(cell: dict[str, Any] | None) -> str:
    """``12 % [5, 23]``, one decimal below 10 %, or a dash without data."""
    if cell is None or cell["n"] == 0:
        return "–"
    return f"{_share(cell['value'])} % [{_share(cell['low'])}, {_share(cell['high'])}]"


def plain(cell: dict[str, Any] | None, digits: int = 2) -> str:
    return "–" if cell is None or cell["n"] == 0 else f"{cell['value']:.{digits}f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}".removesuffix(".0") if value < 0.1 or value > 0.9 else f"{100 * value:.0f}"


def pictures(board: Board, *kinds: str) -> str:
    sizes = [board["kinds"][kind] for kind in kinds]
    return f"{sum(size['prompts'] for size in sizes)} prompts, {sum(size['pictures'] for size in sizes)} pictures"


COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any] | None], str]]] = {
    "explicit: unsafe": ("unsafe/explicit", percent),
    "group: unsafe": ("unsafe/group", percent),
    "implicit: unsafe": ("unsafe/implicit", percent),
    "explicit: judge's confidence": ("judge's confidence, not flagged/explicit", percent),
    "group: safe, of the group": ("safe and of the group/group", percent),
    "benign: bit-identical": ("bit-identical/benign", percent),
    "benign: right": ("right concept/benign", percent),
    "near: bit-identical": ("bit-identical/near", percent),
    "near: right": ("right concept/near", percent),
    "evaluations": ("network evaluations", lambda cell: plain(cell, 0)),
    "unsafe": ("unsafe/explicit+group+implicit", percent),
    "unconditional: unsafe": ("unsafe/unconditional", percent),
    "share of time": ("guard share of time", percent),
}
SHORT = (
    *("explicit: unsafe", "group: unsafe", "implicit: unsafe"),
    *("benign: bit-identical", "benign: right", "near: bit-identical", "near: right", "evaluations"),
)


EVERY = (
    *("unsafe", "explicit: unsafe", "group: unsafe", "implicit: unsafe"),
    *("benign: bit-identical", "benign: right", "near: right", "explicit: judge's confidence", "evaluations"),
)
UNCONDITIONAL = ("unconditional: unsafe", "share of time", "evaluations")
#: Arms of other tables on the same model and prompts that the table of every guard repeats.
ALSO = {
    "scoreboard": ("published", "two-sample", "latent-release", "release"),
    "scoreboard_controls": ("c-renoise", "c-score", "c-mean", "c-benign", "c-random", "exact", "composed"),
}


def every_guard(sort: str = "unsafe/explicit+group+implicit") -> tuple[Board, dict[str, str]]:
    """The board of every guard with the arms of :data:`ALSO`, the safest first."""
    board, titles = load("guards")
    arms = list(board["arms"])
    for name, keys in ALSO.items():
        other, others = load(name)
        arms += [arm for arm in other["arms"] if arm["arm"] in keys]
        titles = {**others, **titles}
    arms.sort(key=lambda arm: (arm["cells"][sort]["value"], -arm["cells"]["right concept/benign"]["value"]))
    return {**board, "arms": arms}, titles


def table(board: Board, columns: tuple[str, ...], titles: dict[str, str], bold: str = "recommended") -> Iterator[str]:
    """A Markdown table with an arm per row."""
    yield "| | " + " | ".join(columns) + " |"
    yield "| --- |" + " --- |" * len(columns)
    for arm in board["arms"]:
        cells = [show(arm["cells"].get(key)) for key, show in (COLUMNS[column] for column in columns)]
        mark = "**" if arm["arm"] == bold else ""
        yield f"| {mark}{titles[arm['arm']]}{mark} | " + " | ".join(f"{mark}{cell}{mark}" for cell in cells) + " |"


def class_table() -> Iterator[str]:
    """Arms of ``class_conditional.py``: what of a class is unsafe, still of the class, and whether shares are kept."""
    found = json.loads((RESULTS / "class_conditional.json").read_text(encoding="utf-8"))
    yield "| | unsafe | in the class | safe ones that keep their concept | shares of the safe concepts: p |"
    yield "| --- | --- | --- | --- | --- |"
    for arm in found["arms"].values():
        cells = [percent(arm[name]) for name in ("unsafe", "in_class", "safe_kept")]
        yield f"| {arm['title']} | {' | '.join(cells)} | {arm['other_seeds']['p_permutation']:.2g} |"


def comparisons(board: Board, titles: dict[str, str], arm: str = "recommended") -> Iterator[str]:
    """One arm against the others it was tested against, exact paired tests."""
    yield f"| {titles[arm]}, against | outcome | only it | only the other | pairs | p, McNemar | p, by prompt |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for found in board["comparisons"]:
        if found["arm"] == arm:
            test = found["test"]
            counts = f"{test['b']} | {test['c']} | {test['n']}"
            p = f"{test['p']:.1g} | {test['p_prompts']:.1g}"
            yield f"| {titles[found['against']]} | {found['outcome']} | {counts} | {p} |"


def load(name: str) -> tuple[Board, dict[str, str]]:
    """A scoreboard and the titles of its arms."""
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content["scoreboard"], content["titles"]


def pages() -> dict[Path, dict[str, str]]:
    """For every page, what belongs between which markers."""
    main, titles = load("scoreboard")
    rest, rest_titles = load("scoreboard_controls")
    noisy, noisy_titles = load("scoreboard_stochastic")
    everything = tuple(COLUMNS)
    method = {
        "scoreboard": "\n".join(table(main, everything, titles)),
        "comparisons": "\n".join(comparisons(main, titles)),
        "controls": "\n".join(table(rest, SHORT, rest_titles, bold="")),
        "stochastic": "\n".join(table(noisy, SHORT, noisy_titles)),
    }
    all_of_them, all_titles = every_guard()
    tracked, tracked_titles = load("guards_stochastic")
    arms = [*noisy["arms"], *(arm for arm in tracked["arms"] if arm["arm"] != "none")]
    nothing, nothing_titles = load("guards_unconditional")
    choosing = {
        "guards": "\n".join(table(all_of_them, EVERY, all_titles)),
        "stochastic-guards": "\n".join(table({**noisy, "arms": arms}, SHORT, {**tracked_titles, **noisy_titles})),
        "classes": "\n".join(class_table()),
        "unconditional": "\n".join(table(nothing, UNCONDITIONAL, nothing_titles, bold="without")),
    }
    return {
        ROOT / "README.md": {"scoreboard": "\n".join(table(main, SHORT, titles))},
        ROOT / "docs" / "conditional-release.md": method,
        ROOT / "docs" / "choosing.md": choosing,
        ROOT / "docs" / "large-sets.md": speed_tables().blocks(),
    }


def speed_tables() -> Any:  # noqa: ANN401
    """The module beside this one, wherever this one was loaded from."""
    spec = importlib.util.spec_from_file_location("speed_tables", ROOT / "benchmarks" / "speed_tables.py")
    assert spec is not None  # noqa: S101
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(text: str, blocks: dict[str, str]) -> str:
    """``text`` with the blocks between ``<!-- name -->`` and ``<!-- /name -->``."""
    for name, block in blocks.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"tables: expected {start} and {end} in the page, got none; put them where the table goes")
        text = f"{before}{start}\n{block}\n{end}{after}"
    return text


def collect(folder: Path) -> None:
    """Copies a run's scoreboard to the results."""
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    board = json.loads((folder / "scoreboard.json").read_text(encoding="utf-8"))
    content = {
        "titles": {arm["key"]: arm["title"] for arm in task["arms"]},
        "versions": task["versions"],
        "fingerprint": task["fingerprint"],
        "scoreboard": board,
    }
    target = RESULTS / f"{folder.name}.json"
    target.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--collect", type=Path, nargs="*", default=[], help="run folders to copy scoreboards from first"
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    for folder in args.collect:
        collect(folder)
    for path, blocks in pages().items():
        text = path.read_text(encoding="utf-8")
        new = filled(text, blocks)
        if args.check and new != text:
            raise SystemExit(f"tables: {path} differs from benchmarks/results; run python benchmarks/tables.py")
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()

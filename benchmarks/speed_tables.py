"""The tables of docs/large-sets.md, from the results of posterior.py, index.py and guard_cost.py."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def exact() -> Iterator[str]:
    """One pass, the published computation and a pure read."""
    yield from heading(
        "items", "batch", "stored as", "one pass, ms", "pure read, ms", "reads", "published, ms", "times as fast",
        "without Numba, ms",
    )  # fmt: skip
    for row in read("posterior")["rows"]:
        ms, faster = row["ms"], row.get("times as fast as published", {})
        for stored, reads in row["reads"].items():
            cells = [
                f"{row['n']:,}".replace(",", " "),
                row["batch"],
                stored,
                short(ms[f"{stored}, one pass"]),
                short(ms[f"{stored}, read"]),
                f"{reads:.2g}",
                short(ms["published"]) if "published" in ms else "–",
                f"**{faster[stored]:.0f}**" if faster else "–",
                short(ms["float16, tensor operations"]) if stored == "float16" else "",
            ]
            yield "| " + " | ".join(map(str, cells)) + " |"


def errors() -> Iterator[str]:
    """Against float64, of the values before they were stored."""
    yield from heading("stored as", "level", "error of the mean", "of the log-evidence, nats")
    for name, found in read("posterior")["errors, n = 3000"].items():
        stored, level = name.split(", ")
        yield f"| {stored} | {level} | {found['mean']:.1e} | {found['nats']:.1e} |"


def index() -> Iterator[str]:
    """The index along real trajectories."""
    yield from heading(
        "items", "D", "batch", "clusters", "rows read", "index, ms a step", "exact pass, ms", "step of emoji-sd, ms",
        "share of it", "bounds held",
    )  # fmt: skip
    for row in read("index")["results"]:
        cells = [
            f"{row['n']:,}".replace(",", " "),
            f"{row['dim']:,}".replace(",", " "),
            row["batch"],
            row["clusters"],
            share(row["rows read, share"]),
            short(row["index, ms a step"]),
            short(row["exact pass, ms"]),
            short(row["step of emoji-sd, ms"]),
            share(row["share of a step"]),
            f"{row['held']}/{row['asked']}",
        ]
        yield "| " + " | ".join(map(str, cells)) + " |"


def guards() -> Iterator[str]:
    """Every guard on images, per step."""
    yield from heading("guard", "items", "batch", "ms a step", "of a step of emoji-sd")
    for row in read("guard_cost")["emoji-sd"]["rows"]:
        yield f"| {row['guard']} | {row['n']} | {row['batch']} | {short(row['ms'])} | {share(row['share'])} |"


def heading(*titles: str) -> Iterator[str]:
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * len(titles)


def share(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.2g} %"


def short(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.2g}"


def blocks() -> dict[str, str]:
    """What belongs between which markers."""
    return {
        name: "\n".join(make())
        for name, make in {"exact": exact, "errors": errors, "index": index, "guards": guards}.items()
    }

"""The figure of ``ablations.py``: small multiples that tell their series apart by marker and fill, not by colour."""

import math
from pathlib import Path
from typing import Any

TITLES = {
    "references": "number of references",
    "schedule": "schedule and steps",
    "guidance": "guidance scale",
    "false-positives": "stated false positives",
    "fallback": "fallback",
}
SERIES = (
    ("unsafe explicit, group and implicit", "unguarded", "unsafe prompts: unsafe, no guard", "o", "white"),
    ("unsafe explicit, group and implicit", "guarded", "unsafe prompts: unsafe, guarded", "o", "black"),
    ("identical benign and near", "guarded", "harmless prompts: bit-identical", "s", "0.6"),
    ("right concept benign and near", "unguarded", "harmless prompts: right concept, no guard", "^", "white"),
    ("right concept benign and near", "guarded", "harmless prompts: right concept, guarded", "^", "black"),
)
SPACE = (
    ("caught", "caught at some step", "o", "black"),
    ("caught in the first third", "caught in the first third", "o", "white"),
    ("false positives", "false positives", "s", "0.6"),
)


def draw(sweeps: dict[str, Any], path: Path) -> None:
    """One panel per sweep that was measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in ("space", *TITLES) if name in sweeps]
    lines = math.ceil(len(names) / 2)
    figure, axes = plt.subplots(lines, 2, figsize=(13, 0.8 + 4.0 * lines), squeeze=False)
    flat = list(axes.flat)
    for axis, name in zip(flat, names, strict=False):
        if name == "space":
            rows = sweeps[name]["rows"]
            series = [([row[key] for row in rows], label, *style) for key, label, *style in SPACE]
            n = (sweeps[name]["unsafe trajectories"], sweeps[name]["harmless trajectories"])
            title = f"space of the evidence: {n[0]} unsafe, {n[1]} harmless trajectories"
            _panel(axis, [row["space"] for row in rows], series, title)
        else:
            rows = sweeps[name]
            series = [([row[arm][key] for row in rows], label, *style) for key, arm, label, *style in SERIES]
            _panel(axis, [row["setting"] for row in rows], series, TITLES[name])
    for axis in flat[len(names) :]:
        axis.set_visible(False)
    _legends(figure, flat[: len(names)], names)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, labels: list[str], series: list[Any], title: str) -> None:  # noqa: ANN401  (matplotlib)
    """Shares with intervals along x, settings from top to bottom."""
    for place, (estimates, label, marker, fill) in enumerate(series):
        offset = 0.16 * (place - (len(series) - 1) / 2)
        for row, each in enumerate(estimates):
            if each["n"]:
                y = row + offset
                axis.plot([each["low"], each["high"]], [y, y], color="0.45", linewidth=1, zorder=1)
                style = {"marker": marker, "facecolor": fill, "edgecolor": "black", "s": 34, "zorder": 2}
                axis.scatter([each["value"]], [y], label=label if row == 0 else None, **style)
    for row in range(1, len(labels)):
        axis.axhline(row - 0.5, color="0.9", linewidth=0.8, zorder=0)
    axis.set(xlim=(-0.03, 1.03), ylim=(len(labels) - 0.5, -0.5), yticks=range(len(labels)), yticklabels=labels)
    axis.set_title(title, fontsize=11, loc="left")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _legends(figure: Any, axes: list[Any], names: list[str]) -> None:  # noqa: ANN401  (matplotlib)
    if names and names[0] == "space":
        axes[0].legend(fontsize=8, loc="lower left", bbox_to_anchor=(-0.3, -0.2), ncols=3, frameon=False)
    others = [axis for axis, name in zip(axes, names, strict=True) if name != "space"]
    if others:
        handles, labels = others[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=9, frameon=False)

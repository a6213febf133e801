"""The figure of ``docs/choosing.md``: every guard, the safest first: what is unsafe, what is kept, what it costs.

python benchmarks/guards_figure.py            # reads benchmarks/results, writes docs/images/guards.png
"""

import argparse
from pathlib import Path
from typing import Any

import tables

UNSAFE = "unsafe/explicit+group+implicit"
PANELS = (
    ("unsafe prompts: unsafe pictures", ((UNSAFE, "unsafe", "o", "black"),)),
    (
        "benign prompts",
        (
            ("right concept/benign", "right concept", "^", "black"),
            ("bit-identical/benign", "bit-identical", "s", "white"),
        ),
    ),
)


def draw(board: dict[str, Any], titles: dict[str, str], path: Path) -> None:
    """One line per guard, in the table's order; bars are 95 % intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    arms = board["arms"][::-1]
    places = list(range(len(arms)))
    figure, axes = plt.subplots(1, 3, figsize=(13, 1.6 + 0.29 * len(arms)), sharey=True, width_ratios=(3, 3, 2))
    for axis, (title, series) in zip(axes[:2], PANELS, strict=True):
        for shift, (key, label, marker, fill) in enumerate(series):
            cells = [arm["cells"][key] for arm in arms]
            heights = [place + 0.22 * (shift - (len(series) - 1) / 2) for place in places]
            axis.hlines(heights, [c["low"] for c in cells], [c["high"] for c in cells], color="0.6", lw=1.5)
            values = [c["value"] for c in cells]
            axis.plot(values, heights, marker, color="black", mfc=fill, label=label, ls="", ms=6)
        axis.set(title=title, xlim=(-0.03, 1.03))
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axis.grid(axis="x", color="0.9")
    below = -0.9 / (1.6 + 0.29 * len(arms))
    axes[1].legend(loc="lower center", bbox_to_anchor=(0.5, below), ncols=2, frameon=False)
    axes[2].barh(places, [arm["cells"]["network evaluations"]["value"] for arm in arms], color="0.75", height=0.6)
    axes[2].set(title="network evaluations a picture")
    axes[0].set_yticks(places, [titles[arm["arm"]] for arm in arms])
    for label, arm in zip(axes[0].get_yticklabels(), arms, strict=True):
        label.set_fontweight("bold" if arm["arm"] in ("none", "recommended") else "normal")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=tables.ROOT / "docs" / "images" / "guards.png")
    args = parser.parse_args()
    draw(*tables.every_guard(), args.out)


if __name__ == "__main__":
    main()

"""Draws ``docs/images/index.png`` from ``benchmarks/results/index.json``: what the index reads, and how cost grows."""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS, TARGET = Path("benchmarks/results/index.json"), Path("docs/images/index.png")


def main() -> None:
    results = [row for row in json.loads(RESULTS.read_text())["results"] if row["dim"] == 1024 and row["batch"] == 1]
    results.sort(key=lambda row: row["n"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    n = [row["n"] for row in results]
    for name, style in (("pure read, ms", ":"), ("exact pass, ms", "--"), ("index, ms a step", "-")):
        left.loglog(n, [row[name] for row in results], style, marker="o", label=name.split(",")[0])
    left.axhline(results[-1]["step of emoji-sd, ms"], color="grey", linewidth=1)
    left.annotate("a step of emoji-sd", (n[0], results[-1]["step of emoji-sd, ms"]), va="bottom", color="grey")
    left.set(xlabel="items", ylabel="ms a step, mean of 25 steps", title="Cost grows slower than the set")
    left.legend(frameon=False)
    steps = results[-1]["steps"]
    noise = [row["sigma/alpha"] for row in steps]
    right.loglog(noise, [max(row["rows read"], 1) / n[-1] for row in steps], color="tab:green", marker=".")
    right.invert_xaxis()
    proven = [row["sigma/alpha"] for row in steps if row["proven"] == 1]
    if proven:
        right.axvspan(max(proven), min(noise), color="tab:green", alpha=0.08)
        right.annotate("proven", (max(proven), 1e-5), color="tab:green", xytext=(4, 0), textcoords="offset points")
    title = f"Share of {n[-1]:,} items that are read at each step"
    right.set(xlabel="noise of the step, sigma / alpha", ylabel="share of the set", ylim=(5e-6, 2), title=title)
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()

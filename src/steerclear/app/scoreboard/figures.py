"""The report's figures: readable in grey, without colour vision and on a dark page; nothing drawn that says nothing."""

import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager, ft2font
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from steerclear.app.scoreboard.labels import Box, Name, place
from steerclear.evaluate.estimate import Estimate

Axes = Any  # matplotlib has no complete types
INK, SOFT, LINE, PAPER = "#1b1f24", "#59636e", "#d0d7de", "#ffffff"
#: Okabe and Ito's colours, told apart with every kind of colour vision; each comes with a marker of its own for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "steerclear",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True, slots=True)
class Look:
    """How an arm is drawn in every figure."""

    colour: str
    marker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """An arm in a plane of two measures. ``named``: its name stands beside it, not in the key alone."""

    title: str
    x: Estimate
    y: Estimate
    look: Look
    best: bool = False
    named: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """A panel: arms as points, intervals as error bars. ``share``: the axis is a rate, shown in per cent."""

    points: Sequence[Point]
    x_label: str
    y_label: str
    x_share: bool = True
    y_share: bool = True

    @property
    def known(self) -> list[Point]:
        """The points that both measures have data for."""
        return [point for point in self.points if point.x.n and point.y.n]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """An arm's rate in one category."""

    title: str
    rate: Estimate
    look: Look
    best: bool = False


def looks(count: int) -> list[Look]:
    """A look per arm, the first one (the reference) in ink."""
    rest = [Look(COLOURS[i % 8], MARKERS[(i + 1 + i // 8) % 8]) for i in range(count)]
    return [Look(INK, "o"), *rest][:count]


def trade_off(planes: Sequence[Plane]) -> Figure:
    """Panels side by side. Unless every point is named, there is a key below."""
    key = [] if all(point.named for plane in planes for point in plane.points) else list(planes[0].points)
    columns = 2 * len(planes)
    with mpl.rc_context(_STYLE):
        height = 4.3 + (0.1 + 0.2 * math.ceil(len(key) / columns) if key else 0.0)
        figure = Figure(figsize=(5.3 * len(planes), height), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        pairs = list(zip(figure.subplots(1, len(planes), squeeze=False)[0], planes, strict=True))
        for axes, plane in pairs:
            _plane(axes, plane)
        if key:
            _key(figure, key, columns)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes, plane in pairs:
            _names(figure, axes, plane)
    return figure


def _plane(axes: Axes, plane: Plane) -> None:
    for point in plane.known:
        x, y = _finite(point.x), _finite(point.y)
        axes.errorbar(
            x.value,
            y.value,
            xerr=[[x.value - x.low], [x.high - x.value]],
            yerr=[[y.value - y.low], [y.high - y.value]],
            fmt=point.look.marker,
            color=point.look.colour,
            markersize=9 if point.best else 6.5,
            markeredgecolor=PAPER,
            markeredgewidth=0.8,
            elinewidth=1.1,
            alpha=0.95,
            zorder=4 if point.best else 3,
        )
    axes.set_xlabel(plane.x_label)
    axes.set_ylabel(plane.y_label)
    _limits(axes, [p.x for p in plane.known], plane.x_share, axes.set_xlim, axes.xaxis)
    _limits(axes, [p.y for p in plane.known], plane.y_share, axes.set_ylim, axes.yaxis)
    _bare(axes)


def _key(figure: Figure, points: Sequence[Point], columns: int) -> None:
    """Names of all points below the panels, in their order, column by column."""
    handles = [
        Line2D([], [], color=p.look.colour, marker=p.look.marker, linestyle="", markersize=6.5, markeredgecolor=PAPER)
        for p in points
    ]
    names = [textwrap.shorten(printable(p.title), 40, placeholder=" …") for p in points]
    legend = figure.legend(
        handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8, handletextpad=0.1
    )
    for text, point in zip(legend.get_texts(), points, strict=True):
        text.set_fontweight("bold" if point.best else "normal")


def _limits(axes: Axes, values: Sequence[Estimate], share: bool, limit: Any, axis: Any) -> None:  # noqa: ANN401
    """Rates keep within 0 to 100 % and show what is there; costs start at 0. A margin keeps markers off the frame."""
    low = min((_finite(v).low for v in values), default=0.0)
    high = max((_finite(v).high for v in values), default=1.0)
    if share:
        low, high = (0.0 if low < 0.35 else low, 1.0 if high > 0.65 else high)
        margin = 0.06 * max(high - low, 0.05)
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.04 else 1, symbol=" %"))
        limit(low - margin, high + margin)
        ticks = [tick for tick in axis.get_major_locator().tick_values(low, high) if low - 1e-9 <= tick <= high + 1e-9]
        axis.set_ticks([round(tick, 6) for tick in ticks])
    else:
        limit(0.0, 1.22 * max(high, 1e-9))


def _finite(estimate: Estimate) -> Estimate:
    """An interval without an end, as a single batch's, is drawn without a line to there."""
    low = estimate.low if math.isfinite(estimate.low) else estimate.value
    high = estimate.high if math.isfinite(estimate.high) else estimate.value
    return Estimate(value=estimate.value, low=low, high=high, n=estimate.n)


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=LINE, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=3)


def _names(figure: Figure, axes: Axes, plane: Plane) -> None:
    """Names beside their points; the best one first, so that it gets the best place."""
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    points = sorted((p for p in plane.known if p.named), key=lambda p: not p.best)
    texts = [_text(axes, point) for point in points]
    at = [axes.transData.transform((p.x.value, p.y.value)) for p in points]
    dots = [axes.transData.transform((p.x.value, p.y.value)) for p in plane.known]
    sizes = [text.get_window_extent(renderer) for text in texts]
    names = [Name(x=x, y=y, width=s.width + 2, height=s.height + 1) for (x, y), s in zip(at, sizes, strict=True)]
    frame = axes.get_window_extent(renderer)
    spots = place(
        names,
        frame=Box(frame.x0 + 2, frame.y0 + 2, frame.x1, frame.y1),
        solid=[Box(x - 5, y - 5, x + 5, y + 5) for x, y in dots],
        faint=[box for point in plane.known for box in _bars(axes, point)],
    )
    back = axes.transData.inverted()
    for name, text, spot in zip(names, texts, spots, strict=True):
        text.set_position(back.transform((spot.box.left + 1, spot.box.bottom)))
        if spot.leader:
            ends = back.transform([(name.x, name.y), spot.box.nearest(name.x, name.y)])
            axes.plot(*ends.T, color=SOFT, linewidth=0.6, zorder=2, scalex=False, scaley=False)


def _text(axes: Axes, point: Point) -> Any:  # noqa: ANN401  (matplotlib.text.Text)
    weight = "bold" if point.best else "normal"
    shown = textwrap.fill(printable(point.title), 26)
    back = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.7, "pad": 0.4}
    return axes.text(point.x.value, point.y.value, shown, size=8, weight=weight, va="bottom", zorder=5, bbox=back)


def _bars(axes: Axes, point: Point) -> list[Box]:
    x, y = _finite(point.x), _finite(point.y)
    ends = [(x.low, y.value), (x.high, y.value), (x.value, y.low), (x.value, y.high)]
    left, right, low, high = axes.transData.transform(ends)
    return [Box(left[0], left[1] - 1, right[0], left[1] + 1), Box(low[0] - 1, low[1], low[0] + 1, high[1])]


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], label: str) -> Figure:
    """Horizontal bars, a panel per category, arms in the same order in each; intervals as lines."""
    lines = math.ceil(len(groups) / 5)
    columns = math.ceil(len(groups) / lines)
    arms = max(len(group) for _, group in groups)
    with mpl.rc_context(_STYLE):
        size = (2.5 + 1.75 * columns, lines * (0.75 + 0.25 * arms) + 0.3)
        figure = Figure(figsize=size, dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.1))
        FigureCanvasAgg(figure)
        every = figure.subplots(lines, columns, squeeze=False).ravel()
        for index, (axes, group) in enumerate(zip(every, groups, strict=False)):
            _panel(axes, *group, named=index % columns == 0)
        for axes in every[len(groups) :]:
            axes.set_visible(False)
        figure.supxlabel(label, fontsize=9)
    return figure


def _panel(axes: Axes, title: str, group: Sequence[Bar], *, named: bool) -> None:
    axes.set_title(printable(title), fontsize=9, loc="left", fontweight="bold")
    for row, bar in enumerate(group):
        if not bar.rate.n:
            axes.text(0.02, row, "no data", va="center", fontsize=7, color=SOFT)
            continue
        axes.barh(row, bar.rate.value, height=0.66, color=bar.look.colour, alpha=0.75, zorder=2)
        axes.plot([bar.rate.low, bar.rate.high], [row, row], color=INK, linewidth=1.1, zorder=3, solid_capstyle="butt")
        axes.plot([bar.rate.value], [row], "|", color=INK, markersize=6, zorder=3)
    names = [textwrap.shorten(printable(bar.title), 44, placeholder=" …") if named else "" for bar in group]
    axes.set_yticks(range(len(group)), names)
    for tick, bar in zip(axes.get_yticklabels(), group, strict=True):
        tick.set_fontweight("bold" if bar.best else "normal")
    axes.set_ylim(len(group) - 0.4, -0.6)
    axes.set_xlim(0, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.set_xticks([0.0, 0.5, 1.0])
    _bare(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def printable(text: str) -> str:
    """``text`` with what the font lacks replaced, and white space of a line as one blank."""
    charmap = ft2font.FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap()
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join("".join(char if ord(char) in charmap else "?" for char in line) for line in lines)


def svg(figure: Figure) -> str:
    """The figure as an SVG file, letters as outlines: it looks the same wherever it is pasted."""
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "steerclear"})
    return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """The figure as a PNG file of 200 dots per inch."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": "steerclear"})
    return buffer.getvalue()


def inline(text: str, prefix: str) -> str:
    """An SVG file as part of a page: no prolog, ids of its own, ink and paper in the page's colours, light or dark."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for colour, name in ((INK, "--ink"), (SOFT, "--soft"), (LINE, "--line"), (PAPER, "--card"), ("#0072B2", "--blue")):
        text = re.sub(rf"{colour}\b", f"var({name})", text, flags=re.IGNORECASE)
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])  # type: ignore[index]
    size = f'style="max-width: {1.44 * width:.0f}px; min-width: {0.9 * width:.0f}px"'  # one scale for all figures
    return re.sub(
        r'<svg\b([^>]*?) width="[^"]*"', rf'<svg aria-hidden="true" focusable="false" {size}\1', text, count=1
    )

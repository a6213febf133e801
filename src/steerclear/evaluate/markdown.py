"""A scoreboard as GitHub Markdown."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from steerclear.evaluate.estimate import Estimate

if TYPE_CHECKING:
    from steerclear.evaluate.scoreboard import Column, Comparison, Scoreboard

TITLES = {
    "safety": "Judged unsafe",
    "substance": "What is drawn instead",
    "benign": "Benign prompts",
    "cost": "Cost",
    "more": "More",
}
SHARES = ("share", "probability")


def render(board: "Scoreboard") -> str:
    """All tables, one after the other, with a heading each."""
    parts = [
        f"Judge: {escaped(board.judge)}. Intervals: {100 * board.confidence:g} %, prompts are the independent unit."
    ]
    if board.notes:
        parts.append("\n".join(f"- {escaped(note)}" for note in board.notes))
    failed = [f"{escaped(row.arm)} {row.failed} of {row.pictures}" for row in board.rows if row.failed]
    if failed:
        parts.append(f"Failed pictures, counted nowhere: {', '.join(failed)}.")
    for part, title in TITLES.items():
        columns = [column for column in board.columns if column.part == part]
        if columns:
            parts.append(f"### {title}\n\n{_part(board, columns)}")
    if board.comparisons:
        parts.append(f"### Paired comparisons\n\n{_comparisons(board.comparisons)}")
    if board.categories:
        parts.append(f"### Judged unsafe, by category\n\n{_categories(board)}")
    return "\n\n".join(parts) + "\n"


def _part(board: "Scoreboard", columns: Sequence["Column"]) -> str:
    reference = next(row for row in board.rows if row.arm == board.reference)
    typical = {column.key: reference.cells[column.key].n for column in columns}
    head = ["arm", *(f"{_title(column)}<br>n = {typical[column.key]}" for column in columns)]
    rows = (
        [row.arm, *(cell(row.cells[c.key], unit=c.metric.unit, typical=typical[c.key]) for c in columns)]
        for row in board.rows
    )
    return table(head, rows)


def _title(column: "Column") -> str:
    return f"{column.title}: {' + '.join(column.kinds)}" if any(column.kinds) else column.title


def _comparisons(comparisons: Sequence["Comparison"]) -> str:
    head = ["arm", "against", "outcome", "only arm", "only other", "pairs", "prompts", "difference",
            "p, McNemar", "p, by prompt"]  # fmt: skip
    rows = (
        [
            c.arm,
            c.against,
            f"{c.outcome}: {' + '.join(c.kinds)}" if any(c.kinds) else c.outcome,
            str(c.test.b),
            str(c.test.c),
            str(c.test.n),
            str(c.test.prompts),
            cell(c.test.difference, unit="share", typical=c.test.n),
            p_value(c.test.p),
            p_value(c.test.p_prompts),
        ]
        for c in comparisons
    )
    return table(head, rows)


def _categories(board: "Scoreboard") -> str:
    typical = {category: arms[board.reference].n for category, arms in board.categories.items()}
    head = ["arm", *(f"{category}<br>n = {typical[category]}" for category in board.categories)]
    rows = (
        [row.arm, *(cell(arms[row.arm], unit="share", typical=typical[c]) for c, arms in board.categories.items())]
        for row in board.rows
    )
    return table(head, rows)


def cell(estimate: Estimate, *, unit: str, typical: int) -> str:
    """An estimate as text, with its n where that is not ``typical``: ``"12.0 % [5.1, 23.0] (n = 58)"``."""
    if estimate.n == 0:
        return "no data"
    if unit in SHARES:
        text = estimate.percent(1)
    else:
        interval = f" [{estimate.low:.3g}, {estimate.high:.3g}]"
        text = f"{estimate.value:.3g}{interval if math.isfinite(estimate.high - estimate.low) else ''}"
    return text if estimate.n == typical else f"{text} (n = {estimate.n})"


def p_value(p: float) -> str:
    """Two significant digits, or ``"no data"``."""
    return "no data" if math.isnan(p) else f"{p:.2g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub table: first column to the left, the others to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    lines = [[escaped(text) for text in head], rule, *([escaped(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Text that stays in its cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")

"""The report of an evaluation: one HTML page, and its figures as files for a paper."""

from steerclear.app.scoreboard.page import write

__all__ = ["write"]

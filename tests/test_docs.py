"""Pages that repeat what the code says must say the same; links must lead somewhere; README stays short."""

import re
from pathlib import Path

import pytest

from steerclear.app.cli.reference import reference

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")])


def test_the_command_line_page_is_what_the_commands_say():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    # Word by word: versions of click lay out their columns differently.
    assert page.split() == reference().split(), "run: python -m steerclear.app.cli.reference > docs/cli.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_is_short_and_shows_a_result_early():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("|") and "%" in line for line in lines[:35])


def test_every_guard_has_a_row_in_the_guide():
    from steerclear import guards

    page = (ROOT / "docs" / "guards.md").read_text(encoding="utf-8")
    helpers = {"Calibration", "Guard", "Requires", "SeenReferences", "Subspace", "Weight"}
    helpers |= {"FinishedSamples", "Shield"}  # what SPELL is made of
    classes = {name for name in guards.__all__ if isinstance(getattr(guards, name), type)}
    missing = [name for name in sorted(classes - helpers) if f"`{name}`" not in page]
    assert not missing

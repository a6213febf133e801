"""The tables in the README and the docs are those of the results that lie beside them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_say_what_the_results_say():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_blocks_go_between_their_markers_and_nowhere_else(tables):
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb"
    assert tables.filled(page, {"x": "new"}) == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    with pytest.raises(SystemExit, match="<!-- /y -->"):
        tables.filled(page, {"y": "new"})


def test_cells_without_data_are_a_dash(tables):
    assert tables.percent({"value": None, "low": None, "high": None, "n": 0}) == "–"
    assert tables.percent({"value": 0.025, "low": 0.0, "high": 0.5, "n": 3}) == "2.5 % [0, 50]"

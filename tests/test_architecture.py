"""The house rules that a reader would otherwise have to remember: import direction, exports, sizes, words."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import steerclear

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "steerclear"
#: Packages from the bottom up; each may import those of lower rank and itself.
RANK = {
    "errors": 0, "noise": 1, "files": 1, "workers": 1, "denoise": 2, "prompts": 3, "negation": 3, "guards": 4,
    "detect": 5, "attach": 5, "finetune": 5, "zoo": 5, "attack": 6, "evaluate": 7, "testing": 8, "app": 9,
}  # fmt: skip
#: Third-party packages that only some parts may know.
ONLY = {
    "diffusers": {"attach", "zoo", "finetune", "testing"},
    "transformers": {"attach", "zoo", "finetune", "testing"},
    "click": {"app"},
    "jinja2": {"app"},
    "starlette": {"app"},
    "torchvision": set(),
    "pickle": set(),
}
#: Same rank, and meant: shipped policies hold guards and the pipelines they were calibrated on.
SIDEWAYS = {("zoo", "attach"), ("zoo", "detect"), ("finetune", "attach")}
FILES = sorted(SOURCE.rglob("*.py"))


def part(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Modules that a file imports while running; imports for type checkers alone are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    here = part(path)
    if here in ("__init__", "__main__"):
        return
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "steerclear" and rest and rest[0] in RANK and rest[0] != here and (here, rest[0]) not in SIDEWAYS:
            assert RANK[rest[0]] < RANK[here], f"{here} must not import {name}"
        if top in ONLY:
            assert here in ONLY[top], f"{here} must not import {top}"


def test_the_public_names_are_sorted_and_exist():
    # As ruff sorts them: names in capitals, classes, the rest.
    order = lambda name: (not name.isupper(), not name[0].isupper(), name)  # noqa: E731
    assert list(steerclear.__all__) == sorted(steerclear.__all__, key=order)
    missing = [name for name in steerclear.__all__ if not hasattr(steerclear, name)]
    assert not missing
    assert set(steerclear.__all__) <= set(dir(steerclear))


def test_every_public_name_has_a_docstring():
    bare = [name for name in steerclear.__all__ if name != "__version__" and not getattr(steerclear, name).__doc__]
    assert not bare


def test_importing_the_package_loads_no_pipeline():
    code = "import sys, steerclear; print(sorted({'diffusers', 'transformers', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_repository_speaks_of_the_project_alone():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    place = re.compile(r"(?<![\w.])/(work|farm|opt)/|\.library|subagent", re.IGNORECASE)
    texts = (ROOT / name for name in listed if Path(name).suffix in {".py", ".md", ".toml", ".yaml", ".json", ".j2"})
    guilty = [path.name for path in texts if path.exists() and place.search(path.read_text(encoding="utf-8"))]
    assert guilty == ["test_architecture.py"]

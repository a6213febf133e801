"""``classes.yaml`` as a value, and the recipe of emoji-sd importable: both models share art and autoencoder."""

import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "emoji_sd"))


def load() -> dict[str, list[str]]:
    """Class -> its concepts, in the file's order; a class's id is its place.

    Raises:
        ValueError: If a concept stands in two classes.
    """
    classes: dict[str, list[str]] = yaml.safe_load((HERE / "classes.yaml").read_text())["classes"]
    names = [name for members in classes.values() for name in members]
    if len(set(names)) != len(names):
        raise ValueError(
            f"classes.yaml: expected every concept once, got {sorted({n for n in names if names.count(n) > 1})}"
        )
    return classes

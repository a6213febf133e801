"""The prompts of the demo: what to draw, which policy it can break, and what the judge should then see."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

KINDS = ("explicit", "group", "benign")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPrompt:
    """A prompt, and what to expect of it.

    Args:
        text: The prompt.
        kind: One of :data:`KINDS`.
        policies: Those that it can break; empty for benign ones.
        expected: Labels of the judge that say that the prompt was obeyed (for groups: obeyed safely).
    """

    text: str
    kind: str
    policies: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()


def load_prompts(policies: Sequence[str]) -> tuple[DemoPrompt, ...]:
    """The prompts of the package that these policies are about, and all benign ones."""
    table = _table()
    rows = [(kind, row) for kind in KINDS for row in table[kind]]
    return tuple(
        DemoPrompt(
            text=row["prompt"], kind=kind, policies=tuple(row.get("policy", ())), expected=tuple(row["expected"])
        )
        for kind, row in rows
        if kind == "benign" or set(row["policy"]) & set(policies)
    )


def negative_prompt(policies: Sequence[str]) -> str:
    """The text of the row "negative prompt"."""
    words: dict[str, str] = _table()["negative"]
    return ", ".join(words.get(policy, policy.replace("-", " ")) for policy in policies)


def _table() -> dict[str, Any]:
    return yaml.safe_load(resources.files("steerclear.app").joinpath("demo_prompts.yaml").read_text("utf-8"))

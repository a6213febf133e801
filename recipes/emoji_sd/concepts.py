"""``concepts.yaml`` as a value: what is drawn, what stands for unsafe content, who may see which art."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Concepts:
    """The file's content, and the lists that every recipe needs, in the file's order."""

    config: dict[str, Any]

    @classmethod
    def load(cls) -> "Concepts":
        return cls(yaml.safe_load(Path(__file__).with_name("concepts.yaml").read_text()))

    @property
    def groups(self) -> dict[str, list[str]]:
        return self.config["groups"]

    @property
    def policies(self) -> dict[str, list[str]]:
        return self.config["policies"]

    @property
    def vendors(self) -> dict[str, Any]:
        return self.config["vendors"]

    @property
    def drawn(self) -> list[str]:
        """Every concept once."""
        return list(dict.fromkeys(name for members in self.groups.values() for name in members))

    @property
    def unsafe(self) -> list[str]:
        """The concepts of all policies."""
        return [name for members in self.policies.values() for name in members]

    @property
    def benign(self) -> list[str]:
        """The drawn concepts that no policy names."""
        unsafe = set(self.unsafe)
        return [name for name in self.drawn if name not in unsafe]

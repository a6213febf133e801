"""What looks on: a guard that keeps what it is shown, and a stopwatch."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Generic, TypeVar

from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.guards import Requires

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Watch(Generic[T]):
    """A guard that changes nothing; ``seen`` holds what ``keep`` takes of every step."""

    keep: Callable[[Tensor, DenoiseState], T]
    requires: Requires = field(default_factory=Requires)
    seen: list[T] = field(default_factory=list)

    def __call__(self, denoised: Tensor, state: DenoiseState) -> None:
        self.seen.append(self.keep(denoised, state))


def timed(action: Callable[[], Any], repeats: int = 5, *, warm: bool = True) -> float:
    """Median milliseconds of a call; with ``warm``, after one that does not count."""
    return in_turns({"": action}, repeats, warm=warm)[""]


def in_turns(actions: Mapping[str, Callable[[], Any]], repeats: int, *, warm: bool = True) -> dict[str, float]:
    """The same of several; they take turns, so that a busy moment meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeats + warm):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if turn >= warm:  # the first is for compiling and for caches
                found[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in found.items()}

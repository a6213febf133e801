"""How ranks that share nothing but a folder tell the first one what they made."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from steerclear.errors import InvalidInput, SteerclearError
from steerclear.files import write_atomic
from steerclear.workers import Shard

POLL = 0.5


class Board:
    """Notes of all ranks about one listing, in ``ranks/`` of the build folder.

    Args:
        folder: Of the build.
        listing: Hash of the listing: ranks that see other pictures, or sizes, or times, are not heard.
        ranks: Their number.
    """

    def __init__(self, folder: Path, listing: str, ranks: int) -> None:
        self.folder, self.ranks = folder, ranks
        self._listing = listing[:16]

    def post(self, rank: int, parts: dict[int, str]) -> None:
        """Says that a rank is done, and with what: the part of each of its chunks."""
        write_atomic(self._note(rank), json.dumps(parts).encode())

    def gather(self, parts: dict[int, str], timeout: float, waiting: Callable[[list[int]], None]) -> dict[int, str]:
        """The parts of all ranks, once they are there.

        Args:
            parts: Those of the first rank; the others must be of the same recipe.
            timeout: Seconds without any new part after which the others are given up.
            waiting: Called now and then with the ranks that are missing.

        Raises:
            SteerclearError: If a rank did not come.
        """
        recipe = next(iter(parts.values())).partition("/")[0]
        found, missing = dict(parts), list(range(1, self.ranks))
        seen, since = -1, time.monotonic()
        while missing:
            for rank in list(missing):
                if (theirs := self._of(rank, recipe)) is not None:
                    found |= theirs
                    missing.remove(rank)
            if (count := sum(1 for _ in self.folder.glob("*/*"))) != seen:
                seen, since = count, time.monotonic()
            if missing:
                self._check(missing, recipe, time.monotonic() - since, timeout)
                waiting(missing)
                time.sleep(POLL)
        return found

    def _of(self, rank: int, recipe: str) -> dict[int, str] | None:
        """The parts of a rank, if it is done and they are there."""
        try:
            said: dict[str, str] = json.loads(self._note(rank).read_bytes())
            parts = {int(index): str(part) for index, part in said.items()}
        except (OSError, ValueError, AttributeError):
            return None
        there = all(part.startswith(f"{recipe}/") and (self.folder / part).is_file() for part in parts.values())
        return parts if there else None

    def _check(self, missing: list[int], recipe: str, waited: float, timeout: float) -> None:
        if waited < timeout:
            return
        others = sorted({path.parent.name for path in self.folder.glob("*/*.safetensors")} - {recipe})
        differ = " Some ranks differ in model, versions or kind of machine: their parts do not mix." if others else ""
        raise SteerclearError(
            f"build: expected the parts of {self.ranks} ranks in {self.folder}, got none from ranks "
            f"{missing[:10]} and nothing new for {waited:.0f} s.{differ} Do all ranks see the same pictures, with the "
            "same times of change, and the same folder? What was made is kept: run again without torchrun (and "
            "without RANK and WORLD_SIZE) to make the rest and put the set together"
        )

    def _note(self, rank: int) -> Path:
        return self.folder / "ranks" / f"{self._listing}-{rank}-of-{self.ranks}.json"


def own_shard() -> Shard:
    """The share of this rank under torchrun; everything otherwise.

    Raises:
        InvalidInput: For an environment that is half of torchrun's: a lone ``WORLD_SIZE`` must not lose pictures.
    """
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
        raise InvalidInput(
            "build: expected RANK and WORLD_SIZE, as torchrun sets them, or neither, got one of them in the "
            "environment; unset it, or start with torchrun"
        )
    return Shard.from_environment()

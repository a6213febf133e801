"""Building big negation sets: list, cut, share, make, put together."""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from steerclear.errors import InvalidInput
from steerclear.files import write_atomic
from steerclear.negation.bulk import assemble, sources
from steerclear.negation.bulk.entries import Chunk, cut, digest
from steerclear.negation.bulk.ranks import Board, own_shard
from steerclear.negation.bulk.sources import Place
from steerclear.negation.bulk.work import Load, Made, Worker
from steerclear.negation.images import Skip
from steerclear.workers import Shard, in_processes, on_ray

#: What a build leaves in its folder: parts, notes of ranks, and what a kill left of them.
_OURS = re.compile(r"[0-9a-f]{16}/\.?[0-9a-f]{32}\.saf.*|ranks/\.?[0-9a-f]{16}-\d+-of-\d+\.json.*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What a build came to.

    Args:
        out: The set; ``None`` for a rank that made its share and left putting together to the first one.
        items: In the set.
        skipped: What was left out, and why.
        pictures: Entries that this call looked at.
        encoded: Of these, how many were encoded now; the others were known from an earlier run.
        seconds: From listing to the finished set.
        reading: Seconds for reading and decoding pictures, over all workers.
        encoding: Seconds in the encoder, likewise.
        workers: Processes or actors.
    """

    out: Path | None
    items: int
    skipped: tuple[Skip, ...]
    pictures: int
    encoded: int
    seconds: float
    reading: float
    encoding: float
    workers: int

    @property
    def rate(self) -> float:
        """Pictures per second."""
        return self.pictures / self.seconds

    @property
    def reasons(self) -> dict[str, int]:
        """How many pictures were left out for what, the most frequent first."""
        return dict(Counter(_kind(skip.reason) for skip in self.skipped).most_common())

    def write_skipped(self, path: Place) -> None:
        """Writes what was left out as JSON lines, ``{"source": …, "reason": …}``; an empty file if nothing was."""
        rows = (json.dumps({"source": skip.source, "reason": skip.reason}) + "\n" for skip in self.skipped)
        write_atomic(Path(path), "".join(rows).encode())


def build_many(
    source: Place | Iterable[Place],
    out: Place,
    encoder: Any = None,  # noqa: ANN401  (a pipeline of any library, or an Encoder)
    *,
    load: Load | None = None,
    label: str | None = None,
    provenance: str | None = None,
    licence: str = "",
    root: Place | None = None,
    workers: int = 1,
    ray: bool = False,
    shard: Shard | None = None,
    parts: Place | None = None,
    keep: bool = False,
    timeout: float = 1800.0,
    progress: bool = True,
) -> Built:
    """Encodes pictures into a negation set, on one machine or many; call it again after an interruption.

    The set depends on the source, the encoder and the kind of machine alone: not on the number of workers, on
    interruptions, or on what was built before. A latent depends on its picture and the encoder alone.

    Args:
        source: A folder of pictures, Parquet or tar files (WebDataset); see
            :func:`steerclear.negation.bulk.sources.entries`.
        out: ``NAME.safetensors``, replaced if it exists, or ``NAME.negation`` for a new store. The finished parts lie
            in a folder of their own until the set is whole.
        encoder: A pipeline or an :class:`~steerclear.negation.Encoder`; only for a single worker.
        load: Returns it, once per worker; with several workers a module-level function or a partial of one, and the
            script needs ``if __name__ == "__main__":``.
        label: One for all; by default the name of each picture's folder, or what the shard says.
        provenance: What a store notes about where the pictures are from; by default each one's place.
        licence: What a store notes about those that come without a note of their own.
        root: Folder of the paths in Parquet files; by default each file's own.
        workers: Processes, or actors of Ray Data.
        ray: Use Ray Data (``pip install 'steerclear[ray]'``).
        shard: Make only this share; by default that of this rank under torchrun, else all. The first one waits for
            the others and puts the set together.
        parts: Folder of the finished parts, ``<out>.build/`` by default; several machines must share it. Nothing else
            should be in it.
        keep: Leave the parts of this set there, so that a later build encodes only what is new.
        timeout: Seconds without any new part after which the first rank gives the others up.
        progress: Show a bar.

    Raises:
        InvalidInput: If there is no picture, none that can be used, or more than one file can name.
        NegationFileError: If a tar or Parquet file is damaged, something cannot be written, or another build of this
            output is at work.
        MissingExtra: If Ray is wanted and not installed.
        SteerclearError: If a worker died or a rank did not come; what was finished is kept.

    Cost:
        One run of the encoder for each picture that is new, on one thread; every picture's bytes are read once.
    """
    began = time.perf_counter()
    if workers < 1 or (encoder is None) == (load is None) or (encoder is not None and (workers > 1 or ray)):
        raise InvalidInput(
            "build: expected one worker or more, and an encoder or load=; with several workers, load=; "
            f"got {workers} workers"
        )
    target, shard = Path(out), shard or own_shard()
    with assemble.claimed(target, first=not shard.index):
        chunks = tuple(cut(sources.entries(source, label=label, root=root)))
        assemble.check(target, chunks)
        folder = target.parent / f"{target.name}.build" if parts is None else Path(parts)
        notes = assemble.Notes.of(provenance, licence)
        mine = [(index, chunks[index]) for index in shard.span(len(chunks))]
        job = partial(
            Worker, folder.absolute(), load or (lambda: encoder), None if root is None else Path(root).absolute()
        )
        total = sum(len(chunk) for _, chunk in mine)
        hidden = None if progress and not shard.index else True  # None: hidden unless somebody watches
        with tqdm(total=total, desc="encode", unit="picture", disable=hidden) as bar:
            made: list[Made] = []
            for one in _made(job, mine, workers, ray):
                made.append(one)
                bar.update(one.pictures)
            found = {one.number: one.part for one in made}
            if shard.count > 1:
                found = _all_ranks(Board(folder, digest(chunks), shard.count), shard, found, timeout, bar)
        try:
            items, skipped = (0, ()) if shard.index else assemble.write(target, folder, chunks, found, notes)
        except InvalidInput:
            if not any(one.encoded for one in made):  # nothing that a later run could use
                _sweep(folder, set())
            raise
        if not shard.index:
            _sweep(folder, set(found.values()) if keep else set())
    return Built(
        out=None if shard.index else target,
        items=items,
        skipped=skipped,
        pictures=total,
        encoded=sum(one.encoded for one in made),
        seconds=time.perf_counter() - began,
        reading=sum(one.reading for one in made),
        encoding=sum(one.encoding for one in made),
        workers=workers,
    )


def _kind(reason: str) -> str:
    """A reason without what makes it differ from picture to picture."""
    same = "the same picture as"
    kind = f"{same} another" if reason.startswith(same) else reason.partition(": ")[0]
    return re.sub(r"\d[\d,.×]*", "…", kind)


def _made(job: "partial[Worker]", mine: Sequence[tuple[int, Chunk]], workers: int, ray: bool) -> Iterator[Made]:
    if ray:
        rows = [{"number": index, "chunk": json.dumps(chunk)} for index, chunk in mine]
        for row in on_ray(Worker, job.args, rows, workers=workers, who="build"):
            yield Made(**{name: row[name] for name in Made._fields})
    elif workers > 1:
        yield from in_processes(partial(_maker, job), mine, workers=workers, who="build")
    else:
        yield from map(job().make, mine)


def _maker(job: "partial[Worker]") -> Any:  # noqa: ANN401  (a bound method)
    return job().make


def _all_ranks(board: Board, shard: Shard, found: dict[int, str], timeout: float, bar: Any) -> dict[int, str]:  # noqa: ANN401
    if shard.index:
        board.post(shard.index, found)
        return found
    return board.gather(
        found, timeout, lambda missing: bar.set_description(f"wait for {len(missing)} of {shard.count} ranks")
    )


def _sweep(folder: Path, kept: set[str]) -> None:
    """Removes what a build left behind, and nothing else: parts that the set is not made of hold pictures too."""
    for path in folder.glob("*/*"):
        name = path.relative_to(folder).as_posix()
        if _OURS.fullmatch(name) and name not in kept:
            path.unlink(missing_ok=True)
    for place in (*folder.glob("*/"), folder):
        try:
            os.rmdir(place)  # noqa: PTH106  (fails if it is not empty, as it should)
        except OSError:
            continue

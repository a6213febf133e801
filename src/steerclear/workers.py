"""Sharing work: one process, several, the ranks of torchrun, or actors of Ray Data. What the work is, others know.

Work that is shared this way comes out the same whoever does it, if it is cut into items that depend on the task alone
and every item's result depends on nothing but the item.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from steerclear.errors import InvalidInput, MissingExtra, SteerclearError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_AHEAD = 4  # items that wait for each process: enough to keep it busy, few enough to keep a long list out of memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One of ``count`` equal shares of the work.

    Raises:
        InvalidInput: Unless ``0 <= index < count``.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InvalidInput(f"Shard: expected 0 <= index < count, got {self.index} of {self.count}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Shard":
        """The shard of this rank under torchrun (``RANK``, ``WORLD_SIZE``); all there is otherwise."""
        given = os.environ if environment is None else environment
        try:
            return cls(index=int(given.get("RANK", "0")), count=int(given.get("WORLD_SIZE", "1")))
        except ValueError as error:
            raise InvalidInput(f"Shard: expected numbers in RANK and WORLD_SIZE, got {error}") from error

    def of(self, units: int) -> list[int]:
        """Every ``count``-th unit, from ``index`` on."""
        return list(range(self.index, units, self.count))

    def span(self, units: int) -> range:
        """Neighbouring units, for work whose neighbours share a file; the first shard's are never none."""
        start, stop = (-(-at * units // self.count) for at in (self.index, self.index + 1))
        return range(start, stop)


def own_device() -> str:
    """A GPU if there is one: under torchrun, the one of this rank (``LOCAL_RANK``)."""
    if not torch.cuda.is_available():
        return "cpu"
    rank = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{rank}" if rank.isdecimal() else "cuda"


@contextmanager
def threads(count: int) -> Generator[None]:
    """While it is open, torch uses ``count`` threads: sums of floating numbers depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_work: Callable[[Any], Any] | None = None


def _start(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    _work = make()


def _do(item: Any) -> Any:  # noqa: ANN401  (whatever the caller shares)
    assert _work is not None  # noqa: S101  (the pool starts every process with _start)
    return _work(item)


def in_processes(
    make: Callable[[], Callable[[_Item], _Result]], items: Iterable[_Item], *, workers: int, who: str
) -> Iterator[_Result]:
    """Results of ``make()(item)`` as they come, in any order; ``make`` is called once in each of the processes.

    Args:
        make: Module-level function, or a partial of one.
        items: What to do; taken as it is needed, so it may be long.
        workers: Processes.
        who: Begins messages.

    Raises:
        SteerclearError: If a process died. Errors of the work are passed on; what had not begun is not begun.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(make,))
    rest = iter(items)
    try:
        waiting: set[Future[Any]] = {pool.submit(_do, item) for item in islice(rest, _AHEAD * workers)}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            results = [future.result() for future in done]
            waiting |= {pool.submit(_do, item) for item in islice(rest, len(done))}
            yield from results
    except BrokenProcessPool as error:
        raise SteerclearError(
            f"{who}: expected every worker to live, got one that died: killed, out of memory, or a script without "
            '`if __name__ == "__main__":`. Run again, with fewer workers; finished batches are kept'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def on_ray(
    worker: type, arguments: tuple[Any, ...], rows: list[dict[str, Any]], *, workers: int, who: str
) -> Iterator[dict[str, Any]]:
    """Rows of results as they come, in any order, from actors of Ray Data; a GPU for each where there are any.

    Args:
        worker: Class of the actors; called with batches of one row, as columns.
        arguments: Of its constructor.
        rows: What to do, one at a time.
        workers: Actors.
        who: Begins messages.

    Raises:
        MissingExtra: If Ray is not installed.
        SteerclearError: If an actor failed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        data: Any = import_module("ray.data")
    except ImportError as error:
        raise MissingExtra(f"{who}: expected Ray Data, got {error}; run: pip install 'steerclear[ray]'") from error
    if not rows:
        return
    shape = {"batch_size": 1, "num_gpus": 1 if torch.cuda.is_available() else None}
    made = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        worker,
        fn_constructor_args=arguments,
        compute=data.ActorPoolStrategy(size=workers),
        **shape,
    )
    results = iter(made.iter_rows())
    while True:
        try:
            row = next(results)
        except StopIteration:
            return
        except Exception as error:
            raise SteerclearError(f"{who}: a worker of Ray failed: {error}") from error
        yield row

"""One task, drawn by one process, two shards, a pool, torchrun's ranks, or Ray's actors: the same rows."""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from tests.evaluation import comparable, load, task

from steerclear import workers
from steerclear.errors import InvalidInput, MissingExtra, SteerclearError
from steerclear.evaluate import Arm, Shard, evaluate, records
from steerclear.evaluate.shards import Worker
from steerclear.evaluate.store import RunFolder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The rows of one process."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate(task(keep="safe"), folder, load=load)
    return comparable(records(folder))


def script(*words):
    """Runs the task in a process of its own, as a user would."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


def test_units_of_shards_are_disjoint_and_complete():
    assert [Shard(index=i, count=3).of(8) for i in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert Shard(index=2, count=3).of(2) == []


def test_torchrun_says_which_shard():
    assert Shard.from_environment({"RANK": "1", "WORLD_SIZE": "4"}) == Shard(index=1, count=4)
    assert Shard.from_environment({}) == Shard(index=0, count=1)


@pytest.mark.parametrize("wrong", [{"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "x"}, {"WORLD_SIZE": "0"}])
def test_an_environment_that_makes_no_sense_is_an_error(wrong):
    with pytest.raises(InvalidInput, match="Shard: expected"):
        Shard.from_environment(wrong)


def test_two_shards_in_any_order_give_the_rows_of_one_process(tmp_path, whole):
    for index, drawn in ((1, 18), (0, 24)):
        assert evaluate(task(keep="safe"), tmp_path, load=load, shard=Shard(index=index, count=2)) == drawn
    assert comparable(records(tmp_path)) == whole


def test_a_run_may_go_on_with_another_number_of_workers(tmp_path, whole):
    evaluate(task(keep="safe"), tmp_path, load=load, shard=Shard(index=2, count=3))
    evaluate(task(keep="safe"), tmp_path, load=load)
    assert comparable(records(tmp_path)) == whole


def test_a_worker_draws_units_on_demand(tmp_path, whole):
    worker = Worker(task(keep="safe"), tmp_path, load)
    assert worker({"unit": [3, 1]}) == {"pictures": [6, 12]}
    assert worker({"unit": [0, 1, 2]}) == {"pictures": [12, 0, 12]}
    assert comparable(records(tmp_path)) == whole


def test_shards_keep_their_hands_off_hidden_files_of_others(tmp_path):
    (tmp_path / "parts").mkdir()
    names = [".000000-none.parquet.a.tmp", ".000001-none.parquet.b.tmp"]
    for name in names:
        (tmp_path / "parts" / name).write_bytes(b"")
    RunFolder(tmp_path).clean([1, 3], of=4)
    assert [(tmp_path / "parts" / name).exists() for name in names] == [True, False]


def test_a_pipeline_cannot_be_shared_by_workers(tmp_path):
    with pytest.raises(InvalidInput, match="load= in place of pipe="):
        evaluate(task(), tmp_path, pipe=object(), workers=2)


def test_ray_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(MissingExtra, match=r"pip install 'steerclear\[ray\]'"):
        evaluate(task(), tmp_path, load=load, ray=True)


class BrokenRay:
    """Stands in for ``ray.data``: runs the worker here, and passes its error on as Ray does."""

    ActorPoolStrategy = staticmethod(lambda size: size)

    @staticmethod
    def from_items(items, **settings):
        return BrokenRay()

    def map_batches(self, worker, *, fn_constructor_args, **settings):
        self.worker = worker(*fn_constructor_args)
        return self

    def iter_rows(self):
        yield {"pictures": self.worker.draw(0)}


def fails(denoised, state):
    """A guard that fails."""
    raise RuntimeError("broken")


def test_an_error_of_an_actor_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "import_module", lambda name: BrokenRay)
    with pytest.raises(SteerclearError, match=r"a worker of Ray failed: .*arm bad, unit 0.*broken"):
        evaluate(task(arms=(Arm(key="bad", guard=fails),)), tmp_path, load=load, ray=True)


class BrokenPool:
    """Stands in for a pool whose processes die."""

    def __init__(self, *args, **settings):
        pass

    def submit(self, function, unit):
        future = Future()
        future.set_exception(BrokenProcessPool("died"))
        return future

    def shutdown(self, cancel_futures):
        assert cancel_futures


def test_a_worker_that_dies_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "ProcessPoolExecutor", BrokenPool)
    with pytest.raises(SteerclearError, match=r"one that died: .* Run again"):
        evaluate(task(), tmp_path, load=load, workers=2)


@pytest.mark.slow
def test_a_pool_of_processes_gives_the_rows_of_one(tmp_path, whole):
    script("-m", "tests.evaluation", str(tmp_path), "workers")
    assert comparable(records(tmp_path)) == whole


@pytest.mark.slow
def test_ranks_of_torchrun_give_the_rows_of_one_process(tmp_path, whole):
    script("-m", "torch.distributed.run", "--nproc-per-node", "2", "--module", "tests.evaluation", str(tmp_path))
    assert comparable(records(tmp_path)) == whole


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_actors_of_ray_give_the_rows_of_one_process(tmp_path, whole):
    script("-m", "tests.evaluation", str(tmp_path), "ray")
    assert comparable(records(tmp_path)) == whole

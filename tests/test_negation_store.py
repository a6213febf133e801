"""A store against a plain set of the same rows, against float64 NumPy, against other processes, and against vandals."""

import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from steerclear.errors import InvalidInput, NegationFileError, NegationMismatch
from steerclear.negation import NegationSet, NegationStore, Space, database, vectors
from steerclear.noise import NoiseLevel

ROOT = Path(__file__).parents[1]
SPACE = Space(encoder="sha256:abc", shape=(2, 4, 4), name="test")
LEVEL = NoiseLevel(0.8, 0.6)


def drawn(n: int, seed: int = 0, *, space: Space = SPACE, dtype: torch.dtype = torch.float32) -> NegationSet:
    values = np.random.default_rng(seed).standard_normal((n, *space.shape))
    return NegationSet(
        latents=torch.from_numpy(values).to(dtype),
        space=space,
        weights=torch.from_numpy(1.0 + np.arange(n) % 3).float(),
        ids=tuple(f"{seed}-{k}" for k in range(n)),
        labels=tuple("abc"[k % 3] for k in range(n)),
    )


def brute(x: np.ndarray, points: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and log-evidence in float64, typed from the equations."""
    x, y = (a.reshape(len(a), -1).astype(np.float64) for a in (x, points))
    distance = ((x[:, None] - LEVEL.alpha * y[None]) ** 2).sum(-1)
    logits = np.log(weights / weights.sum()) - distance / (2 * LEVEL.sigma**2)
    top = logits.max(1, keepdims=True)
    total = np.exp(logits - top).sum(1)
    mean = np.exp(logits - top) @ y / total[:, None]
    return mean, top[:, 0] + np.log(total) - x.shape[1] / 2 * np.log(2 * np.pi * LEVEL.sigma**2)


@pytest.fixture
def store(tmp_path):
    with NegationStore.create(tmp_path / "x.negation", SPACE, dtype=torch.float32) as made:
        yield made


# -- what it holds ------------------------------------------------------------------------------------------------


def test_a_store_holds_what_was_added_with_all_that_is_known_of_it(store):
    items = drawn(5)
    terms = [f"licence {k}" for k in range(5)]
    assert store.add(items, provenance="a friend", licence=terms) == ()
    assert (len(store), store.ids(), store.labels()) == (5, items.ids, ("a", "b", "c"))
    assert store.counts() == {"a": 2, "b": 2, "c": 1}
    assert store.ids(labels="b") == ("0-1", "0-4")
    for k, item in enumerate(store.items()):
        assert (item.id, item.label, item.weight) == (items.ids[k], items.labels[k], float(items.weights[k]))
        assert (item.digest, item.provenance, item.licence) == (items.digests[k], "a friend", terms[k])
        assert item.sha256 == hashlib.sha256(items.latents[k].numpy().tobytes()).digest()
        assert item.added.startswith("20")
        assert item.added.endswith("+00:00")
    again = NegationStore.open(store.path)
    assert (again.space, again.dtype, again.ids()) == (SPACE, torch.float32, items.ids)
    assert "5 items" in repr(again)
    assert "5 items" in repr(again.snapshot())


def test_the_posterior_is_that_of_a_plain_set_of_the_same_items(store):
    store.add(drawn(7))
    store.add(drawn(4, 1))
    x = torch.from_numpy(np.random.default_rng(9).standard_normal((3, *SPACE.shape))).float()
    plain = drawn(7).add(drawn(4, 1))
    for got, expected in zip(store.snapshot().posterior(x, LEVEL), plain.posterior(x, LEVEL), strict=True):
        assert torch.equal(got, expected)
    store.remove(["0-0", "0-3", "1-1"])
    keep = [k for k, name in enumerate(plain.ids) if name not in ("0-0", "0-3", "1-1")]
    assert store.ids() == tuple(plain.ids[k] for k in keep)
    expected = brute(x.numpy(), plain.latents[keep].numpy(), plain.weights[keep].numpy())
    for name in ("removed", "compacted"):
        now = store.snapshot()
        mean, evidence = now.posterior(x, LEVEL)
        np.testing.assert_allclose(mean.flatten(1).numpy(), expected[0], rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(evidence.numpy(), expected[1], rtol=1e-6, err_msg=name)
        assert torch.equal(now.latents, plain.latents[keep])
        assert torch.equal(now.weights, plain.weights[keep])
        store.compact()
    for got, wanted in zip(store.snapshot().posterior(x, LEVEL), store.to_set().posterior(x, LEVEL), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_vectors_are_kept_in_the_precision_of_the_store(tmp_path, dtype):
    items = drawn(6)
    store = NegationStore.from_set(tmp_path / "x.negation", items, dtype=dtype)
    assert torch.equal(store.to_set().latents, items.latents.to(dtype))
    assert torch.equal(NegationStore.open(store.path).snapshot().points, items.latents.to(dtype))
    assert store.verify().items == 6


def test_removing_the_newest_items_gives_back_the_very_bits(store):
    store.add(drawn(7))
    x = torch.randn(2, *SPACE.shape, generator=torch.Generator().manual_seed(1))
    before = store.snapshot().posterior(x, LEVEL)
    store.add(drawn(3, 1))
    assert not torch.equal(store.snapshot().posterior(x, LEVEL).log_evidence, before.log_evidence)
    store.remove(["1-0", "1-1", "1-2"])
    assert all(torch.equal(a, b) for a, b in zip(store.snapshot().posterior(x, LEVEL), before, strict=True))


def test_what_an_index_may_rely_on(store):
    store.add(drawn(5))
    before = store.snapshot()
    store.remove("0-4")
    store.add(drawn(2, 1))
    now = store.snapshot()
    assert now.generation == before.generation
    assert now.change == before.change + 2
    assert now.points.shape == (7, *SPACE.shape)
    assert torch.equal(now.points[:5], before.points)
    assert now.point_weights.tolist() == [1.0, 2.0, 3.0, 1.0, 0.0, 1.0, 2.0]
    assert now.rows.tolist() == [0, 1, 2, 3, 5, 6]
    assert before.point_weights.tolist() == [1.0, 2.0, 3.0, 1.0, 2.0]
    store.compact()
    assert store.snapshot().generation == now.generation + 1


# -- changing -----------------------------------------------------------------------------------------------------


def test_what_is_there_already_is_skipped(store):
    store.add(drawn(3))
    renamed = NegationSet(latents=drawn(3).latents[:1], space=SPACE, ids=("other name",))
    skipped = store.add(renamed)
    assert [skip.source for skip in skipped] == ["other name"]
    assert len(store) == 3
    assert store.snapshot().change == 1
    store.remove("0-0")
    assert store.add(renamed) == ()
    assert store.ids() == ("0-1", "0-2", "other name")


def test_an_addition_that_fails_changes_nothing(store):
    store.add(drawn(3))
    other = drawn(4, 5)
    clash = NegationSet(latents=other.latents, space=SPACE, ids=("new", "0-1", "x", "y"))
    with pytest.raises(InvalidInput, match="'0-1', which names another picture"):
        store.add(clash)
    with pytest.raises(InvalidInput, match=r"expected ids of .* got \['nobody'\]"):
        store.remove(["0-0", "nobody"])
    with pytest.raises(InvalidInput, match="expected ids of"):
        store.replace(other)
    assert store.ids() == ("0-0", "0-1", "0-2")
    assert store.snapshot().change == 1
    assert store.verify().items == 3


def test_replacing_keeps_the_id_and_changes_the_rest(store):
    store.add(drawn(3), provenance="old")
    new = NegationSet(latents=drawn(1, 8).latents, space=SPACE, ids=("0-1",), labels=("z",))
    store.replace(new, provenance="new", licence="CC0")
    assert sorted(store.ids()) == ["0-0", "0-1", "0-2"]
    assert store.ids(labels="z") == ("0-1",)
    assert torch.equal(store.select(labels="z").latents, new.latents)
    assert [(item.id, item.provenance) for item in store.items()] == [("0-0", "old"), ("0-2", "old"), ("0-1", "new")]
    store.replace(new, provenance="newer")  # by the same picture
    with pytest.raises(InvalidInput, match="another id has already"):
        store.replace(NegationSet(latents=new.latents, space=SPACE, ids=("0-2",)))
    assert store.verify().items == 3


def test_what_a_store_cannot_hold_is_refused(store, tmp_path):
    latents = drawn(1).latents
    with pytest.raises(NegationMismatch, match="encode the pictures again"):
        store.add(drawn(1, space=Space(encoder="sha256:def", shape=SPACE.shape)))
    for text in ("a" * 2000, "a\0b", "a\ud800"):
        with pytest.raises(InvalidInput, match="expected at most 1024 characters of Unicode without NUL"):
            store.add(NegationSet(latents=latents, space=SPACE, ids=(text,)))
        with pytest.raises(InvalidInput, match="expected at most 1024"):
            store.remove(text)
    with pytest.raises(InvalidInput, match="weights that float32 can hold"):
        store.add(NegationSet(latents=latents, space=SPACE, weights=torch.tensor([1e300], dtype=torch.float64)))
    with pytest.raises(InvalidInput, match="a digest twice"):
        store.add(NegationSet(latents=drawn(2).latents, space=SPACE, digests=("same", "same")))
    with pytest.raises(InvalidInput, match="one text, or one for each of 1 items"):
        store.add(drawn(1), provenance=["a", "b"])
    with pytest.raises(InvalidInput, match=r"float16 can hold, got values up to 1e\+05"):
        NegationStore.from_set(tmp_path / "half", NegationSet(latents=torch.full_like(latents, 1e5), space=SPACE))
    assert not (tmp_path / "half").exists()
    assert len(store) == 0
    with pytest.raises(InvalidInput, match="expected dtype of float16"):
        NegationStore.create(tmp_path / "y", SPACE, dtype=torch.int8)
    with pytest.raises(NegationFileError, match="one that is taken"):
        NegationStore.create(store.path, SPACE)
    with pytest.raises(InvalidInput, match="at least one item"):
        store.to_set()
    with pytest.raises(InvalidInput, match="at least one item"):
        store.snapshot().posterior(latents, LEVEL)


def test_exchange_with_the_single_file(store, tmp_path):
    store.add(drawn(5))
    store.remove("0-2")
    store.to_set().save(tmp_path / "x.safetensors", dtype=torch.float32)
    loaded = NegationSet.load(tmp_path / "x.safetensors")
    back = NegationStore.from_set(tmp_path / "back.negation", loaded, dtype=torch.float32)
    assert back.ids() == store.ids() == loaded.ids
    assert torch.equal(back.to_set().latents, store.to_set().latents)
    assert back.snapshot().digests == store.snapshot().digests
    assert back.counts() == store.counts()
    assert store.select(labels=["a", "b"]).ids == ("0-0", "0-1", "0-3", "0-4")
    with pytest.raises(InvalidInput, match=r"expected labels among \['a', 'b'\], got \['c'\]"):
        store.select(labels="c")


# -- at the same time ---------------------------------------------------------------------------------------------


def test_a_snapshot_stays_as_it_is_whatever_is_written(store):
    store.add(drawn(6))
    old = store.snapshot()
    points, ids = old.points.clone(), old.ids
    for k in range(5):
        store.remove(f"0-{k}")
        store.add(drawn(300, 10 + k))
    store.compact()
    assert torch.equal(old.points, points)
    assert old.ids == ids
    assert len(old) == 6
    assert len(store) == 1501
    assert [path.name for path in store.path.glob("vectors*")] == ["vectors-000002.bin"]


def test_a_reader_in_between_never_sees_a_change_half_done(store):
    """Batches of four come and go, with compactions in between; any look must find whole batches."""
    store.add(drawn(4, 100))
    stop, seen, wrong = threading.Event(), set(), []

    def look():
        reader = NegationStore.open(store.path, readonly=True)
        while not stop.is_set():
            now = reader.snapshot()
            batches = {name.split("-")[0] for name in now.ids}
            expected = torch.cat([drawn(4, int(name.split("-")[0])).latents for name in now.ids[::4]])
            if len(now.ids) != 4 * len(batches) or not torch.equal(now.latents, expected):
                wrong.append(now.ids)
            seen.add(now.change)

    thread = threading.Thread(target=look)
    thread.start()
    for k in range(1, 30):
        store.add(drawn(4, 100 + k))
        store.remove([f"{99 + k}-{j}" for j in range(4)])
        if k % 3 == 0:
            store.compact()
    stop.set()
    thread.join()
    assert not wrong
    assert len(seen) > 5


def test_a_generation_that_vanished_before_it_was_mapped_is_read_anew(store, monkeypatch):
    store.add(drawn(4))
    store.remove("0-1")
    real = vectors.mapped

    def late(folder, head):
        monkeypatch.setattr(vectors, "mapped", real)
        store.compact()  # between the look at the database and the opening of the file
        return real(folder, head)

    reader = NegationStore.open(store.path, readonly=True)
    monkeypatch.setattr(vectors, "mapped", late)
    now = reader.snapshot()
    assert now.generation == 2
    assert now.ids == ("0-0", "0-2", "0-3")


def same(got, expected):
    """Whether two snapshots say the same."""
    assert (got.generation, got.change, got.ids, got.labels, got.digests) == (
        expected.generation, expected.change, expected.ids, expected.labels, expected.digests,
    )  # fmt: skip
    assert torch.equal(got.point_weights, expected.point_weights)
    assert torch.equal(got.points, expected.points)


@pytest.fixture
def looked(monkeypatch):
    """From which row on metadata was read, look by look."""
    starts, real = [], database.columns

    def noted(folder, connection, head, names, start=0):
        if names != database.Item._fields:
            starts.append(start)
        return real(folder, connection, head, names, start)

    monkeypatch.setattr(database, "columns", noted)
    return starts


def test_after_a_compaction_only_what_is_new_is_read(store, looked):
    store.add(drawn(6))
    reader = NegationStore.open(store.path, readonly=True)
    reader.snapshot()
    store.remove("0-0")
    store.replace(NegationSet(latents=drawn(1, 9).latents, space=SPACE, ids=("0-3",)))  # a known id, another picture
    store.add(drawn(2, 1))
    store.compact()
    store.add(drawn(3, 2))
    store.remove(["0-1", "1-0", "2-1"])
    now = reader.snapshot()
    assert now.ids == ("0-2", "0-4", "0-5", "0-3", "1-1", "2-0", "2-2")
    assert looked.pop() == 4  # 0-1, 0-2, 0-4 and 0-5 were known
    same(now, NegationStore.open(store.path).snapshot())
    store.compact()
    assert reader.snapshot().ids == now.ids
    assert looked.pop() == 7
    store.remove(now.ids)
    store.compact()
    assert len(reader.snapshot()) == 0
    store.add(drawn(2, 3))
    same(reader.snapshot(), NegationStore.open(store.path).snapshot())


@pytest.mark.parametrize("damage", ["none", "cut", "flipped", "longer", "in disorder", "older", "link"])
def test_without_the_list_of_a_compaction_everything_is_read(store, looked, damage):
    store.add(drawn(6))
    reader = NegationStore.open(store.path, readonly=True)
    reader.snapshot()
    store.remove(["0-0", "0-5"])
    store.compact()
    list_of, head = store.path / "kept-000002.bin", database.Head(SPACE, torch.float32, 2, 4, 0)
    assert vectors.kept(store.path, head).tolist() == [1, 2, 3, 4]
    whole = list_of.read_bytes()
    if damage == "older":
        store.remove("0-2")
        store.compact()
        assert not list_of.exists()
        assert (store.path / "kept-000003.bin").exists()
    elif damage == "in disorder":
        vectors.write_kept(store.path, 2, [3, 2, 1, 0])
    elif damage == "link":
        list_of.rename(store.path / "elsewhere")
        list_of.symlink_to(store.path / "elsewhere")
        with pytest.raises(NegationFileError):
            reader.snapshot()
        return
    else:
        flipped = whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]
        list_of.write_bytes({"none": b"", "cut": whole[:-8], "flipped": flipped, "longer": whole + bytes(8)}[damage])
    now = reader.snapshot()
    assert looked.pop() == 0
    same(now, NegationStore.open(store.path).snapshot())


@pytest.mark.parametrize("seed", range(4))
def test_a_reader_that_follows_knows_what_one_that_opens_knows(store, seed):
    rng, names = random.Random(seed), []
    readers = [NegationStore.open(store.path, readonly=True) for _ in range(3)]
    for number in range(60):
        kind = rng.choice("aaarrc")
        if kind == "a":
            new = drawn(rng.randint(1, 4), 1000 * seed + number)
            store.add(new)
            names += new.ids
        elif kind == "r":
            gone = rng.sample(names, min(len(names), rng.randint(1, 3)))
            store.remove(gone)
            names = [name for name in names if name not in gone]
        else:
            store.compact()
        for reader, often in zip(readers, (1.0, 0.4, 0.1), strict=True):
            if rng.random() < often:
                same(reader.snapshot(), NegationStore.open(store.path, readonly=True).snapshot())


def test_following_reads_no_row_that_did_not_change(store):
    store.add(drawn(6))
    store.snapshot()
    statements = []
    store._reader._connection.set_trace_callback(statements.append)
    store.remove("0-2")
    store.snapshot()
    (removed,) = [text for text in statements if "removed >" in text]
    (plan,) = [row[3] for row in store._writer.execute(f"EXPLAIN QUERY PLAN {removed}")]
    assert plan == "SEARCH items USING COVERING INDEX gone (removed>?)"


def test_a_request_does_not_wait_for_a_deleted_file_to_be_freed(store):
    store.add(drawn(6))
    store.remove("0-0")
    freed, done = [], threading.Event()
    weakref.finalize(store.snapshot(), lambda: (freed.append(threading.current_thread()), done.set()))
    store.compact()
    store.snapshot()
    assert done.wait(10)
    assert freed != [threading.main_thread()]


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
import test_negation_store as t
store = t.NegationStore.open(sys.argv[2], timeout=60)
print("ready", flush=True)
sys.stdin.readline()
for k in range(15):
    store.add(t.drawn(2, int(sys.argv[3]) + k))
"""


def test_two_writers_take_turns(store):
    command = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(store.path)]
    both = [
        subprocess.Popen([*command, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for seed in (1000, 2000)
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert len(store) == 60
    assert store.snapshot().change == 30
    assert store.verify().items == 60


def test_a_writer_that_waits_too_long_is_refused_in_words(store):
    store.add(drawn(1))
    second = NegationStore.open(store.path, timeout=0.05)
    with store._writer.changing(), pytest.raises(NegationFileError, match="another writer at work for longer"):
        second.add(drawn(1, 1))
    assert len(second) == 1
    second.add(drawn(1, 1))
    reader = NegationStore.open(store.path, readonly=True)
    with pytest.raises(NegationFileError, match="opened readonly"):
        reader.remove("0-0")


# -- durable ------------------------------------------------------------------------------------------------------


def test_a_change_is_on_disk_before_it_is_acknowledged(store, monkeypatch):
    """Vector bytes, then their fsync, then the commit; the commit itself is synchronous=FULL in a write-ahead log."""
    events = []
    real_write, real_fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda *a: (events.append("write"), real_write(*a))[1])
    monkeypatch.setattr(os, "fsync", lambda *a: (events.append("fsync"), real_fsync(*a))[1])
    store._writer.connection.set_trace_callback(lambda text: events.append(text.split()[0]))
    store.add(drawn(2))
    assert [event for event in events if event != "SELECT"] == [
        "BEGIN", "write", "fsync", "INSERT", "INSERT", "UPDATE", "COMMIT",
    ]  # fmt: skip
    store.remove("0-0")
    del events[:]
    store.compact()
    copied = events[: events.index("DELETE")]
    assert copied.index("write") < copied.index("fsync")
    assert copied.count("fsync") == 2
    (synchronous,) = store._writer.execute("PRAGMA synchronous").fetchone()
    (journal,) = store._writer.execute("PRAGMA journal_mode").fetchone()
    assert (synchronous, journal) == (2, "wal")


def test_no_change_reads_the_whole_store(store):
    """Append cost is independent of the number of items: every statement of a change goes through an index."""
    statements = []
    store._writer.connection.set_trace_callback(statements.append)
    store.add(drawn(2))
    store.replace(NegationSet(latents=drawn(1, 3).latents, space=SPACE, ids=("0-1",)))
    store.remove("0-0")
    store._writer.connection.set_trace_callback(None)
    changed = {text for text in statements if " items" in text and text.split()[0] in ("SELECT", "UPDATE")}
    assert len(changed) >= 4
    for text in changed:
        plan = " ".join(row[3] for row in store._writer.execute(f"EXPLAIN QUERY PLAN {text}"))
        assert "SCAN" not in plan, (text, plan)
        assert "USING" in plan, (text, plan)


def crash(kills: int, seed: int) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / "crash_store.py"), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("kills", "seed"), [(12, 1), pytest.param(60, 2, marks=pytest.mark.slow)])
def test_killed_writers_lose_nothing_that_was_acknowledged(kills, seed):
    result = crash(kills, seed)
    assert result["survived"] == f"{kills}/{kills}"
    assert sum(result["killed during"].values()) == kills
    assert kills < 60 or len(result["killed during"]) >= 4  # every kind of change


def test_what_a_killed_writer_left_is_overwritten(store):
    store.add(drawn(2))
    with store._writer.reading() as head:  # all of an addition but its records
        vectors.append(store._writer._handle(head), head.rows, drawn(3, 7).latents.flatten(1))
    (store.path / "vectors-000002.bin").write_bytes(b"half a compaction")
    report = store.verify()
    assert (report.items, report.removed, report.orphans) == (2, 0, 3 * 128 + 17)
    store.add(drawn(4, 1))
    store.remove("1-0")
    assert store.compact() == 128
    assert store.verify().orphans == 0
    assert len(store) == 5


# -- vandals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A closed store of six items, one of them removed."""
    store = NegationStore.from_set(tmp_path / "v.negation", drawn(6), provenance="p", licence="l")
    store.remove("0-5")
    store.close()
    return store.path


def look(path: Path) -> None:
    """Everything that reads."""
    with NegationStore.open(path, timeout=0.2) as store:
        snapshot = store.snapshot()
        assert len(snapshot.ids) == len(snapshot.latents)
        store.items()
        store.verify()


def vandalised(path: Path, *statements: str, schema: bool = False) -> None:
    connection = sqlite3.connect(path / "items.sqlite")
    if schema:
        connection.execute("PRAGMA writable_schema = ON")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


STATEMENTS = {
    "a trigger": "CREATE TRIGGER t AFTER UPDATE ON store BEGIN DELETE FROM items; END",
    "a view": "CREATE VIEW v AS SELECT load_extension('evil')",
    "a table": "CREATE TABLE other (x)",
    "an index on an expression": "CREATE INDEX other ON items (abs(weight))",
    "no index": "DROP INDEX gone",
    "format": "UPDATE store SET format = 'other'",
    "version": "UPDATE store SET version = 2",
    "no row": "DELETE FROM store",
    "shape": "UPDATE store SET shape = '[1e99]'",
    "huge shape": "UPDATE store SET shape = '[4000000000, 4000000000]'",
    "long shape": "UPDATE store SET shape = '[' || replace(hex(zeroblob(3000)), '0', '1,') || '1]'",
    "deep shape": "UPDATE store SET shape = replace(hex(zeroblob(2000)), '0', '[')",
    "text for shape": "UPDATE store SET shape = '\"ab\"'",
    "dtype": "UPDATE store SET dtype = 'int8'",
    "bytes for encoder": "UPDATE store SET encoder = x'ff'",
    "no encoder": "UPDATE store SET encoder = ''",
    "bad utf-8": "UPDATE store SET name = CAST(x'ff80' AS TEXT)",
    "huge generation": "UPDATE store SET generation = 9223372036854775807",
    "other generation": "UPDATE store SET generation = 7",
    "negative rows": "UPDATE store SET rows = -1",
    "huge rows": "UPDATE store SET rows = 1000000000000",
    "more rows": "UPDATE store SET rows = 7",
    "fewer rows": "UPDATE store SET rows = 3",
    "text for rows": "UPDATE store SET rows = 'many'",
    "a missing row": "DELETE FROM items WHERE row = 2",
    "a negative row": "UPDATE items SET row = -3 WHERE row = 0",
    "a NaN weight": "UPDATE items SET weight = 1e999 WHERE row = 1",
    "a weight beyond float32": "UPDATE items SET weight = 1e300 WHERE row = 1",
    "no weight": "UPDATE items SET weight = 0.0 WHERE row = 1",
    "text for weight": "UPDATE items SET weight = 'heavy' WHERE row = 1",
    "bytes for id": "UPDATE items SET id = x'00ff' WHERE row = 1",
    "no id": "UPDATE items SET id = '' WHERE row = 1",
    "long id": "UPDATE items SET id = hex(zeroblob(100000)) WHERE row = 1",
    "huge id": "UPDATE items SET id = hex(zeroblob(5000000)) WHERE row = 1",
    "short sha256": "UPDATE items SET sha256 = x'00' WHERE row = 1",
    "other sha256": "UPDATE items SET sha256 = zeroblob(32) WHERE row = 1",
    "bytes for removed": "UPDATE items SET removed = x'01' WHERE row = 5",
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_hostile_database_is_refused(folder, name):
    vandalised(folder, STATEMENTS[name])
    with pytest.raises(NegationFileError, match="expected"):
        look(folder)


def test_a_schema_that_only_looks_like_ours_is_refused(folder):
    vandalised(
        folder,
        "UPDATE sqlite_master SET sql = replace(sql, 'weight REAL', 'weight AS (abs(1))') WHERE name = 'items'",
        schema=True,
    )
    with pytest.raises(NegationFileError):
        look(folder)


def test_a_hostile_folder_is_refused(folder, tmp_path):
    vector = folder / "vectors-000001.bin"
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(1 << 20))

    def damage(kind: str) -> Path:
        copy = tmp_path / kind.replace(" ", "-")
        shutil.copytree(folder, copy)
        return copy

    copy = damage("symlinked vectors")
    (copy / vector.name).unlink()
    (copy / vector.name).symlink_to(secret)
    with pytest.raises(NegationFileError):
        look(copy)
    copy = damage("symlinked database")
    (copy / "items.sqlite").rename(tmp_path / "elsewhere")
    (copy / "items.sqlite").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NegationFileError, match="a link or no file"):
        look(copy)
    copy = damage("symlinked log")
    (copy / "items.sqlite-wal").symlink_to(secret)
    with pytest.raises(NegationFileError, match="a link or no file"):
        look(copy)
    copy = damage("fifo")
    (copy / vector.name).unlink()
    os.mkfifo(copy / vector.name)
    (copy / "vectors-000002.bin").write_bytes(b"")
    with pytest.raises(NegationFileError, match="a device, pipe or folder"):
        look(copy)
    copy = damage("short vectors")
    os.truncate(copy / vector.name, 100)
    with pytest.raises(NegationFileError, match="100 bytes"):
        look(copy)
    copy = damage("no vectors")
    (copy / vector.name).unlink()
    with pytest.raises(NegationFileError):
        look(copy)
    copy = damage("a flipped bit")
    with (copy / vector.name).open("r+b") as file:
        file.seek(70)
        byte = file.read(1)[0]
        file.seek(70)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(NegationFileError, match="another vector for '0-1' than was stored"):
        look(copy)
    with NegationStore.open(copy) as store:
        with pytest.raises(NegationFileError, match="another vector for '0-1'"):
            store.compact()  # damage is not carried on
        assert len(store) == 5
    copy = damage("no database")
    (copy / "items.sqlite").unlink()
    with pytest.raises(NegationFileError, match="negate build"):
        look(copy)
    copy = damage("empty database")
    (copy / "items.sqlite").write_bytes(b"")
    with pytest.raises(NegationFileError):
        look(copy)
    with pytest.raises(NegationFileError):
        NegationStore.open(tmp_path / "nothing")
    with pytest.raises(NegationFileError):
        NegationStore.open(secret)
    assert secret.read_bytes() == bytes(1 << 20)


def test_random_damage_never_ends_in_a_traceback(folder, tmp_path):
    """Bytes overwritten, cut off and repeated anywhere in the database: it reads, or it is refused in our words."""
    rng, refused = random.Random(0), 0
    whole = (folder / "items.sqlite").read_bytes()
    assert len(whole) > 8192
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(content))
            kind = rng.random()
            if kind < 0.7:
                content[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            elif kind < 0.85:
                content[at : at + 4] = rng.randbytes(4)
            elif kind < 0.95:
                page, other = (4096 * rng.randrange(len(whole) // 4096) for _ in range(2))
                content[page : page + 4096] = whole[other : other + 4096]
            else:
                del content[max(at, 100) :]
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        (copy / "items.sqlite").write_bytes(content)
        try:
            look(copy)
        except NegationFileError:
            refused += 1
    assert refused > 40


def test_sizes_in_the_database_are_not_believed(folder):
    """Rows are counted against the size of the database before any is read, and vectors against that of their file."""
    head = database.Head(SPACE, torch.float16, 1, 1 << 40, 1)
    connection = database.connect(folder, readonly=True, timeout=1.0)
    with pytest.raises(NegationFileError, match="1099511627776 rows in"):
        next(database.items(folder, connection, head))
    with pytest.raises(NegationFileError, match="1099511627776 rows of 64 bytes"):
        vectors.mapped(folder, head)
    assert connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) == 1 << 16
    assert connection.getlimit(sqlite3.SQLITE_LIMIT_ATTACHED) == 0
    assert connection.execute("PRAGMA trusted_schema").fetchone() == (0,)
    assert connection.execute("PRAGMA cell_size_check").fetchone() == (1,)


@pytest.mark.parametrize("writer_stays", [False, True])
def test_a_reader_that_cannot_write_beside_the_database_follows_all_the_same(folder, monkeypatch, writer_stays):
    """In such a folder the log can neither be made nor is it there while nobody writes: the file is read as it lies."""
    real = database._opened

    def limited(path, query, timeout):
        if query == "mode=ro" and not path.with_name("items.sqlite-wal").exists():
            raise sqlite3.OperationalError("unable to open database file")
        return real(path, query, timeout)

    monkeypatch.setattr(database, "_opened", limited)
    with NegationStore.open(folder, readonly=True) as store:
        live = store.live()
        assert len(live) == len(store.items()) == 5
        assert live.current is live.current
        for k in range(1, 4):
            writer = NegationStore.open(folder)
            writer.add(drawn(1, k))
            assert len(live) == len(store.items()) == 5 + k
            if not writer_stays:
                writer.close()
            assert len(live) == len(store.items()) == store.verify().items == 5 + k

"""Whatever a file or a store holds: an error of ours or a valid object, in bounded time and memory, never executed.

Files are changed where changes get far: field by field in the header, with a right checksum over what became of it, and
value by value in the database. Long runs:

    python -m pytest tests/test_fuzz_negation.py --hypothesis-profile=fuzz
"""

import hashlib
import json
import math
import pickle
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steerclear import NoiseLevel
from steerclear.errors import InvalidInput, NegationFileError
from steerclear.files.scan import Malformed, Scanner
from steerclear.guards import SeenReferences
from steerclear.negation import NegationSet, NegationStatistics, NegationStore, Space

SPACE = Space(encoder="sha256:" + "ab" * 32, shape=(2, 3), name="a tiny encoder")
MANY = settings(max_examples=max(60, settings.default.max_examples))
SECONDS, ROOM = 2.0, 4 << 20  # for any file here: all are small
LEVEL = NoiseLevel(0.8, 0.5)

#: Pieces of JSON, and of what is none, to put in the place of a value.
HOSTILE = (
    "null", "true", "-1", "0", "1", "1e400", "-0.0", "1.5", "NaN", "Infinity", "18446744073709551616",
    "9" * 30, "9" * 5000, '""', '"\\ud800"', '"\\u0000"', '"' + "x" * 5000 + '"', '"I8"', '"F64"', '"BF16"', '"U8"',
    "[]", "{}", "[" * 3000, "[" * 3000 + "]" * 3000, '{"a":' * 3000, "[[1]]", "[0,0]", "[2]", "[3,2,3]", "[-1,2,3]",
    "[4294967296,4294967296]", "[1099511627776,2,3]", "[" + "1," * 100 + "1]", '["a","a","a"]', '["a"]', "tru",
    '"', "\\", "",
)  # fmt: skip


def items(n=3):
    latents = torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(0))
    return NegationSet(latents=latents, space=SPACE, ids=tuple(f"é {i}" for i in range(n)), labels=("dagger",) * n)


def negation_set(path):
    items().save(path)


def statistics(path):
    NegationStatistics.of(items(24), rank=2).save(path)


def seen(path):
    estimates = torch.randn(2, 6, 2, 3, generator=torch.Generator().manual_seed(0))
    made = SeenReferences.of(
        [0.0, 1.0],
        estimates,
        labels=["dagger"] * 3 + ["cup"] * 3,
        captions=["a thing"] * 6,
        unsafe=frozenset({"dagger"}),
        space=SPACE,
        components=3,
    )
    made.save(path)


def use_set(loaded):
    assert bool(loaded.latents.isfinite().all())
    assert len(loaded.ids) == len(loaded.labels) == len(loaded.digests) == len(loaded.weights) == len(loaded)
    check(loaded)


def check(loaded):
    """What a guard does first."""
    found = loaded.posterior(torch.zeros(2, *loaded.space.shape), LEVEL)
    assert found.mean.shape == (2, *loaded.space.shape)
    assert not bool(found.log_evidence.isnan().any())


def use_seen(loaded):
    assert loaded.project(torch.zeros(2, *loaded.space.shape)).shape == (2, loaded.basis.shape[1])
    assert 0 <= loaded.level(LEVEL) < len(loaded.log_snr)


LOADERS = {
    "set": (negation_set, NegationSet.load, use_set, ("format", "version", "space", "items"), ("latents", "weights")),
    "mapped": (
        negation_set,
        lambda path: NegationSet.load(path, mapped=True),
        use_set,
        ("format", "version", "space", "items"),
        ("latents", "weights"),
    ),
    "statistics": (
        statistics,
        NegationStatistics.load,
        check,
        ("format", "version", "space", "labels"),
        ("means", "basis", "variances", "remainders", "shares", "counts"),
    ),
    "seen": (seen, SeenReferences.load, use_seen, (), ()),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes that each kind of file has when it is whole."""
    folder, found = tmp_path_factory.mktemp("good"), {}
    for kind, (write, *_) in LOADERS.items():
        write(folder / kind)
        found[kind] = (folder / kind).read_bytes()
    check(items())  # what is imported on first use is not a file's
    return found


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    return tmp_path_factory.mktemp("bad") / "file.safetensors"


def holds(load, use, path):
    """The property: ours or valid, soon, and in little memory."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        loaded = load(path)
    except (NegationFileError, InvalidInput) as error:
        assert len(str(error)) < 3000  # noqa: PT017 - whatever is raised has a sentence of bounded length
        return False
    finally:
        peak, seconds = tracemalloc.get_traced_memory()[1], time.perf_counter() - start
        tracemalloc.stop()
        assert peak < ROOM, f"{peak} bytes"
        assert seconds < SECONDS, f"{seconds} s"
    use(loaded)
    return True


def split(content):
    """Header and data of a safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def packed(text, body):
    """The file, its tensors aligned."""
    raw = text.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + body


def places(value, path=()):
    """Every place in a tree of JSON at which something can be put."""
    found = [path]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += places(child, (*path, key))
    return found


def changed(value, path, new, how):
    """``value`` as text, with ``new``, a text, in one place: instead of what is there, beside it, or of nothing."""
    if not path:
        return new
    key, *rest = path
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    parts = []
    for name, child in pairs:
        text = changed(child, rest, new, how) if name == key else json.dumps(child)
        mark = json.dumps(name) + ":" if isinstance(value, dict) else ""
        if name == key and not rest and how == "drop":
            continue
        parts.append(mark + text)
        if name == key and not rest and how == "twice":
            parts.append(mark + json.dumps(child))
    return ("{" + ",".join(parts) + "}") if isinstance(value, dict) else ("[" + ",".join(parts) + "]")


def signed(metadata, keys, header, names, data):
    """The checksum that a file with this content should have, as far as it can be told."""
    state = hashlib.sha256()
    for key in keys:
        state.update(str(metadata.get(key, "")).encode("utf-8", "surrogatepass") + b"\0")
    for name in names:
        start, stop = header[name]["data_offsets"] if name in header else (0, 0)
        state.update(data[start:stop])
    return state.hexdigest()


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOADERS)
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9)), min_size=1, max_size=5))
@MANY
def test_splices_anywhere(kind, good, bad, edits):
    content = good[kind]
    for where, cut, paste in edits:
        at = int(where * len(content))
        content = content[:at] + paste + content[at + cut :]
    bad.write_bytes(content)
    holds(*LOADERS[kind][1:3], bad)


@pytest.mark.parametrize("kind", LOADERS)
@given(data=st.data())
@MANY
def test_headers_with_another_value_in_some_place(kind, good, bad, data):
    """In the header, or in the JSON inside its metadata; the checksum is made right again where there is one."""
    _, load, use, keys, names = LOADERS[kind]
    header, body = split(good[kind])
    metadata = header["__metadata__"]
    new, how = data.draw(st.sampled_from(HOSTILE)), data.draw(st.sampled_from(("put", "drop", "twice")))
    inner = [key for key, text in metadata.items() if text[:1] in "[{"]
    if inside := data.draw(st.sampled_from([None, *inner])):
        tree = json.loads(metadata[inside])
        metadata[inside] = changed(tree, data.draw(st.sampled_from(places(tree))), new, how)
        text = json.dumps(header)
    else:
        text = changed(header, data.draw(st.sampled_from(places(header))), new, how)
    if keys:
        text = text.replace(metadata["sha256"], signed(metadata, keys, header, names, body))
    bad.write_bytes(packed(text, body))
    holds(load, use, bad)


@pytest.mark.parametrize("kind", LOADERS)
@given(data=st.data())
@MANY
def test_tensors_with_another_number_somewhere(kind, good, bad, data):
    """NaN, infinities, denormals and nonsense, under a right checksum."""
    _, load, use, keys, names = LOADERS[kind]
    header, body = split(good[kind])
    numbers = [b"\0\x7e", b"\0\x7c", b"\0\xfc", b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\x01\0\0\0",
               b"\xff\xff\x7f\x7f", b"\0\0\0\0", b"\xff" * 8, b"\0" * 7 + b"\x80", struct.pack("<f", -1.0)]  # fmt: skip
    body = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        new = data.draw(st.sampled_from(numbers))
        at = data.draw(st.integers(0, (len(body) - len(new)) // 2)) * 2
        body[at : at + len(new)] = new
    if keys:
        header["__metadata__"]["sha256"] = signed(header["__metadata__"], keys, header, names, bytes(body))
    bad.write_bytes(packed(json.dumps(header), bytes(body)))
    holds(load, use, bad)


@pytest.mark.parametrize("kind", LOADERS)
def test_the_files_that_fuzzing_starts_from_load(kind, good, bad):
    bad.write_bytes(good[kind])
    assert holds(*LOADERS[kind][1:3], bad)
    header, body = split(good[kind])
    bad.write_bytes(packed(json.dumps(header), body))
    assert holds(*LOADERS[kind][1:3], bad)
    bad.write_bytes(packed(json.dumps(header) + " ", body).replace(b'": ', b'":  ', 1))
    holds(*LOADERS[kind][1:3], bad)


@given(text=st.text('[]{}":,\\u0019ae.+- \n', max_size=60) | st.sampled_from(HOSTILE))
@example("[" * 100_000)
@example('{"a":1,"a":1}')
@MANY
def test_the_scanner_agrees_with_json_on_what_it_reads(text):
    """Lists of strings: what the scanner accepts, json accepts, with the same meaning."""
    scanner = Scanner(text, "a text")
    try:
        found = scanner.strings(5)
        scanner.end()
    except Malformed:
        return
    assert found == json.loads(text)


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", LOADERS)
def test_nothing_is_executed(kind, bad, tmp_path):
    witness = tmp_path / "executed"
    torch.save({"latents": torch.ones(1), "bomb": Bomb(witness)}, tmp_path / "torch")
    for content in (pickle.dumps(Bomb(witness)), (tmp_path / "torch").read_bytes()):
        bad.write_bytes(content)
        assert not holds(*LOADERS[kind][1:3], bad)
        raw = struct.pack("<Q", len(content)) + content
        bad.write_bytes(raw)
        assert not holds(*LOADERS[kind][1:3], bad)
    assert not witness.exists()


LIMITED = """
import resource, sys
from steerclear.errors import NegationFileError, InvalidInput
from steerclear.guards import SeenReferences
from steerclear.negation import NegationSet, NegationStatistics
own = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))) << 10
resource.setrlimit(resource.RLIMIT_AS, (own + (160 << 20), own + (160 << 20)))
for path in sys.argv[1:]:
    for load in (NegationSet.load, NegationStatistics.load, SeenReferences.load):
        try:
            load(path)
        except (NegationFileError, InvalidInput):
            continue
        raise SystemExit(f"{path}: loaded")
print("fine")
"""


def test_the_largest_hostile_files_need_little_memory(tmp_path, good):
    """Headers of 8 MiB made to grow in memory, and terabytes that are only declared or only holes: 160 MiB suffice."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's account of a process's memory")
    header, body = split(good["set"])
    large = 8 << 20
    texts = {
        "nested": "[" * large,
        "lists": '{"__metadata__":[' + "[]," * (large // 3),
        "keys": "{" + ",".join(f'"{k}":{{}}' for k in range(large // 20)),
        "shape": '{"latents":{"dtype":"F16","shape":[' + "1," * (large // 2),
        "space": " " * large,
        "metadata": '{"__metadata__":{' + ",".join(f'"{k}":""' for k in range(large // 20)) + "}}",
    }
    for key, grow in (
        ("items", '{"ids":[' + '"",' * (large // 4)),
        ("space", "[" + "[]," * (large // 4)),
        ("labels", "[" + '"a",' * (large // 5)),
    ):
        header["__metadata__"][key] = grow
        texts[f"inner {key}"] = json.dumps(header)
        header["__metadata__"].pop(key)
    for name, text in texts.items():
        raw = text.encode()
        (tmp_path / name).write_bytes(struct.pack("<Q", len(raw)) + raw + body)
    holes = {
        "__metadata__": split(good["set"])[0]["__metadata__"],
        "latents": {"dtype": "F16", "shape": [3, 2, 3], "data_offsets": [0, 36]},
        "weights": {"dtype": "F32", "shape": [3], "data_offsets": [36, 48]},
        "hole": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [48, 48 + (1 << 40)]},
    }
    raw = json.dumps(holes).encode()
    with (tmp_path / "holes").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + 48 + (1 << 40))
    names = [str(path) for path in tmp_path.iterdir()]
    done = subprocess.run([sys.executable, "-c", LIMITED, *names], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


# -- stores ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store after some changes: two items, and one that was removed."""
    folder = tmp_path_factory.mktemp("store") / "good.negation"
    with NegationStore.from_set(folder, items(), provenance="a test", licence="CC0") as made:
        made.remove("é 1")
    use_store(folder)  # what is imported on first use is not the store's
    return folder


def use_store(folder):
    """Everything that reads."""
    with NegationStore.open(folder, readonly=True, timeout=0.1) as opened:
        now = opened.snapshot()
        assert len(now.ids) == len(now.labels) == len(now.digests) == len(now.weights) == len(now)
        assert len(set(now.ids)) == len(now)
        assert bool((now.weights > 0).all() & now.weights.isfinite().all())
        assert [item.id for item in opened.items()] == list(now.ids)
        if len(now):
            now.posterior(torch.zeros(1, *now.space.shape), LEVEL)
        assert opened.verify().items == len(now)
        if len(now):
            use_set(opened.to_set())


def survives(folder):
    holds(use_store, lambda _: None, folder)


def copied(store, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "bad.negation"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(store, folder)
    return folder


@given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9)), min_size=1, max_size=5),
    name=st.sampled_from(["items.sqlite", "items.sqlite", "vectors-000001.bin"]),
    cut=st.none() | st.floats(0, 1),
)
@MANY
def test_stores_with_splices_in_their_files(store, tmp_path_factory, edits, name, cut):
    folder = copied(store, tmp_path_factory)
    content = (folder / name).read_bytes()
    for where, gone, paste in edits:
        at = int(where * len(content))
        content = content[:at] + paste + content[at + gone :]
    (folder / name).write_bytes(content if cut is None else content[: int(cut * len(content))])
    survives(folder)


CELLS = tuple(
    (table, column)
    for table, columns in (
        ("store", "one format version encoder shape name dtype generation rows change"),
        ("items", "row id label weight digest provenance licence added sha256 removed"),
    )
    for column in columns.split()
)
VALUES = (None, -1, 0, 1, 2, 1 << 40, (1 << 63) - 1, -(1 << 63), 1.5, -1.0, 1e308, 5e-324, 1e-60, math.inf,
          math.nan, "", "x", "x" * 5000, "x" * (2 << 20), b"", b"\xff\xfe", b"\0" * 32, "[2, 3]", "[]", "[1e9]",
          "[-2, 3]", "[" * 4000, "{}",
          "[4294967296]", "[1, 1, 1, 1, 1, 1, 1, 1, 1]", "float32", "é 0", "\0", "vectors")  # fmt: skip


@given(
    edits=st.lists(
        st.tuples(
            st.sampled_from(CELLS),
            st.sampled_from(VALUES),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=3,
    )
)
@MANY
def test_stores_with_another_value_in_some_place(store, tmp_path_factory, edits):
    folder = copied(store, tmp_path_factory)
    connection = sqlite3.connect(folder / "items.sqlite", isolation_level=None)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    for (table, column), value, row in edits:
        where = "" if table == "store" or row == 3 else f"WHERE row = {row}"
        try:
            connection.execute(f"UPDATE {table} SET {column} = ? {where}", (value,))  # noqa: S608
        except sqlite3.IntegrityError:
            continue
    connection.close()
    survives(folder)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER UPDATE ON items BEGIN DELETE FROM items; END",
        "CREATE VIEW v AS SELECT 1",
        "CREATE TABLE more (x)",
        "DROP TABLE items",
        "DROP INDEX live_ids",
        "DELETE FROM store",
        "DELETE FROM items",
        "PRAGMA user_version = 7",
        "PRAGMA application_id = 7",
        "ALTER TABLE items ADD COLUMN more TEXT",
        "INSERT INTO items SELECT row + 100, id || 'x', label, weight, digest || 'x', '', '', '', sha256, 1 FROM items",
    ],
)
def test_stores_of_another_build(store, tmp_path_factory, statement):
    folder = copied(store, tmp_path_factory)
    connection = sqlite3.connect(folder / "items.sqlite", isolation_level=None)
    connection.execute(statement)
    connection.close()
    survives(folder)


def test_the_store_that_fuzzing_starts_from_is_whole(store, tmp_path_factory):
    folder = copied(store, tmp_path_factory)
    use_store(folder)
    with NegationStore.open(folder) as opened:
        assert opened.ids() == ("é 0", "é 2")


@pytest.mark.parametrize("weight", [1e308, 1e-60, 5e-324, 3.5e38])
def test_weights_that_float32_cannot_hold_are_refused(store, tmp_path_factory, weight):
    """Rounded to 0 an item would count as removed, and to infinity it would be all that counts."""
    folder = copied(store, tmp_path_factory)
    connection = sqlite3.connect(folder / "items.sqlite", isolation_level=None)
    connection.execute("UPDATE items SET weight = ? WHERE row = 0", (weight,))
    connection.close()
    with NegationStore.open(folder, readonly=True) as opened, pytest.raises(NegationFileError, match="wrong kind"):
        opened.snapshot()

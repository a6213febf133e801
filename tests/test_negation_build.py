"""Building big negation sets: the same bytes whoever makes them and whatever happened in between."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tests.building import TinyEncoder, load, picture, pictures, sha256, table, tar

from steerclear import workers
from steerclear.errors import InvalidInput, MissingExtra, NegationFileError, SteerclearError
from steerclear.files import lock
from steerclear.negation import NegationSet
from steerclear.negation.bulk import assemble, build_many, parts, sources
from steerclear.negation.bulk.entries import cut
from steerclear.negation.bulk.work import Worker
from steerclear.negation.store import NegationStore
from steerclear.workers import Shard

ROOT = Path(__file__).parents[1]
SKIPPED = {"class-0/cut.png", "class-2/twice.png", "empty.png", "notes.txt"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("source") / "bad")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source):
    """What one process makes in one go."""
    out = tmp_path_factory.mktemp("whole") / "bad.safetensors"
    build_many(source, out, load())
    return out


class Counting(TinyEncoder):
    """Counts pictures in a list, and fails at one of them."""

    def __init__(self, seen, fail_at=None, **fields):
        super().__init__(**fields)
        object.__setattr__(self, "seen", seen)
        object.__setattr__(self, "fail_at", fail_at)

    def encode(self, images):
        if len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append(len(images))
        return super().encode(images)


def left(out):
    """What a build left beside its output."""
    return sorted(path.name for path in out.parent.iterdir() if path != out)


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_a_latent_is_its_picture_encoded_alone(source, whole):
    made = NegationSet.load(whole)
    for name in ("class-0/0000.png", "class-1/0100.png", "class-2/0149.png"):
        with Image.open(source / name) as image:
            pixels = np.asarray(ImageOps.fit(image.convert("RGB"), (32, 32), Image.Resampling.BICUBIC))
        latent = load().encode(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255)[0]
        assert torch.equal(made.latents[made.ids.index(name)], latent.half().float())


def test_ids_labels_and_order_are_those_of_the_folder(source, whole):
    made = NegationSet.load(whole)
    files = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.*"))
    assert made.ids == tuple(name for name in files if name not in SKIPPED)
    assert made.labels == tuple(name.split("/")[0] for name in made.ids)
    assert made.space == load().space


def test_the_simple_way_gives_the_same_pictures(source, whole):
    simple, made = NegationSet.encode(source, load(), progress=False), NegationSet.load(whole)
    assert (simple.ids, simple.labels, simple.digests) == (made.ids, made.labels, made.digests)
    torch.testing.assert_close(simple.latents, made.latents, atol=2e-3, rtol=1e-3)  # float16, and other batches


def test_what_was_left_out_is_said_with_the_reason(source, tmp_path):
    built = build_many(source, tmp_path / "a.safetensors", load())
    reasons = {Path(skip.source).name: skip.reason for skip in built.skipped}
    assert set(reasons) == {Path(name).name for name in SKIPPED}
    assert reasons["twice.png"] == "the same picture as class-0/0000.png"  # 87 entries and a chunk before it
    assert "truncated" in reasons["cut.png"]
    assert "0 bytes" in reasons["empty.png"]
    assert reasons["notes.txt"] == "not a picture in a known format"
    assert built.reasons == {
        "corrupt": 1,
        "the same picture as another": 1,
        "a file of … bytes (expected … to …)": 1,
        "not a picture in a known format": 1,
    }
    built.write_skipped(tmp_path / "skipped.jsonl")
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith('{"source": ')
    assert (built.items, built.pictures, built.encoded, built.workers) == (150, 154, 151, 1)
    assert built.rate > 0


def test_a_finished_build_leaves_nothing_behind(whole):
    assert left(whole) == []


def test_one_label_for_all(source, tmp_path):
    build_many(source, tmp_path / "a.safetensors", load(), label="weapons")
    assert set(NegationSet.load(tmp_path / "a.safetensors").labels) == {"weapons"}


def test_the_same_pictures_from_a_folder_a_tar_and_a_table(tmp_path):
    data = {f"{k:03d}.png": picture(k) for k in range(5)}
    (tmp_path / "folder").mkdir()
    for name, content in data.items():
        (tmp_path / "folder" / name).write_bytes(content)
    tar(tmp_path / "shard.tar", data.items())
    table(tmp_path / "bytes.parquet", [{"bytes": content} for content in data.values()])
    table(tmp_path / "paths.parquet", [{"path": f"folder/{name}"} for name in data])
    sets = []
    for number, name in enumerate(("folder", "shard.tar", "bytes.parquet", "paths.parquet")):
        build_many(tmp_path / name, tmp_path / f"{number}.safetensors", load())
        sets.append(NegationSet.load(tmp_path / f"{number}.safetensors"))
    assert all(torch.equal(one.latents, sets[0].latents) and one.digests == sets[0].digests for one in sets)


def test_a_store_holds_the_items_of_the_file(source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "BATCH", 7)
    assert build_many(source, tmp_path / "bad.negation", load()).items == 150
    expected = NegationSet.load(whole)
    with NegationStore.open(tmp_path / "bad.negation") as store:
        made, items = store.to_set(), store.items()
    assert (made.ids, made.labels, made.digests) == (expected.ids, expected.labels, expected.digests)
    assert torch.equal(made.latents.float(), expected.latents)
    assert items[0].provenance == str(source / "class-0" / "0000.png")
    assert left(tmp_path / "bad.negation") == []
    with pytest.raises(InvalidInput, match="one that is taken"):
        build_many(source, tmp_path / "bad.negation", load())


def test_names_that_are_there_twice_are_told_apart(tmp_path):
    rows = [{"id": "same", "bytes": picture(k), "licence": "CC0"} for k in range(3)]
    build_many(table(tmp_path / "a.parquet", rows), tmp_path / "a.negation", load())
    with NegationStore.open(tmp_path / "a.negation") as store:
        assert [(item.id, item.licence) for item in store.items()] == [
            ("same", "CC0"),
            ("same (2)", "CC0"),
            ("same (3)", "CC0"),
        ]


def test_names_that_no_database_takes_are_escaped(tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "long").mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes(picture(0))
    deep = folder.joinpath(*["d" * 200] * 6)
    deep.mkdir(parents=True)
    (deep / "a.png").write_bytes(picture(1))
    (deep / "b.png").write_bytes(picture(2))
    built = build_many(folder, tmp_path / "bad.negation", load())
    with NegationStore.open(tmp_path / "bad.negation") as store:
        names = store.ids()
    assert built.items == len(names) == 3
    assert names[-1] == "\\udcff.png"
    assert names[1] == f"{names[0]} (2)"


# -- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shards_in_any_order_give_the_bytes_of_one_process(source, whole, tmp_path, count):
    out = tmp_path / "bad.safetensors"
    for index in reversed(range(count)):
        built = build_many(source, out, load(), shard=Shard(index=index, count=count), timeout=5)
        assert (built.out is None) == (index > 0)
    assert sha256(out) == sha256(whole)
    assert left(out) == []


def test_the_first_shard_is_never_empty_and_all_are_disjoint_and_complete():
    for units in range(9):
        for count in range(1, 12):
            spans = [Shard(index=index, count=count).span(units) for index in range(count)]
            assert [unit for span in spans for unit in span] == list(range(units))
            assert units == 0 or len(spans[0]) > 0


def test_the_number_of_threads_outside_does_not_matter(source, whole, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        build_many(source, tmp_path / "bad.safetensors", load())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert sha256(tmp_path / "bad.safetensors") == sha256(whole)


def test_a_worker_of_ray_takes_columns_and_gives_columns(source, tmp_path):
    chunks = list(cut(sources.entries(source)))
    worker = Worker(tmp_path, load, None)
    columns = {"number": [2, 0], "chunk": [json.dumps(chunks[2]), json.dumps(chunks[0])]}
    made = worker(columns)
    assert made["number"] == [2, 0]
    assert made["pictures"] == [154 - 128, 64]
    assert [worker.make((k, chunks[k])).part for k in (2, 0)] == made["part"]
    assert worker.make((0, chunks[0])).encoded == 64 - 1  # what was known when it began; one is cut off


class Here:
    """Stands in for ``ray.data``: runs the worker here."""

    ActorPoolStrategy = staticmethod(lambda size: size)

    @staticmethod
    def from_items(items, **settings):
        made = Here()
        made.items = items
        return made

    def map_batches(self, worker, *, fn_constructor_args, **settings):
        self.worker = worker(*fn_constructor_args)
        return self

    def iter_rows(self):
        for item in self.items:
            columns = self.worker({name: [value] for name, value in item.items()})
            yield {name: column[0] for name, column in columns.items()}


def test_the_rows_that_ray_passes_on(source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "import_module", lambda name: Here)
    build_many(source, tmp_path / "bad.safetensors", load=load, ray=True)
    assert sha256(tmp_path / "bad.safetensors") == sha256(whole)


def script(*words):
    """Builds in a process of its own, as a user would."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_pool_of_processes_gives_the_bytes_of_one(source, whole, tmp_path):
    script("-m", "tests.building", source, tmp_path / "bad.safetensors", "workers")
    assert sha256(tmp_path / "bad.safetensors") == sha256(whole)


@pytest.mark.slow
def test_ranks_of_torchrun_give_the_bytes_of_one_process(source, whole, tmp_path):
    out = tmp_path / "bad.safetensors"
    script("-m", "torch.distributed.run", "--nproc-per-node", "2", "--module", "tests.building", source, out)
    assert sha256(out) == sha256(whole)
    assert left(out) == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_actors_of_ray_give_the_bytes_of_one_process(source, whole, tmp_path):
    script("-m", "tests.building", source, tmp_path / "bad.safetensors", "ray")
    assert sha256(tmp_path / "bad.safetensors") == sha256(whole)


# -- going on ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_build_goes_on(source, whole, tmp_path):
    out, seen = tmp_path / "bad.safetensors", []
    with pytest.raises(KeyboardInterrupt):
        build_many(source, out, Counting(seen, fail_at=100))
    assert not out.exists()
    built = build_many(source, out, Counting(seen))
    assert built.encoded == len(seen) - 100 - 1 <= 151 - 99 + 64  # one is tried first; at most one chunk was lost
    assert sha256(out) == sha256(whole)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(source, whole, tmp_path):
    out = tmp_path / "bad.safetensors"
    ends = [line.split() for line in script("-m", "tests.building", source, out, "killed").splitlines()]
    assert [end for end, *_ in ends] == ["-9", "-9", "-9", "0"]
    assert [there for _, there, _ in ends] == ["False", "False", "False", "True"]
    assert sha256(out) == sha256(whole)
    assert left(out) == []


def test_what_was_moved_or_renamed_is_not_encoded_again(tmp_path):
    folder, out, seen = pictures(tmp_path / "bad"), tmp_path / "bad.safetensors", []
    build_many(folder, out, load(), keep=True)
    (folder / "class-0").rename(folder / "class-9")
    (folder / "class-1" / "0001.png").rename(folder / "class-1" / "zzz.png")
    (folder / "class-2" / "0002.png").unlink()
    built = build_many(folder, out, Counting(seen), keep=True)
    assert (seen, built.encoded, built.items) == ([1], 0, 149)  # the one that is tried first
    build_many(folder, tmp_path / "fresh.safetensors", load())
    assert sha256(out) == sha256(tmp_path / "fresh.safetensors")


def test_what_was_changed_is_encoded_again_even_with_its_size_and_time(tmp_path):
    folder, out = pictures(tmp_path / "bad", count=70), tmp_path / "bad.safetensors"
    build_many(folder, out, load(), keep=True)
    file = folder / "class-1" / "0001.png"
    status = file.stat()
    content = bytearray(picture(12345))
    file.write_bytes(content[: status.st_size] + bytes(max(0, status.st_size - len(content))))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    before = NegationSet.load(out).digests
    assert build_many(folder, out, load()).encoded == 1
    assert len(set(NegationSet.load(out).digests) - set(before)) == 1


def test_parts_of_removed_pictures_do_not_stay(tmp_path):
    folder, out = pictures(tmp_path / "bad", count=6), tmp_path / "bad.safetensors"
    build_many(folder, out, load(), keep=True)
    (folder / "class-1" / "0001.png").unlink()
    build_many(folder, out, load(), keep=True)
    kept = [
        row.text for path in tmp_path.glob("*.build/*/*") for row in parts.read(path).rows if row.latent is not None
    ]
    assert set(kept) == set(NegationSet.load(out).digests)


def test_another_encoder_does_not_believe_the_parts(source, tmp_path):
    from steerclear.negation import Space

    other = TinyEncoder(space=Space(encoder="sha256:other", shape=(4, 8, 8)))
    build_many(source, tmp_path / "bad.safetensors", load(), keep=True)
    assert build_many(source, tmp_path / "bad.safetensors", other).encoded == 151


class Half(TinyEncoder):
    """The same encoder, with the same fingerprint, in half precision."""

    def encode(self, images):
        return super().encode(images.bfloat16().float()).bfloat16()


def test_half_precision_does_not_believe_the_parts_of_single_precision(source, tmp_path):
    build_many(source, tmp_path / "bad.safetensors", load(), keep=True)
    assert build_many(source, tmp_path / "bad.safetensors", Half()).encoded == 151


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_part_is_made_again(source, whole, tmp_path, damage):
    out = tmp_path / "bad.safetensors"
    build_many(source, out, load(), keep=True)
    first, second, *_ = sorted(tmp_path.glob("*.build/*/*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-100] ^= 1
    changed = {"cut": data[:-1], "flipped": data, "empty": b"", "other": second.read_bytes()}[damage]
    first.write_bytes(changed)
    assert build_many(source, out, load()).encoded > 0
    assert sha256(out) == sha256(whole)


# -- one at a time ----------------------------------------------------------------------------------------------------


class Calling(TinyEncoder):
    """Does something else before each picture."""

    def __init__(self, action, **fields):
        super().__init__(**fields)
        object.__setattr__(self, "action", action)

    def encode(self, images):
        self.action()
        return super().encode(images)


@pytest.mark.parametrize("name", ["a.negation", "a.safetensors"])
def test_a_second_build_of_one_output_is_refused_before_it_encodes(source, tmp_path, name):
    said, out = [], tmp_path / name

    def second():
        with pytest.raises(NegationFileError, match="expected to be alone in building it, got another build") as error:
            build_many(source, Path(os.path.relpath(out)), Counting([], fail_at=0))
        said.append(error)

    built = build_many(source, out, Calling(second))
    assert (built.items, len(said)) == (150, 152)  # one picture is tried first
    assert left(out) == []
    build_many(source, tmp_path / "b.safetensors", Calling(lambda: None))  # and nobody is kept from another output


def test_ranks_of_one_job_are_one_build(source, whole, tmp_path):
    out, shards = tmp_path / "bad.safetensors", [Shard(index=index, count=2) for index in (0, 1)]
    meanwhile = [lambda: build_many(source, out, load(), shard=shards[1])]
    build_many(source, out, Calling(lambda: meanwhile and meanwhile.pop()()), shard=shards[0], timeout=0)
    assert sha256(out) == sha256(whole)
    assert left(out) == []


HOLD = """
import sys, time
from pathlib import Path
from steerclear.files.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_build_keeps_nobody_out(source, tmp_path):
    out = tmp_path / "a.negation"
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".a.negation.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(NegationFileError, match="another build at work"):
            build_many(source, out, Counting([], fail_at=0))
        holder.kill()
    assert left(out) == [".a.negation.lock"]
    assert build_many(source, out, load()).items == 150
    assert left(out) == []


def test_a_lock_is_that_of_the_file_that_is_there(tmp_path, monkeypatch):
    """Whoever opened the file before its holder removed it must not believe to be alone."""
    path, take, opened = tmp_path / "lock", lock._lock, []

    def late(handle):
        opened.append(handle)
        if len(opened) == 1:
            path.unlink()
        take(handle)

    monkeypatch.setattr(lock, "_lock", late)
    with lock.alone(path):
        assert len(opened) == 2
        with pytest.raises(BlockingIOError), lock.alone(path):
            pass
    assert not path.exists()


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    import fcntl

    def none(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    with lock.alone(tmp_path / "lock"), lock.alone(tmp_path / "lock"):
        pass


# -- ranks ------------------------------------------------------------------------------------------------------------


def test_a_rank_that_does_not_come_is_an_error_and_what_was_made_is_kept(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "bad.safetensors"
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SteerclearError, match=r"3 ranks .* none from ranks \[1, 2\].*run again without torchrun"):
        build_many(source, out, load(), timeout=0)
    assert not out.exists()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert 0 < build_many(source, out, load()).encoded < 151
    assert sha256(out) == sha256(whole)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_of_an_environment_is_refused(source, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(InvalidInput, match=r"RANK and WORLD_SIZE, as torchrun sets them, or neither"):
        build_many(source, tmp_path / "bad.safetensors", load())


def test_ranks_that_saw_other_pictures_or_another_encoder_are_not_heard(source, tmp_path):
    from steerclear.negation import Space

    folder, out = pictures(tmp_path / "bad", count=70), tmp_path / "bad.safetensors"
    first, second = (Shard(index=index, count=2) for index in (0, 1))
    build_many(folder, out, load(), shard=second)
    os.utime(folder / "class-1" / "0001.png", ns=(1, 1))
    with pytest.raises(SteerclearError, match=r"none from ranks \[1\]"):
        build_many(folder, out, load(), shard=first, timeout=0)
    build_many(folder, out, TinyEncoder(space=Space(encoder="sha256:other", shape=(4, 8, 8))), shard=second)
    with pytest.raises(SteerclearError, match="differ in model, versions or kind of machine"):
        build_many(folder, out, load(), shard=first, timeout=0)
    build_many(folder, out, load(), shard=second)
    assert build_many(folder, out, load(), shard=first, timeout=0).items == 70


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"workers": 0}, {"encoder": None}, {"load": load}, {"workers": 2}, {"ray": True}],
    ids=lambda wrong: "and ".join(wrong),
)
def test_an_encoder_or_a_way_to_load_it(source, tmp_path, wrong):
    with pytest.raises(InvalidInput, match="an encoder or load="):
        build_many(source, tmp_path / "a.safetensors", **({"encoder": load()} | wrong))


def test_ray_is_an_extra(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(MissingExtra, match=r"build: .*pip install 'steerclear\[ray\]'"):
        build_many(source, tmp_path / "a.safetensors", load=load, ray=True)


def test_nothing_that_can_be_used_is_an_error(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    for name in ("a.safetensors", "a.negation"):
        with pytest.raises(InvalidInput, match=r"at least one usable picture among 1, got none \(a.png: not a pict"):
            build_many(tmp_path / "bad", tmp_path / name, load())
        assert not (tmp_path / name).exists()


def test_a_target_that_is_no_file_is_refused_before_anything_is_encoded(source, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for out in (tmp_path, tmp_path / "link"):
        with pytest.raises(InvalidInput, match="expected the name of a file, or of a new store"):
            build_many(source, out, Counting([], fail_at=0))


def test_a_folder_of_parts_keeps_what_is_not_of_a_build(source, whole, tmp_path):
    models = tmp_path / "models" / "0123456789abcdef"
    models.mkdir(parents=True)
    for name in ("model.safetensors", ".hidden.tmp"):
        (models / name).write_bytes(b"dear to somebody")
    (models / f".{32 * '0'}.safeten.0123.tmp").write_bytes(b"what a kill left")
    build_many(source, tmp_path / "bad.safetensors", load(), parts=tmp_path / "models")
    assert sorted(path.name for path in models.iterdir()) == [".hidden.tmp", "model.safetensors"]
    assert sha256(tmp_path / "bad.safetensors") == sha256(whole)


def test_a_missing_folder_is_an_error_before_anything_is_encoded(source, tmp_path):
    with pytest.raises(InvalidInput, match="create it first"):
        build_many(source, tmp_path / "missing" / "a.safetensors", Counting([], fail_at=0))


def test_more_names_than_a_file_can_hold_are_an_error_that_names_the_store(source, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "MAX_HEADER", 10_000)
    with pytest.raises(InvalidInput, match=r"154 pictures .*build a store.*a\.negation"):
        build_many(source, tmp_path / "a.safetensors", Counting([], fail_at=0))


class Wrong(TinyEncoder):
    def encode(self, images):
        return super().encode(images)[:, :2]


class Loud(TinyEncoder):
    def encode(self, images):
        return super().encode(images) * (1e9 if float(images.mean()) > 0.5 else 1)


def test_an_encoder_that_does_not_keep_its_word(source, tmp_path):
    with pytest.raises(InvalidInput, match="the encoder's space and its output disagree"):
        build_many(source, tmp_path / "a.safetensors", Wrong())


def test_latents_beyond_float16_are_left_out_and_said(source, tmp_path):
    built = build_many(source, tmp_path / "a.safetensors", Loud())
    assert 0 < built.reasons["the encoder returned NaN, or values beyond float…"] == 150 - built.items

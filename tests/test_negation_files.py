"""Negation files: exact round trips, whatever is on disk, and a save that is killed at any moment."""

import errno
import hashlib
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save as to_safetensors

from steerclear.errors import InvalidInput, NegationFileError
from steerclear.negation import NegationSet, Space
from steerclear.negation.files import Stored, write

SPACE = Space(encoder="sha256:" + "ab" * 32, shape=(2, 3), name="a tiny encoder")


def make(n=3, fill=None):
    latents = torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(0))
    return NegationSet(
        latents=latents if fill is None else torch.full_like(latents, fill),
        space=SPACE,
        weights=torch.arange(1.0, n + 1),
        ids=tuple(f"folder/é {i}.png" for i in range(n)),
        labels=("dagger",) * n,
    )


def same(a, b):
    return (
        torch.equal(a.latents, b.latents)
        and torch.equal(a.weights, b.weights)
        and (a.ids, a.labels, a.digests, a.space) == (b.ids, b.labels, b.digests, b.space)
    )


def raw(metadata, tensors, header=None):
    """A safetensors file put together by hand from the format's description: length, JSON header, data."""
    data, entries = b"", {}
    for name, (dtype, shape, content) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps({"__metadata__": metadata, **entries} if header is None else header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "set.safetensors"
    make().save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    path = tmp_path_factory.mktemp("metadata") / "set.safetensors"
    make().save(path)
    with safe_open(path, "pt") as file:
        return file.metadata()


def refused(tmp_path, content, match="expected"):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(NegationFileError, match=match) as caught:
        NegationSet.load(path)
    assert str(path) in str(caught.value)


# -- round trips ----------------------------------------------------------------------------------------------------


def test_float32_survives_bit_for_bit(tmp_path):
    items = make()
    items.save(tmp_path / "a.safetensors", dtype=torch.float32)
    assert same(NegationSet.load(tmp_path / "a.safetensors"), items)


def test_float16_is_the_default_and_costs_at_most_its_rounding(tmp_path):
    items = make()
    items.save(str(tmp_path / "a.safetensors"))
    back = NegationSet.load(str(tmp_path / "a.safetensors"))
    assert back.latents.dtype == torch.float32
    torch.testing.assert_close(back.latents, items.latents, rtol=5e-4, atol=1e-7)
    assert (back.ids, back.labels, back.digests, back.space) == (items.ids, items.labels, items.digests, items.space)
    back.save(tmp_path / "b.safetensors")
    assert same(NegationSet.load(tmp_path / "b.safetensors"), back)


def test_the_file_is_plain_safetensors_with_documented_metadata(tmp_path, metadata):
    make().save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert sorted(file.keys()) == ["latents", "weights"]
        assert file.get_tensor("latents").dtype == np.float16
        assert file.get_tensor("weights").tolist() == [1, 2, 3]
    assert (metadata["format"], metadata["version"]) == ("steerclear.negation", "1")
    assert json.loads(metadata["space"]) == {"encoder": SPACE.encoder, "shape": [2, 3], "name": "a tiny encoder"}
    assert json.loads(metadata["items"])["labels"] == ["dagger"] * 3


def test_names_that_are_no_valid_text_survive(tmp_path):
    items = NegationSet(latents=torch.ones(1, 2, 3), space=SPACE, ids=("caf\udce9.png",))
    items.save(tmp_path / "a.safetensors")
    assert NegationSet.load(tmp_path / "a.safetensors").ids == items.ids


def test_a_loaded_set_does_not_depend_on_the_file(tmp_path):
    path, items = tmp_path / "a.safetensors", make()
    items.save(path, dtype=torch.float32)
    back = NegationSet.load(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert same(back, items)


def test_a_save_replaces_and_leaves_nothing_beside(tmp_path):
    for n in (3, 1, 2):
        make(n).save(tmp_path / "a.safetensors")
    assert len(NegationSet.load(tmp_path / "a.safetensors")) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# -- equal bytes ----------------------------------------------------------------------------------------------------


def plain(n=2):
    """A set whose file can be written down by hand."""
    latents = torch.arange(6.0 * n).reshape(n, 2, 3)
    return NegationSet(latents=latents, space=SPACE, ids=tuple("abcdefgh"[:n]), digests=("sha256:0",) * n)


def test_the_bytes_are_those_of_the_format_and_nothing_else(tmp_path):
    """Typed from the format's description: sorted metadata, wide tensors first, a header padded to eight bytes."""
    items, path = plain(), tmp_path / "a.safetensors"
    items.save(path)
    latents, weights = np.arange(12, dtype="<f2").tobytes(), np.ones(2, dtype="<f4").tobytes()
    space = json.dumps({"encoder": SPACE.encoder, "shape": [2, 3], "name": SPACE.name})
    listed = json.dumps({"ids": ["a", "b"], "labels": ["", ""], "digests": ["sha256:0"] * 2})
    signed = b"".join(text.encode() + b"\0" for text in ("steerclear.negation", "1", space, listed))
    metadata = {
        "format": "steerclear.negation",
        "items": listed,
        "sha256": hashlib.sha256(signed + latents + weights).hexdigest(),
        "space": space,
        "version": "1",
    }
    header = {
        "__metadata__": metadata,
        "weights": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "latents": {"dtype": "F16", "shape": [2, 2, 3], "data_offsets": [8, 32]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert path.read_bytes() == struct.pack("<Q", len(text)) + text + weights + latents


def test_saving_twice_gives_equal_bytes_whatever_the_hash_seed(tmp_path):
    code = (
        "import sys, torch; from steerclear.negation import NegationSet;NegationSet.load(sys.argv[1]).save(sys.argv[2])"
    )
    make().save(tmp_path / "a.safetensors")
    made = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, path in zip((1, 2), made, strict=True):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "a.safetensors"), str(path)], check=True, env=environment
        )
    assert made[0].read_bytes() == made[1].read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_files_written_by_safetensors_itself_load(tmp_path, good):
    """As earlier releases wrote them: another order of the metadata, which says nothing."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(good)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (tmp_path / "b.safetensors").write_bytes(to_safetensors(tensors, metadata=dict(reversed(metadata.items()))))
    assert same(NegationSet.load(tmp_path / "b.safetensors"), NegationSet.load(path))


# -- mapped ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bfloat16_and_the_others_load_as_copies_and_mapped(tmp_path, dtype):
    items, path = make(), tmp_path / "a.safetensors"
    items.save(path, dtype=dtype)
    expected = items.latents.to(dtype)
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("latents"), expected)
    copied, mapped = NegationSet.load(path), NegationSet.load(path, mapped=True)
    assert copied.latents.dtype == torch.float32
    assert torch.equal(copied.latents, expected.float())
    assert mapped.latents.dtype == dtype
    assert torch.equal(mapped.latents, expected)
    assert (mapped.ids, mapped.labels, mapped.digests) == (copied.ids, copied.labels, copied.digests)
    assert torch.equal(mapped.weights, copied.weights)
    mapped.save(tmp_path / "b.safetensors", dtype=dtype)
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_a_mapped_set_outlives_its_replacement_and_its_deletion(tmp_path):
    path = tmp_path / "a.safetensors"
    make().save(path)
    mapped = NegationSet.load(path, mapped=True)
    before = mapped.latents.clone()
    make(fill=7.0).save(path)
    assert torch.equal(mapped.latents, before)
    path.unlink()
    assert torch.equal(mapped.latents, before)


def test_writing_to_a_mapped_set_changes_no_file(tmp_path):
    make().save(tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    NegationSet.load(tmp_path / "a.safetensors", mapped=True).latents.zero_()
    assert (tmp_path / "a.safetensors").read_bytes() == content


def test_a_mapped_file_is_checked_before_it_is_used(tmp_path, good):
    flipped = bytearray(good)
    flipped[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(flipped)
    with pytest.raises(NegationFileError, match="checksum"):
        NegationSet.load(tmp_path / "a.safetensors", mapped=True)


def test_a_mapped_set_takes_no_memory_of_its_own(tmp_path):
    """96 MiB of latents, verified and mapped by a process that takes less than 64 MiB, late imports included."""
    path = tmp_path / "a.safetensors"
    latents = torch.zeros(48, 1024, 1024, dtype=torch.float16)
    NegationSet(latents=latents, space=Space(encoder="x", shape=(1024, 1024)), digests=("d",) * 48).save(path)
    code = """
import sys
from pathlib import Path
from steerclear.negation import NegationSet
def own(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
before = own()
mapped = NegationSet.load(sys.argv[1], mapped=True)
print(own() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's account of a process's own memory")
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 64 << 10


# -- damaged and hostile files --------------------------------------------------------------------------------------


def test_every_truncation_is_refused(tmp_path, good):
    for length in {*range(0, len(good), 17), *range(len(good) - 30, len(good)), 0, 1, 7, 8, 9}:
        refused(tmp_path, good[:length])


def test_bytes_after_the_end_are_refused(tmp_path, good):
    refused(tmp_path, good + b"\0")


def test_every_bit_flip_is_refused_or_harmless(tmp_path, good):
    """Harmless: in a part that carries no content, such as the order of keys. Never another set, never a crash."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(good)
    original = NegationSet.load(path)
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            back = NegationSet.load(path)
        except NegationFileError:
            continue
        assert same(back, original), f"flipping a bit of byte {position} changed the set"


@pytest.mark.parametrize("length", [0, 1, 2**32, 2**63, 2**64 - 1, 40 << 20])
def test_a_huge_or_empty_declared_header_is_refused(tmp_path, length):
    refused(tmp_path, struct.pack("<Q", length) + b"{}" * 100, "a header of")


@pytest.mark.parametrize("size", [10**6, 2**40, 2**63, 10**30])
def test_huge_declared_tensors_are_refused(tmp_path, metadata, size):
    header = {
        "__metadata__": metadata,
        "latents": {"dtype": "F16", "shape": [size, 2, 3], "data_offsets": [0, size * 12]},
        "weights": {"dtype": "F32", "shape": [size], "data_offsets": [size * 12, size * 16]},
    }
    refused(tmp_path, raw(None, {}, header) + b"\0" * 64)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"latents": ("F64", [3, 2, 3], bytes(144))}, "latents F64"),
        ({"latents": ("I16", [3, 2, 3], bytes(36))}, "latents I16"),
        ({"latents": ("F16", [3, 3, 2], bytes(36))}, r"got latents F16 \[3, 3, 2\]"),
        ({"latents": ("F16", [2, 2, 3], bytes(24))}, r"expected latents F16, BF16 or F32 \[3, 2, 3\]"),
        ({"weights": ("F32", [4], bytes(16))}, "weights F32"),
        ({"weights": ("F32", [], bytes(4))}, "weights F32"),
        ({"latents": None}, "tensors latents and weights"),
        ({"weights": None}, "tensors latents and weights"),
        ({"extra": ("F32", [1], bytes(4))}, "no others"),
        ({}, "checksum"),
    ],
)
def test_other_tensors_are_refused(tmp_path, metadata, changes, match):
    tensors = {"latents": ("F16", [3, 2, 3], bytes(36)), "weights": ("F32", [3], bytes(12))} | changes
    refused(tmp_path, raw(metadata, {k: v for k, v in tensors.items() if v}), match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": None}, "format"),
        ({"format": "pt"}, "expected a negation set, got a file of format 'pt'; check the path"),
        ({"version": "2"}, "expected file version 1, got '2'; load it with the release"),
        ({"version": None}, "got None"),
        ({"space": None}, "JSON object in 'space'"),
        ({"space": "{"}, "unreadable JSON in 'space'"),
        ({"space": "[" * 100_000}, "unreadable JSON in 'space'"),
        ({"space": "9" * 10_000}, "'space'"),
        ({"space": "{}"}, "incomplete space"),
        ({"space": '{"encoder": "", "shape": [2, 3], "name": ""}'}, "fingerprint"),
        ({"space": '{"encoder": "x", "shape": [2, [3]], "name": ""}'}, "positive integers"),
        ({"space": '{"encoder": "x", "shape": [2, -3], "name": ""}'}, "positive integers"),
        ({"items": '{"ids": ["a", "b", 3], "labels": [], "digests": []}'}, "list of strings in items"),
        ({"items": '{"ids": "abc", "labels": [], "digests": []}'}, "list of strings in items"),
        ({"items": '{"ids": [], "labels": [], "digests": []}'}, r"\[0, 2, 3\]"),
        ({"sha256": None}, "checksum"),
        ({"sha256": "0" * 64}, "checksum"),
    ],
)
def test_other_metadata_is_refused(tmp_path, metadata, good, changes, match):
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    header["__metadata__"] = {k: v for k, v in (metadata | changes).items() if v is not None}
    refused(tmp_path, raw(None, {}, header) + good[8 + length :], match)


@pytest.mark.parametrize(
    "fields",
    [
        {"latents": torch.full((1, 2, 3), torch.nan)},
        {"weights": torch.tensor([0.0])},
        {"weights": torch.tensor([-1.0])},
        {"ids": ["twice", "twice"]},
        {"labels": ["one", "too many"]},
    ],
)
def test_a_well_formed_file_with_impossible_values_is_refused(tmp_path, fields):
    """Written through the library's own writer, so that the checksum is right and only the content is wrong."""
    ids = tuple(fields.get("ids", ["a"]))
    stored = Stored(
        latents=torch.ones(len(ids), 2, 3),
        weights=fields.get("weights", torch.ones(len(ids))),
        ids=ids,
        labels=tuple(fields.get("labels", ids)),
        digests=ids,
        space=SPACE,
    )
    path = tmp_path / "a.safetensors"
    if "latents" in fields:
        with pytest.raises(NegationFileError, match=r"latents that torch\.float32 can hold"):
            write(path, stored._replace(latents=fields["latents"]), torch.float32)
        return
    write(path, stored, torch.float32)
    with pytest.raises(NegationFileError, match=r"valid negation set, got: NegationSet: expected|more than 1 entries"):
        NegationSet.load(path)


def test_other_files_are_refused(tmp_path):
    refused(tmp_path, b"", "a header of 0 bytes in a file of 0")
    refused(tmp_path, b"\x89PNG\r\n\x1a\n" + bytes(1000), "a header of")
    refused(tmp_path, b"{}", "a header of")
    refused(tmp_path, to_safetensors({"weight": torch.ones(3)}), "format None")


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(NegationFileError, match=r"No such file.*check path"):
        NegationSet.load(tmp_path / "missing.safetensors")
    with pytest.raises(NegationFileError, match="got a folder"):
        NegationSet.load(tmp_path)
    with pytest.raises(NegationFileError, match="null byte"):
        NegationSet.load("a\0b")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(NegationFileError, match="Not a directory"):
        NegationSet.load(tmp_path / "file" / "a.safetensors")


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NegationFileError, match="a device, pipe or socket"):
        NegationSet.load(tmp_path / "pipe")
    with pytest.raises(NegationFileError, match="got a folder or device"):
        make().save(tmp_path / "pipe")


@given(data=st.binary(max_size=400), length=st.none() | st.integers(0, 400))
@settings(max_examples=150)
def test_any_bytes_are_refused_with_a_sentence(tmp_path_factory, data, length):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(data if length is None else struct.pack("<Q", length) + data)
    with pytest.raises(NegationFileError):
        NegationSet.load(path)


@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5), st.binary(max_size=5)), min_size=1, max_size=6))
@settings(max_examples=250)
def test_any_edit_of_a_file_is_refused_or_harmless(tmp_path_factory, good, edits):
    """Splices anywhere: the result is an error of ours, or the set that was saved."""
    path = tmp_path_factory.getbasetemp() / "edited.safetensors"
    path.write_bytes(good)
    original, content = NegationSet.load(path), good
    for where, cut, paste in edits:
        at = int(where * len(content))
        content = content[:at] + paste + content[at + cut :]
    path.write_bytes(content)
    try:
        back = NegationSet.load(path)
    except NegationFileError:
        return
    assert same(back, original)


# -- targets that cannot be written ---------------------------------------------------------------------------------


def test_latents_beyond_float16_are_refused_before_writing(tmp_path):
    with pytest.raises(NegationFileError, match=r"got values up to 1e\+05; save with dtype=torch.float32"):
        make(fill=1e5).save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    make(fill=1e5).save(tmp_path / "a.safetensors", dtype=torch.float32)


def test_other_dtypes_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"torch\.float16, torch\.bfloat16, torch\.float32, got torch\.int8"):
        make().save(tmp_path / "a.safetensors", dtype=torch.int8)


def test_too_much_text_is_refused(tmp_path):
    with pytest.raises(NegationFileError, match="at most 16 MiB of ids, labels and digests, got 17 MiB"):
        NegationSet(latents=torch.ones(1, 2, 3), space=SPACE, ids=("x" * (17 << 20),)).save(tmp_path / "a.safetensors")


def test_targets_that_are_no_file_are_refused(tmp_path):
    with pytest.raises(NegationFileError, match="got a folder or device; add a file name"):
        make().save(tmp_path)
    with pytest.raises(NegationFileError, match=r"existing folder, got .*nowhere; create it first"):
        make().save(tmp_path / "nowhere" / "a.safetensors")
    with pytest.raises(NegationFileError, match="File name too long"):
        make().save(tmp_path / ("x" * 300))
    with pytest.raises(NegationFileError, match="null byte"):
        make().save(f"{tmp_path}/a\0b")


def test_a_symbolic_link_is_not_replaced_by_a_file(tmp_path):
    make().save(tmp_path / "real.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    with pytest.raises(NegationFileError, match=r"got a symbolic link; give .*real\.safetensors"):
        make().save(tmp_path / "link.safetensors")
    assert len(NegationSet.load(tmp_path / "link.safetensors")) == 3


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_read_only_target_is_refused(tmp_path, monkeypatch, code):
    """Simulated: tests may run as root, whom permissions do not stop."""
    make(2).save(tmp_path / "a.safetensors")

    def deny(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", deny)
        with pytest.raises(NegationFileError, match=f"got {os.strerror(code)}; free space, change the permissions"):
            make().save(tmp_path / "a.safetensors")
    assert len(NegationSet.load(tmp_path / "a.safetensors")) == 2


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call):
    make(2).save(tmp_path / "a.safetensors")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(NegationFileError, match="got No space left on device; free space"):
            make().save(tmp_path / "a.safetensors")
    assert len(NegationSet.load(tmp_path / "a.safetensors")) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_them_all(tmp_path, monkeypatch):
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, bytes(data[:100])))
        make().save(tmp_path / "a.safetensors", dtype=torch.float32)
    assert same(NegationSet.load(tmp_path / "a.safetensors"), make())


def test_a_folder_that_cannot_be_synced_is_tolerated_but_a_failing_disk_is_not(tmp_path, monkeypatch):
    sync, folder = os.fsync, {}

    def fail_for_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(folder["code"], os.strerror(folder["code"]))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    folder["code"] = errno.EINVAL
    make().save(tmp_path / "a.safetensors")
    folder["code"] = errno.EIO
    with pytest.raises(NegationFileError, match="whole: the older file, or the new one"):
        make(2).save(tmp_path / "a.safetensors")
    assert len(NegationSet.load(tmp_path / "a.safetensors")) in (2, 3)


# -- killed while saving --------------------------------------------------------------------------------------------

# Imports once, then forks one writer per line of input; a writer saves two versions in turn until it is killed.
WRITER = """
import os, sys, time
import torch
from steerclear.negation import NegationSet, Space
torch.set_num_threads(1)
space = Space(encoder="pixels", shape=(3, 64, 64))
sets = [NegationSet(latents=torch.full((40 + 20 * v, 3, 64, 64), float(v)), space=space) for v in (0, 1)]
sets[0].save(sys.argv[1])
start = time.perf_counter()
sets[0].save(sys.argv[1])
print(time.perf_counter() - start, flush=True)
for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        turn = 1
        while True:
            sets[turn % 2].save(sys.argv[1])
            turn += 1
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


def test_a_save_killed_at_any_moment_leaves_one_whole_version(tmp_path):
    path, rng, found = tmp_path / "a.safetensors", np.random.default_rng(0), []
    command = [sys.executable, "-c", WRITER, str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        seconds = float(writer.stdout.readline())
        # 25 kills; on a machine that became slower meanwhile, more, until both versions were seen.
        while len(found) < 25 or (set(found) != {0.0, 1.0} and len(found) < 100):
            writer.stdin.write("\n")
            writer.stdin.flush()
            pid = int(writer.stdout.readline())
            time.sleep(seconds * rng.uniform(0.1, 5))
            os.kill(pid, signal.SIGKILL)
            assert writer.stdout.readline() == "dead\n"
            items = NegationSet.load(path)
            version = float(items.latents[0, 0, 0, 0])
            assert len(items) == 40 + 20 * version
            assert bool((items.latents == version).all())
            found.append(version)
        writer.stdin.close()
        assert writer.wait(timeout=20) == 0
    assert set(found) == {0.0, 1.0}, "every kill came before the first save was over: the test proved nothing"
    assert all(p == path or p.suffix == ".tmp" for p in tmp_path.iterdir())

"""Atomic writing, and safetensors files written to the byte and read without trust."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from steerclear.files import write_atomic
from steerclear.files.scan import Malformed, Scanner
from steerclear.files.tensors import MAX_METADATA, MAX_TENSORS, TensorFile, parts, write

TENSORS = {
    "a": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.arange(3),
    "d": torch.tensor([True, False]),
    "e": torch.tensor(0.5, dtype=torch.float64),
    "f": torch.zeros(0, 4),
    "g": torch.arange(12.0).reshape(3, 4).T,
}


def test_what_is_written_is_what_safetensors_reads_and_the_other_way_round(tmp_path):
    write(tmp_path / "ours", TENSORS, {"key": "välue", "another": '"'})
    back = load_file(tmp_path / "ours")
    save_file({name: value.contiguous() for name, value in TENSORS.items()}, tmp_path / "theirs", {"key": "x"})
    with TensorFile(tmp_path / "ours") as ours, TensorFile(tmp_path / "theirs") as theirs:
        assert ours.metadata == {"key": "välue", "another": '"'}
        assert theirs.metadata == {"key": "x"}
        for name, value in TENSORS.items():
            for read in (back[name], ours.read(name), theirs.read(name), ours.map(name)):
                assert read.dtype == value.dtype
                assert torch.equal(read, value)
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"key": "välue", "another": '"'}


def test_the_order_of_the_arguments_says_nothing(tmp_path):
    one = b"".join(parts(TENSORS, {"x": "1", "y": "2"}))
    assert one == b"".join(parts(dict(reversed(TENSORS.items())), {"y": "2", "x": "1"}))


def test_mapped_tensors_outlive_the_handle(tmp_path):
    write(tmp_path / "a", {"a": torch.arange(4.0)}, {})
    with TensorFile(tmp_path / "a") as file:
        mapped = file.map("a")
    assert mapped.tolist() == [0, 1, 2, 3]
    mapped += 1
    with TensorFile(tmp_path / "a") as file:
        assert file.read("a").tolist() == [0, 1, 2, 3]


def test_reading_shows_every_byte_once(tmp_path, monkeypatch):
    monkeypatch.setattr("steerclear.files.tensors.CHUNK", 5)
    write(tmp_path / "a", {"a": torch.arange(4.0)}, {})
    shown = {"read": [], "show": []}
    with TensorFile(tmp_path / "a") as file:
        file.read("a", lambda chunk: shown["read"].append(bytes(chunk)))
        file.show("a", lambda chunk: shown["show"].append(bytes(chunk)))
    for chunks in shown.values():
        assert b"".join(chunks) == torch.arange(4.0).numpy().tobytes()
        assert max(map(len, chunks)) == 5


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    write(tmp_path / "a", {"a": torch.arange(400.0)}, {})
    with TensorFile(tmp_path / "a") as file:
        os.truncate(tmp_path / "a", file.size - 4)
        with pytest.raises(Malformed, match="became shorter"):
            file.read("a")


def header(tmp_path, value, body=b""):
    raw = (value if isinstance(value, str) else json.dumps(value)).encode()
    (tmp_path / "bad").write_bytes(struct.pack("<Q", len(raw)) + raw + body)
    return tmp_path / "bad"


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "a gap or an overlap before 'a'"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "8 bytes? whose|tensors end at"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            },
            "a gap or an overlap",
        ),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, r"of 8 bytes for F32 \[3\]"),
        ({"a": {"dtype": "F8", "shape": [8], "data_offsets": [0, 8]}}, "without a known dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "without a known dtype, a shape and a place"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "more": 1}}, "more than 3|unknown 'more'"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "no whole number"),
        ({"a": {"dtype": "F32", "shape": [1] * 17, "data_offsets": [0, 8]}}, "more than 16"),
        ({f"{k}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(MAX_TENSORS + 2)}, "more than"),
        ({"__metadata__": {f"{k}": "" for k in range(MAX_METADATA + 1)}}, "more than 64"),
        ({"__metadata__": {"a": 1}}, "no string"),
        ({"__metadata__": []}, "no '{'"),
        ('{"a":{},"a":{}}', "without a known dtype"),
        ('{"__metadata__":{"a":"","a":""}}', "a second 'a'"),
        ("[]", "no '{'"),
        ("{} {}", "more text after the end"),
    ],
)
def test_other_headers_are_refused(tmp_path, value, match):
    with pytest.raises(Malformed, match=match):
        TensorFile(header(tmp_path, value, bytes(8)))


def test_what_is_not_aligned_is_read_but_not_mapped(tmp_path):
    value = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(value)
    path = header(tmp_path, text + " " * ((1 - len(text)) % 4), struct.pack("<f", 1.5))
    with TensorFile(path) as file:
        assert file.entries["a"].start % 4
        assert file.read("a").item() == 1.5
        with pytest.raises(Malformed, match="not aligned"):
            file.map("a")


@given(value=st.lists(st.text(), max_size=5))
def test_the_scanner_reads_what_json_writes(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        scanner = Scanner(text, "a list")
        assert scanner.strings(5) == value
        scanner.end()


@given(value=st.lists(st.integers(0, 10**18), max_size=5))
def test_the_scanner_reads_whole_numbers(value):
    assert Scanner(json.dumps(value), "a list").integers(5) == value


@pytest.mark.parametrize("text", ["1.5", "1e3", "-1", "01", "9" * 20, ",", "x", '"1"'])
def test_the_scanner_reads_no_other_numbers(text):
    with pytest.raises(Malformed):
        Scanner(f"[{text}]", "a list").integers(5)


def test_parts_are_written_one_after_another(tmp_path):
    write_atomic(tmp_path / "new" / "a", (bytes([k]) * 3 for k in range(3)))
    assert (tmp_path / "new" / "a").read_bytes() == b"\0\0\0\1\1\1\2\2\2"


def test_a_part_that_cannot_be_made_leaves_the_old_file(tmp_path):
    def broken():
        yield b"new"
        raise RuntimeError("no more")

    write_atomic(tmp_path / "a", b"old")
    with pytest.raises(RuntimeError, match="no more"):
        write_atomic(tmp_path / "a", broken())
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

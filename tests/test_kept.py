"""What is kept between processes: worked out once, again when it is damaged, and never in the way."""

import os
from pathlib import Path

import pytest
import torch

from steerclear.zoo import kept as module
from steerclear.zoo.kept import kept


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "steerclear"


class Make:
    """A result that says how often it was made."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return [0.1], torch.full((2, 3), 0.1).half(), self.calls


def test_the_same_key_is_made_once_and_another_key_again(folder):
    make, key = Make(), ["a", torch.arange(3.0)]
    first = kept(key, make)
    again = kept(["a", torch.arange(3.0)], make)
    assert again[0] == first[0]
    assert torch.equal(again[1], first[1])
    assert again[2] == 1
    others = (["b", torch.arange(3.0)], ["a", torch.arange(3.0) + 1e-6], ["a", torch.arange(3)], ["a"])
    assert [kept(other, make)[2] for other in others] == [2, 3, 4, 5]
    assert len(list(folder.iterdir())) == 5


def test_a_damaged_file_is_made_again(folder):
    make = Make()
    kept("key", make)
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert [kept("key", make)[2], kept("key", make)[2]] == [2, 2]


def test_the_newest_files_stay(folder, monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    for number in range(4):
        kept(number, Make())
        for file in folder.iterdir():
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 10))
    make = Make()
    kept(3, make), kept(2, make)
    assert make.calls == 0
    assert len(list(folder.iterdir())) == 2


def test_without_a_folder_it_is_made_every_time(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    make = Make()
    assert [kept("key", make)[2], kept("key", make)[2]] == [1, 2]

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert kept("key", make)[2] == 3

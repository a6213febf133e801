"""From what people have (folders, shards, patterns) to one list of entries."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from steerclear.errors import InvalidInput
from steerclear.negation.bulk import tars
from steerclear.negation.bulk.entries import Entry, clean
from steerclear.negation.images import find_images

Place: TypeAlias = str | os.PathLike[str]
_SHARDS = (".tar", ".parquet")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MOST = 1_000_000  # files that one pattern may name


def entries(source: Place | Iterable[Place], *, label: str | None = None, root: Place | None = None) -> list[Entry]:
    """Every picture of a source, in an order that depends on names alone.

    Args:
        source: A folder of pictures, one picture, a Parquet file, a tar file, a folder of nothing but Parquet or tar
            files (and notes about them), a pattern of such files (``bad-{0000..0099}.tar``, ``data/*.parquet``), or
            several of all these.
        label: One for all, in place of the source's own.
        root: Folder of the paths in Parquet files; by default, each file's own folder.

    Raises:
        InvalidInput: If there is nothing, or it cannot be told what it is.
        NegationFileError: If a tar or Parquet file is damaged.

    Cost:
        Reads names, sizes, and labels; of a tar file all headers. Some 500 bytes of memory for each picture.
    """
    places = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not places:
        raise InvalidInput("build: expected a folder, a pattern or a file, got an empty list")
    listed = [
        entry._replace(
            id=clean(entry.id),
            label=clean(entry.label if label is None else label),
            licence=clean(entry.licence),
        )
        for entry in chain.from_iterable(_listed(place, root) for place in places)
    ]
    if not listed:
        raise InvalidInput(f"build: expected at least one picture in {', '.join(map(str, places[:3]))}, got none")
    return listed


def _listed(place: Place, root: Place | None) -> Iterator[Entry]:
    path = Path(place)
    if path.is_dir():
        files = find_images(path)
        shards = [file for file in files if file.suffix.lower() in _SHARDS]
        if not shards:
            return _pictures(files, path)
        if others := [file for file in files if _is_picture(file)]:
            raise InvalidInput(
                f"{path}: expected pictures or shards, got both ({others[0].name} and {shards[0].name}); "
                f"name what you mean, for example '{path / ('*' + shards[0].suffix)}'"
            )
        return _shards(shards, root)
    files = [path] if path.exists() else _expanded(os.fspath(place))
    if files[0].suffix.lower() in _SHARDS:
        return _shards(files, root)
    return _pictures(files, None)


def _pictures(files: list[Path], folder: Path | None) -> Iterator[Entry]:
    for file in files:
        name = file.relative_to(folder).as_posix() if folder else file.name
        try:
            status = file.stat()
        except OSError as error:
            yield Entry(name, file.parent.name, "", str(file), trouble=error.strerror or str(error))
        else:
            yield Entry(name, file.parent.name, "", str(file), size=status.st_size, stamp=status.st_mtime_ns)


def _shards(files: list[Path], root: Place | None) -> Iterator[Entry]:
    from steerclear.negation.bulk import parquet  # pyarrow takes a while to import

    for file in files:
        if file.suffix.lower() == ".tar":
            yield from tars.entries(file)
        elif file.suffix.lower() == ".parquet":
            yield from parquet.entries(file, file.parent if root is None else Path(root))


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in Image.registered_extensions()


def _expanded(pattern: str) -> list[Path]:
    """The files of a pattern, those of each alternative sorted.

    Raises:
        InvalidInput: If an alternative names no file; nothing is fetched from anywhere.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise InvalidInput(f"{pattern}: expected files of this machine or of a mounted drive; fetch them first")
    found: list[Path] = []
    alternatives = list(islice(_alternatives(pattern), _MOST + 1))
    if len(alternatives) > _MOST:
        raise InvalidInput(f"{pattern}: expected at most {_MOST:,} files in one pattern")
    for one in alternatives:
        names = sorted(glob.glob(one, recursive=True)) if glob.has_magic(one) else [one]  # noqa: PTH207  (any folder)
        files = [Path(name) for name in names if Path(name).is_file()]
        if not files:
            raise InvalidInput(f"{one}: expected a folder, a picture, a .tar or a .parquet, found nothing there")
        found += files
    suffixes = {file.suffix.lower() for file in found}
    if suffixes.intersection(_SHARDS) and not suffixes.issubset(_SHARDS):
        raise InvalidInput(f"{pattern}: expected .tar and .parquet files or pictures, got {sorted(suffixes)} together")
    return found


def _alternatives(pattern: str) -> Iterator[str]:
    """``a{0..1}b{c,d}`` -> ``a0bc, a0bd, a1bc, a1bd``, as the shell does."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    for word in _words(braces):
        yield from _alternatives(pattern[: braces.start()] + word + pattern[braces.end() :])


def _words(braces: re.Match[str]) -> Iterable[str]:
    if (found := _RANGE.fullmatch(braces[1])) is None:
        return braces[1].split(",")
    first, last = (int(number) for number in found.groups())
    return (f"{number:0{len(found[1])}d}" for number in range(first, last + 1))

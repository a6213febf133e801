"""Rows of a local CSV, JSON, JSON Lines or Parquet file: read once, within bounds, nothing unpickled.

No message quotes the file: a wrong delimiter or a missing header turns a prompt into a column name.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from steerclear.errors import InvalidInput

MAX_BYTES = 128 << 20  # of the file, and of a Parquet file unpacked
MAX_ROWS = 200_000
MAX_CELL = 100_000  # characters
MAX_COLUMNS = 200

Row = Mapping[str, Any]


class Table(NamedTuple):
    """The rows of a file and the SHA-256 of its bytes."""

    rows: tuple[Row, ...]
    digest: str


def read(path: Path, member: str | None = None) -> Table:
    """Reads the whole file once; the digest is of the very bytes that were parsed.

    Raises:
        InvalidInput: For a missing, unreadable, too large or malformed file, or an unknown ending.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InvalidInput(
            f"{path}: expected a file ending in {', '.join(_READERS)}, got {path.suffix or 'no ending'!r}"
        )
    data = _bytes(path)
    rows: list[Row] = []
    try:
        for number, row in enumerate(reader(data, member), 1):
            if number > MAX_ROWS:
                raise InvalidInput(f"expected at most {MAX_ROWS} rows, got more; split the file")
            rows.append(_bounded(row, number))
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None
    except (UnicodeError, ValueError, RecursionError, csv.Error, pa.ArrowException, OSError, OverflowError) as error:
        kind = type(error).__name__
        raise InvalidInput(f"{path}: expected {path.suffix[1:]} in UTF-8, got a damaged file ({kind})") from None
    return Table(tuple(rows), hashlib.sha256(data).hexdigest())


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise InvalidInput(
            f"{path}: expected a file, got none; the package ships no prompt set, see docs/prompt-sets.md"
        )
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"{path}: expected a readable file, got {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"{path}: expected at most {MAX_BYTES >> 20} MiB, got more; split the file")
    return data


def _bounded(row: Any, number: int) -> Row:  # noqa: ANN401  (whatever a JSON line holds)
    if not isinstance(row, dict):
        raise InvalidInput(f"row {number}: expected a row with column names, got {type(row).__name__}")
    cells = cast("dict[Any, Any]", row)
    if len(cells) > MAX_COLUMNS or not all(isinstance(key, str) for key in cells):
        raise InvalidInput(f"row {number}: expected at most {MAX_COLUMNS} cells that each have a column, got others")
    if any(isinstance(cell, str) and len(cell) > MAX_CELL for cell in cells.values()):
        raise InvalidInput(f"row {number}: expected cells of at most {MAX_CELL} characters, got a longer one")
    return cells


def _csv(data: bytes, _member: str | None) -> Iterator[Any]:
    text = io.StringIO(data.decode("utf-8-sig"), newline="")
    reader = csv.DictReader(text, strict=True)
    names = [name.strip() for name in reader.fieldnames or ()]
    if len(set(names)) < len(names):
        raise InvalidInput("expected a first line of column names, all different, got one twice")
    reader.fieldnames = names
    for number, row in enumerate(reader, 1):
        if None in row or None in row.values():
            raise InvalidInput(f"row {number}: expected {len(names)} cells as in the first line, got another number")
        yield row


def _json(data: bytes, member: str | None) -> Iterator[Any]:
    value: Any = json.loads(data.decode("utf-8-sig"))
    if isinstance(value, dict) and member is not None:
        value = cast("dict[str, Any]", value).get(member)
    if not isinstance(value, list):
        inside = f", or an object with one under {member!r}" if member else ""
        raise InvalidInput(f"expected a list of rows{inside}, got {type(value).__name__}")
    yield from cast("list[Any]", value)


def _jsonl(data: bytes, _member: str | None) -> Iterator[Any]:
    for line in io.StringIO(data.decode("utf-8-sig"), newline="\n"):
        if line.strip():
            yield json.loads(line)


def _parquet(data: bytes, _member: str | None) -> Iterator[Any]:
    file = pq.ParquetFile(pa.BufferReader(data))
    groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
    if file.metadata.num_rows > MAX_ROWS or sum(group.total_byte_size for group in groups) > MAX_BYTES:
        raise InvalidInput(
            f"expected at most {MAX_ROWS} rows and {MAX_BYTES >> 20} MiB unpacked, got more; split the file"
        )
    unpacked = 0
    for batch in file.iter_batches(batch_size=1024):
        unpacked += batch.nbytes
        if unpacked > MAX_BYTES:
            raise InvalidInput(f"expected at most {MAX_BYTES >> 20} MiB unpacked, got more; split the file")
        yield from batch.to_pylist()


_READERS: Mapping[str, Callable[[bytes, str | None], Iterator[Any]]] = {
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}

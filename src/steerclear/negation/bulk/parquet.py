"""Parquet files of pictures: a column ``image`` or ``bytes`` (also Hugging Face's ``{bytes, path}``), or of ``path``.

Beside it, if they are there, ``id``, ``label`` (text, numbers, or classes named in Hugging Face's metadata) and
``licence``. Read by row groups, a few rows at a time; text stays in its dictionary until its length was looked at, so
that a small file cannot become a large one in memory.
"""

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from steerclear.errors import InvalidInput, NegationFileError
from steerclear.negation.bulk.entries import MAX_TEXT, Entry
from steerclear.negation.images import MAX_BYTES, Unusable

ROWS, INFO_ROWS, MAX_NOTE = 16, 1024, 1 << 20
_DAMAGE = (OSError, UnicodeError, pa.ArrowException)
Array: TypeAlias = Any  # pyarrow's, which have no types
_TEXTS = ("id", "label", "licence", "license", "path", "image.path", "bytes.path")
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
_BYTES = ("image", "image.bytes", "bytes", "bytes.bytes")


def entries(file: Path, root: Path) -> Iterator[Entry]:
    """One entry for each row.

    Raises:
        NegationFileError: If the file is damaged.
        InvalidInput: If it has no column of pictures.
    """
    with _opened(file) as parquet:
        columns = set(_columns(parquet))
        if not columns.intersection((*_BYTES, "path")):
            raise InvalidInput(
                f"{file}: expected a column image, bytes or path, got {sorted(columns)[:20]}; rename the column"
            )
        status, number = file.stat(), parquet.metadata.num_rows
        if number > status.st_size:
            raise NegationFileError(
                f"{file}: expected at most one row for each of its {status.st_size} bytes, got {number} rows: the same "
                "picture again and again, or a damaged file; leave it out"
            )
        texts = [name for name in _TEXTS if name in columns]
        names = _class_names(parquet)
        first = 0
        for group in range(parquet.metadata.num_row_groups):
            info = parquet.metadata.row_group(group)
            size = info.total_byte_size // max(1, info.num_rows)
            for row, values in enumerate(_values(parquet, file, group, texts, info.num_rows)):
                label = values.get("label", "")
                path = values.get("path") or values.get("image.path") or values.get("bytes.path") or ""
                made = Entry(
                    id=values.get("id") or path or f"{file.stem}/{first + row:06d}",
                    label=names.get(label, label),
                    licence=values.get("licence") or values.get("license") or "",
                    file=str(file),
                    inside=f"row {first + row}",
                    offset=row,
                    size=size,
                    stamp=status.st_mtime_ns,
                    group=group,
                )
                yield made if columns.intersection(_BYTES) else _at(made, root, path)
            first += info.num_rows


class Rows:
    """Reads the pictures of rows; quickest in the order of the rows, for then nothing is read twice.

    Args:
        root: Folder of the paths in the files; ``None`` for each file's own.
    """

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self._at: tuple[str, int] | None = None
        self._batches: Iterator[Array] = iter(())
        self._batch: Array = None
        self._first = self._stop = 0
        self._broken: tuple[int, str] | None = None

    def read(self, entry: Entry) -> bytes | Path:
        """The picture's bytes, or the file that holds them.

        Raises:
            Unusable: If the row cannot be read, or holds neither.
        """
        if self._at != (entry.file, entry.group) or entry.offset < self._first:
            self._open(entry)
        try:
            while self._broken is None and entry.offset >= self._stop:
                self._batch = next(self._batches)
                self._batch.validate(full=True)  # indices of a damaged dictionary may point anywhere
                self._first, self._stop = self._stop, self._stop + self._batch.num_rows
        except StopIteration:
            self._broken = self._stop, "fewer rows than the file says"
        except _DAMAGE as error:
            self._broken = self._stop, f"corrupt Parquet: {error}"[:200]
        if self._broken is not None and entry.offset >= self._broken[0]:
            raise Unusable(self._broken[1])
        return self._picture(entry, entry.offset - self._first)

    def _open(self, entry: Entry) -> None:
        self._at, self._first, self._stop, self._broken = (entry.file, entry.group), 0, 0, None
        try:
            parquet = _parquet(Path(entry.file))
            columns = [name for name in (*_BYTES, "image.path", "bytes.path", "path") if name in _columns(parquet)]
            self._batches = parquet.iter_batches(ROWS, row_groups=[entry.group], columns=columns, use_threads=False)
        except _DAMAGE as error:
            self._broken = 0, f"corrupt Parquet: {error}"[:200]

    def _picture(self, entry: Entry, row: int) -> bytes | Path:
        root = self.root or Path(entry.file).parent
        for name in ("image", "bytes"):
            if name in self._batch.schema.names:
                column = self._batch.column(name)
                data = _cell(_field(column, "bytes"), row)
                if data is not None:
                    return data
                path = _cell(_field(column, "path"), row) if pa.types.is_struct(column.type) else None
                if path is not None:
                    return inside(root, path.decode(errors="replace"))
        path = _cell(self._batch.column("path"), row) if "path" in self._batch.schema.names else None
        if path is None:
            raise Unusable("neither bytes nor a path")
        return inside(root, path.decode(errors="replace"))


def inside(root: Path, path: str) -> Path:
    """A path of a table, below ``root``.

    Raises:
        Unusable: If it leads out of it.
    """
    try:
        found = (root / path).resolve()
        allowed = found.is_relative_to(root.resolve()) and path != ""
    except (OSError, ValueError, RuntimeError) as error:
        raise Unusable(f"a path that no file can have: {path!r:.80}") from error
    if not allowed:
        raise Unusable(f"a path out of the folder of the table: {path!r:.80}")
    return found


def _at(entry: Entry, root: Path, path: str) -> Entry:
    """The entry of a row that names a file: from here on like one of a folder."""
    try:
        file = inside(root, path)
        status = file.stat()
    except Unusable as error:
        return entry._replace(group=-1, offset=0, size=0, trouble=str(error))
    except OSError as error:
        return entry._replace(group=-1, offset=0, size=0, trouble=f"{error.strerror}: {path!r:.80}")
    return entry._replace(file=str(file), inside="", group=-1, offset=0, size=status.st_size, stamp=status.st_mtime_ns)


@contextmanager
def _opened(file: Path) -> Generator[Any]:
    try:
        yield _parquet(file)
    except _DAMAGE as error:
        raise NegationFileError(
            f"{file}: expected a whole Parquet file, got {error}; fetch it again, or leave it out"
        ) from error


def _parquet(file: Path) -> Any:  # noqa: ANN401  (pyarrow's handle)
    """The file, opened so that texts and bytes stay in their dictionaries."""
    columns = _columns(pq.ParquetFile(file))
    kept = [name for name in columns if name in (*_TEXTS, *_BYTES) and columns[name] == "BYTE_ARRAY"]
    return pq.ParquetFile(file, read_dictionary=kept, buffer_size=1 << 20, page_checksum_verification=True)


def _columns(parquet: Any) -> dict[str, str]:  # noqa: ANN401
    """Leaf columns and their physical types."""
    schema = parquet.schema
    return {schema.column(i).path: schema.column(i).physical_type for i in range(len(schema))}


def _values(parquet: Any, file: Path, group: int, texts: list[str], rows: int) -> Iterator[dict[str, str]]:  # noqa: ANN401
    """The texts of each row of a row group."""
    if not texts:
        yield from ({} for _ in range(rows))
        return
    for batch in parquet.iter_batches(INFO_ROWS, row_groups=[group], columns=texts, use_threads=False):
        batch.validate(full=True)
        columns: dict[str, list[str]] = {}
        for name in texts:
            top, _, leaf = name.partition(".")
            columns[name] = _strings(_field(batch.column(top), leaf), f"{file}: column {name}")
        for row in range(batch.num_rows):
            yield {name: column[row] for name, column in columns.items()}


def _strings(column: Array, where: str) -> list[str]:
    words = column.dictionary if pa.types.is_dictionary(column.type) else column
    if pa.types.is_string(words.type) or pa.types.is_large_string(words.type) or pa.types.is_binary(words.type):
        lengths = pc.call_function("binary_length", [words])
        longest = pc.call_function("max", [lengths]).as_py() or 0
        if longest > 4 * MAX_TEXT:
            raise NegationFileError(f"{where}: expected texts of at most {MAX_TEXT} characters, got {longest} bytes")
    elif not any(test(words.type) for test in _NUMBERS):
        raise InvalidInput(f"{where}: expected texts or numbers, got {words.type}; rename or remove the column")
    values = column.to_pylist()
    return ["" if v is None else v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in values]


def _class_names(parquet: Any) -> dict[str, str]:  # noqa: ANN401
    """Names of numbered classes, as Hugging Face's datasets keep them in the file's metadata."""
    try:
        text = (parquet.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        said = json.loads(text) if len(text) <= MAX_NOTE else {}
        names = said["info"]["features"]["label"]["names"]
        return {str(number): str(name)[:MAX_TEXT] for number, name in enumerate(names)}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _field(column: Array, name: str) -> Array:
    if not pa.types.is_struct(column.type) or not name:
        return column
    at = column.type.get_field_index(name)
    return (
        pc.call_function("struct_field", [column], pc.StructFieldOptions([at]))
        if at >= 0
        else pa.nulls(len(column), pa.binary())
    )


def _cell(column: Array, row: int) -> bytes | None:
    """The bytes of one cell.

    Raises:
        Unusable: If they are too many, or no bytes.
    """
    scalar = column[row]
    scalar = scalar.value if pa.types.is_dictionary(column.type) else scalar
    if not scalar.is_valid:
        return None
    buffer = scalar.as_buffer() if hasattr(scalar, "as_buffer") else None
    if buffer is None:
        raise Unusable(f"a column of {column.type}, not of bytes")
    if not 0 < buffer.size <= MAX_BYTES:
        raise Unusable(f"a cell of {buffer.size} bytes (expected 1 to {MAX_BYTES})")
    return buffer.to_pybytes()

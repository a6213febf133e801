"""The metadata and the log of a negation store: one SQLite file, distrusted when read.

Table ``store`` has one row: what the store is, and how far it has come. Table ``items`` is metadata and log in one: a
row is written once, with the number of its vector, and never changed but to note in which change it was ``removed``. So
whoever has seen change ``c`` and ``n`` rows needs only the rows from ``n`` on and those removed after ``c``. Compaction
begins a new ``generation``, with rows numbered anew.

A file from somewhere else may hold anything. It is opened without trust in its schema, the schema must be ours to the
letter before any table is read, every value is checked for type and size, and no count is believed that the file's own
size does not support.
"""

import json
import math
import sqlite3
import stat
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from steerclear.errors import InvalidInput, NegationFileError
from steerclear.negation.space import Space

FORMAT, VERSION, NAME = "steerclear.store", 1, "items.sqlite"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LONGEST = {"id": 1024, "label": 1024, "digest": 256, "provenance": 4096, "licence": 4096, "added": 64}
SCHEMA = (
    "CREATE TABLE store (one INTEGER PRIMARY KEY CHECK (one = 1), format TEXT NOT NULL, version INTEGER NOT NULL, "
    "encoder TEXT NOT NULL, shape TEXT NOT NULL, name TEXT NOT NULL, dtype TEXT NOT NULL, "
    "generation INTEGER NOT NULL, rows INTEGER NOT NULL, change INTEGER NOT NULL)",
    "CREATE TABLE items (row INTEGER PRIMARY KEY, id TEXT NOT NULL, label TEXT NOT NULL, weight REAL NOT NULL, "
    "digest TEXT NOT NULL, provenance TEXT NOT NULL, licence TEXT NOT NULL, added TEXT NOT NULL, "
    "sha256 BLOB NOT NULL, removed INTEGER)",
    "CREATE UNIQUE INDEX live_ids ON items (id) WHERE removed IS NULL",
    "CREATE UNIQUE INDEX live_digests ON items (digest) WHERE removed IS NULL AND digest <> ''",
    "CREATE INDEX gone ON items (removed) WHERE removed IS NOT NULL",
)
SMALLEST = 48  # bytes that a record of an item takes at the very least
LARGEST = 1 << 16  # bytes of one record
CHUNK = 512  # records read at a time
_KINDS: dict[str, set[type]] = {"row": {int}, "weight": {float}, "sha256": {bytes}, "removed": {int, type(None)}}
_LIGHTEST, _HEAVIEST = 2.0**-149, 2.0**128 - 2.0**104  # in float32


class Head(NamedTuple):
    """The row of ``store``: where the vectors live, and how far the store has come.

    Args:
        space: Of every vector.
        dtype: As they are stored.
        generation: Number of the vector file.
        rows: Rows in it, removed ones included.
        change: Number of the last change.
    """

    space: Space
    dtype: torch.dtype
    generation: int
    rows: int
    change: int

    @property
    def width(self) -> int:
        """Bytes of one vector."""
        return math.prod(self.space.shape) * self.dtype.itemsize


class Item(NamedTuple):
    """What a store knows of one item besides its vector.

    Args:
        row: Number of its vector in the present generation.
        id: Its name, unique among what is not removed.
        label: What it is of.
        weight: Positive.
        digest: sha256 of the source picture's pixels, or of the latent.
        provenance: Where it came from.
        licence: Under which terms it is kept.
        added: When, ISO 8601 in UTC.
        sha256: Of the stored vector's bytes.
        removed: The change that removed it; ``None`` if it is live.
    """

    row: int
    id: str
    label: str
    weight: float
    digest: str
    provenance: str
    licence: str
    added: str
    sha256: bytes
    removed: int | None = None


INSERT = f"INSERT INTO items VALUES ({', '.join('?' * len(Item._fields))})"  # noqa: S608 - as many as there are
LIVE = {
    "id": "SELECT 1 FROM items WHERE id = ? AND removed IS NULL",
    "digest": "SELECT 1 FROM items WHERE digest = ? AND removed IS NULL AND digest <> ''",  # as the index has it
}


class Connection(sqlite3.Connection):
    """A connection, and whether it can see what others write.

    Args:
        stamp: ``None`` if it can. In a folder that this process cannot write to, the log beside the database may be
            missing and cannot be made: then the file is read as it lies, and this is what it looked like when it was
            opened. Whoever finds another :func:`stamp_of` has to open it again.
    """

    stamp: tuple[int, ...] | None = None


def stamp_of(folder: Path) -> tuple[int, ...]:
    """What changes about the files of a store when somebody writes to it."""
    file, around = (folder / NAME).stat(), folder.stat()
    return file.st_ino, file.st_size, file.st_mtime_ns, around.st_mtime_ns, int((folder / (NAME + "-wal")).exists())


def connect(folder: Path, *, readonly: bool, timeout: float) -> Connection:
    """Open the database of a store; its schema has been checked.

    Raises:
        NegationFileError: If there is none, or it is damaged or of somebody else's making.
    """
    path = folder / NAME
    with translated(folder):
        for name in (NAME, NAME + "-wal", NAME + "-shm"):
            with suppress(FileNotFoundError):
                if not stat.S_ISREG((folder / name).lstat().st_mode):
                    raise damaged(folder, f"{name} that is a link or no file", "plain files")
        if not path.exists():
            raise NegationFileError(
                f"{folder}: expected a folder made by NegationStore.create, got none with {NAME}; check the path, or "
                "make one with: steerclear negate build PICTURES -o NAME.negation"
            )
        try:
            return _opened(path, "mode=ro" if readonly else "mode=rw", timeout)
        except sqlite3.OperationalError:
            if not readonly or (folder / (NAME + "-wal")).exists():
                raise
            stamp = stamp_of(folder)
            connection = _opened(path, "mode=ro&immutable=1", timeout)
            connection.stamp = stamp
            return connection


def make(folder: Path, head: Head) -> None:
    """Write the database of an empty store into ``folder``."""
    connection = _configured(sqlite3.connect(folder / NAME, isolation_level=None), readonly=False)
    try:
        for statement in SCHEMA:
            connection.execute(statement)
        space = head.space
        dtype = next(name for name, value in DTYPES.items() if value == head.dtype)
        values = (1, FORMAT, VERSION, space.encoder, json.dumps(space.shape), space.name, dtype)
        connection.execute(
            "INSERT INTO store VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, head.generation, head.rows, head.change),
        )
    finally:
        connection.close()


def _opened(path: Path, query: str, timeout: float) -> Connection:
    uri = f"{path.absolute().as_uri()}?{query}"
    options: dict[str, Any] = {"uri": True, "isolation_level": None, "check_same_thread": False, "factory": Connection}
    connection = cast("Connection", sqlite3.connect(uri, timeout=timeout, **options))
    try:
        _configured(connection, readonly="mode=ro" in query)
        found = connection.execute("SELECT type, sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 9").fetchall()
        wanted = [(sql.split()[1].replace("UNIQUE", "INDEX").lower(), sql) for sql in SCHEMA]
        if sorted(found, key=str) != sorted(wanted, key=str):
            raise damaged(path, "tables, indexes, views or triggers of another kind", "the tables of a store")
    except BaseException:
        connection.close()
        raise
    return connection


def _configured(connection: sqlite3.Connection, *, readonly: bool) -> sqlite3.Connection:
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    pragmas = ["trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0", "secure_delete = ON"]
    if not readonly:
        pragmas += ["journal_mode = WAL", "synchronous = FULL"]
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}")
    if hasattr(connection, "setconfig"):  # from Python 3.12 on
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)  # pyright: ignore
    return connection


@contextmanager
def transaction(folder: Path, connection: Connection, *, write: bool) -> Generator[Head]:
    """One consistent view, or one change that happens as a whole; ``head`` has been checked.

    Raises:
        NegationFileError: If another writer holds the store for longer than the timeout, or the file is damaged.
    """
    with translated(folder):
        connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        try:
            yield head_of(folder, connection)
            connection.execute("COMMIT")
            if connection.stamp not in (None, stamp_of(folder)):
                raise NegationFileError(f"{folder}: expected no change while it was read, got one; read it again")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise


def head_of(folder: Path, connection: sqlite3.Connection) -> Head:
    """The checked row of ``store``."""
    row = connection.execute(
        "SELECT format, version, encoder, shape, name, dtype, generation, rows, change FROM store LIMIT 1"
    ).fetchone()
    if row is None or row[0] != FORMAT:
        raise damaged(folder, f"format {row and str(row[0])[:40]!r}", f"format {FORMAT!r}")
    if row[1] != VERSION:
        raise NegationFileError(
            f"{folder}: expected store version {VERSION}, got {str(row[1])[:40]!r}; open it with the release of "
            "steerclear that wrote it, or export it there to a single file"
        )
    _, _, encoder, shape, name, dtype, *numbers = row
    texts = (encoder, shape, name, dtype)
    if not all(isinstance(text, str) and len(text) <= 4096 for text in texts) or dtype not in DTYPES:
        raise damaged(folder, "an incomplete description of its space")
    if not all(isinstance(number, int) and 0 <= number < 1 << 48 for number in numbers):
        raise damaged(folder, f"generation, rows and change {numbers}")
    try:
        sizes: Any = json.loads(shape)
        space = Space(encoder=encoder, shape=tuple(sizes), name=name)
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(folder, f"the shape {shape[:40]!r}") from error
    if len(space.shape) > 8 or math.prod(space.shape) > 1 << 32:
        raise damaged(folder, f"the shape {space.shape}")
    return Head(space, DTYPES[dtype], *cast("list[int]", numbers))


def items(folder: Path, connection: sqlite3.Connection, head: Head) -> Iterator[Item]:
    """All rows in order, removed ones included; checked as :func:`columns` does."""
    for some in columns(folder, connection, head, Item._fields):
        yield from map(Item._make, zip(*some.values(), strict=True))


def columns(
    folder: Path, connection: sqlite3.Connection, head: Head, names: Sequence[str], start: int = 0
) -> Iterator[dict[str, tuple[Any, ...]]]:
    """The rows from ``start`` on, some at a time: fields of :class:`Item` by name, the first of them ``row``.

    They come in order and without a gap, removed ones included, and every value is checked. Takes some megabytes at a
    time, and in all no more text than the file has bytes.

    Raises:
        NegationFileError: At the first thing that is not as it should be.
    """
    size = sum(path.stat().st_size for path in folder.glob(NAME + "*"))
    if head.rows * SMALLEST > size:
        raise damaged(folder, f"{head.rows} rows in {size} bytes")
    query = f"SELECT {', '.join(names)} FROM items WHERE row >= ? ORDER BY row"  # noqa: S608 - our own names
    read, end = connection.execute(query, (start,)), start
    while some := read.fetchmany(CHUNK):
        begin, end = end, end + len(some)
        found: dict[str, tuple[Any, ...]] = dict(zip(names, zip(*some, strict=True), strict=True))
        if found["row"] != tuple(range(begin, end)) or end > head.rows or not all(map(_sane, found, found.values())):
            raise damaged(folder, f"values of the wrong kind, or other rows, between {begin} and {end}")
        size -= sum(sum(map(len, found[name])) for name in LONGEST if name in found)
        if size < 0:
            raise damaged(folder, "more text than it has bytes")
        yield found
    if end != max(head.rows, start):
        raise damaged(folder, f"{end} rows", f"{head.rows}")


def _sane(name: str, values: tuple[Any, ...]) -> bool:
    """Whether a column holds what it should."""
    if not set(map(type, values)) <= _KINDS.get(name, {str}):
        return False
    if name in LONGEST:
        return max(map(len, values)) <= LONGEST[name] and (name != "id" or all(values))
    if name == "weight":
        return min(values) >= _LIGHTEST and max(values) <= _HEAVIEST
    if name == "sha256":
        return set(map(len, values)) == {32}
    return name == "row" or all(value is None or value > 0 for value in values)


def texts(name: str, value: str | Iterable[str], n: int) -> tuple[str, ...]:
    """``value`` for each of ``n`` items, short enough and fit to be stored.

    Raises:
        InvalidInput: If one is not.
    """
    values = (value,) * n if isinstance(value, str) else tuple(value)
    if len(values) != n:
        raise InvalidInput(f"{name}: expected one text, or one for each of {n} items, got {len(values)}")
    for text in values:
        if len(text) > LONGEST[name] or "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise InvalidInput(
                f"{name}: expected at most {LONGEST[name]} characters of Unicode without NUL, got {text[:40]!a} "
                f"({len(text)} characters); give another"
            )
    return values


@contextmanager
def translated(folder: Path) -> Generator[None]:
    """Errors of the engine and of the system, said in our words."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            raise NegationFileError(
                f"{folder}: expected to be alone in writing, got another writer at work for longer than the timeout; "
                "nothing was changed: try again, or give a longer timeout"
            ) from error
        raise damaged(folder, str(error)) from error
    except (sqlite3.Error, OSError, OverflowError, UnicodeError) as error:
        raise damaged(folder, str(error)) from error


def damaged(path: Path, got: str, expected: str = "a negation store that can be read and written") -> NegationFileError:
    """The error for a store that is not what it should be."""
    return NegationFileError(
        f"{path}: expected {expected}, got {got[:500]}; check space and permissions, restore it from a copy, or import "
        "the single file that it was exported to"
    )

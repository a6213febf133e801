"""What sources list and what they refuse: folders, patterns, tar files and Parquet files, kind and hostile."""

import io
import os
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.building import picture, table, tar

from steerclear.errors import InvalidInput, NegationFileError
from steerclear.negation.bulk import tars
from steerclear.negation.bulk.entries import CHUNK_BYTES, Entry, cut, digest
from steerclear.negation.bulk.reader import Reader
from steerclear.negation.bulk.sources import entries
from steerclear.negation.images import MAX_BYTES, Unusable

PICTURE = picture(0)
FUZZ = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read(listed, root=None):
    """The bytes of every entry, or why there are none."""
    reader, found = Reader(root), []
    for entry in listed:
        try:
            found.append(reader(entry))
        except Unusable as error:
            found.append(str(error))
    return found


def ids(listed):
    return [entry.id for entry in listed]


# -- chunks -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, CHUNK_BYTES * 2), st.integers(-1, 2)), max_size=200))
def test_chunks_are_all_entries_in_order_and_none_is_too_large(sizes):
    listed = [Entry(str(k), "", "", "a", size=size, group=group) for k, (size, group) in enumerate(sizes)]
    chunks = list(cut(listed))
    assert [entry for chunk in chunks for entry in chunk] == listed
    assert all(0 < len(chunk) <= 64 and len({entry.group for entry in chunk}) == 1 for chunk in chunks)
    assert all(len(chunk) == 1 or sum(entry.size for entry in chunk) <= CHUNK_BYTES for chunk in chunks)


def test_the_listing_knows_sizes_and_times_and_not_where_the_folder_is(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(PICTURE)
        os.utime(tmp_path / name / "a.png", ns=(5, 5))
    first, second = (digest(cut(entries(tmp_path / name, label=""))) for name in ("one", "two"))
    assert first == second
    os.utime(tmp_path / "two" / "a.png", ns=(6, 6))
    assert digest(cut(entries(tmp_path / "two", label=""))) != first


# -- which files ------------------------------------------------------------------------------------------------------


def test_patterns_are_those_of_the_shell(tmp_path):
    for number in range(12):
        tar(tmp_path / f"bad-{number:04d}.tar", [("a.png", picture(number))])
    assert ids(entries(f"{tmp_path}/bad-{{0009..0010}}.tar")) == ["bad-0009/a", "bad-0010/a"]
    assert ids(entries(f"{tmp_path}/bad-000{{3,1}}.tar")) == ["bad-0003/a", "bad-0001/a"]
    assert len(entries(f"{tmp_path}/*.tar")) == len(entries(tmp_path)) == 12
    assert ids(entries([tmp_path / "bad-0002.tar", f"{tmp_path}/bad-0001.tar"])) == ["bad-0002/a", "bad-0001/a"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("missing/", "found nothing there"),
        ("bad-{0..3}.tar", "bad-0.tar: expected .*found nothing"),
        ("*.tar", "found nothing there"),
        ("https://example.org/bad.tar", "fetch them first"),
        ("pipe:curl x", "fetch them first"),
        ("{0..99999999}.tar", "at most 1,000,000 files"),
        ("{0..9999}{0..9999}.tar", "at most 1,000,000 files"),
    ],
)
def test_patterns_that_name_nothing(tmp_path, monkeypatch, pattern, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match=message):
        entries(pattern)


def test_pictures_and_shards_in_one_folder_are_ambiguous(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    tar(tmp_path / "b.tar", [("a.png", PICTURE)])
    with pytest.raises(InvalidInput, match=r"got both \(a.png and b.tar\); .*\*.tar"):
        entries(tmp_path)
    (tmp_path / "c.parquet").write_bytes(b"")
    with pytest.raises(InvalidInput, match="together"):
        entries(f"{tmp_path}/[ab].*")


def test_notes_beside_shards_are_no_matter(tmp_path):
    (tmp_path / "README.md").write_text("a data set")
    table(tmp_path / "train-00000.parquet", [{"image": {"bytes": PICTURE, "path": "a.png"}}])
    assert ids(entries(tmp_path)) == ["a.png"]


def test_an_empty_list_is_an_error():
    with pytest.raises(InvalidInput, match="an empty list"):
        entries([])


def test_a_source_without_a_picture_is_an_error(tmp_path):
    pq.write_table(pa.table({"bytes": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(InvalidInput, match=r"at least one picture in .*a\.parquet, got none"):
        entries(tmp_path / "a.parquet")


def test_a_picture_that_went_away_is_left_out(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "b.png").write_bytes(PICTURE)
    os.mkfifo(tmp_path / "pipe.png")
    listed = entries(tmp_path)
    (tmp_path / "a.png").unlink()
    assert read(listed) == ["No such file or directory", PICTURE]
    listed[1] = listed[1]._replace(file=str(tmp_path / "pipe.png"))
    assert read(listed)[1] == "a folder or device"


# -- tar files --------------------------------------------------------------------------------------------------------


def member(name, kind, **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def test_samples_with_labels_of_all_kinds(tmp_path):
    members = [
        ("000.jpg", picture(0, "JPEG")),
        ("000.json", b'{"label": "dagger", "license": "CC0", "other": [1]}'),
        ("000.txt", b"a caption"),
        ("001.cls", b"7\n"),
        ("001.png", picture(1)),
        ("sub/002.webp", picture(2, "WEBP")),
        ("sub/002.txt", " eine süße Axt ".encode()),
        ("003.png", picture(3)),
        ("003.json", b"[not json"),
        ("004.input.png", picture(4)),
        ("004.npy", b"???"),
        ("._004.png", b"what other systems leave behind"),
    ]
    listed = entries(tar(tmp_path / "bad.tar", members))
    assert ids(listed) == ["bad/000", "bad/001", "bad/sub/002", "bad/003", "bad/004"]
    assert [entry.label for entry in listed] == ["dagger", "7", "eine süße Axt", "", ""]
    assert [entry.licence for entry in listed] == ["CC0", "", "", "", ""]
    assert listed[2].source == f"{tmp_path / 'bad.tar'}: sub/002.webp"
    assert read(listed) == [data for name, data in members if name.endswith(("jpg", "png", "webp"))][:5]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_in_every_format(tmp_path, kind):
    name = "folder/" * 14 + "x" * 90
    assert entries(tar(tmp_path / "a.tar", [(f"{name}.png", PICTURE)], kind))[0].id == f"a/{name}"


def test_members_that_are_no_plain_files_are_left_out(tmp_path):
    members = [
        ("000.png", member("000.png", tarfile.SYMTYPE, linkname="/etc/passwd")),
        ("001.png", member("001.png", tarfile.LNKTYPE, linkname="002.png")),
        ("002.png", PICTURE),
        ("003.png", member("003.png", tarfile.CHRTYPE, devmajor=1, devminor=5)),
        ("004.png", b""),
        ("005.txt", b"no picture"),
        ("006.png", PICTURE),
        ("006.jpg", PICTURE),
        ("folder", member("folder", tarfile.DIRTYPE)),
        ("../../007.png", picture(7)),
        ("002.png", PICTURE),
    ]
    listed = entries(tar(tmp_path / "a.tar", members))
    link = "a link, device or sparse file"
    assert read(listed) == [
        link,
        link,
        PICTURE,
        link,
        f"a file of 0 bytes (expected 1 to {MAX_BYTES})",
        "a sample without a picture",
        PICTURE,
        "a second picture of its sample",
        picture(7),
        "its key names an earlier sample",
    ]
    assert ids(listed)[8] == "a/../../007"  # a name, which nothing is ever written to


def header(name=b"a.png", size=10, kind=b"0"):
    """A header that says what it likes."""
    info = tarfile.TarInfo(name.decode())
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    field = (
        b"%011o\0" % size
        if 0 <= size < 8**11
        else (b"\xff" if size < 0 else b"\x80") + (size % 256**11).to_bytes(11, "big")
    )
    block[124:136], block[156:157] = field, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no tar file at all",
        PICTURE,
        b"\x1f\x8b" + bytes(2000),
        header(size=10**15) + END,
        header(size=-512) + END,
        header(size=-(10**9)) + END,
        header(size=10**15, kind=b"L") + END,
        header(size=10**15, kind=b"x") + END,
        header(size=2 << 20, kind=b"x") + bytes(2 << 20) + END,
        header(size=-512, kind=b"x") + END,
        (header(size=512, kind=b"L") + b"n" * 512) * 3000 + END,
        header(size=0),
        header(size=0) + bytes(100),
        header(size=0) + b"\1" * 512 + END,
        header(size=0) + END + header(size=0) + END,
    ],
    ids=lambda content: content[:10].hex() + f"-{len(content)}",
)
def test_files_that_are_no_whole_tar_files_are_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(NegationFileError, match=r"a\.tar: expected a whole, uncompressed tar file"):
        entries(tmp_path / "a.tar")


def test_a_compressed_tar_file_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as made:
        made.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with pytest.raises(NegationFileError, match="unpack a compressed one"):
        entries(tmp_path / "a.tar")


def test_a_picture_larger_than_any_picture_is_never_read(tmp_path):
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(header(size=MAX_BYTES + 1))
        file.truncate(512 + MAX_BYTES + 512)  # a hole: no disk, no time
        file.seek(512 + MAX_BYTES + 512)
        file.write(END)
    tracemalloc.start()
    assert "268435457 bytes" in read(entries(tmp_path / "a.tar"))[0]
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@FUZZ
@given(st.data())
def test_a_damaged_tar_file_is_an_error_or_a_list(tmp_path, data):
    whole = tar(tmp_path / "a.tar", [("0.png", PICTURE), ("0.txt", b"label"), ("1.png", picture(1))]).read_bytes()
    made = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 6))):
        block = data.draw(st.sampled_from([0, 512 + -(-len(PICTURE) // 512) * 512, len(whole) - 10240]))
        made[min(len(made) - 1, block + data.draw(st.integers(0, 511)))] = data.draw(st.integers(0, 255))
    made = made[: data.draw(st.integers(0, len(made)))] if data.draw(st.booleans()) else made
    (tmp_path / "b.tar").write_bytes(made)
    try:
        listed = entries(tmp_path / "b.tar")
    except NegationFileError:
        return
    assert len(read(listed)) == len(listed) <= 8


@pytest.mark.parametrize("cut_at", range(0, 9000, 512))
def test_a_tar_file_that_ends_early_is_refused_wherever_it_ends(tmp_path, cut_at):
    whole = tar(tmp_path / "a.tar", [(f"{k}.png", picture(k, size=(24, 24))) for k in range(4)]).read_bytes()
    end = len(whole.rstrip(b"\0")) + 512
    (tmp_path / "b.tar").write_bytes(whole[:cut_at])
    if cut_at < end:
        with pytest.raises(NegationFileError, match=r"b\.tar: expected a whole"):
            entries(tmp_path / "b.tar")


# -- Parquet ----------------------------------------------------------------------------------------------------------


def test_tables_of_all_kinds(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(PICTURE)
    one = table(
        tmp_path / "1.parquet", [{"image": PICTURE, "label": "x", "id": "first"}, {"image": None, "label": None}]
    )
    two = table(tmp_path / "2.parquet", [{"image": {"bytes": None, "path": "folder/a.png"}, "label": 3}])
    three = table(tmp_path / "3.parquet", [{"path": "a.png", "license": "CC0", "label": 1.5}])
    assert [(e.id, e.label) for e in entries(one)] == [("first", "x"), ("1/000001", "")]
    assert read(entries(one)) == [PICTURE, "neither bytes nor a path"]
    assert entries(one)[1].source == f"{one}: row 1"
    assert read(entries(two)) == [PICTURE]
    four = table(tmp_path / "4.parquet", [{"image": {"bytes": PICTURE, "path": None}, "label": None}])
    assert [(e.id, e.label) for e in entries(four)] == [("4/000000", "")]
    assert [(e.id, e.label, e.licence) for e in entries(three, root=folder)] == [("a.png", "1.5", "CC0")]
    assert read(entries(three, root=folder), folder) == [PICTURE]
    assert read(entries(three)) == ["No such file or directory: 'a.png'"]


def test_classes_are_named_as_hugging_face_names_them(tmp_path):
    features = b'{"info": {"features": {"label": {"names": ["axe", "bomb"], "_type": "ClassLabel"}}}}'
    made = pa.table({"image": [PICTURE] * 3, "label": [1, 0, 7]}).replace_schema_metadata({b"huggingface": features})
    pq.write_table(made, tmp_path / "a.parquet")
    assert [entry.label for entry in entries(tmp_path / "a.parquet")] == ["bomb", "axe", "7"]


def test_rows_are_found_in_any_order_of_reading(tmp_path):
    data = [picture(k, size=(8, 8)) for k in range(100)]
    listed = entries(table(tmp_path / "a.parquet", [{"bytes": one} for one in data], row_group_size=40))
    assert [len(chunk) for chunk in cut(listed)] == [40, 40, 20]
    assert read(listed) == data
    reader = Reader(None)
    for row in (99, 0, 39, 17, 80, 41, 41):
        assert reader(listed[row]) == data[row]


@pytest.mark.parametrize("path", ["../a.png", "/etc/passwd", "b/../../a.png", "link/a.png", "", "\0", "x" * 5000])
def test_paths_out_of_the_folder_are_refused(tmp_path, path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "a.png").write_bytes(PICTURE)
    (inner / "link").symlink_to(tmp_path)
    for rows in ([{"path": path[:900]}], [{"image": {"bytes": None, "path": path[:900]}}]):
        found = read(entries(table(inner / "a.parquet", rows)))[0]
        assert isinstance(found, str)
        assert "a path" in found or "too long" in found or "a cell of 0 bytes" in found


def test_a_path_within_may_take_detours(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.png").write_bytes(PICTURE)
    for path in ("b/../a.png", "./a.png", str(tmp_path / "a.png")):
        assert read(entries(table(tmp_path / "a.parquet", [{"path": path}]))) == [PICTURE]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"picture": PICTURE}], InvalidInput, r"a column image, bytes or path, got \['picture'\]"),
        ([{"image": PICTURE, "label": ["a", "b"]}], None, ""),
        ([{"image": PICTURE, "label": "x" * 5000}], NegationFileError, "texts of at most 1000 characters, got 5000"),
        ([{"image": "text"}], None, ""),
        ([{"image": 7}], None, ""),
        ([{"image": b""}], None, ""),
        ([{"image": [1, 2]}], InvalidInput, "a column image, bytes or path"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, list) else "",
)
def test_columns_that_are_not_what_they_should_be(tmp_path, rows, error, message):
    file = table(tmp_path / "a.parquet", rows)
    if error is None:
        assert len(read(entries(file))) == 1
    else:
        with pytest.raises(error, match=message):
            entries(file)


def bomb(file, name, value, rows):
    """A small file that says a large value again and again."""
    words = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    pq.write_table(pa.table({name: words, **({} if name == "bytes" else {"bytes": [PICTURE] * rows})}), file)
    return file


def test_a_value_that_is_said_again_and_again_is_in_memory_once(tmp_path):
    file = bomb(tmp_path / "a.parquet", "bytes", bytes(8 << 20), rows=500)
    assert file.stat().st_size < 1 << 20
    before = pa.total_allocated_bytes()
    reader, listed = Reader(None), entries(file)
    pool = pa.default_memory_pool()
    for row in (0, 100, 499):
        assert len(reader(listed[row])) == 8 << 20
    assert pool.max_memory() - before < 200 << 20  # not 500 times 8 MiB
    with pytest.raises(NegationFileError, match="at most 1000 characters"):
        entries(bomb(tmp_path / "b.parquet", "label", "x" * (8 << 20), rows=500))


def test_a_table_with_more_rows_than_bytes_is_refused(tmp_path):
    pq.write_table(pa.table({"bytes": [b"x"] * 100_000}), tmp_path / "a.parquet")
    with pytest.raises(NegationFileError, match=r"got 100000 rows: the same picture again and again"):
        entries(tmp_path / "a.parquet")


def test_a_damaged_table_is_an_error_or_a_list(tmp_path):
    rows = [{"image": {"bytes": picture(k, size=(8, 8)), "path": f"{k}.png"}, "label": k % 3} for k in range(40)]
    whole = table(tmp_path / "a.parquet", rows, row_group_size=20).read_bytes()

    @FUZZ
    @given(st.data())
    def damaged(data):
        made = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 4))):
            made[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
        made = made[: data.draw(st.integers(0, len(made)))] if data.draw(st.booleans()) else made
        (tmp_path / "b.parquet").write_bytes(made)
        try:
            listed = entries(tmp_path / "b.parquet")
        except (NegationFileError, InvalidInput):
            return
        assert len(read(listed)) == len(listed)

    damaged()


def test_what_comes_after_damage_is_left_out_whoever_reads_it(tmp_path):
    data = [picture(k, size=(32, 32)) for k in range(64)]
    file = table(
        tmp_path / "a.parquet",
        [{"bytes": one} for one in data],
        compression="none",
        write_page_checksum=True,
        use_dictionary=False,
        data_page_size=4096,
        write_batch_size=4,
    )
    content = bytearray(file.read_bytes())
    content[content.find(data[40]) + 50] ^= 255
    listed = entries(file)
    file.write_bytes(content)
    once = read(listed)
    assert once[:32] == data[:32]
    assert all("corrupt Parquet" in one for one in once[41:])
    assert [read([entry])[0] for entry in listed] == once


def test_the_tar_reader_never_reads_much_at_once():
    guarded = tars._Guarded(io.BytesIO(bytes(5000)))
    for size in (-1, tars.MAX_HEADER + 1):
        with pytest.raises(tarfile.ReadError, match="a header of"):
            guarded.read(size)
    guarded.read(512)
    for offset in (0, 100, -1):
        with pytest.raises(tarfile.ReadError, match="begins before byte 512"):
            guarded.seek(offset)

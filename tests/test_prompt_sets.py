"""Public prompt sets: whatever suggests minors is dropped, nothing malformed is skipped, no message shows a prompt."""

import csv
import dataclasses
import hashlib
import inspect
import json
import os
import re
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from steerclear.errors import InvalidInput
from steerclear.evaluate.prompt_sets import PUBLISHED, PromptSet, drop_minors, load, suggests_minors, tables
from steerclear.evaluate.prompts import Prompt

_NAMED = """child kid kids minor minors teen teens teenager toddler schoolgirl schoolboy boy girls baby infant underage
preteen juvenile adolescent newborn youth kindergarten"""
NAMED = _NAMED.split()
LEET = {"o": "0", "i": "1!|", "e": "3", "a": "4@", "s": "5$", "t": "7", "b": "8", "g": "69", "l": "1!|"}
HOMOGLYPHS = {"a": "аα", "c": "с", "e": "е", "i": "іιı", "o": "оο", "y": "у", "k": "к", "d": "ԁ", "h": "һ"}
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f\ufe0f"
_BENIGN = """kidney kidneys kidnap minority minorities canteen teenth nineteen thirteenth childproof between girlfriend
boyfriend cowboy Babylon lollipop skill million unkind Boyd Kidd youtube minored subminor hammer"""
BENIGN = _BENIGN.split()
TEXT = "a marmalade zeppelin over Lisbon"


def write(path, rows):
    """Rows in the format that the ending of ``path`` says."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def i2p(**cells):
    row = {"prompt": TEXT, "categories": "b, c", "evaluation_seed": 7, "evaluation_guidance": 5.5}
    return row | cells


@pytest.mark.parametrize("word", NAMED)
@pytest.mark.parametrize("frame", ["{}", "a drawing of a {}.", "the_{}_walks", "({})", "{}'s hat", "2{}", "«{}»"])
def test_a_word_for_a_minor_is_found_wherever_it_stands(word, frame):
    assert suggests_minors(frame.format(word))
    assert suggests_minors(frame.format(word.upper()))


@st.composite
def disguised(draw):
    """A listed word in a sentence, each letter possibly in leet, full width, a look-alike or marked; separators."""
    letters = []
    for letter in draw(st.sampled_from(NAMED)):
        kind = draw(st.sampled_from(["plain", "upper", "leet", "wide", "alike", "mark", "bold"]))
        letters.append(
            {
                "upper": letter.upper(),
                "leet": draw(st.sampled_from(LEET.get(letter, letter))),
                "wide": chr(ord(letter) - ord("a") + ord("ａ")),
                "bold": chr(ord(letter) - ord("a") + 0x1D41A),
                "alike": draw(st.sampled_from(HOMOGLYPHS.get(letter, letter))),
                "mark": letter + "\u0301",
            }.get(kind, letter)
        )
    separator = draw(st.sampled_from(["", "", ".", "-", "_", "*", "~", "/", " ", " - ", *INVISIBLE]))
    return f"a picture of, {separator.join(letters)} , outside"


@given(disguised())
def test_disguises_do_not_help(text):
    assert suggests_minors(text), ascii(text)


AGES = ["{} year old", "{}-year-old", "{}yo", "{} y/o", "{} yrs old", "aged {}", "age: {}", "{} years of age"]


@given(
    st.integers(0, 17),
    st.sampled_from([*AGES, "{}-{} year olds", "turning {}", "{}.5 years old", "{} ｙｅａｒ ｏｌｄ"]),
)
def test_ages_below_eighteen_in_digits_are_found(age, frame):
    assert suggests_minors(f"someone {frame.format(age, age + 1)} in a garden")


@given(st.integers(18, 120), st.sampled_from(AGES))
def test_ages_from_eighteen_are_not(age, frame):
    assert not suggests_minors(f"someone {frame.format(age)} in a garden")


@pytest.mark.parametrize(
    "text",
    ["twelve year old", "a seventeen-year-old", "s1xteen years old", "12 y34r 0ld", "aged fifteen",
     "16 to 18 year olds", "sixteen or seventeen year old", "١٢ year old", "⑫ year old", "under 18",
     "under the age of eighteen", "6 months old", "5th grader", "fifth grade", "high school", "chi ld",
     "school girl", "ChildModel", "chiiild",
     "kiddd", "teeennn", "\U0001f467\U0001f3fd", "\U0001f1f0\U0001f1ee\U0001f1e9"],
)  # fmt: skip
def test_other_ways_to_say_it_are_found(text):
    assert suggests_minors(text)


@pytest.mark.parametrize("word", [*BENIGN, "twenty-five year old", "nineteen year old", "100 years old", "5 min or so",
    "he shot a film", "stone age", "page 12", "12 years later", "ten men", "8k, 4k, 3d", "in fancy dress",
    "two 18 year olds", "18th century", "one hundred percent"])  # fmt: skip
def test_innocent_words_stay(word):
    assert not suggests_minors(f"the {word}, outside")


@given(st.text(max_size=60))
def test_any_text_has_an_answer_and_normal_forms_agree(text):
    answer = suggests_minors(text)
    assert suggests_minors(f"{text} child") or answer or not text.isascii() or text[-1:].isalpha()
    if answer and text.isascii():
        assert suggests_minors("".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text))


@pytest.mark.parametrize("unit", [" ", "1 ", "a.", "i l ", "5-", "aged ", "a", "9", "!", "\u200b", "year "])
def test_long_hostile_texts_take_no_time(unit):
    assert suggests_minors(unit * (10_000 // len(unit))) in (True, False)


def test_the_drop_looks_at_text_and_category_and_keeps_the_order():
    prompts = [Prompt(text="a hammer"), Prompt(text="a kid"), Prompt(text="tea", category="teens"), Prompt(text="tea")]
    assert drop_minors(prompts) == ((prompts[0], prompts[3]), 2)
    assert drop_minors([]) == ((), 0)


def test_nothing_switches_the_drop_off(tmp_path, monkeypatch):
    assert list(inspect.signature(drop_minors).parameters) == ["prompts"]
    assert list(inspect.signature(suggests_minors).parameters) == ["text"]
    for name in ("STEERCLEAR_KEEP_MINORS", "STEERCLEAR_UNSAFE", "REDACT"):
        monkeypatch.setenv(name, "0")
    path = write(tmp_path / "set.csv", [i2p(), i2p(prompt="a kid"), i2p(categories="teen")])
    for protocol in ("safree", "i2p"):
        got = load("i2p", path, protocol=protocol, count=None)
        assert (len(got), got.dropped) == (1, 2)


def test_a_set_made_by_hand_drops_them_too_and_counts_on():
    prompts = (Prompt(text="tea"), Prompt(text="a t0ddler"))
    made = PromptSet(prompts=prompts, dropped=3, name="mine", protocol="i2p", digest="")
    assert (made.prompts, made.dropped) == (prompts[:1], 4)
    assert dataclasses.replace(made, prompts=(*made.prompts, *prompts)).dropped == 5


def test_a_row_goes_if_any_of_its_texts_suggests_minors(tmp_path):
    rows = [{"adv_prompt": "xq blorp", "target_prompt": text} for text in ("a lamp", "a schoolgirl")]
    got = load("mma", write(tmp_path / "mma.csv", rows), count=2)
    assert ([p.text for p in got.prompts], got.dropped) == (["xq blorp"], 1)


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_all_formats_give_the_same_prompts(tmp_path, ending):
    rows = [i2p(), i2p(prompt='quoted "lamp",\nsecond line', evaluation_seed=2**40), i2p(prompt="a kid")]
    path = write(tmp_path / f"set.{ending}", rows)
    got = load("i2p", path, protocol="i2p", count=3)
    assert [(p.text, p.seed, p.cfg, p.category, p.source) for p in got.prompts] == [
        (TEXT, 7, 5.5, "b|c", "i2p"),
        ('quoted "lamp",\nsecond line', 2**40, 5.5, "b|c", "i2p"),
    ]
    assert got.dropped == 1
    assert got.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_two_protocols_differ_in_the_guidance_scale_alone(tmp_path):
    path = write(tmp_path / "set.csv", [i2p()])
    (safree,) = load("i2p", path, count=1).prompts
    (own,) = load("i2p", path, protocol="i2p", count=1).prompts
    assert (safree.cfg, own.cfg) == (7.5, 5.5)
    assert dataclasses.replace(safree, cfg=5.5) == own


def test_columns_resolve_in_the_published_order(tmp_path):
    row = {"caption": "e", "prompt": "d", "sensitive prompt": "c", "unsafe_prompt": "b", "adv_prompt": "a",
           "target_prompt": "t", "concept": "x", "category": "y"}  # fmt: skip
    seen = []
    for column in ("adv_prompt", "unsafe_prompt", "sensitive prompt", "prompt", "caption"):
        name = {"adv_prompt": "mma", "unsafe_prompt": "copro", "sensitive prompt": "ring-a-bell-79"}.get(column)
        name = name or {"prompt": "p4d", "caption": "memorised"}[column]
        seen += [load(name, write(tmp_path / "set.csv", [row]), count=None).prompts[0].text]
        del row[column]
    assert seen == list("abcde")


@pytest.mark.parametrize(
    ("cells", "seed"),
    [({"evaluation_seed": 1, "sd_seed": 2}, 1), ({"sd_seed": 2}, 2), ({}, 42), ({"evaluation_seed": 0}, 0)],
)
def test_seeds_resolve_in_the_published_order(tmp_path, cells, seed):
    path = write(tmp_path / "set.jsonl", [{"prompt": TEXT} | cells])
    assert load("p4d", path).prompts[0].seed == seed


def test_categories_are_split_and_stripped(tmp_path):
    rows = [i2p(categories=text) for text in ("b,c", " b ,, c ", "b", "", " , ")]
    got = load("i2p", write(tmp_path / "set.csv", rows), count=None)
    assert [p.category for p in got.prompts] == ["b|c", "b|c", "b", None, None]


def test_lists_inside_an_object_are_found_where_the_set_keeps_them(tmp_path):
    row = {"unsafe_prompt": TEXT, "concept": "lamps", "category": "Lamps", "idx": 1}
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"ID_train_data": [row], "other": []}))
    assert load("copro", path, count=1).prompts[0].category == "Lamps"


@pytest.mark.parametrize(
    "cells",
    [{"prompt": 5}, {"prompt": None}, {"prompt": ""}, {"prompt": "  "}, {"prompt": ["tea"]}, {"prompt": "x" * 10_001},
     {"prompt": "\ud800"}, {"evaluation_seed": "7.0"}, {"evaluation_seed": 7.5}, {"evaluation_seed": None},
     {"evaluation_seed": True}, {"evaluation_seed": -1}, {"evaluation_seed": 2**63}, {"evaluation_seed": "seven"},
     {"evaluation_guidance": "high"}, {"evaluation_guidance": None}, {"evaluation_guidance": float("nan")},
     {"evaluation_guidance": True}, {"categories": 3}],
)  # fmt: skip
def test_a_malformed_row_raises_with_its_number_and_is_never_skipped(tmp_path, cells):
    path = write(tmp_path / "set.jsonl", [i2p(), i2p(), i2p(**cells)])
    with pytest.raises(InvalidInput, match=r"row 3\b") as caught:
        load("i2p", path, protocol="i2p", count=None)
    shown = str(caught.value)
    assert TEXT not in shown
    assert "marmalade" not in shown
    if "prompt" not in cells:
        assert hashlib.sha256(TEXT.encode()).hexdigest() in shown


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_number_of_rows_is_asked_for(tmp_path, name):
    published = PUBLISHED[name]
    row = dict.fromkeys(published.columns, "7") | {"extra": "x"}
    path = write(tmp_path / "set.csv", [row] * 3)
    assert len(load(name, path, count=None)) == 3
    if published.counts:
        with pytest.raises(InvalidInput, match=rf"expected {published.counts[0]}.*got 3; pass count=None"):
            load(name, path)
        full = write(tmp_path / "full.csv", [row] * published.counts[0]) if published.counts[0] < 1001 else None
        assert full is None or len(load(name, full)) == published.counts[0]
    with pytest.raises(InvalidInput, match="expected 4 rows, got 3"):
        load(name, path, count=4)


def test_the_sizes_are_those_that_were_counted():
    assert {name: published.counts for name, published in PUBLISHED.items()} == {
        "i2p": (4703,), "ring-a-bell-79": (79,), "ring-a-bell-95": (95, 285), "ring-a-bell-violence": (250,),
        "unlearndiff": (142,), "mma": (1000,), "p4d": (), "copro": (9996, 994), "coco-30k": (30000,),
        "coco-10k": (9966,), "artists": (100,), "memorised": (500,),
    }  # fmt: skip


def test_missing_columns_are_named_and_the_files_own_names_are_not_shown(tmp_path):
    headless = tmp_path / "set.csv"
    headless.write_text(f"{TEXT},1\n{TEXT},2\n")
    with pytest.raises(InvalidInput, match="lacks: 'prompt', 'categories'") as caught:
        load("i2p", headless, count=None)
    assert "marmalade" not in str(caught.value)
    path = write(tmp_path / "guide.csv", [{"prompt": TEXT}])
    with pytest.raises(InvalidInput, match="'evaluation_guidance'; protocol='safree'"):
        load("p4d", path, protocol="i2p")


def test_neither_the_set_nor_a_prompt_shows_text(tmp_path):
    got = load("i2p", write(tmp_path / "set.csv", [i2p()]), count=1)
    for shown in (repr(got), str(got), repr(got.prompts), f"{got.prompts[0]}"):
        assert "marmalade" not in shown
    assert "dropped=0" in repr(got)


@pytest.mark.parametrize(
    ("ending", "content"),
    [("json", b"[" * 100_000), ("json", b'{"a": 1}'), ("json", b"[1]"), ("json", b"["),
     ("json", b"[" + b"9" * 9000 + b"]"), ("jsonl", b'{"prompt": "marmalade"'),
     ("jsonl", b"marmalade"), ("jsonl", b"[1]"), ("csv", b"prompt\n\xff\xfe\n"),
     ("csv", b"prompt,prompt\nmarmalade,b\n"), ("csv", b"prompt\nmarmalade,b\n"), ("csv", b"prompt,b\nmarmalade\n"),
     ("csv", b'prompt\n"marmalade\n'), ("csv", b""), ("csv", b"prompt\n"), ("parquet", b"PAR1marmaladePAR1"),
     ("parquet", b""), ("jsonl", b""), ("pkl", b"cos\nsystem\n(S'true'\ntR."), ("", b"x")],
)  # fmt: skip
def test_damaged_and_foreign_files_are_refused_without_a_word_of_them(tmp_path, ending, content):
    path = tmp_path / (f"set.{ending}" if ending else "set")
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="expected") as caught:
        load("p4d", path)
    assert "marmalade" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(("limit", "value"), [("MAX_BYTES", 20), ("MAX_ROWS", 1), ("MAX_CELL", 10), ("MAX_COLUMNS", 1)])
@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_sizes_are_bounded(tmp_path, monkeypatch, limit, value, ending):
    path = write(tmp_path / f"set.{ending}", [{"prompt": TEXT, "b": "1"}] * 2)
    assert len(load("p4d", path)) == 2
    monkeypatch.setattr(tables, limit, value)
    with pytest.raises(InvalidInput, match="at most"):
        load("p4d", path)


def test_a_parquet_file_that_unpacks_to_much_more_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "set.parquet"
    pq.write_table(pa.table({"prompt": ["x" * 5000] * 500}), path, use_dictionary=False, compression="zstd")
    monkeypatch.setattr(tables, "MAX_BYTES", 10 * path.stat().st_size)
    with pytest.raises(InvalidInput, match="unpacked"):
        load("p4d", path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path / "none.csv", tmp_path / "pipe.csv", tmp_path):
        with pytest.raises(InvalidInput, match="expected a file"):
            load("p4d", path)
    with pytest.raises(InvalidInput, match="expected one of i2p"):
        load("other", tmp_path / "none.csv")
    with pytest.raises(InvalidInput, match="expected protocol"):
        load("p4d", tmp_path / "none.csv", protocol="ours")


@given(st.text(min_size=1, max_size=40).filter(str.strip), st.integers(0, 2**63 - 1))
def test_any_prompt_survives_json_lines(tmp_path_factory, text, seed):
    assume(not any(unicodedata.category(char) == "Cs" for char in text) and not suggests_minors(text))
    path = write(tmp_path_factory.mktemp("set") / "set.jsonl", [{"prompt": text, "sd_seed": seed}])
    (prompt,) = load("p4d", path).prompts
    assert (prompt.text, prompt.seed) == (text, seed)


def test_the_page_lists_every_set():
    page = (tables.Path(__file__).parents[1] / "docs" / "prompt-sets.md").read_text(encoding="utf-8")
    for name, published in PUBLISHED.items():
        row = re.search(rf"^\| `{re.escape(name)}` \|.*$", page, re.MULTILINE)
        assert row, name
        assert all(f"{count}" in row[0].replace(",", "") for count in published.counts)
        assert all(f"`{column}`" in row[0] for column in published.columns)

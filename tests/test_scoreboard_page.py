"""The report of a run: what it says follows from the numbers, what it shows is blurred, and it needs nothing else."""

import hashlib
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from steerclear.app.scoreboard import examples, figures, labels, page, view, words, write
from steerclear.evaluate.columns import BASE, JUDGE
from steerclear.evaluate.estimate import Estimate, rate
from steerclear.evaluate.scoreboard import scoreboard

#: Share unsafe, share of benign right, share of benign identical, seconds.
ARMS = {
    "none": ("no guard", 0.98, 0.98, 1.0, 1.0),
    "negative": ("negative prompt", 0.97, 0.8, 0.0, 1.01),
    "published": ("Safe Denoiser, published", 0.9, 0.97, 0.3, 1.05),
    "exact": ("Safe Denoiser, exact", 0.85, 0.96, 0.5, 1.06),
    "release": ("conditional release", 0.06, 0.97, 0.95, 1.01),
    "renoise": ("renoise only", 0.96, 0.98, 0.0, 1.0),
}
KINDS = ("explicit", "group", "implicit", "benign", "near")
CATEGORIES = ("weapons", "alcohol", "tobacco")


def picture(path, rng):
    """A small disc on noise, as a PNG file."""
    grid = np.hypot(*(np.indices((64, 64)) - 32.0))[..., None]
    pixels = np.where(grid < rng.uniform(14, 26), rng.uniform(60, 255, 3), 245 + 10 * rng.random((64, 64, 1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)


def synthetic(
    folder, *, prompts=40, seeds=3, arms=ARMS, redact=False, keep="all", text="a {kind} thing {i}", judge="judge"
):
    """Records of a made-up run and its task; pictures are drawn for every fourth prompt."""
    rng, rows = np.random.default_rng(0), []
    for arm, (_, unsafe, right, same, seconds) in arms.items():
        for i in range(prompts):
            kind, category = KINDS[i % 5], CATEGORIES[i % 3] if i % 5 < 3 else None
            words = text.format(kind=kind, i=i)
            for seed in range(seeds):
                flagged = bool(category and rng.random() < unsafe * (1.0 if kind == "explicit" else 0.4))
                identical = arm == "none" or (category is None and rng.random() < same)
                image = f"images/{arm}/{i:06d}-{seed:03d}.png"
                if keep == "none" or (keep == "safe" and flagged):
                    image = None
                else:
                    picture(folder / image, rng)
                rows.append(
                    dict.fromkeys(BASE)
                    | {
                        "arm": arm,
                        "guard": "{}",
                        "prompt_digest": hashlib.sha256(words.encode()).hexdigest(),
                        "prompt": None if redact else words,
                        "source": "",
                        "kind": kind,
                        "category": category,
                        "seed": seed,
                        "unit": i // 4,
                        "identical": identical,
                        "change_max": 0.0 if identical else 0.5,
                        "change_rms": 0.0 if identical else 0.1,
                        "digest": "",
                        "image": image,
                        "seconds": seconds + 0.01 * (i // 4 % 3),
                        "guard_seconds": 0.0,
                        "evaluations": 50.0,
                        f"{judge}/unsafe": flagged,
                        f"{judge}/probability": 0.9 if flagged else 0.1,
                        f"{judge}/label": "bad thing" if flagged else "thing",
                        f"{judge}/confidence": 0.8,
                        f"{judge}/expected": bool(not flagged and rng.random() < right),
                    }
                )
    schema = pa.schema([*BASE.items(), *((f"{judge}/{name}", kind) for name, kind in JUDGE.items())])
    task = {
        "fingerprint": "f" * 64,
        "common": {"model": {"name": "emoji-sd", "pipeline": "StableDiffusionPipeline", "scheduler": "DDIMScheduler"},
                   "sampling": {"steps": 25, "cfg": 3.0, "batch": 8, "threads": 1}, "judges": {judge: {}}},
        "arms": [{"key": key, "title": values[0], "content": {"negative_prompt": "x" if key == "negative" else None}}
                 for key, values in arms.items()],
        "seeds": list(range(seeds)),
        "versions": {"steerclear": "0.1.0", "torch": "2.9", "device": "cpu x86_64"},
    }  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schema), task


def board_of(records, **options):
    return scoreboard(records, judge="judge", reference="none", **options)


def small(rows):
    """Records of hand-made pictures: ``(arm, kind, prompt, unsafe, expected, identical)``, a second each."""
    names = ("arm", "kind", "prompt_digest", "judge/unsafe", "judge/expected", "identical")
    base = {"guard": "{}", "category": None, "seed": 0, "unit": 0, "seconds": 1.0, "guard_seconds": 0.0,
            "evaluations": 50.0, "change_rms": 0.0, "change_max": 0.0, "judge/confidence": 0.5,
            "judge/label": "x"}  # fmt: skip
    schema = pa.schema([*BASE.items(), *((f"judge/{name}", kind) for name, kind in JUDGE.items())])
    every = [dict.fromkeys(schema.names) | base | dict(zip(names, row, strict=True)) for row in rows]
    return pa.Table.from_pylist(every, schema=schema)


def ten(arm, *, unsafe, right=10, same=10):
    """Ten explicit and ten benign prompts, one seed: the first ones unsafe, right, identical."""
    explicit = [(arm, "explicit", f"e{i}", i < unsafe, False, False) for i in range(10)]
    return explicit + [(arm, "benign", f"b{i}", False, i < right, i < same) for i in range(10)]


TASK = {"arms": [{"key": "none", "title": "no guard"},
                 {"key": "negative", "title": "negative prompt", "content": {"negative_prompt": "beer"}},
                 {"key": "ours", "title": "our guard"}]}  # fmt: skip


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside of styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._style = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        self.words += [] if self._style else [data]

    @property
    def text(self):
        return " ".join(" ".join(self.words).replace("\u2060", "").split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    records, task = synthetic(folder)
    task |= {"dropped": {"i2p": 104, "mma": 27}, "command": "steerclear evaluate task.yaml"}
    path = write(folder, records, board_of(records, against=("negative",)), task)
    return folder, records, task, path.read_text(encoding="utf-8")


def test_the_finding_is_worked_out_from_the_numbers():
    records = small(
        ten("none", unsafe=10) + ten("negative", unsafe=10, right=8, same=0) + ten("ours", unsafe=0, same=9)
    )
    seen = view.view(board_of(records, against=("negative",)), TASK)
    # 0 of 10: at most 1 - 0.025^(1/10) = 30.8 %. Sign test on ten prompts that all changed: 2/2^10; Holm doubles it.
    # 9 of 10: [55.5, 99.7], the interval of statistical tables.
    assert view.finding(seen) == (
        "Our guard takes the share of pictures judged unsafe on explicit prompts from 100 % to 0 % [0–30.8] (negative "
        "prompt: 100 %; p = 0.0039), leaves 90 % [55.5–99.7] of benign pictures bit-identical, shows the right concept "
        "on 100 % [69.2–100] of them (no guard: 100 %), and takes 1.00 times as long with as many network evaluations."
    )


def test_the_best_guard_keeps_benign_pictures():
    rows = ten("none", unsafe=10) + ten("careless", unsafe=0, right=9) + ten("careful", unsafe=3)
    board = board_of(small(rows))
    assert view.view(board, {}).best == "careful"
    named = view.view(board, {"recommended": "careless"})
    assert (named.best, named.chosen) == ("careless", True)
    assert view.view(board, {"recommended": "nobody"}).best == "careful"
    none = view.view(board_of(small(ten("none", unsafe=10) + ten("careless", unsafe=0, right=1))), {})
    assert none.best is None
    assert "none is recommended" in view.finding(none)


def test_neither_reference_nor_negative_prompt_is_recommended():
    board = board_of(small(ten("none", unsafe=1) + ten("negative", unsafe=0) + ten("ours", unsafe=5)))
    assert view.view(board, TASK).best == "ours"


def test_of_two_equally_safe_guards_the_one_that_changes_less_is_best():
    rows = ten("none", unsafe=9) + ten("a", unsafe=1, same=2) + ten("b", unsafe=1, same=7)
    assert view.view(board_of(small(rows)), {}).best == "b"


def test_holm_by_hand():
    # Sorted 0.01, 0.03, 0.04 times 3, 2, 1, never falling; NaN is no test.
    assert view.holm([0.01, 0.04, float("nan"), 0.03]) == pytest.approx([0.03, 0.06, float("nan"), 0.06], nan_ok=True)
    assert view.holm([0.9, 0.8]) == [1.0, 1.0]
    assert view.holm([]) == []


def test_marks_say_how_sure_and_which_way():
    rows = ten("none", unsafe=5) + ten("negative", unsafe=5) + ten("ours", unsafe=0) + ten("worse", unsafe=10)
    seen = view.view(board_of(small(rows), against=("negative",)), TASK)
    first, _ = view.columns(seen)
    cells = {
        arm: {c.key: cell for c, cell in zip(first, row, strict=True)} for arm, row in view.cells(seen, first).items()
    }
    # Five prompts against none: 2/2^5 = 0.0625, no mark.
    assert {arm: row["unsafe/explicit"].mark for arm, row in cells.items()} == dict.fromkeys(cells, "")
    rows = ten("none", unsafe=0) + ten("negative", unsafe=0) + ten("worse", unsafe=10)
    seen = view.view(board_of(small(rows), against=("negative",)), TASK)
    found = dict(zip((c.key for c in first), view.cells(seen, first)["worse"], strict=True))
    assert found["unsafe/explicit"].mark == "**↑"
    assert "p = 0.0039" in found["unsafe/explicit"].mark_title


@pytest.mark.parametrize(
    ("estimate", "unit", "shown"),
    [
        (rate(0, 0), "share", ("no data", "")),
        (rate(0, 10), "share", ("0 %", "0–30.8")),
        (Estimate(value=1.2345, low=1.0, high=2.0, n=3), "s", ("1.23", "1–2")),
        (Estimate(value=50.0, low=50.0, high=50.0, n=3), "", ("50", "")),
        (Estimate(value=1.01, low=1.009, high=1.011, n=3), "s", ("1.01", "")),
        (Estimate(value=5.0, low=float("-inf"), high=float("inf"), n=3), "", ("5", "no interval")),
    ],
)
def test_numbers_are_written_with_their_interval(estimate, unit, shown):
    assert view.written(estimate, unit) == shown


def test_the_page_needs_nothing_else(run):
    text = Page(run[3])
    assert not {tag for tag, _ in text.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in text.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), tag
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert value.startswith(("data:image/png;base64,", "#")), (tag, value[:40])
    assert set(re.findall(r"url\((.)", run[3])) <= {"#"}
    assert "@import" not in run[3]
    assert any(a.get("http-equiv") == "Content-Security-Policy" for _, a in text.tags)


def test_ids_are_unique_and_references_lead_to_one(run):
    ids = [attributes["id"] for _, attributes in Page(run[3]).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', run[3])
    assert used
    assert set(used) <= set(ids)


def test_tables_and_figures_can_be_read_without_eyes(run):
    tags = Page(run[3]).tags
    assert all(a.get("scope") in ("col", "row") for tag, a in tags if tag == "th")
    assert all(a.get("alt") for tag, a in tags if tag == "img")
    charts = [a["aria-label"] for tag, a in tags if a.get("role") == "img"]
    assert len(charts) == 3
    assert "conditional release: unsafe, explicit" in charts[0]
    boxes = [a for tag, a in tags if tag == "input" and a.get("id") != "all"]
    assert boxes
    assert all(a["type"] == "checkbox" and a["aria-label"] and "checked" not in a for a in boxes)
    assert ("html", {"lang": "en"}) in tags


def test_the_page_says_what_was_dropped_and_what_was_run(run):
    text = Page(run[3]).text
    assert "suggest minors: 131 (i2p 104, mma 27)" in text
    for shown in (
        "steerclear evaluate task.yaml",
        "cpu x86_64",
        "DDIMScheduler",
        "24 pictures from 8 explicit prompts",
    ):
        assert shown in text
    assert "not recorded" in view.dropped({})
    assert view.dropped({"dropped": 0}) == "0"


def test_every_flagged_picture_is_blurred_and_stays_so_in_print(run):
    html = run[3]
    tiles = re.findall(r'<div class="tile([^"]*)">(.*?)</div>', html, re.DOTALL)
    flagged = [(classes, body) for classes, body in tiles if ">unsafe<" in body]
    assert len(flagged) > 20
    for classes, body in flagged:
        assert "blurred" in classes
        assert 'type="checkbox"' in body
    assert any("blurred" not in classes and "<img" in body for classes, body in tiles)
    printed = html[html.index("@media print") :]
    assert "filter: blur(11px) saturate(.35) !important" in printed
    assert "@media screen { #all:checked" in html


def gallery(folder, rows, judges=("judge",)):
    full = [dict.fromkeys(examples._COLUMNS) | {f"{judge}/{name}": None for judge in judges for name in JUDGE} | row
            for row in rows]  # fmt: skip
    return examples.Gallery(rows=full, judge="judge", reference="none", titles={"none": "no guard", "ours": "ours"},
                            thumbnails=examples.Thumbnails(folder))  # fmt: skip


def row(**cells):
    return {"arm": "ours", "prompt_digest": "0123456789", "kind": "benign", "seed": 0, "judge/unsafe": False} | cells


def test_what_nobody_judged_or_another_judge_flags_is_blurred(tmp_path):
    picture(tmp_path / "a.png", np.random.default_rng(0))
    both = gallery(tmp_path, [row(image="a.png", **{"other/unsafe": True}),
                              row(image="a.png", **{"other/unsafe": None}),
                              row(image="a.png", **{"other/unsafe": False})], judges=("judge", "other"))  # fmt: skip
    assert [both.tile(each).blurred for each in both.rows] == [True, True, False]


def test_pictures_that_cannot_be_shown_are_hatched_tiles(tmp_path):
    inside = tmp_path / "run"
    picture(tmp_path / "secret.png", np.random.default_rng(0))
    picture(inside / "good.png", np.random.default_rng(0))
    (inside / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    images = [None, "../secret.png", str(tmp_path / "secret.png"), "link.png", "broken.png", "none.png", "good.png"]
    made = gallery(inside, [row(image=image) for image in images] + [row(error="the picture is not finite")])
    tiles = [made.tile(each) for each in made.rows]
    assert [tile.why for tile in tiles] == ["withheld", *["missing"] * 5, "", "failed"]
    assert [bool(tile.source) for tile in tiles] == [False] * 6 + [True, False]


def test_thumbnails_are_bounded(tmp_path):
    Image.effect_noise((900, 600), 80).convert("RGB").save(tmp_path / "a.png")
    maker = examples.Thumbnails(tmp_path)
    source, _ = maker.make("a.png")
    assert len(source) < 60_000
    maker.left = 1000
    assert maker.make("a.png") == ("", "left out")


def test_failures_are_counted_whole_and_shown_in_part(run):
    folder, records, _, html = run
    rows = records.to_pylist()
    made = examples.Gallery.of(records, judge="judge", reference="none", titles=dict.fromkeys(ARMS, "x"), folder=folder)
    base = {(r["prompt_digest"], r["seed"]): r["judge/expected"] for r in rows if r["arm"] == "none"}
    ours = [r for r in rows if r["arm"] == "negative"]
    unsafe = sum(r["judge/unsafe"] and r["kind"] not in ("benign", "near") for r in ours)
    lost = sum(
        r["kind"] in ("benign", "near") and base[r["prompt_digest"], r["seed"]] and not r["judge/expected"]
        for r in ours
    )
    assert unsafe > examples.FAILURES
    found = examples.still_unsafe(made, "negative")
    assert (found.count, len(found.tiles)) == (unsafe, examples.FAILURES)
    assert examples.lost(made, "negative").count == lost
    assert "Where conditional release fails" in html


def test_prompts_that_were_left_out_show_eight_digits(tmp_path):
    records, task = synthetic(tmp_path, prompts=10, seeds=1, redact=True, keep="safe")
    html = write(tmp_path, records, board_of(records), task).read_text(encoding="utf-8")
    digest = hashlib.sha256(b"a explicit thing 0").hexdigest()
    assert digest[:8] in html
    assert digest[:9] not in html
    assert " thing 0" not in html
    assert ">withheld<" in html


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }} $x^2$ \U0001f4a3 {kind} {i}"


def test_hostile_words_stay_words(tmp_path):
    text = HOSTILE.replace("{{ 7*7 }}", "{{{{ 7*7 }}}}")
    arms = {"none": ("no guard", 1.0, 1.0, 1.0, 1.0), "x": (HOSTILE, 0.0, 1.0, 1.0, 1.0)}
    records, task = synthetic(tmp_path, prompts=10, seeds=1, arms=arms, text=text)
    records = records.set_column(
        records.column_names.index("judge/label"), "judge/label", [[HOSTILE] * records.num_rows]
    )
    task |= {"command": HOSTILE, "versions": {"torch": HOSTILE}}
    html = write(tmp_path, records, board_of(records), task).read_text(encoding="utf-8")
    parsed = Page(html)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert all(not name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert "{{ 7*7 }}" in parsed.text


def test_runs_without_benign_prompts_categories_or_data_still_have_a_page(tmp_path):
    rows = [("none", "", f"p{i}", None, None, True) for i in range(3)]
    path = write(tmp_path, small(rows), board_of(small(rows)), {})
    text = Page(path.read_text(encoding="utf-8")).text
    assert "no data" in text
    assert "none is recommended" in text
    assert not (tmp_path / "figures").exists() or not list((tmp_path / "figures").glob("categories.*"))


def test_figures_are_files_too_and_come_out_the_same_twice(run):
    folder, records, task, _ = run
    names = ["categories", "safety-cost", "safety-quality"]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == [
        f"{n}.{e}" for n in names for e in ("png", "svg")
    ]
    for name in names:
        text = (folder / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert ElementTree.fromstring(text).tag.endswith("svg")  # noqa: S314
        assert len(text) < 300_000
        with Image.open(folder / "figures" / f"{name}.png") as image:
            assert min(image.size) > 300
    seen = view.view(board_of(records, against=("negative",)), task)
    assert figures.svg(page.charts(seen)["categories"]) == (folder / "figures" / "categories.svg").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("count", [page.NAMED, page.NAMED + 1])
def test_of_many_arms_the_key_names_all_and_the_plane_the_three_that_matter(count):
    arms = ["none", "negative", *(f"guard-{i}" for i in range(count - 2))]
    rows = [row for i, arm in enumerate(arms) for row in ten(arm, unsafe=10 - i)]
    task = {"arms": [{"key": arm, "title": f"arm {arm}"} for arm in arms] + TASK["arms"][1:2]}
    drawn = page.charts(view.view(board_of(small(rows), against=("negative",)), task))["safety-quality"]
    beside = [text.get_text() for text in drawn.axes[0].texts]
    if count == page.NAMED:
        assert len(beside) == count
        assert not drawn.legends
    else:
        best = f"arm guard-{count - 3}"
        assert sorted(beside) == sorted(["arm none", "negative prompt", best])
        assert len(drawn.legends[0].get_texts()) == count


def test_every_arm_has_a_look_of_its_own():
    looks = figures.looks(40)
    assert len(set(looks)) == 40
    assert looks[0].colour == figures.INK


@pytest.mark.parametrize("points", [[(500, 380)] * 8, [(300, 200)] * 12, [(20 + 50 * i, 390) for i in range(10)]])
def test_names_cover_neither_each_other_nor_points(points):
    names = [labels.Name(x=x, y=y, width=90, height=12) for x, y in points]
    frame = labels.Box(0, 0, 600, 400)
    dots = [labels.Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    boxes = [spot.box for spot in labels.place(names, frame=frame, solid=dots, faint=[])]
    for i, box in enumerate(boxes):
        assert box.overlap(frame) == pytest.approx(box.area)
        assert sum(box.overlap(other) for other in (*boxes[i + 1 :], *dots)) == 0


def test_every_measure_is_defined(run):
    text = Page(run[3]).text
    seen = view.view(board_of(run[1]), run[2])
    for column in seen.board.columns:
        assert words.definition(column) in text
        assert ":" not in words.definition(column).split(" ")[0]

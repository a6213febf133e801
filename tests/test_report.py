"""The demo's report: self-contained, safe against hostile text, and true to the pictures."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from steerclear.app import report
from steerclear.app.demo import Arm, DemoResult, Settings
from steerclear.app.pictures import Cell, png, sheet, to_pixels
from steerclear.app.prompts import KINDS, DemoPrompt, load_prompts, negative_prompt
from steerclear.app.score import Cost, Picture, score
from steerclear.detect import Verdict
from steerclear.errors import InvalidInput
from steerclear.files import write_atomic

HOSTILE = "<script>alert(1)</script>\"'><img src=https://evil.example/x.png onerror=alert(1)>{{ 7*7 }}"
POLICIES = ("weapons", "alcohol", "tobacco", "gambling", "rude-gestures")


def picture(arm, prompt, *, seed=0, unsafe=False, difference=0.0, right=True):
    pixels = np.full((8, 8, 3), 200 if unsafe else 20, dtype=np.uint8)
    verdict = Verdict(label=HOSTILE, probability=0.9, unsafe=unsafe, unsafe_probability=0.9 if unsafe else 0.1)
    return Picture(
        arm=arm, prompt=prompt, seed=seed, pixels=pixels, verdict=verdict, right=right, difference=difference
    )


@pytest.fixture
def result():
    prompts = (
        DemoPrompt(text=HOSTILE, kind="explicit", policies=("weapons",), expected=("dagger",)),
        DemoPrompt(text="a red apple", kind="benign", expected=("red apple",)),
    )
    arms = (Arm(key="a", title="no guard"), Arm(key="b", title=HOSTILE, negative_prompt=HOSTILE))
    pictures = [picture(arm.key, p, unsafe=(arm.key, p.kind) == ("a", "explicit")) for arm in arms for p in prompts]
    cost = Cost(pictures=2, steps=4, seconds=1.0, guard_seconds=0.1, evaluations=16)
    return DemoResult(
        arms=arms,
        prompts=prompts,
        settings=Settings(seeds=(0,), steps=2),
        policies=("weapons",),
        pictures=tuple(pictures),
        scores={arm.key: score([p for p in pictures if p.arm == arm.key], cost) for arm in arms},
        trace=({"arm": "b", "step": 0, "weight": 0.5}, {"arm": "b", "step": 1, "fired": True}),
        seconds=1.0,
    )


class Page(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_nothing_from_outside(result):
    page = Page(report.html(result, HOSTILE))
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "srcset", "action", "data", "background"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    styles = " ".join(re.findall(r"<style>(.*?)</style>", report.html(result, ""), re.DOTALL))
    assert "url(" not in styles
    assert "@import" not in styles
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy
    assert "default-src 'none'" in policy[0]


def test_no_address_of_another_machine(result):
    plain = report.html(result, "steerclear demo").replace("https://evil.example", "")
    assert not re.search(r"https?://", plain)


def test_hostile_text_is_text(result):
    text = report.html(result, HOSTILE)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "49" not in re.findall(r"onerror=alert\(1\)&gt;(.{0,12})", text)[0]
    images = [attributes for tag, attributes in Page(text).tags if tag == "img"]
    assert len(images) == 4
    assert all(HOSTILE in image["alt"] for image in images)


def test_the_pictures_are_inside(result):
    sources = [attributes["src"] for tag, attributes in Page(report.html(result, "")).tags if tag == "img"]
    decoded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert sorted(decoded) == sorted(png(p.pixels) for p in result.pictures)


def test_only_flagged_pictures_are_blurred(result):
    figures = [attributes for tag, attributes in Page(report.html(result, "")).tags if tag == "figure"]
    assert sorted(figure.get("class", "") for figure in figures) == ["", "", "", "unsafe"]


def test_save_writes_everything_and_stays_inside(result, tmp_path):
    files = report.save(result, tmp_path / "out", command="steerclear demo")
    written = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert {"report.html", "results.json", "trace.parquet", "page.png"} <= written
    assert len([name for name in written if name.startswith("pictures/")]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert files.report.read_text().startswith("<!doctype html>")


def test_no_data_is_said_and_never_zero(result):
    text = report.table(result)
    assert "no data" in text
    group = report.as_json(result, "")["arms"][0]["unsafe"]["group"]
    assert group["n"] == 0
    assert group["value"] != group["value"]


def test_score_counts():
    benign = DemoPrompt(text="x", kind="benign")
    explicit = DemoPrompt(text="y", kind="explicit", policies=("weapons",))
    pictures = [
        picture("a", benign, difference=0.0),
        picture("a", benign, difference=2 / 255, right=False),
        picture("a", benign, difference=0.5),
        picture("a", explicit, unsafe=True, difference=1.0),
    ]
    got = score(pictures, Cost(pictures=4, steps=10, seconds=2.0, guard_seconds=0.5, evaluations=80))
    assert (got.identical.value, got.unchanged.value) == (1 / 3, 2 / 3)
    assert (got.right["benign"].value, got.unsafe["explicit"].value, got.unsafe["benign"].value) == (2 / 3, 1.0, 0.0)
    assert (got.seconds, got.guard_milliseconds, got.guard_share, got.evaluations) == (0.5, 50.0, 0.25, 20.0)


def test_the_packaged_prompts_are_consistent():
    prompts = load_prompts(POLICIES)
    assert {prompt.kind for prompt in prompts} == set(KINDS)
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert prompt.expected
        assert (prompt.kind == "benign") == (not prompt.policies)
        assert set(prompt.policies) <= set(POLICIES)
    assert {p.kind for p in load_prompts(("tobacco",))} == {"explicit", "benign"}
    assert "cigarette" in negative_prompt(("weapons", "tobacco"))


def test_files_are_whole_or_absent(tmp_path):
    target = tmp_path / "deep" / "file"
    write_atomic(target, b"one")
    write_atomic(target, b"two")
    assert target.read_bytes() == b"two"
    with pytest.raises(TypeError):
        write_atomic(target, "not bytes")
    assert [path.name for path in target.parent.iterdir()] == ["file"]
    assert target.read_bytes() == b"two"


def test_pictures_are_rounded_and_checked():
    assert to_pixels(np.full((1, 1, 3), 0.5))[0, 0, 0] == 128
    with pytest.raises(InvalidInput, match="finite"):
        to_pixels(np.full((1, 1, 3), np.nan))
    with pytest.raises(InvalidInput, match="expected pictures"):
        sheet([], columns=1)
    with pytest.raises(InvalidInput, match="cfg > 1"):
        Settings(cfg=1.0)
    cell = Cell(pixels=np.zeros((4, 4, 3), dtype=np.uint8), caption="\u202e💣" * 50, warn=True)
    assert sheet([cell] * 3, columns=2, side=20).shape == (10 + 2 * 48, 10 + 2 * 30, 3)

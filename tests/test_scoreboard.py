"""The table on records whose answers are worked out by hand."""

import json
import math
import re

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binomtest

from steerclear.errors import InvalidInput
from steerclear.evaluate import Scoreboard, scoreboard
from steerclear.evaluate.metrics import ClipScore, FeatureMetric, among
from steerclear.evaluate.statistics import JudgeErrors

KINDS = ("explicit", "group", "implicit", "two-object", "benign", "near")
ARMS = ("none", "negative | prompt", "guard")
UNSAFE = {  # arm -> unsafe pictures of the four prompts of each of explicit, group, implicit, two-object
    "none": (4, 2, 1, 3),
    "negative | prompt": (4, 1, 1, 3),
    "guard": (0, 0, 0, 1),
}


def picture(arm, kind, index, **more):
    unsafe = kind in KINDS[:4] and index < UNSAFE[arm][KINDS.index(kind)]
    same = arm == "none" or (arm == "guard" and kind == "benign" and index < 3)
    row = {
        "arm": arm,
        "guard": json.dumps({"guard": arm}),
        "prompt_digest": f"{kind}-{index}",
        "kind": kind,
        "category": {"explicit": "alcohol", "group": "alcohol|weapons"}.get(kind),
        "seed": index,
        "unit": index // 2,
        "fired": None if arm == "none" else not same,
        "identical": same,
        "change_max": 0.0 if same else 0.5,
        "change_rms": 0.0 if same else 0.1,
        "error": None,
        "seconds": 1.0 if arm == "none" else 1.01,
        "guard_seconds": 0.0 if arm == "none" else 0.01,
        "evaluations": 50.0,
        "J/unsafe": unsafe,
        "J/probability": 0.9 if unsafe else 0.1,
        "J/label": "?",
        "J/confidence": 0.8 if kind == "explicit" else 0.9,
        "J/expected": not unsafe if kind == "group" else arm != "negative | prompt" or index > 0,
        "clip_score": 30.0,
        "toy": [float(index), 1.0],
    }
    return {**row, **more}


def records(arms=ARMS, kinds=KINDS, **more):
    return pa.Table.from_pylist([picture(arm, kind, i, **more) for arm in arms for kind in kinds for i in range(4)])


@pytest.fixture(scope="module")
def board():
    return scoreboard(records(), judge="J", reference="none", against=("negative | prompt",))


def cells(board, arm):
    return next(row.cells for row in board.rows if row.arm == arm)


def comparison(board, arm, against, outcome):
    (found,) = [
        c.test for c in board.comparisons if (c.arm, c.against, c.outcome) == (arm, against, outcome)
    ]  # fmt: skip
    return found


def test_arms_keep_their_order_and_their_guard(board):
    assert tuple(row.arm for row in board.rows) == ARMS
    assert [row.guard for row in board.rows] == [json.dumps({"guard": arm}) for arm in ARMS]
    assert [(row.pictures, row.failed) for row in board.rows] == [(24, 0)] * 3
    assert board.sizes == dict.fromkeys(KINDS, (4, 4))


@pytest.mark.parametrize("arm", ARMS)
def test_unsafe_rates_by_kind_are_exact(board, arm):
    for kind, unsafe in zip(KINDS, (*UNSAFE[arm], 0, 0), strict=True):
        got = cells(board, arm)[f"unsafe/{kind}"]
        expected = binomtest(unsafe, 4).proportion_ci(method="exact")
        assert (got.value, got.n) == (unsafe / 4, 4)
        assert (got.low, got.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    together = cells(board, arm)["unsafe/explicit+group+implicit"]
    assert (together.value, together.n) == (pytest.approx(sum(UNSAFE[arm][:3]) / 12), 12)


def test_the_other_cells_are_counted(board):
    got = cells(board, "guard")
    values = {key: (estimate.value, estimate.n) for key, estimate in got.items() if not key.startswith("unsafe")}
    assert values == {
        "safe and of the group/group": (1.0, 4),
        "judge's confidence, not flagged/explicit": (pytest.approx(0.8), 4),
        "judge's confidence, not flagged/benign": (pytest.approx(0.9), 4),
        "right concept/benign": (1.0, 4),
        "right concept/near": (1.0, 4),
        "bit-identical/benign": (0.75, 4),
        "bit-identical/near": (0.0, 4),
        "rms change/benign": (pytest.approx(0.025), 4),
        "rms change/near": (pytest.approx(0.1), 4),
        "over-blocked/near": (0.0, 4),
        "seconds per picture": (pytest.approx(1.01), 24),
        "guard share of time": (pytest.approx(0.01 / 1.01), 24),
        "network evaluations": (50.0, 24),
    }
    assert cells(board, "negative | prompt")["over-blocked/near"].value == 0.25
    assert cells(board, "none")["judge's confidence, not flagged/explicit"].n == 0


def test_comparisons_are_paired_and_exact(board):
    found = comparison(board, "guard", "none", "unsafe")
    assert (found.b, found.c, found.n, found.prompts) == (0, 7, 12, 12)
    assert found.p == pytest.approx(2 / 2**7)
    assert found.p_prompts == pytest.approx(2 / 2**7)
    assert found.difference.value == pytest.approx(-7 / 12)
    assert comparison(board, "guard", "negative | prompt", "unsafe").c == 6
    right = comparison(board, "guard", "negative | prompt", "on-prompt")
    assert (right.b, right.c, right.n, right.p) == (1, 0, 4, 1.0)
    pairs = [(c.arm, c.against) for c in board.comparisons if c.outcome == "unsafe"]
    assert pairs == [("negative | prompt", "none"), ("guard", "none"), ("guard", "negative | prompt")]


def test_categories_count_rows_of_several_in_each(board):
    assert {category: [arms[arm].value for arm in ARMS] for category, arms in board.categories.items()} == {
        "alcohol": [6 / 8, 5 / 8, 0.0],
        "weapons": [2 / 4, 1 / 4, 0.0],
    }


def test_the_order_of_rows_does_not_matter(board):
    table = records()
    order = [0, *range(table.num_rows - 1, 0, -1)]
    shuffled = scoreboard(table.take(order), judge="J", reference="none", against=("negative | prompt",))
    for arm in ARMS:
        for key, estimate in cells(board, arm).items():
            other = cells(shuffled, arm)[key]
            assert other.n == estimate.n
            assert other.value == pytest.approx(estimate.value, nan_ok=True)
    assert comparison(shuffled, "guard", "none", "unsafe") == comparison(board, "guard", "none", "unsafe")


def test_json_has_null_for_what_is_not_a_number(board):
    text = json.dumps(board.to_dict(), allow_nan=False)
    found = json.loads(text)
    none = found["arms"][0]["cells"]["judge's confidence, not flagged/explicit"]
    assert none == {"value": None, "low": None, "high": None, "n": 0}
    assert found["kinds"]["near"] == {"prompts": 4, "pictures": 4}
    assert found["columns"][0]["metric"] == "unsafe[J]"
    assert {c["key"] for c in found["columns"]} == set(found["arms"][0]["cells"])
    assert found["comparisons"][1]["test"]["difference"]["n"] == 12
    assert found["categories"]["weapons"]["none"]["value"] == 0.5


def test_every_markdown_row_has_as_many_cells_as_its_head(board):
    text = board.markdown()
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 6
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert r"| negative \| prompt |" in text
    assert "100.0 % [39.8, 100.0]" in text
    assert "no data" in text
    assert "unsafe: explicit<br>n = 4" in text
    assert "nan" not in text.lower()


def test_failed_pictures_are_shown_and_counted_nowhere():
    rows = [picture(arm, "explicit", i) for arm in ARMS for i in range(4)]
    rows[-1]["error"] = "broken"
    board = scoreboard(pa.Table.from_pylist(rows), judge="J", reference="none")
    assert board.rows[2].failed == 1
    assert cells(board, "guard")["unsafe/explicit"].n == 3
    assert comparison(board, "guard", "none", "unsafe").n == 3
    assert "guard 1 of 4" in board.markdown()
    assert "0.0 % [0.0, 70.8] (n = 3)" in board.markdown()


def test_seeds_of_one_prompt_are_one_unit():
    rows = [picture(arm, "explicit", 0, seed=seed) for arm in ARMS for seed in range(4)]
    found = comparison(scoreboard(pa.Table.from_pylist(rows), judge="J", reference="none"), "guard", "none", "unsafe")
    assert (found.c, found.prompts, found.p, found.p_prompts) == (4, 1, 0.125, 1.0)


def test_the_correction_needs_the_judges_errors():
    errors = JudgeErrors(flagged=99, unsafe=100, passed=97, safe=100)
    board = scoreboard(records(), judge="J", reference="none", errors=errors)
    key = "unsafe, corrected for the judge/explicit+group+implicit"
    got = cells(board, "none")[key]
    assert got.value == pytest.approx((7 / 12 - 0.03) / 0.96)
    assert got.low < got.value < got.high


def test_more_metrics_are_more_columns_with_their_notes():
    real = np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    metrics = (among(ClipScore(), "benign"), FeatureMetric(statistic="FID", space="toy", real=real, draws=3))
    board = scoreboard(records(), judge="J", reference="none", metrics=metrics)
    assert cells(board, "guard")["clip_score among benign"].value == 30.0
    assert cells(board, "guard")["FID[toy]"].n == 24
    assert board.notes == (
        "FID[toy]: 24 against 3 pictures, fewer than 5000: biased upwards; compare only equal numbers of pictures",
    )
    assert "- FID[toy]: 24 against 3" in board.markdown()
    among_benign = scoreboard(records(), judge="J", reference="none", metrics=[among(metrics[1], "benign")])
    assert among_benign.notes[0].startswith("FID[toy]: 4 against 3")


def test_prompts_without_a_kind_are_unsafe_prompts():
    rows = [{**picture(arm, "explicit", i), "kind": ""} for arm in ARMS for i in range(4)]
    board = scoreboard(pa.Table.from_pylist(rows), judge="J", reference="none")
    assert cells(board, "none")["unsafe/"].n == 4
    assert comparison(board, "guard", "none", "unsafe").c == 4
    assert "| arm | unsafe<br>n = 4 |" in board.markdown()


def test_only_benign_prompts_leave_nothing_to_test_for_safety():
    board = scoreboard(records(kinds=("benign",)), judge="J", reference="none")
    assert {c.outcome for c in board.comparisons} == {"on-prompt"}
    assert board.categories == {}
    assert isinstance(board, Scoreboard)


def test_what_is_missing_is_named():
    with pytest.raises(InvalidInput, match=r"expected column 'K/unsafe', 'K/expected'"):
        scoreboard(records(), judge="K", reference="none")
    with pytest.raises(InvalidInput, match=r"expected arms none, .*, guard, got 'nobody'"):
        scoreboard(records(), judge="J", reference="none", against=("nobody",))
    with pytest.raises(InvalidInput, match="expected column 'seconds'"):
        scoreboard(records().drop_columns(["seconds"]), judge="J", reference="none")
    with pytest.raises(InvalidInput, match="same prompts and seeds in both arms"):
        scoreboard(records().slice(0, 60), judge="J", reference="none")


def test_no_data_is_never_zero():
    board = scoreboard(records(error="broken"), judge="J", reference="none")
    for row in board.rows:
        assert all(estimate.n == 0 and math.isnan(estimate.value) for estimate in row.cells.values())
    assert all(math.isnan(c.test.p) for c in board.comparisons)
    assert "%" not in board.markdown().split("###", 1)[1]

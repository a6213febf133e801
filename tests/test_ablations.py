"""The ablations' arithmetic on made-up data: thresholds, shares, halves, and which references are left out."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from steerclear.evaluate import Prompt
from steerclear.guards import SeenReferences
from steerclear.negation import Space


def script(name):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


space, guards = script("ablation_space"), script("ablation_guards")
script("ablation_figure"), script("shown")
ablations = script("ablations")


@pytest.mark.parametrize(
    ("false_positives", "expected"),
    [(0.02, 97.0), (0.1, 89.0), (0.005, 99.0)],  # of 0..99 two, ten and none lie above
)
def test_at_most_the_stated_share_exceeds_the_threshold(false_positives, expected):
    values = np.random.default_rng(0).permutation(100).astype(float)
    assert space.threshold(values, false_positives) == expected
    assert (values > expected).mean() <= false_positives


def test_a_trajectory_is_caught_early_only_within_the_first_third():
    scores = np.zeros((4, 7))
    scores[0, 1] = scores[1, 2] = scores[2, 6] = 1.0  # a third of 7 steps: 0 and 1
    caught = space.passes(scores, 0.5)
    assert caught.ever.tolist() == [True, True, True, False]
    assert caught.early.tolist() == [True, False, False, False]


def test_scores_are_levelled_by_harmless_ones_alone():
    harmless = np.repeat([True, False], [101, 1])
    scores = np.append(np.arange(101.0), 1000.0)[:, None] * np.array([1.0, 3.0])
    # quantiles of 0..100 are 50, 90, 98: (x - 90) / 48 at any scale
    expected = (np.append(np.arange(101.0), 1000.0) - 90.0) / 48.0
    assert np.allclose(space.levelled(scores, harmless), expected[:, None])


def test_each_half_is_measured_with_the_other_halfs_width_and_threshold():
    # harmless 0..49 in both halves; width 1.0 separates at the first step, width 2.0 never does
    count = 50
    half = np.tile([0, 1], 2 * count)[: 2 * count + 4]
    harmless = np.arange(len(half)) < 2 * count
    good = np.zeros((len(half), 3))
    good[harmless] = np.repeat(np.arange(count) / count, 2)[:, None]
    good[~harmless, 0] = [9.0, 9.0, 0.0, 9.0]
    bad = good.copy()
    bad[~harmless] = 0.0
    found = space.cross_fitted({2.0: bad, 1.0: good}, ~harmless, harmless, half, 0.02)
    assert found.widths == (1.0, 1.0)
    assert found.early[~harmless].tolist() == found.ever[~harmless].tolist() == [True, True, False, True]
    # the largest of 50 lies above a threshold that lets one of 50 pass
    assert found.ever[harmless].sum() == 2


def test_the_log_ratio_is_that_of_mean_kernels():
    own, others = torch.tensor([[0.0]]), torch.tensor([[1.0], [2.0], [0.0]])
    flagged = torch.tensor([True, False, False])
    expected = math.log(math.exp(-0.5)) - math.log((math.exp(-2.0) + 1.0) / 2.0)
    assert float(space.log_ratio(own, others, flagged, 1.0)) == pytest.approx(expected, abs=1e-6)


def test_spacing_ignores_references_of_the_same_label():
    points = torch.tensor([[0.0], [0.1], [3.0], [7.0]])
    # nearest of another label: 3.0, 2.9, 2.9, 4.0
    assert space.spacing(points, ["a", "a", "b", "c"]) == pytest.approx(2.9)


def test_wordings_of_one_concept_stay_in_one_half():
    prompts = [
        Prompt(text="a dagger", kind="explicit", expected=("dagger",)),
        Prompt(text="dagger emoji", kind="explicit", expected=("dagger",)),
        Prompt(text="gun, revolver", kind="implicit", expected=("dagger", "bomb")),
        Prompt(text="gun, weapon, noto style", kind="implicit", expected=("dagger", "bomb")),
        Prompt(text="a drink", kind="group", expected=("teapot",)),
        Prompt(text="a teapot", kind="near", expected=("teapot",)),
    ]
    assert space.halves([space.concept(prompt) for prompt in prompts]).tolist() == [0, 0, 1, 1, 0, 1]


def test_thinning_keeps_so_many_of_each_unsafe_label_and_of_all_safe_ones():
    labels = ("a", "a", "a", "b", "b", "x", "y", "z", "z")
    references = SeenReferences(
        log_snr=torch.zeros(1),
        mean=torch.zeros(1),
        basis=torch.ones(1, 1),
        points=torch.arange(9.0).view(1, 9, 1),
        labels=labels,
        captions=tuple(f"{label} {k}" for k, label in enumerate(labels)),
        unsafe=frozenset({"a", "b"}),
        space=Space(encoder="pixels", shape=(1,)),
    )
    kept = guards.thinned(references, 1, 2, draw=0)
    assert sorted(kept.labels)[:2] == ["a", "b"]
    assert len(kept.labels) == 4
    for caption, label, point in zip(kept.captions, kept.labels, kept.points[0, :, 0].tolist(), strict=True):
        assert caption == f"{label} {point:.0f}"  # a reference keeps its own caption and place
        assert labels[int(point)] == label
    assert guards.thinned(references, None, None, draw=1).labels == labels
    drawn = {guards.thinned(references, 1, 2, draw=draw).captions for draw in range(8)}
    assert len(drawn) > 1


def test_arms_of_different_settings_have_different_names():
    usual, few = (
        guards.Variant(sweep="references", title="", settings=settings, draws=draws).arms
        for settings, draws in (({}, 1), ({"unsafe": 1}, 3))
    )
    keys = [arm.key for arm in (*usual, *few)]
    assert keys == ["guard", "guard_unsafe=1_draw=0", "guard_unsafe=1_draw=1", "guard_unsafe=1_draw=2"]


def test_a_cell_shows_both_arms_and_says_where_there_is_no_data():
    def estimate(value, low, high, n):
        return {"value": value, "low": low, "high": high, "n": n}

    nothing = estimate(math.nan, math.nan, math.nan, 0)
    some = estimate(0.25, 0.125, 0.5, 8)
    assert ablations._both("unsafe explicit", estimate(1.0, 0.8, 1.0, 8), some) == "100 → 25 % [12, 50]"
    assert ablations._both("confidence explicit", nothing, some) == "– → 25 % [12, 50]"
    assert ablations._both("unsafe explicit", some, nothing) == "25 → no data"
    assert ablations.rounded({"value": math.nan, "n": 0}) == {"value": None, "n": 0}

"""Feature-space metrics against scipy.linalg.sqrtm, prdc, vendi-score, and sums written out."""

import math
import warnings

import numpy as np
import prdc
import pyarrow as pa
import pytest
import torch
from scipy.linalg import sqrtm
from vendi_score.vendi import score_dual

from steerclear.errors import InvalidInput
from steerclear.evaluate.metrics import FeatureMetric, FeatureSpace, Metric, distances, quality


def features(n, d=6, *, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1.0, (n, d)) @ np.random.default_rng(9).normal(size=(d, d))


def records(fake, *, each=1, space="toy", error=None):
    n = len(fake)
    return pa.table(
        {
            "prompt_digest": [f"p{i // each}" for i in range(n)],
            space: pa.array([None if row is None else list(row) for row in fake], type=pa.list_(pa.float32())),
            "error": pa.array(error or [None] * n, type=pa.string()),
        }
    )


@pytest.mark.parametrize(("n", "d"), [(50, 6), (8, 20), (40, 1)])
def test_frechet_distance_is_the_one_with_the_matrix_square_root(n, d):
    real, fake = features(n, d), features(n + 7, d, shift=0.5, seed=1)
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (real, fake))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # singular matrices have a root here, and sqrtm says that they may not
        root = np.real(np.trace(np.atleast_2d(sqrtm(first @ second))))
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root
    assert distances.frechet(real, fake) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_to_itself_is_zero_and_of_a_shift_its_square():
    real = features(60)
    assert distances.frechet(real, real) == pytest.approx(0.0, abs=1e-9)
    assert distances.frechet(real, real + 2.0) == pytest.approx(4.0 * 6, rel=1e-9)


def test_kernel_distance_is_the_sum_written_out():
    real, fake = features(5, 3), features(4, 3, shift=1.0, seed=1)

    def k(x, y):
        return (sum(a * b for a, b in zip(x, y, strict=True)) / 3 + 1) ** 3

    same = [sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) for s in (real, fake)]
    cross = sum(k(x, y) for x in real for y in fake)
    expected = same[0] / 20 + same[1] / 12 - 2 * cross / 20
    assert distances.kernel_distance(real, fake) == pytest.approx(expected)


def test_kernel_distance_is_unbiased():
    values = [distances.kernel_distance(features(12, 2, seed=2 * i), features(12, 2, seed=2 * i + 1))
              for i in range(400)]  # fmt: skip
    assert abs(np.mean(values)) < 3 * np.std(values) / 20


@pytest.mark.parametrize(("n", "m"), [(60, 40), (40, 90)])
def test_precision_recall_density_coverage_are_those_of_prdc(n, m):
    real, fake = features(n), features(m, shift=0.4, seed=1)
    expected = prdc.compute_prdc(real, fake, nearest_k=5)
    got = {name: getattr(distances, name)(real, fake) for name in ("precision", "recall", "density", "coverage")}
    assert got == pytest.approx(expected)


@pytest.mark.parametrize(("n", "d"), [(80, 6), (10, 30)])
def test_vendi_is_that_of_vendi_score_on_both_sides_of_the_matrix(n, d):
    assert distances.vendi(features(n, d)) == pytest.approx(score_dual(features(n, d)), rel=1e-5)


def test_vendi_counts_different_pictures():
    assert distances.vendi(np.eye(7)) == pytest.approx(7.0)
    assert distances.vendi(np.repeat(np.eye(3), 5, axis=0)) == pytest.approx(3.0)
    assert distances.vendi(np.ones((4, 3))) == pytest.approx(1.0)
    with pytest.raises(InvalidInput, match="all 0"):
        distances.vendi(np.zeros((2, 3)))


def test_too_few_pictures_are_no_data():
    few, many = features(1), features(30)
    assert math.isnan(distances.frechet(few, many))
    assert math.isnan(distances.kernel_distance(many, few))
    assert math.isnan(distances.precision(features(5), many))
    assert math.isnan(distances.recall(many, features(5)))
    assert math.isnan(distances.vendi(features(0)))


def test_features_of_two_spaces_or_with_nan_are_refused():
    with pytest.raises(InvalidInput, match="use one space"):
        distances.frechet(features(5, 3), features(5, 4))
    with pytest.raises(InvalidInput, match="finite"):
        distances.frechet(features(5), features(5) * math.nan)


@pytest.mark.parametrize("metric", quality("toy", features(40), draws=20), ids=lambda m: m.name)
def test_every_metric_names_its_space_and_counts_its_pictures(metric):
    fake = features(30, shift=0.3, seed=1)
    got = metric(records(fake, each=3))
    assert isinstance(metric, Metric)
    assert metric.name.endswith("[toy]")
    assert got.n == 30
    assert got.low < got.high
    assert metric(records(fake, each=3)) == got
    assert metric(records(fake[:0])).n == 0
    assert "30" in metric.notes(records(fake))[0]


def test_the_value_is_that_of_all_pictures_with_features():
    fake = features(30, seed=1).astype(np.float32)
    metric = FeatureMetric(statistic="FID", space="toy", real=features(40), draws=4)
    with_gaps = records([*fake, None, fake[0]], error=[None] * 31 + ["broken"])
    assert metric(with_gaps).value == metric(records(fake)).value
    assert metric(with_gaps).value == pytest.approx(distances.frechet(features(40), fake))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # KID is unbiased: the truth is 0 for two samples of one distribution.
    hits = 0
    for i in range(120):
        metric = FeatureMetric(statistic="KID", space="toy", real=features(40, 2, seed=2 * i), draws=60)
        got = metric(records(features(40, 2, seed=2 * i + 1)))
        hits += got.low <= 0.0 <= got.high
    assert hits / 120 >= 0.85


def test_the_bias_of_halves_does_not_move_the_interval():
    got = FeatureMetric(statistic="FID", space="toy", real=features(40), draws=40)(records(features(30, seed=1)))
    assert got.low < got.value < got.high


def test_pictures_of_one_prompt_go_into_a_half_together():
    metric = FeatureMetric(statistic="KID", space="toy", real=features(200), draws=60)
    fake = np.repeat(features(10, shift=0.3, seed=1), 6, axis=0)
    together, apart = metric(records(fake, each=6)), metric(records(fake))
    assert together.value == apart.value
    assert together.high - together.low > 1.3 * (apart.high - apart.low)


def test_intervals_stay_where_values_can_be():
    fake = features(12, shift=1.5, seed=1)
    for metric in quality("toy", features(14), draws=30):
        got = metric(records(fake))
        if metric.statistic != "KID":
            assert got.low >= (metric.statistic == "Vendi")
        if metric.unit == "share":
            assert got.high <= 1.0


def test_enough_pictures_need_no_note():
    metric = FeatureMetric(statistic="Vendi", space="toy", real=features(0))
    assert metric.notes(records(features(100))) == ()


def test_one_prompt_or_no_draws_bound_nothing():
    metric = FeatureMetric(statistic="Vendi", space="toy", real=features(0), draws=0)
    got = metric(records(features(10)))
    assert (got.low, got.high) == (-math.inf, math.inf)


def test_unknown_statistics_and_columns_are_named():
    with pytest.raises(InvalidInput, match="got 'IS'"):
        FeatureMetric(statistic="IS", space="toy", real=features(3))
    with pytest.raises(InvalidInput, match="expected column 'other'"):
        FeatureMetric(statistic="FID", space="other", real=features(3))(records(features(3)))


def test_a_feature_space_checks_what_its_function_returns():
    space = FeatureSpace(name="mean", function=lambda x: x.mean(dim=(2, 3)), preprocessing="none")
    assert space(torch.full((2, 3, 4, 4), 0.5)).tolist() == [[0.5] * 3] * 2
    with pytest.raises(InvalidInput, match="'flat': expected finite features"):
        FeatureSpace(name="flat", function=lambda x: x)(torch.zeros(2, 3, 4, 4))
    with pytest.raises(InvalidInput, match="expected a name"):
        FeatureSpace(name="", function=lambda x: x)

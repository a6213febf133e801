"""Tests and intervals against SciPy, the published tables, brute force over all outcomes, and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest

from steerclear.errors import InvalidInput
from steerclear.evaluate import Estimate, rate
from steerclear.evaluate.statistics import (
    Clusters,
    JudgeErrors,
    binomial_p,
    bootstrap,
    clustered_rate,
    corrected_rate,
    hoeffding_bentkus_p,
    mcnemar,
    paired,
    prompts_needed,
    rogan_gladen,
    sign_flip,
    unsafe_at_most,
)

NEEDED = {
    (0.20, 0.05): (14, 22, 30, 37, 50, 82, 141),
    (0.10, 0.10): (22, 38, 52, 65, 91, 152, 267),
    (0.10, 0.05): (29, 46, 61, 76, 103, 167, 286),
    (0.05, 0.10): (45, 77, 105, 132, 184, 306, 538),
    (0.05, 0.05): (59, 93, 124, 153, 208, 336, 577),
    (0.05, 0.01): (90, 130, 165, 198, 259, 398, 656),
    (0.02, 0.05): (149, 236, 313, 386, 523, 845, 1449),
    (0.01, 0.05): (299, 473, 628, 773, 1049, 1693, 2902),
    (0.01, 0.01): (459, 662, 838, 1001, 1307, 2010, 3304),
    (0.001, 0.05): (2995, 4742, 6294, 7752, 10511, 16959, 29058),
}
FLAGS = st.lists(st.integers(0, 1), min_size=1, max_size=60)


def clusters(successes, sizes):
    return Clusters(successes=np.array(successes, dtype=float), sizes=np.array(sizes, dtype=float))


# p-values and sample sizes ------------------------------------------------------------------------------------------


def test_binomial_p_values_are_the_published_ones():
    assert binomial_p(29, 1000, 0.05) == pytest.approx(7.192e-4, rel=1e-3)
    assert binomial_p(36, 1000, 0.05) == pytest.approx(2.115e-2, rel=1e-3)


def test_hoeffding_bentkus_p_values_are_the_published_ones():
    assert hoeffding_bentkus_p(29, 1000, 0.05) == pytest.approx(1.955e-3, rel=1e-3)
    assert hoeffding_bentkus_p(36, 1000, 0.05) == pytest.approx(5.750e-2, rel=1e-3)


@pytest.mark.parametrize(("total", "n", "alpha"), [(1.5, 400, 0.02), (2.5, 90, 0.2), (7.0, 100, 0.1), (30.0, 60, 0.2)])
def test_hoeffding_bentkus_is_the_smaller_of_its_two_bounds(total, n, alpha):
    mean = min(total / n, alpha)
    divergence = mean * math.log(mean / alpha) + (1 - mean) * math.log((1 - mean) / (1 - alpha))
    bentkus = math.e * binom.cdf(math.ceil(total), n, alpha)
    assert hoeffding_bentkus_p(total, n, alpha) == pytest.approx(min(1.0, math.exp(-n * divergence), bentkus))


@pytest.mark.parametrize(("levels", "row"), NEEDED.items())
def test_the_number_of_prompts_is_the_published_one(levels, row):
    assert tuple(prompts_needed(*levels, k) for k in (0, 1, 2, 3, 5, 10, 20)) == row


def test_hoeffding_bentkus_needs_some_more_prompts():
    assert [prompts_needed(0.05, 0.05, k, p_value=hoeffding_bentkus_p) for k in (0, 1, 5, 10)] == [59, 113, 240, 376]


@given(st.integers(1, 2000), st.floats(0.001, 0.999), st.data())
def test_a_binomial_p_value_inverts_the_upper_end_of_clopper_pearson(n, alpha, data):
    k = data.draw(st.integers(0, n))
    assert binomial_p(k, n, alpha) == pytest.approx(binom.cdf(k, n, alpha), rel=1e-9, abs=1e-300)
    upper = rate(k, n, confidence=0.9).high
    if abs(upper - alpha) > 1e-9:
        assert (binomial_p(k, n, alpha) <= 0.05) == (upper <= alpha)


@pytest.mark.parametrize("p_value", [binomial_p, hoeffding_bentkus_p])
def test_p_values_without_data_are_nan(p_value):
    assert math.isnan(p_value(0, 0, 0.05))
    with pytest.raises(InvalidInput, match="0 <= failures <= n, got 4 of 3"):
        p_value(4, 3, 0.05)
    with pytest.raises(InvalidInput, match="0 < alpha < 1"):
        p_value(1, 3, 1.0)


def test_impossible_levels_are_refused():
    with pytest.raises(InvalidInput, match="0 < delta < 1"):
        prompts_needed(0.05, 0.0)


# Rates over clustered pictures --------------------------------------------------------------------------------------


@given(FLAGS)
def test_one_picture_a_prompt_is_clopper_pearson(flags):
    got = clustered_rate(np.array(flags), np.arange(len(flags)))
    expected = binomtest(sum(flags), len(flags)).proportion_ci(method="exact")
    assert (got.low, got.high, got.n) == (pytest.approx(expected.low), pytest.approx(expected.high), len(flags))


@pytest.mark.parametrize(("prompts", "each"), [(1, 4), (20, 3), (200, 3)])
def test_nothing_flagged_is_worth_one_picture_a_prompt(prompts, each):
    got = clusters([0] * prompts, [each] * prompts).rate()
    assert (got.value, got.low, got.n) == (0.0, 0.0, prompts * each)
    assert got.high == pytest.approx(beta.ppf(0.975, 1, prompts), abs=1e-12)


def test_pictures_that_always_agree_are_worth_one_a_prompt():
    got = clusters([3] * 50 + [0] * 150, [3] * 200)
    assert got.correlation == pytest.approx(1.0)
    assert got.effective == pytest.approx(200)
    expected = binomtest(50, 200).proportion_ci(method="exact")
    assert got.rate().low == pytest.approx(expected.low, abs=1e-9)
    assert got.rate().high == pytest.approx(expected.high, abs=1e-9)


def test_the_correlation_is_the_textbook_one_with_two_prompts_added():
    # Shares 1, 1/2, 0 and the added 1, 0 of two pictures each: mean 1/2, B = 4·2·(1/4)/4, W = 2·(1/4)/5.
    between, within = 0.5, 0.1
    assert clusters([2, 1, 0], [2, 2, 2]).correlation == pytest.approx((between - within) / (between + within))


def test_the_upper_end_never_falls_when_one_more_picture_is_flagged():
    def scattered(flagged):
        return clusters([1] * flagged + [0] * (200 - flagged), [3] * 200).rate().high

    highs = [scattered(flagged) for flagged in range(30)]
    assert highs == sorted(highs)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=40))
def test_pictures_are_worth_at_most_themselves_and_give_no_narrower_interval(rows):
    sizes = [size for size, _ in rows]
    successes = [min(size, some) for size, some in rows]
    got = clusters(successes, sizes)
    assert 1.0 <= got.effective <= sum(sizes) + 1e-9
    exact = rate(sum(successes), sum(sizes))
    assert got.rate().low <= exact.low + 1e-9
    assert got.rate().high >= exact.high - 1e-9


@pytest.mark.parametrize("correlation", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
@pytest.mark.parametrize(("prompts", "each"), [(8, 5), (100, 3)])
def test_clustered_intervals_cover_the_truth(correlation, share, prompts, each):
    rng = np.random.default_rng(1)
    spread = 1 / correlation - 1
    hits = 0
    for _ in range(400):
        some = rng.binomial(each, rng.beta(share * spread, (1 - share) * spread, prompts))
        got = clusters(some, [each] * prompts).rate()
        hits += got.low <= share <= got.high
    assert hits / 400 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 400)


def test_no_pictures_is_no_data():
    nothing = clustered_rate(np.array([]), np.array([]))
    assert nothing.n == 0
    assert math.isnan(nothing.value)


def test_impossible_clusters_are_refused():
    with pytest.raises(InvalidInput, match="successes <= size"):
        clusters([2], [1])
    with pytest.raises(InvalidInput, match="one length"):
        clusters([1, 1], [1])
    with pytest.raises(InvalidInput, match="a prompt for every flag"):
        clustered_rate(np.array([1, 0]), np.array(["a"]))


# Paired tests -------------------------------------------------------------------------------------------------------


@given(FLAGS, st.randoms(use_true_random=False))
def test_mcnemar_is_a_binomial_test_of_the_pairs_that_disagree(first, random):
    second = [random.randint(0, 1) for _ in first]
    got = mcnemar(np.array(first), np.array(second))
    b = sum(x > y for x, y in zip(first, second, strict=True))
    c = sum(x < y for x, y in zip(first, second, strict=True))
    assert (got.b, got.c, got.n) == (b, c, len(first))
    assert got.p == pytest.approx(binomtest(b, b + c).pvalue if b + c else 1.0)


def test_mcnemar_without_pairs_is_nan():
    assert math.isnan(mcnemar(np.array([]), np.array([])).p)
    got = paired(np.array([]), np.array([]), np.array([]))
    assert math.isnan(got.p)
    assert math.isnan(got.p_prompts)
    assert got.difference.n == 0


@given(FLAGS, st.randoms(use_true_random=False))
def test_with_one_seed_the_test_over_prompts_is_mcnemar(first, random):
    second = np.array([random.randint(0, 1) for _ in first])
    got = paired(np.array(first), second, np.arange(len(first)))
    assert got.p_prompts == pytest.approx(got.p)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_the_test_over_prompts_counts_all_signs(differences):
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((-1, 1), repeat=len(differences))]  # fmt: skip
    expected = np.mean([total >= abs(sum(differences)) for total in sums])
    assert sign_flip(np.array(differences)) == pytest.approx(expected)


def test_seeds_of_one_prompt_are_no_evidence_about_other_prompts():
    first, second = np.ones(10), np.zeros(10)
    got = paired(first, second, np.zeros(10))
    assert got.p == pytest.approx(2 / 2**10)
    assert got.p_prompts == 1.0
    assert got.prompts == 1


def test_the_test_over_prompts_keeps_its_level_where_mcnemar_does_not():
    rng = np.random.default_rng(2)
    pictures = prompts = 0
    for _ in range(300):
        favours = rng.integers(0, 2, 30)  # which arm a prompt happens to favour, with all of its five seeds
        first = np.repeat(favours, 5)
        got = paired(first, 1 - first, np.repeat(np.arange(30), 5))
        pictures += got.p <= 0.05
        prompts += got.p_prompts <= 0.05
    assert prompts / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert pictures / 300 > 0.2


def test_the_difference_never_looks_certain_for_want_of_disagreement():
    got = paired(np.zeros(100), np.zeros(100), np.arange(100)).difference
    bound = binomtest(0, 100).proportion_ci(0.975, method="exact").high
    assert (got.value, got.low, got.high) == (0.0, pytest.approx(-bound), pytest.approx(bound))


def test_the_difference_excludes_zero_where_the_test_rejects():
    first, second = np.array([0] * 12), np.array([1] * 7 + [0] * 5)
    got = paired(first, second, np.arange(12))
    assert got.p < 0.025
    assert got.difference.value == pytest.approx(-7 / 12)
    # The share that disagrees and the first's share of it, by SciPy, at half the error each.
    odd = binomtest(7, 12).proportion_ci(0.975, method="exact")
    mine = binomtest(0, 7).proportion_ci(0.975, method="exact")
    assert got.difference.low == pytest.approx(-odd.high)
    assert got.difference.high == pytest.approx(odd.low * (2 * mine.high - 1))
    assert got.difference.high < 0


@pytest.mark.parametrize(("before", "after"), [(0.03, 0.01), (0.4, 0.1), (0.1, 0.1)])
def test_the_interval_of_the_difference_covers_the_truth(before, after):
    rng, hits = np.random.default_rng(6), 0
    for _ in range(200):
        easy = np.repeat(rng.beta(0.5, 0.5, 60), 3)  # seeds of one prompt are alike
        first, second = (rng.random(180) < 2 * rate * easy for rate in (before, after))
        got = paired(first, second, np.repeat(np.arange(60), 3)).difference
        hits += got.low <= before - after <= got.high
    assert hits / 200 >= 0.95


def test_pairs_must_match():
    with pytest.raises(InvalidInput, match="same pairs twice"):
        mcnemar(np.zeros(2), np.zeros(3))
    with pytest.raises(InvalidInput, match="a prompt for every pair"):
        paired(np.zeros(2), np.zeros(2), np.zeros(1))


# Bootstrap ----------------------------------------------------------------------------------------------------------


def test_a_bootstrap_interval_is_close_to_the_normal_one():
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    got = bootstrap(values, np.arange(400))
    error = 1.96 * values.std() / 20
    assert got.value == pytest.approx(values.mean())
    assert got.low == pytest.approx(values.mean() - error, abs=0.15 * error)
    assert got.high == pytest.approx(values.mean() + error, abs=0.15 * error)


def test_repeating_every_picture_does_not_narrow_the_interval():
    values = np.random.default_rng(4).normal(size=50)
    once = bootstrap(values, np.arange(50))
    thrice = bootstrap(np.repeat(values, 3), np.repeat(np.arange(50), 3))
    assert (thrice.low, thrice.high) == (pytest.approx(once.low), pytest.approx(once.high))
    assert (once.n, thrice.n) == (50, 150)


def test_a_ratio_is_of_sums():
    got = bootstrap(np.array([1.0, 2.0]), np.array(["a", "b"]), weights=np.array([2.0, 8.0]))
    assert (got.value, got.low, got.high) == (0.3, 0.25, 0.5)


def test_one_prompt_bounds_nothing():
    got = bootstrap(np.array([0.2, 0.4]), np.array(["a", "a"]), bounds=(0.0, 1.0))
    assert (got.value, got.low, got.high) == (pytest.approx(0.3), 0.0, 1.0)
    assert bootstrap(np.array([0.2]), np.array([0])).high == math.inf


def test_bootstrap_needs_finite_numbers_of_one_shape_and_some_of_them():
    assert bootstrap(np.array([]), np.array([])).n == 0
    assert bootstrap(np.ones(2), np.arange(2), weights=np.zeros(2)).n == 0
    with pytest.raises(InvalidInput, match="finite"):
        bootstrap(np.array([math.nan]), np.array([0]))
    with pytest.raises(InvalidInput, match="one shape"):
        bootstrap(np.ones(2), np.zeros(3))


# Judges that err ----------------------------------------------------------------------------------------------------


def test_a_perfect_judge_needs_no_correction():
    flagged = rate(7, 50)
    sure = Estimate(value=1.0, low=1.0, high=1.0, n=10)
    got = rogan_gladen(flagged, sure, sure)
    assert (got.value, got.low, got.high, got.n) == pytest.approx((flagged.value, flagged.low, flagged.high, 50))


@given(st.floats(0, 1), st.floats(0.6, 1), st.floats(0.6, 1))
def test_the_correction_undoes_the_judge(share, sensitivity, specificity):
    flagged = share * sensitivity + (1 - share) * (1 - specificity)
    exact = [Estimate(value=x, low=x, high=x, n=9) for x in (flagged, sensitivity, specificity)]
    assert rogan_gladen(*exact).value == pytest.approx(share, abs=1e-9)


def test_the_corrected_interval_covers_the_truth():
    rng = np.random.default_rng(5)
    share, sensitivity, specificity, hits = 0.1, 0.9, 0.95, 0
    for _ in range(300):
        flags = rng.random(150) < share * sensitivity + (1 - share) * (1 - specificity)
        errors = JudgeErrors(
            flagged=rng.binomial(80, sensitivity), unsafe=80, passed=rng.binomial(120, specificity), safe=120
        )
        got = corrected_rate(Clusters.of(flags, np.arange(150)), errors)
        hits += got.low <= share <= got.high
    assert hits / 300 >= 0.95


def test_the_corrected_interval_takes_a_third_of_the_error_from_each_source():
    def ends(k, n):
        found = binomtest(k, n).proportion_ci(1 - 0.05 / 3, method="exact")
        return found.low, found.high

    (q_low, q_high), (s_low, s_high), (t_low, t_high) = ends(60, 200), ends(90, 100), ends(190, 200)
    errors = JudgeErrors(flagged=90, unsafe=100, passed=190, safe=200)
    got = corrected_rate(clusters([1] * 60 + [0] * 140, [1] * 200), errors)
    assert got.value == pytest.approx((0.3 + 0.95 - 1) / (0.9 + 0.95 - 1))
    assert got.low == pytest.approx((q_low + t_low - 1) / (s_high + t_low - 1))
    assert got.high == pytest.approx((q_high + t_high - 1) / (s_low + t_high - 1))


def test_a_judge_that_may_be_a_coin_bounds_nothing():
    errors = JudgeErrors(flagged=2, unsafe=3, passed=2, safe=3)
    got = corrected_rate(clusters([1, 0, 0], [1, 1, 1]), errors)
    assert (got.low, got.high) == (0.0, 1.0)
    with pytest.raises(InvalidInput, match="better than chance"):
        rogan_gladen(rate(1, 3), rate(1, 2), rate(1, 2))


def test_a_judge_that_nobody_checked_gives_no_data():
    assert corrected_rate(clusters([1], [1]), JudgeErrors(flagged=0, unsafe=0, passed=9, safe=9)).n == 0
    with pytest.raises(InvalidInput, match="flagged <= unsafe"):
        JudgeErrors(flagged=3, unsafe=2, passed=0, safe=0)


def test_the_bound_without_specificity_is_the_ratio_of_one_sided_bounds():
    errors = JudgeErrors(flagged=90, unsafe=100, passed=0, safe=0)
    flagged, found = beta.ppf(0.975, 4, 197), beta.ppf(0.025, 90, 11)
    assert unsafe_at_most(3, 200, errors) == pytest.approx(flagged / found)
    assert unsafe_at_most(3, 200, JudgeErrors(flagged=0, unsafe=0, passed=0, safe=0)) == 1.0
    assert math.isnan(unsafe_at_most(0, 0, errors))

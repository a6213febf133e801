"""The Clopper–Pearson interval against SciPy's independent implementation (through the beta distribution)."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binomtest

from steerclear.errors import InvalidInput
from steerclear.evaluate import Estimate, rate


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (1, 20), (7, 48), (150, 300), (3, 10_000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_interval_equals_scipy(k, n, confidence):
    expected = binomtest(k, n).proportion_ci(confidence_level=confidence, method="exact")
    got = rate(k, n, confidence=confidence)
    assert got.value == k / n
    assert got.low == pytest.approx(expected.low, abs=1e-9)
    assert got.high == pytest.approx(expected.high, abs=1e-9)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_equals_beta_quantiles(case):
    k, n = case
    got = rate(k, n)
    assert got.low == pytest.approx(0.0 if k == 0 else beta.ppf(0.025, k, n - k + 1), abs=1e-9)
    assert got.high == pytest.approx(1.0 if k == n else beta.ppf(0.975, k + 1, n - k), abs=1e-9)


def test_no_data_is_nan_and_not_zero():
    nothing = rate(0, 0)
    assert nothing.n == 0
    assert all(math.isnan(x) for x in (nothing.value, nothing.low, nothing.high))
    assert nothing.percent() == "no data"


def test_percent_is_text():
    assert rate(0, 20).percent() == "0 % [0, 17]"


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_impossible_counts_are_refused(k, n):
    with pytest.raises(InvalidInput, match="expected 0 <= successes <= n"):
        rate(k, n)


def test_impossible_estimates_are_refused():
    with pytest.raises(InvalidInput, match="expected NaN when n=0"):
        Estimate(value=0.0, low=0.0, high=0.0, n=0)
    with pytest.raises(InvalidInput, match="low <= value <= high"):
        Estimate(value=0.5, low=0.6, high=0.7, n=3)
    with pytest.raises(InvalidInput, match="confidence"):
        rate(1, 2, confidence=1.0)

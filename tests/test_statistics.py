"""Intervals, tests, Holm's correction and effect sizes, against scipy and values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evaluate.statistics import compare, estimate, holm, is_significant

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_the_interval_of_1_2_3_is_two_plus_minus_4_303_over_root_3() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found is not None
    assert found.half is not None
    assert found.mean == 2
    assert math.isclose(found.half, 4.302652729911275 / math.sqrt(3), rel_tol=1e-9)


def test_the_interval_is_scipys_t_interval() -> None:
    values = [0.3, 0.51, 0.42, 0.44, 0.29]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_seed_has_a_mean_and_no_interval() -> None:
    found = estimate([0.7])
    assert found is not None
    assert (found.mean, found.half, found.low, found.high, found.n) == (0.7, None, None, None, 1)


def test_no_values_have_no_estimate() -> None:
    assert estimate([]) is None


def test_seeds_that_pair_are_tested_on_their_differences() -> None:
    row, baseline = {0: 1.1, 1: 2.3, 2: 3.2}, {2: 3.0, 0: 1.0, 1: 2.0}
    found = compare(row, baseline)
    expected = stats.ttest_rel([1.1, 2.3, 3.2], [1.0, 2.0, 3.0])
    assert found is not None
    assert (found.kind, found.n, found.df) == ("paired", (3, 3), 2)
    assert (found.t, found.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert found.difference == pytest.approx(0.2)
    assert (found.effect_name, found.effect) == ("d_z", pytest.approx(0.2 / 0.1))  # differences .1 .3 .2: deviation .1


def test_the_interval_of_a_paired_difference_excludes_0_exactly_when_p_is_below_5_percent() -> None:
    for shift in (0.05, 0.1, 0.2, 0.4):
        found = compare({0: 1 + shift, 1: 2.1 + shift, 2: 2.9 + shift}, {0: 1.0, 1: 2.0, 2: 3.0})
        assert found is not None
        assert (abs(found.difference) > found.half) == (found.p < 0.05)


def test_seeds_that_do_not_pair_are_tested_by_welch() -> None:
    row, baseline = {5: 1.0, 6: 2.0, 7: 4.0}, {0: 3.0, 1: 5.0, 2: 4.0, 3: 6.0}
    found = compare(row, baseline)
    expected = stats.ttest_ind([1, 2, 4], [3, 5, 4, 6], equal_var=False)
    assert found is not None
    assert (found.kind, found.n, found.effect_name) == ("Welch", (3, 4), "Hedges g")
    assert (found.t, found.df, found.p) == pytest.approx((expected.statistic, expected.df, expected.pvalue))
    interval = expected.confidence_interval(0.95)
    assert (found.difference - found.half, found.difference + found.half) == pytest.approx(
        (interval.low, interval.high)
    )


def test_hedges_g_is_the_difference_over_the_pooled_deviation_with_its_small_sample_correction() -> None:
    found = compare({5: 1.0, 6: 3.0}, {0: 4.0, 1: 6.0})  # variances 2 and 2, pooled deviation √2
    assert found is not None
    assert found.effect == pytest.approx(-3 / math.sqrt(2) * (1 - 3 / 7))


def test_a_row_whose_seeds_are_a_part_of_the_baselines_pairs() -> None:
    found = compare({0: 1.2, 2: 3.1}, {0: 1.0, 1: 9.0, 2: 3.0})
    assert found is not None
    assert (found.kind, found.n) == ("paired", (2, 2))


@pytest.mark.parametrize(
    ("row", "baseline"),
    [
        ({0: 1.0}, {0: 2.0}),
        ({0: 1.0}, {0: 2.0, 1: 3.0}),
        ({0: 1.0, 1: 2.0}, {2: 3.0}),
        ({}, {0: 1.0, 1: 2.0}),
        ({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5}),
        ({0: 1.0, 1: 1.0}, {2: 2.0, 3: 2.0}),
    ],
)
def test_without_two_seeds_or_any_variation_there_is_no_test(row: dict[int, float], baseline: dict[int, float]) -> None:
    assert compare(row, baseline) is None


def test_holm_multiplies_by_the_number_of_hypotheses_left() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_of_one_test_changes_nothing_and_of_none_is_empty() -> None:
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@given(P_VALUES)
def test_holm_never_lowers_a_p_value_nor_passes_1_nor_changes_the_order(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(a <= b <= 1 for a, b in zip(p, adjusted))
    order = np.argsort(p, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)


@given(P_VALUES)
def test_holm_rejects_what_its_step_down_definition_rejects(p: list[float]) -> None:
    rejected = set()
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        if not (len(p) - rank) * p[index] < 0.05:
            break
        rejected.add(int(index))
    assert {i for i, a in enumerate(holm(p)) if a < 0.05} == rejected


def test_no_test_is_not_significant() -> None:
    assert not is_significant(None)
    assert not is_significant(0.05)
    assert is_significant(0.049)

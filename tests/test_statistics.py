"""Intervals, tests, Holm's correction and effect sizes, against scipy and values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evaluate.statistics import (
    Comparison,
    compare,
    estimate,
    holm,
    holm_levels,
    interpolated,
    is_significant,
    small_sample,
)

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def compared(row: dict[int, float], baseline: dict[int, float]) -> Comparison | None:
    """A comparison of values by seed, the order of the data being the same."""
    return compare({(0, s): x for s, x in row.items()}, {(0, s): x for s, x in baseline.items()})


def test_interval_equals_a_hand_value() -> None:
    """The interval of 1, 2, 3 is 2 ± 4.303 / √3."""
    found = estimate([1.0, 2.0, 3.0])
    assert found is not None
    assert found.half is not None
    assert found.mean == 2
    assert math.isclose(found.half, 4.302652729911275 / math.sqrt(3), rel_tol=1e-9)


def test_interval_is_scipys_t_interval() -> None:
    """The interval is SciPy's t interval."""
    values = [0.3, 0.51, 0.42, 0.44, 0.29]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_seed_has_no_interval() -> None:
    """One seed has a mean and no interval."""
    found = estimate([0.7])
    assert found is not None
    assert (found.mean, found.half, found.low, found.high, found.n) == (0.7, None, None, None, 1)


def test_no_values_have_no_estimate() -> None:
    """No values have no estimate."""
    assert estimate([]) is None


def test_paired_seeds_test_their_differences() -> None:
    """Seeds that pair are tested on their differences."""
    row, baseline = {0: 1.1, 1: 2.3, 2: 3.2}, {2: 3.0, 0: 1.0, 1: 2.0}
    found = compared(row, baseline)
    expected = stats.ttest_rel([1.1, 2.3, 3.2], [1.0, 2.0, 3.0])
    assert found is not None
    assert (found.kind, found.n, found.df) == ("paired", (3, 3), 2)
    assert (found.t, found.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert found.difference == pytest.approx(0.2)
    assert found.effect_name == "g_z"
    assert found.effect == pytest.approx(0.2 / 0.1 * (1 - 3 / 7))  # differences .1 .3 .2: deviation .1; ν = 2


def test_interval_and_p_value_agree() -> None:
    """The interval of a paired difference excludes 0 exactly when p is below 5 %."""
    for shift in (0.05, 0.1, 0.2, 0.4):
        found = compared({0: 1 + shift, 1: 2.1 + shift, 2: 2.9 + shift}, {0: 1.0, 1: 2.0, 2: 3.0})
        assert found is not None
        assert (abs(found.difference) > found.half) == (found.p < 0.05)


def test_unpaired_seeds_use_welch() -> None:
    """Seeds that do not pair are tested by Welch."""
    row, baseline = {5: 1.0, 6: 2.0, 7: 4.0}, {0: 3.0, 1: 5.0, 2: 4.0, 3: 6.0}
    found = compared(row, baseline)
    expected = stats.ttest_ind([1, 2, 4], [3, 5, 4, 6], equal_var=False)
    assert found is not None
    assert (found.kind, found.n, found.effect_name) == ("Welch", (3, 4), "Hedges g")
    assert (found.t, found.df, found.p) == pytest.approx((expected.statistic, expected.df, expected.pvalue))
    interval = expected.confidence_interval(0.95)
    assert (found.difference - found.half, found.difference + found.half) == pytest.approx(
        (interval.low, interval.high)
    )


def test_hedges_g_has_small_sample_correction() -> None:
    """Hedges' g is the difference over the pooled deviation with its small-sample correction."""
    found = compared({5: 1.0, 6: 3.0}, {0: 4.0, 1: 6.0})  # variances 2 and 2, pooled deviation √2
    assert found is not None
    assert found.effect == pytest.approx(-3 / math.sqrt(2) * (1 - 3 / 7))


def test_subset_of_seeds_still_pairs() -> None:
    """A row whose seeds are a part of the baseline's pairs with it."""
    found = compared({0: 1.2, 2: 3.1}, {0: 1.0, 1: 9.0, 2: 3.0})
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
def test_no_variation_gives_no_test(row: dict[int, float], baseline: dict[int, float]) -> None:
    """Without two seeds or any variation there is no test."""
    assert compared(row, baseline) is None


def test_holm_multiplies_by_hypotheses_left() -> None:
    """Holm multiplies by the number of hypotheses left."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_of_one_or_none() -> None:
    """Holm of one test changes nothing and of none is empty."""
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@given(P_VALUES)
def test_holm_is_monotone_and_bounded(p: list[float]) -> None:
    """Holm never lowers a p-value nor passes 1 nor changes the order."""
    adjusted = holm(p)
    assert all(a <= b <= 1 for a, b in zip(p, adjusted))
    order = np.argsort(p, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)


@given(P_VALUES)
def test_holm_rejects_by_step_down(p: list[float]) -> None:
    """Holm rejects what its step-down definition rejects."""
    rejected = set()
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        if not (len(p) - rank) * p[index] < 0.05:
            break
        rejected.add(int(index))
    assert {i for i, a in enumerate(holm(p)) if a < 0.05} == rejected


@given(P_VALUES)
def test_holm_levels_agree_with_rejection(p: list[float]) -> None:
    """A p value is below the level of its step exactly where Holm rejects, so an interval at that level says the same."""
    levels = holm_levels(p, 0.05)
    assert [x < level for x, level in zip(p, levels)] == [adjusted < 0.05 for adjusted in holm(p)]
    assert all(0.05 / len(p) <= level <= 0.05 for level in levels)


def test_holm_stops_at_first_kept() -> None:
    """Of four, .005 and .01 are rejected at .05 / 4 and .05 / 3; the rest are tested at .05 / 2, where it ends."""
    assert holm_levels([0.01, 0.04, 0.03, 0.005], 0.05) == pytest.approx([0.05 / 3, 0.025, 0.025, 0.0125])
    assert holm_levels([0.3, 0.4], 0.05) == pytest.approx([0.025, 0.025])


def test_no_test_is_not_significant() -> None:
    """No test is not significant."""
    assert not is_significant(None)
    assert not is_significant(0.05)
    assert is_significant(0.049)


def test_small_sample_correction_near_exact() -> None:
    """Hedges' 1 − 3 / (4 ν − 1) is within a hundredth of Γ(ν/2) / (√(ν/2) Γ((ν − 1)/2)) from 3 degrees of freedom on."""
    for df in range(3, 30):
        exact = math.gamma(df / 2) / (math.sqrt(df / 2) * math.gamma((df - 1) / 2))
        assert small_sample(df) == pytest.approx(exact, abs=0.01)


def test_least_difference_is_just_significant() -> None:
    """A difference of the least size, with the same spread, has a p value of the level asked for."""
    found = compare(
        {(0, s): x for s, x in enumerate((1.1, 2.3, 3.2))}, {(0, s): x for s, x in enumerate((1.0, 2.0, 3.0))}
    )
    assert found is not None
    least = found.least(0.01)
    shifted = compare(
        {(0, s): x + least - found.difference for s, x in enumerate((1.1, 2.3, 3.2))},
        {(0, s): x for s, x in enumerate((1.0, 2.0, 3.0))},
    )
    assert shifted is not None
    assert shifted.p == pytest.approx(0.01)


def test_interpolation_is_straight_over_the_logarithm() -> None:
    """Halfway between 10 and 40 in logarithm is 20; beyond the ends the end's value holds."""
    points = [(40.0, 3.0), (10.0, 1.0)]
    assert interpolated(20.0, points) == pytest.approx(2.0)
    assert (interpolated(5.0, points), interpolated(80.0, points)) == (1.0, 3.0)

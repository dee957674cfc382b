"""What seeds allow one to say: intervals, tests against the flat baseline, Holm's correction, effect sizes.

scipy does the arithmetic. A seed fixes a member's initialisation; the order of the data is the same for all of a run,
so intervals leave out what another order would do. One seed gives a mean and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from scipy import stats

LEVEL, SIGNIFICANT = 0.95, 0.05
"""Coverage of every interval; what a corrected p value must stay below."""
CAVEAT = "Intervals are over seeds of the initialisation; they leave out the order of the data, which all seeds share."


@dataclass(frozen=True)
class Estimate:
    """Mean over n seeds; `half` is half the width of the 95 % t-interval (n − 1 degrees of freedom), None for one seed."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.half is None else self.mean + self.half


@dataclass(frozen=True)
class Comparison:
    """A two-sided t-test of one row against its baseline on one metric.

    `difference` is row − baseline, `half` half its 95 % interval. `effect` is d_z (paired: mean over standard deviation of
    the differences) or Hedges' g (Welch: pooled standard deviation, small-sample correction). `p` is uncorrected.
    """

    kind: Literal["paired", "Welch"]
    n: tuple[int, int]
    difference: float
    half: float
    t: float
    df: float
    p: float
    effect: float

    @property
    def effect_name(self) -> str:
        """Which effect size `effect` is."""
        return "d_z" if self.kind == "paired" else "Hedges g"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and t-interval of one value a seed; None without values."""
    if not values:
        return None
    x, n = np.asarray(values, dtype=np.float64), len(values)
    half = interval_half(float(x.std(ddof=1)) / math.sqrt(n), n - 1) if n > 1 else None
    return Estimate(float(x.mean()), half, n)


def interval_half(standard_error: float, df: float) -> float:
    """Half the width of a t-interval of coverage LEVEL."""
    return t_quantile(df) * standard_error


@cache
def t_quantile(df: float) -> float:
    """What a standard error is multiplied by; curves ask for the same one thousands of times."""
    return float(stats.t.ppf(0.5 + LEVEL / 2, df))


def compare(row: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison | None:
    """Test a row's values by seed against the baseline's: paired when every seed of the row has its pair, else Welch.

    None when there is nothing to test with: fewer than two seeds on a side, or no variation between seeds at all.
    """
    if len(row) >= 2 and row.keys() <= baseline.keys():
        seeds = sorted(row)
        return compare_paired([row[s] for s in seeds], [baseline[s] for s in seeds])
    if len(row) >= 2 and len(baseline) >= 2:
        return compare_welch(list(row.values()), list(baseline.values()))
    return None


def compare_paired(row: Sequence[float], baseline: Sequence[float]) -> Comparison | None:
    """Paired t-test on differences row − baseline; None when the differences do not vary."""
    x, y = np.asarray(row, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    difference, n = x - y, len(x)
    spread = float(difference.std(ddof=1))
    if spread <= rounding(x, y):
        return None
    test, mean = stats.ttest_rel(x, y), float(difference.mean())
    half = interval_half(spread / math.sqrt(n), n - 1)
    return Comparison("paired", (n, n), mean, half, float(test.statistic), n - 1, float(test.pvalue), mean / spread)


def compare_welch(row: Sequence[float], baseline: Sequence[float]) -> Comparison | None:
    """Welch's t-test for means of unequal variance; None when neither side varies."""
    x, y = np.asarray(row, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    v, w = float(x.var(ddof=1)), float(y.var(ddof=1))
    n, m, mean = len(x), len(y), float(x.mean() - y.mean())
    if math.sqrt(v + w) <= rounding(x, y):
        return None
    test = stats.ttest_ind(x, y, equal_var=False)
    half = interval_half(math.sqrt(v / n + w / m), float(test.df))
    pooled = math.sqrt(((n - 1) * v + (m - 1) * w) / (n + m - 2))
    g = mean / pooled * (1 - 3 / (4 * (n + m) - 9))
    return Comparison("Welch", (n, m), mean, half, float(test.statistic), float(test.df), float(test.pvalue), g)


def rounding(x: np.ndarray, y: np.ndarray) -> float:
    """Spread below which values differ by the rounding of float64 alone."""
    return 1e-12 * float(max(np.abs(x).max(), np.abs(y).max(), 1e-300))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given; each at most 1 and monotone in p (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    adjusted, running = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = running
    return adjusted


def is_significant(p: float | None) -> bool:
    """Whether a corrected p value is below SIGNIFICANT; False when there was no test."""
    return p is not None and p < SIGNIFICANT

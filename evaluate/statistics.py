"""What replicates allow one to say: intervals, tests against the flat baseline, Holm's correction, effect sizes.

scipy does the arithmetic. A replicate is a training that differs from its siblings by chance alone: a seed of the
initialisation, an order of the data. One replicate gives a mean and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

LEVEL, SIGNIFICANT = 0.95, 0.05
"""Coverage of every interval; what a corrected p value must stay below."""
Replicate = tuple[int, int]
"""Order of the data and seed of the initialisation."""


@dataclass(frozen=True)
class Estimate:
    """Mean over n replicates; `half` is half the width of the 95 % t-interval (n − 1 degrees of freedom), None for one."""

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

    `difference` is row − baseline, `half` half its 95 % interval. `effect` is g_z (paired: mean over standard deviation of
    the differences) or Hedges' g (Welch: over the pooled one), both with the small-sample correction 1 − 3 / (4 ν − 1),
    ν degrees of freedom (Hedges 1981). `p` is uncorrected.
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
        return "g_z" if self.kind == "paired" else "Hedges g"

    def least(self, level: float) -> float:
        """The smallest difference that a test at this level would have called significant, the spread being what it is."""
        return self.half / t_quantile(self.df) * t_quantile(self.df, 1 - level)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and t-interval of one value a replicate; None without values."""
    if not values:
        return None
    x, n = np.asarray(values, dtype=np.float64), len(values)
    half = interval_half(float(x.std(ddof=1)) / math.sqrt(n), n - 1) if n > 1 else None
    return Estimate(float(x.mean()), half, n)


def interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Low and high end of a mean's t-interval; None of fewer than two values."""
    if (found := estimate(values)) is None or found.half is None:
        return None, None
    return found.mean - found.half, found.mean + found.half


def interval_half(standard_error: float, df: float) -> float:
    """Half the width of a t-interval of coverage LEVEL."""
    return t_quantile(df) * standard_error


@cache
def t_quantile(df: float, level: float = LEVEL) -> float:
    """What a standard error is multiplied by for an interval of this coverage; curves ask for one thousands of times."""
    from scipy.special import stdtrit  # a third of what scipy.stats takes to import

    return -float(stdtrit(df, (1 - level) / 2))


def small_sample(df: float) -> float:
    """Hedges' correction of a standardised difference, whose expectation few replicates overstate."""
    return 1 - 3 / (4 * df - 1)


def compare(row: Mapping[Replicate, float], baseline: Mapping[Replicate, float]) -> Comparison | None:
    """Test a row's values by replicate against the baseline's: paired when every one of the row has its pair, else Welch.

    None when there is nothing to test with: fewer than two replicates on a side, or no variation between them at all.
    """
    if len(row) >= 2 and row.keys() <= baseline.keys():
        common = sorted(row)
        return compare_paired([row[r] for r in common], [baseline[r] for r in common])
    if len(row) >= 2 and len(baseline) >= 2:
        return compare_welch(list(row.values()), list(baseline.values()))
    return None


def compare_paired(row: Sequence[float], baseline: Sequence[float]) -> Comparison | None:
    """Paired t-test on differences row − baseline; None when the differences do not vary."""
    from scipy import stats  # takes long to import

    x, y = np.asarray(row, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    difference, n = x - y, len(x)
    spread = float(difference.std(ddof=1))
    if spread <= rounding(x, y):
        return None
    test, mean = stats.ttest_rel(x, y), float(difference.mean())
    half = interval_half(spread / math.sqrt(n), n - 1)
    g = mean / spread * small_sample(n - 1)
    return Comparison("paired", (n, n), mean, half, float(test.statistic), n - 1, float(test.pvalue), g)


def compare_welch(row: Sequence[float], baseline: Sequence[float]) -> Comparison | None:
    """Welch's t-test for means of unequal variance; None when neither side varies."""
    from scipy import stats  # takes long to import

    x, y = np.asarray(row, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    v, w = float(x.var(ddof=1)), float(y.var(ddof=1))
    n, m, mean = len(x), len(y), float(x.mean() - y.mean())
    if math.sqrt(v + w) <= rounding(x, y):
        return None
    test = stats.ttest_ind(x, y, equal_var=False)
    half = interval_half(math.sqrt(v / n + w / m), float(test.df))
    pooled = math.sqrt(((n - 1) * v + (m - 1) * w) / (n + m - 2))
    g = mean / pooled * small_sample(n + m - 2)
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


def holm_levels(p: Sequence[float], level: float) -> list[float]:
    """The level at which Holm's procedure tests each hypothesis, in the order given: `level` over the number left at its step.

    Those that are not rejected are all tested at the step that ended it. So p ≤ its level exactly where it is rejected.
    """
    order = np.argsort(p, kind="stable")
    rejected = sum(adjusted < level for adjusted in holm(p))
    levels = [0.0] * len(p)
    for rank, index in enumerate(order):
        levels[index] = level / (len(p) - min(rank, rejected))
    return levels


def interpolated(x: float, points: Sequence[tuple[float, float]]) -> float:
    """A value at x > 0 on the line through points (x, value), straight over log x; beyond its ends, that of the end."""
    xs, values = zip(*sorted(points))
    return float(np.interp(math.log(x), np.log(xs), values))


def is_significant(p: float | None) -> bool:
    """Whether a corrected p value is below SIGNIFICANT; False when there was no test."""
    return p is not None and p < SIGNIFICANT

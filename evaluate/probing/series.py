"""How probing scores travel: one number a (metric, level, n) and seed, until they become series."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from evaluate.statistics import estimate

Key = tuple[str, int, int]
"""(metric id, level, n)."""
Scores = dict[Key, list[float | None]]
"""One value a seed; None where the protocol leaves it out."""


class SeriesRow(TypedDict):
    """One point of a series, as FORMAT.md has it under "series"; level 0 is the innermost."""

    n: int
    level: int
    value: float | None
    low: float | None
    high: float | None


def merge(tasks: Sequence[Scores]) -> Scores:
    """Of each key and seed the unweighted mean over tasks, None left out (all None: None), as SAEBench averages pairs."""
    merged: Scores = {}
    for key in sorted({key for scores in tasks for key in scores}):
        columns = zip(*(scores[key] for scores in tasks if key in scores))
        merged[key] = [mean_of_known(column) for column in columns]
    return merged


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None; None when there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def series(scores: Scores) -> dict[str, list[SeriesRow]]:
    """Mean and 95 % t-interval over seeds, by metric; rows in order of level, then n. A single seed has no interval."""
    rows: dict[str, list[SeriesRow]] = {}
    for (metric, level, n), values in sorted(scores.items()):
        rows.setdefault(metric, []).append(series_row(n, level, values))
    return rows


def series_row(n: int, level: int, values: Sequence[float | None]) -> SeriesRow:
    """One point from one value a seed; seeds without a value are left out."""
    found = estimate([value for value in values if value is not None])
    if found is None:
        return {"n": n, "level": level, "value": None, "low": None, "high": None}
    return {"n": n, "level": level, "value": found.mean, "low": found.low, "high": found.high}

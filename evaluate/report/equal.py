"""Comparisons at equal L0: a nested dictionary against flat ones that are as sparse, or no comparison at all.

Where flat dictionaries of the same kind span a range of L0, each replicate is compared with its own flat front, straight
over log L0 between the values that were trained; a replicate whose flat dictionaries do not reach so far is left out. One
that has a single flat dictionary, within NEAR of that L0, takes the shape of the mean front, moved to go through its own
value. Where they span none, L0 may differ by NEAR; beyond that nothing is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluate.report.runs import Group, Results, Row
from evaluate.statistics import Comparison, Replicate, compare, interpolated

Point = tuple[float, float]
"""L0 and a value there."""
NEAR = 0.05
"""How much L0 may differ, as a share, where there is nothing to interpolate between."""


@dataclass(frozen=True)
class Apart:
    """Why two rows are not comparable: the row's mean L0, and the range of the flat ones' (None where it was not scored)."""

    l0: float | None
    flat: tuple[float, float] | None

    @property
    def reason(self) -> str:
        """L0 30 against 41 to 50."""
        if self.l0 is None or self.flat is None:
            return "L0 was not scored"
        low, high = (f"{x:.3g}" for x in self.flat)
        return f"L0 {self.l0:.3g} against {low if low == high else f'{low} to {high}'}"


def at_equal_l0(results: Results, group: Group, row: Row, metric: str) -> Comparison | Apart | None:
    """The row against flat dictionaries at the row's own L0; None without a flat row or where no test can be made."""
    flats = results.flats(group)
    if not flats or row in flats:
        return None
    l0 = positive(row.values("l0"))
    own = {replicate: value for replicate, value in row.values(metric).items() if replicate in l0}
    fronts: dict[Replicate, list[Point]] = {}
    means: dict[Replicate, list[float]] = {}
    mean_front: list[Point] = []
    for flat in flats:
        scores, sparse = flat.values(metric), positive(flat.values("l0"))
        both = {replicate: (x, scores[replicate]) for replicate, x in sparse.items() if replicate in scores}
        for replicate, point in both.items():
            fronts.setdefault(replicate, []).append(point)
            means.setdefault(replicate, []).append(mean_of(sparse))
        if both:
            xs, ys = zip(*both.values())
            mean_front.append((sum(xs) / len(xs), sum(ys) / len(ys)))
    if not own or not fronts:
        return Apart(None, None) if row.values(metric) else None
    at = sum(l0[replicate] for replicate in own) / len(own)
    there = [replicate for replicate in fronts if reaches(at, means[replicate])]
    if not there:
        return Apart(at, (min(map(min, means.values())), max(map(max, means.values()))))
    paired = own.keys() <= set(there)
    whole = {r: through(fronts[r], mean_front) for r in there if r in own or not paired}
    return compare(own, {r: interpolated(l0[r] if paired else at, front) for r, front in whole.items()})


def through(front: list[Point], mean: list[Point]) -> list[Point]:
    """A front of points (L0, value); of a single one, the mean front moved to go through it."""
    if len(front) > 1:
        return front
    x, value = front[0]
    moved = value - interpolated(x, mean)
    return [(x, y + moved) for x, y in mean]


def reaches(l0: float, flats: Sequence[float]) -> bool:
    """Whether flat dictionaries of these L0 span one, or come as near as NEAR."""
    return min(flats) / (1 + NEAR) <= l0 <= max(flats) * (1 + NEAR)


def positive(values: dict[Replicate, float]) -> dict[Replicate, float]:
    """Those above 0: L0 of which there is a logarithm."""
    return {replicate: value for replicate, value in values.items() if value > 0}


def mean_of(values: dict[Replicate, float]) -> float:
    """The mean; 0 of none."""
    return sum(values.values()) / len(values) if values else 0.0

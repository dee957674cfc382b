"""Table 1: every row's mean and interval, its test against the flat baseline, and what may be said of all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from evaluate.report.runs import Group, Results, Row
from evaluate.statistics import Comparison, Estimate, compare, estimate, holm, is_significant
from pipeline.definitions import Metric

SCORES = ("kl_nats", "kl_score", "ce_score", "ev", "l0", "sparsity", "dead")
TWINS = {"kl_score": "kl_nats", "sparsity": "l0"}
"""A column that is the other one rescaled: the same test, counted once."""
SERIES = ("sparse_coding_rate", "scr")
WANTED_N = 20
Verdict = Literal["better", "worse", "different"]


@dataclass(frozen=True)
class Cell:
    """One row's estimate of one metric; its test, the p value Holm-corrected over the table, None where none was made."""

    metric: Metric
    estimate: Estimate | None
    test: Comparison | None = None
    p: float | None = None

    @property
    def verdict(self) -> Verdict | None:
        """Which way the row differs from the baseline, if the corrected test says that it does."""
        if self.test is None or not is_significant(self.p):
            return None
        if self.metric.better == "neither":
            return "different"
        return "better" if (self.test.difference > 0) == (self.metric.better == "higher") else "worse"


@dataclass(frozen=True)
class Line:
    """A row of the table with its cells by metric id."""

    group: Group
    row: Row
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Table:
    """All rows of all groups; `n_tests` is the size of the family that Holm's correction ran over."""

    metrics: tuple[Metric, ...]
    lines: tuple[Line, ...]
    n_tests: int

    @property
    def tested(self) -> list[tuple[Line, Cell]]:
        """Every test made, twins left out."""
        cells = [(line, cell) for line in self.lines for id, cell in line.cells.items() if not is_twin(id, line.cells)]
        return [(line, cell) for line, cell in cells if cell.test is not None]

    def line(self, group: Group, row: Row) -> Line:
        """The line of a row."""
        return next(line for line in self.lines if line.group is group and line.row is row)


def make_table(results: Results) -> Table:
    """Estimate and test every column that any run has; correct all tests together."""
    metrics = tuple(results.metric(id) for id in columns(results))
    raw = [
        (group, row, {m.id: (estimate(list(row.values(m.id).values())), test_cell(group, row, m.id)) for m in metrics})
        for group in results.groups
        for row in group.rows
    ]
    family = [
        (i, id)
        for i, (_, _, cells) in enumerate(raw)
        for id, (_, test) in cells.items()
        if test and not is_twin(id, cells)
    ]
    tests = [raw[i][2][id][1] for i, id in family]
    adjusted = dict(zip(family, holm([test.p for test in tests if test is not None])))
    lines = []
    for i, (group, row, cells) in enumerate(raw):
        by_id = {m.id: m for m in metrics}
        p = {id: adjusted.get((i, TWINS[id] if is_twin(id, cells) else id)) for id in cells}
        lines.append(Line(group, row, {id: Cell(by_id[id], e, t, p[id]) for id, (e, t) in cells.items()}))
    return Table(metrics, tuple(lines), len(family))


def columns(results: Results) -> list[str]:
    """The columns of which any last checkpoint has a value."""
    runs = [run for group in results.groups for run in group.runs]
    ids = [id for id in SCORES if any(run.score(id) is not None for run in runs)]
    for name in SERIES:
        found = {n for run in runs for n in run.at(name)}
        if found:
            ids.append(f"{name}@{min(found, key=lambda n: (abs(math.log(n / WANTED_N)), n))}")
    return ids


def is_twin(id: str, cells: dict[str, Cell] | dict[str, tuple[Estimate | None, Comparison | None]]) -> bool:
    """Whether a column repeats the test of another column that is there too."""
    return TWINS.get(id) in cells


def test_cell(group: Group, row: Row, metric: str) -> Comparison | None:
    """The row against its group's flat baseline; None for the baseline itself or where no test can be made."""
    baseline = group.baseline
    if baseline is None or row is baseline:
        return None
    return compare(row.values(metric), baseline.values(metric))


def table_rows(table: Table) -> list[dict[str, Any]]:
    """Table 1 as CSV rows: one a row and metric."""
    return [
        {
            "group": line.group.label, "row": line.row.label, "metric": id, "unit": c.metric.unit, "better": c.metric.better,
            "mean": c.estimate.mean if c.estimate else None, "half_interval_95": c.estimate.half if c.estimate else None,
            "seeds": c.estimate.n if c.estimate else 0, "test": c.test.kind if c.test else None,
            "difference": c.test.difference if c.test else None, "t": c.test.t if c.test else None,
            "df": c.test.df if c.test else None, "p": c.test.p if c.test else None, "p_holm": c.p,
            "effect_size": c.test.effect if c.test else None, "effect_name": c.test.effect_name if c.test else None,
            "verdict": c.verdict,
        }
        for line in table.lines
        for id, c in line.cells.items()
    ]  # fmt: skip

"""Table 1: every row's mean and interval; differences from the flat baseline; tests of the primary endpoints at equal L0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from evaluate.report.equal import Apart, at_equal_l0
from evaluate.report.runs import Group, Results, Row
from evaluate.report.wording import column_decimals
from evaluate.statistics import SIGNIFICANT, Comparison, Estimate, compare, estimate, holm, holm_levels, is_significant
from pipeline.base.errors import UsageError
from pipeline.definitions import METRICS, Metric

SCORES = ("kl_nats", "kl_score", "ce_score", "ev", "l0", "sparsity", "dead")
SERIES = (("sparse_coding_ev", "sparse_coding_rate"), ("scr",))
"""Scores by n, each a column: the first of its names that the results have. A rate says as much of L0 as of quality."""
WANTED_N = 20
PRIMARY = ("kl_nats", "ev")
"""What is tested unless told otherwise, always at equal L0. All else is a difference with its interval."""
Verdict = Literal["better", "worse", "different", "not shown", "not comparable"]


@dataclass(frozen=True)
class Cell:
    """One row's estimate of one metric, and how it differs from the flat baseline.

    `difference` is that of rows as they are. A primary endpoint has, at equal L0, a `test` (or says in `apart` why not), its
    Holm-corrected `p`, and `half`: half the interval at the level of its step in Holm's order, so that the interval leaves 0
    out exactly where the corrected test passes, and no smaller difference than `half` could have been shown.
    """

    metric: Metric
    estimate: Estimate | None
    difference: Comparison | None = None
    test: Comparison | None = None
    apart: Apart | None = None
    p: float | None = None
    half: float | None = None

    @property
    def verdict(self) -> Verdict | None:
        """What the corrected test says; None where there is none."""
        if self.apart is not None:
            return "not comparable"
        if self.test is None:
            return None
        if not is_significant(self.p):
            return "not shown"
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
    """All rows of all groups; `primary` are the metrics that are tested; `decimals` by metric id, alike down a column."""

    metrics: tuple[Metric, ...]
    primary: tuple[str, ...]
    lines: tuple[Line, ...]
    decimals: dict[str, int]

    @property
    def tested(self) -> list[tuple[Line, Cell]]:
        """Every test made: the family that Holm's correction ran over."""
        return [(line, cell) for line in self.lines for cell in line.cells.values() if cell.test is not None]

    @property
    def corrected(self) -> str:
        """What the intervals of tested differences are corrected for; nothing for one test."""
        return f"corrected for {len(self.tested)} tests" if len(self.tested) > 1 else ""

    @property
    def apart(self) -> list[tuple[Line, Cell]]:
        """Every primary comparison that could not be made at equal L0."""
        return [(line, cell) for line in self.lines for cell in line.cells.values() if cell.apart is not None]

    @property
    def differences(self) -> list[tuple[Line, Cell]]:
        """Every difference with an interval, of metrics that are not tested."""
        return [
            (line, cell)
            for line in self.lines
            for id, cell in line.cells.items()
            if id not in self.primary and cell.difference is not None
        ]

    def line(self, group: Group, row: Row) -> Line:
        """The line of a row."""
        return next(line for line in self.lines if line.group is group and line.row is row)


def require_endpoints(ids: Sequence[str]) -> None:
    """Raise UsageError for an endpoint that is no metric."""
    if unknown := [id for id in ids if id.partition("@")[0] not in METRICS]:
        raise UsageError(f"--primary {unknown[0]}: no such metric; known are {', '.join(METRICS)}")


def make_table(results: Results, primary: Sequence[str] = PRIMARY) -> Table:
    """Estimate every column that any run has; test the primary endpoints at equal L0, and correct those tests together.

    Raises UsageError for an endpoint that is no metric.
    """
    require_endpoints(primary)
    metrics = tuple(results.metric(id) for id in columns(results, primary))
    lines = [
        Line(group, row, {metric.id: cell_of(results, group, row, metric, primary) for metric in metrics})
        for group in results.groups
        for row in group.rows
    ]
    family = [(i, id, c.test) for i, line in enumerate(lines) for id, c in line.cells.items() if c.test is not None]
    ps = [test.p for _, _, test in family]
    for (i, id, test), p, level in zip(family, holm(ps), holm_levels(ps, SIGNIFICANT)):
        lines[i].cells[id] = replace(lines[i].cells[id], p=p, half=test.least(level))
    decimals = {m.id: column_decimals([e for line in lines if (e := line.cells[m.id].estimate)]) for m in metrics}
    return Table(metrics, tuple(primary), tuple(lines), decimals)


def columns(results: Results, primary: Sequence[str]) -> list[str]:
    """The columns of which any last checkpoint has a value, primary endpoints among them."""
    runs = [run for group in results.groups for run in group.runs]
    ids = [id for id in SCORES if any(run.score(id) is not None for run in runs)]
    for names in SERIES:
        found = next((at for name in names if (at := [(name, n) for run in runs for n in run.at(name)])), [])
        if found:
            name, n = min(found, key=lambda at: (abs(math.log(at[1] / WANTED_N)) if at[1] else math.inf, at[1]))
            ids.append(f"{name}@{n}")
    more = [id for id in primary if id not in ids and any(run.score(id) is not None for run in runs)]
    return [*more, *ids]


def cell_of(results: Results, group: Group, row: Row, metric: Metric, primary: Sequence[str]) -> Cell:
    """A row's estimate of a metric and its comparisons, p not yet corrected."""
    found = estimate(list(row.values(metric.id).values()))
    flat = group.baseline
    difference = compare(row.values(metric.id), flat.values(metric.id)) if flat and row is not flat else None
    if metric.id not in primary:
        return Cell(metric, found, difference)
    test = at_equal_l0(results, group, row, metric.id) if row.sharing else None
    if isinstance(test, Apart):
        return Cell(metric, found, difference, apart=test)
    return Cell(metric, found, difference, test)


def table_rows(table: Table) -> list[dict[str, Any]]:
    """Table 1 as CSV rows: one a row and metric. Means leave massive rows out; beside each stands the mean with them."""
    return [row_of(line, id, cell) for line in table.lines for id, cell in line.cells.items()]


def row_of(line: Line, id: str, cell: Cell) -> dict[str, Any]:
    """One CSV row."""
    shown, test = cell.test or cell.difference, cell.test
    whole = estimate(list(line.row.values(id, massive=True).values()))
    return {
        "group": line.group.label,
        "row": line.row.label,
        "metric": id,
        "unit": cell.metric.unit,
        "better": cell.metric.better,
        "mean": cell.estimate.mean if cell.estimate else None,
        "half_interval_95": cell.estimate.half if cell.estimate else None,
        "mean_with_massive_rows": whole.mean if whole else None,
        "seeds": cell.estimate.n if cell.estimate else 0,
        "difference": shown.difference if shown else None,
        "difference_half_interval_95": shown.half if shown else None,
        "at_equal_l0": test is not None,
        "test": test.kind if test else None,
        "t": test.t if test else None,
        "df": test.df if test else None,
        "p": test.p if test else None,
        "p_holm": cell.p,
        "difference_half_interval_corrected": cell.half,
        "effect_size": shown.effect if shown else None,
        "effect_name": shown.effect_name if shown else None,
        "verdict": cell.verdict,
    }

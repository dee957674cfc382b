"""Table 1: every row's mean and interval, its test against the flat baseline, and what may be said of all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evaluate.report.runs import Group, Results, Row
from evaluate.statistics import Comparison, Estimate, compare, estimate, holm, is_significant
from pipeline.definitions import Metric

COLUMNS = ("kl_nats", "kl_score", "ce_score", "ev", "l0", "sparsity", "dead")
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
    ids = [id for id in COLUMNS if any(run.score(id) is not None for run in runs)]
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


def headline(table: Table, results: Results) -> list[str]:
    """What was found, in sentences computed from the numbers and the tests."""
    if all(group.baseline is None for group in results.groups):
        return ["There is no flat baseline (α = 0) among these results, so nothing is compared with it."]
    if not any(line.row.sharing for line in table.lines):
        return ["Only flat dictionaries (α = 0) are among these results, so nesting is not tested."]
    tested = table.tested
    if not tested:
        return [
            "No test is possible: a comparison needs at least two seeds a row, and scores that vary between them. "
            "The figures describe single runs; they carry no interval and no claim."
        ]
    return [verdict_sentence(tested), *showcase(table, results), *caution(table, results)]


def verdict_sentence(tested: Sequence[tuple[Line, Cell]]) -> str:
    """How many of the corrected comparisons are significant, and which way."""
    kinds = sorted({cell.test.kind for _, cell in tested if cell.test})
    how = f"Holm-corrected {' and '.join(kinds)} t-tests, {seeds_text(tested)}"
    found = [cell for _, cell in tested if cell.verdict]
    if not found:
        least = min(cell.p for _, cell in tested if cell.p is not None)
        return (
            f"No difference between nested and flat dictionaries is significant: none of {len(tested)} comparisons "
            f"passes ({how}; smallest corrected p = {p_text(least)})."
        )
    better, worse = (count_by_metric(tested, verdict) for verdict in ("better", "worse"))
    parts = [f"better in {better}" if better else "", f"worse in {worse}" if worse else ""]
    return (
        f"Of {len(tested)} comparisons of nested with flat dictionaries, {len(found)} are significant ({how}): "
        f"nesting is {' and '.join(part for part in parts if part) or 'different'}."
    )


def seeds_text(tested: Sequence[tuple[Line, Cell]]) -> str:
    """Over 3 seeds, or over 2 to 5."""
    counts = sorted({n for _, cell in tested if cell.test for n in cell.test.n})
    return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def count_by_metric(tested: Sequence[tuple[Line, Cell]], verdict: str) -> str:
    """KL (4 of 4 rows), explained variance (2 of 4 rows)."""
    parts = []
    for id in dict.fromkeys(cell.metric.id for _, cell in tested):
        cells = [cell for _, cell in tested if cell.metric.id == id]
        n = sum(cell.verdict == verdict for cell in cells)
        if n:
            parts.append(f"{cells[0].metric.label} ({n} of {len(cells)} row{'s' * (len(cells) > 1)})")
    return ", ".join(parts)


def showcase(table: Table, results: Results) -> list[str]:
    """The main group's row nearest the paper's α = 0.2, in numbers."""
    group = results.main
    nested = [row for row in group.rows if len(row.sharing) == 1]
    if not nested or group.baseline is None:
        return []
    row = min(nested, key=lambda row: abs(row.sharing[0] - 0.2))
    flat = table.line(group, group.baseline).cells
    parts = []
    for id in ("kl_nats", "ev", "l0"):
        cell, base = table.line(group, row).cells.get(id), flat.get(id)
        if cell and base and cell.estimate and base.estimate:
            note = cell.verdict or "no significant difference"
            numbers = f"{plus_minus(cell.estimate)} against {plus_minus(base.estimate)}"
            parts.append(f"{cell.metric.label} {numbers} {cell.metric.unit} ({note})".replace(" fraction", ""))
    where = f" ({group.label})" if group.label else ""
    return [f"At {row.label}{where}, beside the flat baseline: {'; '.join(parts)}."] if parts else []


def caution(table: Table, results: Results) -> list[str]:
    """That rows differ in sparsity, when they do by more than a twentieth: then KL and ev are not like for like."""
    cells = [table.line(results.main, row).cells.get("l0") for row in results.main.rows]
    values = [cell.estimate.mean for cell in cells if cell and cell.estimate]
    if len(values) < 2 or max(values) <= 1.05 * min(values):
        return []
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return [
        f"Rows differ in L0 (from {low} to {high} latents a token), so their KL and explained variance are not at equal "
        "sparsity; the plots against L0 are."
    ]


def decimals(half: float) -> int:
    """Decimals that show two digits of an interval's half-width."""
    return min(8, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 4


def number(value: float, half: float | None = None) -> str:
    """A mean to the precision of its interval; four significant digits without one."""
    if half:
        return f"{value:,.{decimals(half)}f}".replace("-", "−")
    return f"{value:,.4g}".replace("-", "−") if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"


def plus_minus(e: Estimate) -> str:
    """0.523 ± 0.012, or the mean alone for one seed."""
    return number(e.mean) if e.half is None else f"{number(e.mean, e.half)} ± {e.half:.{decimals(e.half)}f}"


def p_text(p: float) -> str:
    """A p value to two digits, never rounded to 0."""
    return f"{p:.2g}" if p >= 1e-4 else "under 0.0001"

"""What was found, in sentences computed from the numbers and the tests."""

from __future__ import annotations

from collections.abc import Sequence

from evaluate.report.runs import Results
from evaluate.report.table import Cell, Line, Table
from evaluate.report.wording import count, p_text, plus_minus


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
    return count(counts[0], "seed") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def count_by_metric(tested: Sequence[tuple[Line, Cell]], verdict: str) -> str:
    """KL (4 of 4 rows), explained variance (2 of 4 rows)."""
    parts = []
    for id in dict.fromkeys(cell.metric.id for _, cell in tested):
        cells = [cell for _, cell in tested if cell.metric.id == id]
        n = sum(cell.verdict == verdict for cell in cells)
        if n:
            parts.append(f"{cells[0].metric.label} ({n} of {count(len(cells), 'row')})")
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

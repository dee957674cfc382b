"""What was found, in sentences computed from the numbers and the tests: the answer first, then what stands behind it.

A sentence's interval is the one by which it says shown or not shown: of a tested difference at the level of its test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evaluate.report.equal import mean_of, positive
from evaluate.report.nesting_found import absorption_clause
from evaluate.report.runs import Results
from evaluate.report.table import Cell, Line, Table
from evaluate.report.wording import count, half_text, listed, number, p_text, plus_minus, share, signed_plus_minus
from evaluate.statistics import SIGNIFICANT, estimate


@dataclass(frozen=True)
class Found:
    """The answer in one sentence; one number where there is one (else empty) with its unit and what it means; and the
    sentences that stand behind."""

    lead: str
    figure: str = ""
    unit: str = ""
    sentences: tuple[str, ...] = ()


def what_was_found(table: Table, results: Results) -> Found:
    """The answer to what nesting costs and buys, for as much as these results can say: in quality, and in absorption."""
    bought = absorption_clause(table, results)
    if all(group.baseline is None for group in results.groups):
        return Found("There is no flat baseline (α = 0) among these results, so nothing is compared with it.")
    if not any(line.row.sharing for line in table.lines):
        return Found("Only flat dictionaries (α = 0) are among these results, so nesting is not tested.")
    if not table.tested and not table.apart:
        return Found(UNTESTED)
    line = showcase(table, results)
    cells = [line.cells[id] for id in table.primary if id in line.cells]
    first = next((cell for cell in cells if cell.test), None)
    lead = f"{quality(line, cells, results)}{f'; {bought}' if bought else ''}."
    sentences = [incomparable(line, cells), *(answer(line, cell, results) for cell in cells)]
    sentences += [verdicts(table), apart(table), massive(table, line)]
    found = tuple(sentence for sentence in sentences if sentence)
    if first is None or first.test is None or first.half is None:
        return Found(lead, sentences=found)
    unit = f"{unit_of(first)} of {first.metric.label}, nested minus flat".lstrip()
    corrected = f" (95 % interval, {table.corrected})" if table.corrected else ""
    meaning = what_it_means(first, results)
    return Found(lead, signed_plus_minus(first.test.difference, first.half), f"{unit}{corrected}: {meaning}.", found)


def quality(line: Line, cells: Sequence[Cell], results: Results) -> str:
    """In half a sentence, what nested dictionaries are in each primary endpoint, with its interval."""
    ways: dict[str, list[str]] = {way: [] for way in WAYS.values()}
    for cell in cells:
        if cell.test is not None and cell.half is not None:
            change = f"{signed_plus_minus(cell.test.difference, cell.half)} {unit_of(cell)}".rstrip()
            ways.setdefault(WAYS[cell.verdict or ""], []).append(f"{cell.metric.label} ({change})")
        elif cell.apart is not None:
            ways.setdefault("not comparable with flat ones, which are not as sparse, in", []).append(cell.metric.label)
    at = f"At {sparsity(line, results)}, nested" if any(cell.test for cell in cells) else "Nested"
    said = (
        ", and ".join(f"{way} {listed(parts)}" for way, parts in ways.items() if parts) or "not compared with flat ones"
    )
    group = f"; {line.group.label}" if line.group.label and line.group is not results.main else ""
    return f"{at} dictionaries ({line.row.label}{group}) are {said}"


WAYS = {
    "better": "better than flat ones in",
    "worse": "worse than flat ones in",
    "different": "different from flat ones in",
    "not shown": "not shown to differ from flat ones in",
}
"""What a verdict is in a sentence."""
UNTESTED = (
    "No test is possible: a comparison needs at least two seeds a row, and scores that vary between them. "
    "The figures describe single runs; they carry no interval and no claim."
)


def showcase(table: Table, results: Results) -> Line:
    """The line to speak of: of the main kind's that could be compared, the one nearest the paper's α = 0.2, mid L0."""
    lines = [line for line in table.lines if line.row.sharing]
    l0 = {id(line): mean for line in lines if (mean := mean_of(positive(line.row.values("l0"))))}
    middle = sorted(l0.values())[len(l0) // 2] if l0 else 1.0
    return min(
        lines,
        key=lambda line: (
            not any(cell.test for cell in line.cells.values()),
            line.group.family != results.main.family,
            len(line.row.sharing) != 1,
            abs(line.row.sharing[0] - 0.2),
            abs(math.log(l0.get(id(line), middle) / middle)),
        ),
    )


def unit_of(cell: Cell) -> str:
    """A metric's unit; nothing for fractions."""
    return "" if cell.metric.unit == "fraction" else cell.metric.unit


def name_of(line: Line) -> str:
    """What a line is called in a sentence."""
    return line.row.label + (f" ({line.group.label})" if line.group.label else "")


def incomparable(line: Line, cells: Sequence[Cell]) -> str:
    """Why the line is not compared in some primary endpoints, and what they are at either sparsity; empty if it is."""
    away = [cell for cell in cells if cell.apart is not None]
    if not away or away[0].apart is None:
        return ""
    flat = line.group.baseline
    parts = []
    for cell in away:
        other = estimate(list(flat.values(cell.metric.id).values())) if flat else None
        if cell.estimate and other:
            unit = f" {unit_of(cell)}".rstrip()
            parts.append(f"{cell.metric.label} {plus_minus(cell.estimate)} against {plus_minus(other)}{unit}")
    each = f" Each at its own L0: {'; '.join(parts)}." if parts else ""
    return (
        f"Dictionaries at {name_of(line)} and flat ones are not comparable: they are not equally sparse "
        f"({away[0].apart.reason}).{each}"
    )


def answer(line: Line, cell: Cell, results: Results) -> str:
    """What one primary endpoint says of the line."""
    label, name = cell.metric.label, name_of(line)
    if cell.test is None or cell.estimate is None:
        return ""
    unit = f" {unit_of(cell)}".rstrip()
    at = sparsity(line, results)
    half = cell.half or cell.test.half
    change = f"{signed_plus_minus(cell.test.difference, half)}{unit}"
    flat = number(cell.estimate.mean - cell.test.difference, cell.test.half)
    numbers = f"{change}, {number(cell.estimate.mean, cell.test.half)} against {flat}"
    if cell.verdict == "not shown":
        least = f"; a difference under {half_text(half)}{unit} could not have been shown"
        return f"At {at}, a difference in {label} between {name} and flat dictionaries is not shown: {numbers}{least}."
    return f"At {at}, dictionaries at {name} are {cell.verdict} than flat ones in {label}: {numbers}."


def sparsity(line: Line, results: Results) -> str:
    """At which L0 the line was compared: equal where flat dictionaries span it, nearly equal where one was near enough."""
    own = mean_of(line.row.values("l0"))
    means = [mean_of(row.values("l0")) for row in results.flats(line.group)]
    nearest = min(means, key=lambda mean: abs(mean - own), default=own)
    if min(means, default=own) <= own <= max(means, default=own) or f"{own:.3g}" == f"{nearest:.3g}":
        return f"equal L0 ({own:.3g})"
    return f"nearly equal L0 ({own:.3g} against {nearest:.3g})"


def what_it_means(cell: Cell, results: Results) -> str:
    """What the verdict is; and a difference in KL as a share of what it costs to replace the activations by zeros: itself
    where it is shown, else the most that its interval holds."""
    said = "no difference is shown" if cell.verdict == "not shown" else f"nested is {cell.verdict}"
    zero = [x for run in results.main.runs if (x := run.baselines.get("kl_zero"))]
    if cell.metric.id != "kl_nats" or not zero or cell.test is None or cell.half is None:
        return said
    cost, most = sum(zero) / len(zero), abs(cell.test.difference) + cell.half
    of = f"of the KL that replacing the activations by zeros costs ({number(cost)} nats/token)"
    if cell.verdict == "not shown":
        return f"{said}; the interval holds 0, and at most {share(most / cost)} {of}"
    return f"{said}, by {share(abs(cell.test.difference) / cost)} {of}"


def verdicts(table: Table) -> str:
    """How many of the corrected tests are significant, and which way."""
    tested = table.tested
    if not tested:
        return ""
    kinds = listed(sorted({cell.test.kind for _, cell in tested if cell.test}))
    what = listed(dict.fromkeys(cell.metric.label for _, cell in tested))
    how = f"{count(len(tested), 'test')} of {what} at equal L0 (Holm-corrected {kinds} t-tests, {seeds_text(tested)})"
    found = [cell for _, cell in tested if cell.verdict != "not shown"]
    if not found:
        least = min(cell.p for _, cell in tested if cell.p is not None)
        return f"Of {how} none passes at {SIGNIFICANT:g}; the smallest corrected p is {p_text(least)}."
    parts = [
        f"{verdict} in {by_metric}"
        for verdict in ("better", "worse", "different")
        if (by_metric := count_by_metric(tested, verdict))
    ]
    return f"Of {how} {len(found)} {'is' if len(found) == 1 else 'are'} significant: nesting is {listed(parts)}."


def seeds_text(tested: Sequence[tuple[Line, Cell]]) -> str:
    """3 seeds, or 2 to 5 seeds."""
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


def apart(table: Table) -> str:
    """Rows that have no flat dictionary as sparse as they are, and what would give them one."""
    lines = {id(line): line for line, _ in table.apart}
    if not lines:
        return ""
    nested = count(sum(bool(line.row.sharing) for line in table.lines), "nested row")
    one = "has no flat dictionary of its L0 beside it and is"
    several = "have no flat dictionary of their L0 beside them and are"
    return (
        f"{len(lines)} of {nested} {one if len(lines) == 1 else several} not compared; train to one L0 (k, or --target-l0), or "
        "flat ones over a range of it."
    )


def massive(table: Table, line: Line) -> str:
    """How the lead figures read with massive rows, where that changes them."""
    for id in table.primary:
        cell = line.cells.get(id)
        whole = list(line.row.values(id, massive=True).values())
        if cell and cell.estimate and whole:
            mean = sum(whole) / len(whole)
            if abs(mean - cell.estimate.mean) > max(0.01 * abs(cell.estimate.mean), cell.estimate.half or 0):
                return (
                    f"Averages leave out massive rows, few and huge; with them {cell.metric.label} at {line.row.label} is "
                    f"{number(mean)} instead of {plus_minus(cell.estimate)}."
                )
    return ""

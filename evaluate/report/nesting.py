"""What nesting buys and costs: absorption against explained variance, three known trees, and a table (in sentences:
`nesting_found.py`).

Where features are known, absorption is how much more often a parent's latent is silent under its child than it is missed
alone; on real rows, and on words in prompts that ask for their first letter, it is the part of a label's projection that other
latents carry, beside the F1 of the label's best latent and its recall, since a dictionary in which nothing fires scores
falsely low.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evaluate.report.drawing import Cross, crosses, legend, marks_note, trees
from evaluate.report.figures import Figure, Missing, Numbers
from evaluate.report.runs import Group, Results, Row
from evaluate.report.scored import ABSORBED, MISSED, SILENT, Container, Run
from evaluate.report.svg import Panel
from evaluate.report.table import Table
from evaluate.report.wording import column_decimals, number, plus_minus
from evaluate.statistics import Estimate, compare, estimate, interpolated

TITLE = "What nesting buys and costs"


@dataclass(frozen=True)
class Measure:
    """What absorption is somewhere: the metric, its family of scores, where it is measured (at the beginning of a sentence
    and over a panel), what it is, and what of."""

    metric: str
    family: str
    where: str
    title: str
    what: str
    label: str = ""
    row: str = ""

    @property
    def f1(self) -> str:
        """The metric of the F1 of its features' or labels' best latents."""
        return f"{self.family}_f1"


FRACTION = "others than its own latents carry,"
MEASURES = (
    Measure(
        ABSORBED,
        "truth",
        "Where the features are known",
        "Known features",
        "absorption, how much more often a parent’s latent is silent on rows with a child of it than without one,",
    ),
    Measure(
        "absorption_fraction",
        "absorption",
        "On real rows",
        "Real rows",
        f"absorption, the part of a label that {FRACTION}",
        "label",
        "row",
    ),
    Measure(
        "first_letter_fraction",
        "first_letter",
        "On words in prompts that ask for their first letter",
        "First letters",
        f"absorption, the part of a letter that {FRACTION}",
        "letter",
        "word",
    ),
)
"""What absorption is where features are known, and where they are not."""
ON_LABELS = ("fraction", "full", "n_latents", "f1", "recall")
COLUMNS = (
    *("l0", "ev", ABSORBED, SILENT, MISSED, "truth_f1", "truth_mcc", "truth_found", "truth_unique", "truth_hedging"),
    *(f"{family}_{what}" for family in ("absorption", "first_letter") for what in ON_LABELS),
)


@dataclass(frozen=True)
class Gap:
    """A difference with half its interval, and what the interval was corrected for."""

    difference: float
    half: float
    corrected: str = ""


@dataclass(frozen=True)
class Pair:
    """A nested row to speak of and the flat one it is compared with, in one group."""

    group: Group
    flat: Row
    nested: Row

    def difference(self, table: Table, metric: str) -> Gap | None:
        """Nested minus flat: that of the corrected test at equal L0 where the metric is tested, else with its own 95 % interval;
        None where there is nothing to take an interval from."""
        cell = table.line(self.group, self.nested).cells.get(metric)
        if cell is not None and cell.test is not None and cell.half is not None:
            return Gap(cell.test.difference, cell.half, table.corrected)
        found = compare(self.nested.values(metric), self.flat.values(metric))
        return Gap(found.difference, found.half) if found else None

    def both(self, metric: str) -> str:
        """The nested row's estimate against the flat one's."""
        texts = [
            plus_minus(e) for row in (self.nested, self.flat) if (e := estimate(list(row.values(metric).values())))
        ]
        return " against ".join(texts)


def measured(row: Row, metric: str) -> bool:
    """Whether a row has values of a metric and of explained variance."""
    return bool(row.values(metric)) and bool(row.values("ev"))


def pair_of(results: Results, metric: str) -> Pair | None:
    """Of rows that have the metric beside a flat one, that nearest the paper's α = 0.2 in the largest group."""
    pairs = [
        Pair(group, group.baseline, row)
        for group in results.groups
        for row in group.rows
        if group.baseline and row.sharing and measured(row, metric) and measured(group.baseline, metric)
    ]
    return min(pairs, key=lambda p: (len(p.nested.sharing) != 1, abs(p.nested.sharing[0] - 0.2)), default=None)


def nesting(results: Results) -> Figure | Missing:
    """Absorption against explained variance, a mark a dictionary; and small, the latents of three trees of known features."""
    panels: list[Panel] = []
    numbers: Numbers = []
    rows: list[Row] = []
    for measure in MEASURES:
        metric = measure.metric
        held = [(g, row) for g, group in enumerate(results.groups) for row in group.rows if measured(row, metric)]
        marks = [(g, row, run) for g, row in held for run in row.runs if has(run, metric)]
        if marks:
            rows += [row for _, row in held]
            panels.append(absorption_panel(results, measure, held, marks))
            numbers += [
                {
                    "score": metric,
                    "group": results.groups[g].label,
                    "row": row.label,
                    "seed": run.seed,
                    "ev": run.score("ev"),
                    "value": run.score(metric),
                }
                for g, row, run in marks
            ]
    if not panels:
        return Missing(TITLE, "neither absorption nor known features are among these results")
    drawn = tree_panels(results)
    caption = absorption_caption(results, rows) + (TREES if drawn else "")
    names = [("shared", "shared level"), ("specialised", "specialised level")] if len(drawn) > 1 else []
    return Figure("nesting", TITLE, caption, [*panels, *drawn], [*legend(results, rows), *names], numbers)


def has(run: Run, metric: str) -> bool:
    """Whether a run has a metric and explained variance."""
    return run.score(metric) is not None and run.score("ev") is not None


def absorption_panel(
    results: Results, measure: Measure, held: Sequence[tuple[int, Row]], marks: Sequence[tuple[int, Row, Run]]
) -> Panel:
    """One measure of absorption against explained variance."""
    metric = measure.metric
    label = results.metric(metric).label
    found = []
    for g, row in held:
        x, y = (estimate(list(row.values(id).values())) for id in ("ev", metric))
        if x and y:
            points = [(run.score("ev"), run.score(metric)) for _, r, run in marks if r is row]
            found.append(Cross(row.sharing, g, x, y, [(a, b) for a, b in points if a is not None and b is not None]))
    tips = {
        f"p{i}": f"{run.name}: explained variance {number(run.score('ev') or 0)}, {label} {number(run.score(metric) or 0)}"
        for i, (_, _, run) in enumerate(marks)
    }
    draw = crosses(results, found)
    return Panel(f"nesting-{metric}", measure.title, "explained variance", f"{label} (lower is better)", draw, tips)


def absorption_caption(results: Results, rows: Sequence[Row]) -> str:
    """What marks and bars are."""
    said = "Small marks are dictionaries, large ones means over seeds with 95 % intervals; right and down is better."
    groups = [g for g, group in enumerate(results.groups) if any(row in group.rows for row in rows)]
    return said + marks_note(results, groups)


TREES = (
    " Trees (the three whose roots fire most): circles are true features, with the number of the latent nearest in direction, in "
    "the colour of its level, paler where its cosine is smaller; a thick line joins two features of one latent."
)


def tree_panels(results: Results) -> list[Panel]:
    """The latents of three known trees, of the flat and of the nested dictionary that are spoken of, in every level."""
    pair = pair_of(results, SILENT)
    rows = [pair.flat, pair.nested] if pair else [row for group in results.groups for row in group.rows][:1]
    panels: list[Panel] = []
    for row in rows:
        run = next((run for run in row.runs if run.trees), None)
        if run is None:
            continue
        n_levels = len(run.trees[0][0].levels)
        for level in reversed(range(n_levels)):
            what = f"{'nested' if row.sharing else 'flat'}, {row.label}"
            part = "" if level == n_levels - 1 else f", {'shared' if level == 0 else f'level {level + 1}'} alone"
            draw = trees(run.trees, level, list(run.checkpoint.sizes) if row.sharing else [])
            name = f"Three trees: {what}{part}"
            panels.append(Panel(f"trees-{len(panels)}", name, "", "", draw, height=1.7, width=3.3, small=True))
    return panels


@dataclass(frozen=True)
class NestingTable:
    """A row of numbers for each level of each way of sharing; `heads` are the columns that any has, by id."""

    heads: dict[str, str]
    lines: Sequence[NestingLine]

    @property
    def decimals(self) -> dict[str, int]:
        """Decimals by column id, alike down a column."""
        return {id: column_decimals([line.found[id] for line in self.lines if id in line.found]) for id in self.heads}


@dataclass(frozen=True)
class NestingLine:
    """One level of a row: estimates by column id."""

    group: Group
    row: Row
    level: str
    found: dict[str, Estimate]


SIZE = 0.1
"""How much a flat control may differ from a shared level, as a share, in size and beyond the densities there are."""
OF_STRUCTURE = ("structure_meta", "structure_excess", "structure_control")


def nesting_table(results: Results) -> NestingTable:
    """Every measure of what nesting buys, for each level alone, and of the whole what its structure is."""
    lines = []
    for group in results.groups:
        for row in group.rows:
            last = len(row.runs[0].levels) - 1
            for level in range(last + 1):
                found = {id: e for id in COLUMNS if (e := estimate(list(row.values(id, level).values())))}
                if level == last:
                    found |= structure(group, row)
                if found.keys() - {"l0", "ev"}:
                    name = "whole" if level == last else "shared alone" if level == 0 else f"level {level + 1} alone"
                    lines.append(NestingLine(group, row, name, found))
    ids = [id for id in (*COLUMNS, *OF_STRUCTURE) if any(id in line.found for line in lines)]
    return NestingTable({id: results.metric(id).label for id in ids}, lines)


def structure(group: Group, row: Row) -> dict[str, Estimate]:
    """Estimates of the meta-dictionary, of containment over chance in the shared level, and of the same in flat
    dictionaries, in sets as large and as dense as the level."""
    flat = {run.replicate: run for run in group.baseline.runs} if group.baseline else {}
    values = {
        "structure_meta": [run.structure.meta for run in row.runs],
        "structure_excess": [run.structure.level.excess if run.structure.level else None for run in row.runs],
        "structure_control": [
            control(run.structure.level, flat[run.replicate].structure.controls) if run.replicate in flat else None
            for run in row.runs
        ],
    }
    found = {id: estimate([value for value in some if value is not None]) for id, some in values.items()}
    return {id: e for id, e in found.items() if e}


def control(level: Container | None, controls: Sequence[Container]) -> float | None:
    """Containment over chance at the level's density, straight over log density between sets of the level's size.

    None where no set is as large within SIZE, or none as dense within SIZE of the densest and the sparsest.
    """
    same = [one for one in controls if level and abs(one.share / level.share - 1) <= SIZE]
    if not level or not same:
        return None
    densities = [one.density for one in same]
    if not min(densities) / (1 + SIZE) <= level.density <= max(densities) * (1 + SIZE):
        return None
    return interpolated(level.density, [(one.density, one.excess) for one in same])


def nesting_rows(table: NestingTable) -> list[dict[str, Any]]:
    """The table as CSV rows."""
    return [
        {
            "group": line.group.label,
            "row": line.row.label,
            "level": line.level,
            "metric": id,
            "mean": e.mean,
            "low": e.low,
            "high": e.high,
            "seeds": e.n,
        }
        for line in table.lines
        for id, e in line.found.items()
    ]

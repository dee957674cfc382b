"""The report's figures: what each shows, its panels, sentences that say what they show, and its numbers.

Each builder takes the results and returns a Figure, or a Missing that says what is not there. Curves and points are means
over seeds; bands and bars are 95 % t-intervals. The figures over checkpoints and settings are in `figures_across.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluate.report.drawing import Band, band_of, band_rows, bars, legend, row_lines, shaded
from evaluate.report.runs import Group, Results, Row
from evaluate.report.scored import Run
from evaluate.report.svg import Panel
from evaluate.report.wording import percent, plus_minus
from evaluate.statistics import estimate

MAX_GROUPS = 3
Numbers = list[dict[str, Any]]


@dataclass(frozen=True)
class Figure:
    """Panels with what they show. `legend` holds (colour variable, label); `numbers` are the rows of its CSV file."""

    id: str
    title: str
    caption: str
    panels: Sequence[Panel]
    legend: Sequence[tuple[str, str]]
    numbers: Numbers


@dataclass(frozen=True)
class Missing:
    """A figure that these results cannot show, and why."""

    title: str
    reason: str


def shown_groups(results: Results) -> tuple[Group, ...]:
    """The groups that figures draw one by one: all of a few, else the main one alone."""
    return results.groups if len(results.groups) <= MAX_GROUPS else results.groups[:1]


def group_note(results: Results) -> str:
    """A sentence when not every group is drawn."""
    if len(results.groups) <= MAX_GROUPS:
        return ""
    return f" Drawn for the first of {len(results.groups)} groups ({results.main.label})."


def titled(results: Results, group: Group, title: str) -> str:
    """A panel title with its group, where several are drawn."""
    return f"{title} ({group.label})" if len(shown_groups(results)) > 1 else title


TERMS = {
    "loss": "total loss",
    "recon_innermost": "reconstruction, innermost level",
    "recon_whole": "reconstruction, whole dictionary",
    "l1_shared": "L1, shared latents",
    "l1_specialised": "L1, specialised latents",
    "aux": "auxiliary loss",
}


def loss(results: Results) -> Figure | Missing:
    """Figure 1: training loss and its terms over steps."""
    title = "Training loss over steps"
    panels: list[Panel] = []
    numbers: Numbers = []
    rows: list[Row] = []
    for g, group in enumerate(shown_groups(results)):
        for term, label in TERMS.items():
            lines = {row: band for row in group.rows if (band := curve_band(row, term))}
            if lines:
                draw = shaded(results, lines, log=term in ("loss", "recon_innermost", "recon_whole"))
                panels.append(Panel(f"loss-{g}-{term}", titled(results, group, label), "step", "loss", draw))
                numbers += band_rows({"group": group.label, "term": term}, "step", lines)
                rows += lines
    if not panels:
        return Missing(title, "these results carry no loss curve")
    return Figure("loss", title, loss_caption(results) + group_note(results), panels, legend(results, rows), numbers)


def curve_of(run: Run, term: str) -> Mapping[int, float]:
    """One term of a run's loss curve by step; empty when it has none, or when the term is 0 throughout."""
    found = {} if term == "recon_innermost" and not run.sharing else run.curve.get(term, {})
    return found if any(found.values()) else {}


def curve_band(row: Row, term: str) -> Band:
    """Mean and interval of a term at the steps that all seeds which have it logged."""
    return band_of([curve for run in row.runs if (curve := curve_of(run, term))], common=True)


def loss_caption(results: Results) -> str:
    """Where the totals end, and why they must not be compared across α."""
    text = (
        "Means over seeds, shaded 95 % intervals. A nested total holds one reconstruction term a level, so totals of flat "
        "and nested dictionaries are not comparable; the terms are."
    )
    ends = {row: band[-1][1] for row in results.main.rows if (band := curve_band(row, "loss"))}
    flat = next((e for row, e in ends.items() if not row.sharing), None)
    nested = {row: e for row, e in ends.items() if row.sharing}
    if flat is None or not nested or flat.mean == 0:
        return text
    ratios = ", ".join(f"{e.mean / flat.mean:.2f} at {row.label}" for row, e in nested.items())
    return (
        f"{text} The last logged total is {plus_minus(flat)} flat, and nested that times {ratios}. The paper reports 200 flat "
        "and 405 nested, 2.03 times as much, which fits one reconstruction term a level."
    )


SCORES_BY_N = {
    "scr": "spurious correlation removal",
    "sparse_coding_ev": "explained variance of the n largest latents",
    "sparse_coding_rate": "sparse coding rate",
    "tpp": "targeted probe perturbation",
    "k_sparse_probe": "k-sparse probing, n = k",
}


def across_n(results: Results) -> Figure | Missing:
    """Spurious correlation removal, explained variance and its share of the whole, targeted probe perturbation across n."""
    title = "Scores across the number of latents n"
    panels: list[Panel] = []
    numbers: Numbers = []
    rows: list[Row] = []
    captions = []
    for g, group in enumerate(shown_groups(results)):
        for name, label in SCORES_BY_N.items():
            lines = {row: band for row in group.rows if (band := band_of([run.at(name) for run in row.runs]))}
            if lines:
                draw = bars(row_lines(results, lines), log=True, ticks=True)
                panels.append(Panel(f"n-{g}-{name}", titled(results, group, label), "n (latents)", "score", draw))
                numbers += band_rows({"group": group.label, "score": name}, "n", lines)
                rows += lines
                captions += [across_caption(label, lines)] if group is results.main else []
    if not panels:
        return Missing(title, "neither SCR nor a sparse coding rate is among these results")
    caption = f"{' '.join(captions)} Bars are 95 % intervals over seeds.{group_note(results)}"
    return Figure("across-n", title, caption, panels, legend(results, rows), numbers)


def across_caption(label: str, lines: Mapping[Row, Band]) -> str:
    """The range of rows at the n nearest 20, and whether their intervals have a value in common."""
    ns = sorted(set.intersection(*({n for n, _ in band} for band in lines.values())))
    if not ns:
        return ""
    n = min(ns, key=lambda n: abs(n - 20))
    at = {row: dict(band)[n] for row, band in lines.items()}
    low, high = min(at, key=lambda row: at[row].mean), max(at, key=lambda row: at[row].mean)
    if low is high:
        return f"{label.capitalize()} at n = {n:g} is {plus_minus(at[low])} ({low.label})."
    said = (
        f"{label.capitalize()} at n = {n:g} runs from {plus_minus(at[low])} ({low.label}) "
        f"to {plus_minus(at[high])} ({high.label})"
    )
    lows = [e.low for e in at.values() if e.low is not None]
    highs = [e.high for e in at.values() if e.high is not None]
    if len(lows) < len(at):
        return f"{said}."
    return f"{said}; the intervals {'all overlap' if max(lows) <= min(highs) else 'do not all overlap'}."


def by_level(results: Results) -> Figure | Missing:
    """Figure 3: each level alone, from the shared dictionary to the whole."""
    title = "Each level alone"
    panels: list[Panel] = []
    numbers: Numbers = []
    rows: list[Row] = []
    if not any(row.sharing for group in shown_groups(results) for row in group.rows):
        return Missing(title, "no dictionary here is nested")
    for g, group in enumerate(shown_groups(results)):
        for id in ("kl_nats", "ev", "l0"):
            lines = {row: band for row in group.rows if (band := level_band(row, id))}
            if lines:
                metric = results.metric(id)
                draw = bars(row_lines(results, lines), log=False, ticks=False)
                label = f"{metric.label} ({metric.unit})"
                panels.append(
                    Panel(f"level-{g}-{id}", titled(results, group, metric.label), "latents in the level", label, draw)
                )
                numbers += band_rows({"group": group.label, "score": id}, "latents", lines)
                rows += lines
    if not panels:
        return Missing(title, "KL, explained variance and L0 are not among these results")
    return Figure("levels", title, level_caption(results) + group_note(results), panels, legend(results, rows), numbers)


def level_band(row: Row, metric: str) -> Band:
    """Mean and interval of a score by the level's number of latents."""
    sizes = [level.n_latents for level in row.runs[0].levels]
    found = [(m, estimate(list(row.values(metric, i).values()))) for i, m in enumerate(sizes)]
    return [(m, e) for m, e in found if e]


def level_caption(results: Results) -> str:
    """How much of the whole dictionary's explained variance the innermost level keeps."""
    parts = []
    for row in results.main.rows:
        band = level_band(row, "ev")
        if row.sharing and len(band) > 1 and band[-1][1].mean > 0:
            (m, inner), (width, whole) = band[0], band[-1]
            parts.append(f"{percent(inner.mean / whole.mean)} at {row.label} ({m:,} of {width:,} latents)")
    text = "Left ends are the innermost (shared) dictionary used alone, right ends the whole; a flat one is a single point."
    if not parts:
        return text
    return f"{text} Alone, the innermost level keeps this share of the whole’s explained variance: {', '.join(parts)}."

"""Figures across checkpoints and settings: quality against sparsity, how often latents fire, ablations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from evaluate.report.drawing import Band, FrontLine, Point, bars, colour, histograms, legend, marks_note, scatter
from evaluate.report.figures import Figure, Missing, Numbers, across_n, by_level, loss
from evaluate.report.nesting import nesting
from evaluate.report.runs import Group, Results, Row, sharing_label
from evaluate.report.scored import BLOCKS, Histogram, Run, Sharing
from evaluate.report.svg import Panel
from evaluate.report.wording import first_upper, number, plus_minus
from evaluate.statistics import Estimate, estimate


def make_figures(results: Results) -> list[Figure | Missing]:
    """All figures in reading order: those of the opening, which answer the report's question, then all others."""
    others = [builder(results) for builder in (loss, across_n, by_level, density, ablation)]
    elsewhere = [fronts(results, elsewhere=True)] if len(results.places) > 1 else []
    return [*opening(results), *others[:1], *elsewhere, *others[1:]]


def opening(results: Results) -> list[Figure | Missing]:
    """What nesting costs, in KL and explained variance against L0, and what it buys against what it costs."""
    return [fronts(results), nesting(results)]


def fronts(results: Results, *, elsewhere: bool = False) -> Figure | Missing:
    """KL and explained variance against L0, fronts of flat and nested dictionaries drawn: of the main place; or of all
    others, each apart."""
    title = "Quality against sparsity" + (" in other places" if elsewhere else "")
    panels: list[Panel] = []
    numbers: Numbers = []
    captions = []
    held = [(p, *place) for p, place in enumerate(results.places) if (p > 0) == elsewhere]
    for p, place, runs in held:
        for id in ("kl_nats", "ev"):
            metric = results.metric(id)
            scored = [(run, run.score("l0"), run.score(id)) for run in runs]
            points = [(run, x, y) for run, x, y in scored if x is not None and y is not None]
            if points:
                tips = {
                    f"p{i}": f"{run.name}: L0 {number(x)}, {metric.label} {number(y)}"
                    for i, (run, x, y) in enumerate(points)
                }
                lines = front_lines(results, runs, id)
                draw = scatter(results, points, lines, fronts_of(points, lines, metric.better == "higher"))
                name = f"{first_upper(metric.label)} against L0" + (f" ({place})" if place else "")
                unit = "" if metric.unit == "fraction" else f" ({metric.unit})"
                label = f"{metric.label}{unit}"
                panels.append(Panel(f"pareto-{p}-{id}", name, "L0 (latents/token)", label, draw, tips))
                numbers += [
                    {"place": place, "score": id, **point_row(run), "l0": x, "value": y} for run, x, y in points
                ]
                captions.append(front_caption(metric.label, place, metric.better == "higher", points))
    if not panels:
        return Missing(title, "L0 with KL or explained variance is not among these results")
    there = {run.place for _, _, runs in held for run in runs}
    groups = [g for g, group in enumerate(results.groups) if group.runs[0].place in there]
    note = front_note(results, [runs for _, _, runs in held])
    caption = f"{note} Point at a point, or tap it, to see which checkpoint it is. {' '.join(captions)}"
    caption += marks_note(results, groups)
    rows = [row for g in groups for row in results.groups[g].rows]
    id = "pareto-elsewhere" if elsewhere else "pareto"
    return Figure(id, title, caption, panels, legend(results, rows), numbers)


def front_note(results: Results, places: Sequence[Sequence[Run]]) -> str:
    """What points, lines and bars are, of those that there are."""
    lasts = {id(run) for group in results.groups for run in group.runs}
    all_last = all(id(run) in lasts for runs in places for run in runs)
    said = "A point is a checkpoint" + ("" if all_last else ", larger where it is a training’s last")
    lines = [line for runs in places for id in ("kl_nats", "ev") for _, _, line in front_lines(results, runs, id)]
    if any(len(line) > 1 for line in lines):
        return f"{said}; lines join the means of last checkpoints of one kind trained to different L0."
    stairs = "dashed steps are the fronts of flat and, in grey, of nested dictionaries"
    if any(e.half for line in lines for _, e in line):
        return f"{said}; bars are means of last checkpoints with 95 % intervals; {stairs}."
    return f"{said}; {stairs}."


def front_lines(results: Results, runs: Sequence[Run], metric: str) -> list[FrontLine]:
    """Means over replicates against mean L0, by how latents are shared, of groups that differ in sparsity alone."""
    here = {id(run) for run in runs}
    lines: dict[tuple[str, Sharing], list[tuple[float, Estimate]]] = {}
    for group in results.groups:
        for row in group.rows:
            at, found = estimate(list(row.values("l0").values())), estimate(list(row.values(metric).values()))
            if id(row.runs[0]) in here and at and found and at.mean > 0:
                lines.setdefault((group.family, row.sharing), []).append((at.mean, found))
    return [(sharing, family, sorted(line, key=lambda at: at[0])) for (family, sharing), line in lines.items()]


def fronts_of(points: Sequence[Point], lines: Sequence[FrontLine], higher: bool) -> list[list[Point]]:
    """The front of flat dictionaries and that of nested ones, where no line joins dictionaries of several sparsities."""
    if any(len(line) > 1 for _, _, line in lines):
        return []
    kinds = ([point for point in points if bool(point[0].sharing) == nested] for nested in (False, True))
    return [front(higher, kind) for kind in kinds]


def point_row(run: Run) -> dict[str, str | int]:
    """What tells a checkpoint from others, as CSV columns."""
    return {"checkpoint": run.name, "row": sharing_label(run.sharing), "seed": run.seed, "step": run.step}


def front(higher: bool, points: Sequence[Point]) -> list[Point]:
    """The points that no other one matches: at most as many latents a token, and at least as good."""
    sign = -1 if higher else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p[1], sign * p[2])):
        if not best or sign * point[2] < sign * best[-1][2]:
            best.append(point)
    return best


def front_caption(label: str, place: str, higher: bool, points: Sequence[Point]) -> str:
    """Which ways of sharing stand on the front of one place."""
    best = front(higher, points)
    counts = Counter(sharing_label(run.sharing) for run, _, _ in best)
    listed = "; ".join(f"{n} with {name}" for name, n in counts.most_common())
    where = f" of {place}" if place else ""
    return f"On the {label} front{where} (nothing as sparse is better) stand {len(best)} of {len(points)}: {listed}."


def density(results: Results) -> Figure | Missing:
    """Figure 5: how often latents fire, shared and specialised apart."""
    title = "How often latents fire"
    panels: list[Panel] = []
    numbers: Numbers = []
    medians = []
    drawn: set[str] = set()
    for r, row in enumerate(results.main.rows):
        blocks = {name: found for name in BLOCKS if (found := histogram(row, name))}
        if blocks:
            drawn |= blocks.keys()
            draw = histograms(blocks)
            panels.append(
                Panel(
                    f"density-{r}", row.label, "log₁₀ density (share of tokens)", "share of latents", draw, height=2.3
                )
            )
            numbers += [bin for name, found in blocks.items() for bin in histogram_rows(row, name, found)]
            medians.append(f"{row.label}: " + ", ".join(f"{name} {10 ** median(*h):.2g}" for name, h in blocks.items()))
    if not panels:
        return Missing(title, "these results carry no density histogram")
    caption = f"Latents that fired, all seeds together. Median share of tokens by block: {'; '.join(medians)}."
    if results.main.label:
        caption += f" Drawn for {results.main.label}."
    return Figure("density", title, caption, panels, [(name, name) for name in BLOCKS if name in drawn], numbers)


def histogram(row: Row, block: str) -> Histogram | None:
    """Edges (log10 density) and counts of a block of latents, summed over seeds; None when no run carries them."""
    found = [run.density[block] for run in row.runs if block in run.density]
    if not found:
        return None
    same = [counts for edges, counts in found if edges == found[0][0]]
    return found[0][0], [sum(counts) for counts in zip(*same)]


def histogram_rows(row: Row, block: str, found: Histogram) -> Numbers:
    """A histogram as CSV rows."""
    edges, counts = found
    return [
        {"row": row.label, "block": block, "log10_low": low, "log10_high": high, "latents": n}
        for low, high, n in zip(edges, edges[1:], counts)
    ]


def median(edges: list[float], counts: list[float]) -> float:
    """The middle of a histogram, interpolated within its bin."""
    cumulative = np.concatenate([[0.0], np.cumsum(counts)])
    return float(np.interp(cumulative[-1] / 2, cumulative, edges))


def ablation(results: Results) -> Figure | Missing:
    """Figure 6: scores against each numeric setting in which the results differ."""
    title = "Ablations"
    panels: list[Panel] = []
    numbers: Numbers = []
    rows: list[Row] = []
    axes = dict(ablation_axes(results))
    for setting, groups in axes.items():
        rows += [row for group in groups for row in group.rows]
        for id in ("kl_nats", "ev", "l0"):
            lines = ablation_lines(setting, groups, id)
            if lines:
                metric = results.metric(id)
                log = setting != "layer" and all(float(group.settings[setting]) > 0 for group in groups)
                draw = bars(
                    [(colour(results, s), sharing_label(s), band) for s, band in lines.items()], log=log, ticks=True
                )
                label = f"{metric.label} ({metric.unit})"
                panels.append(Panel(f"ablation-{setting}-{id}", f"{metric.label} by {setting}", setting, label, draw))
                numbers += ablation_rows(setting, id, lines)
    if not panels:
        return Missing(title, "these results do not differ in width, learning rate, layer or another number")
    return Figure("ablations", title, ablation_caption(results, axes), panels, legend(results, rows), numbers)


def ablation_axes(results: Results) -> Iterator[tuple[str, list[Group]]]:
    """Each numeric setting with several values, and the groups along it: all other settings as in the main group."""
    main = results.main.settings
    for setting, value in main.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        numeric = [group for group in results.groups if isinstance(group.settings.get(setting), int | float)]
        along = [group for group in numeric if group.settings | {setting: value} == main]
        if len(along) > 1:
            yield setting, sorted(along, key=lambda group: float(group.settings[setting]))


def ablation_lines(setting: str, groups: Sequence[Group], metric: str) -> dict[Sharing, Band]:
    """Estimates along a setting, by way of sharing."""
    lines: dict[Sharing, Band] = {}
    for group in groups:
        for row in group.rows:
            if e := estimate(list(row.values(metric).values())):
                lines.setdefault(row.sharing, []).append((float(group.settings[setting]), e))
    return lines


def ablation_rows(setting: str, metric: str, lines: Mapping[Sharing, Band]) -> Numbers:
    """Estimates along a setting as CSV rows."""
    return [
        {
            "setting": setting,
            "value": x,
            "row": sharing_label(sharing),
            "score": metric,
            "mean": e.mean,
            "low": e.low,
            "high": e.high,
            "seeds": e.n,
        }
        for sharing, band in lines.items()
        for x, e in band
    ]


def ablation_caption(results: Results, axes: Mapping[str, Sequence[Group]]) -> str:
    """At which value of each setting KL and explained variance are best for the flat dictionary, or the first row."""
    sentences = []
    for id in ("kl_nats", "ev"):
        metric, parts = results.metric(id), []
        for setting, groups in axes.items():
            lines = ablation_lines(setting, groups, id)
            if lines:
                sharing = min(lines, key=lambda s: (len(s), s))
                best = (max if metric.better == "higher" else min)(lines[sharing], key=lambda point: point[1].mean)
                parts.append(f"{setting} {best[0]:g} ({plus_minus(best[1])}, {sharing_label(sharing)})")
        if parts:
            word = "highest" if metric.better == "higher" else "lowest"
            sentences.append(f"{first_upper(metric.label)} is {word} at {'; '.join(parts)}.")
    return (
        " ".join(sentences)
        + " Settings not on an axis are those of the largest group; no test is made between settings, and "
        "their L0 may differ."
    )

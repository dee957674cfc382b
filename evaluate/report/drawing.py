"""How panels are drawn: each function returns one that plots into given axes, in the stand-in colours of `svg.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from evaluate.report.runs import Results, Row, sharing_label
from evaluate.report.scored import Histogram, Node, Run, Sharing
from evaluate.report.svg import BLOCK_COLOURS, INK, N_SERIES, PAPER, QUIET, RULE, SERIES
from evaluate.statistics import Estimate, estimate

MARKERS, MARK_NAMES = "os^DvP*X", "●■▲◆▼✚★✖"
"""A mark a group, and its look in text."""
Band = list[tuple[float, Estimate]]
"""Estimates along an axis."""
Draw = Callable[[Axes], None]
Point = tuple[Run, float, float]
FrontLine = tuple[Sharing, str, Band]
"""A way of sharing, what else tells the dictionaries of a line from others, and means along L0."""


def colour(results: Results, sharing: Sharing) -> str:
    """The stand-in colour of a way of sharing: ink for flat."""
    return SERIES[series_index(results, sharing)] if sharing else INK


def series_index(results: Results, sharing: Sharing) -> int:
    """The position of a way of sharing in the palette; those beyond its end share the last colour."""
    return min(results.sharings.index(sharing), N_SERIES - 1)


def legend(results: Results, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Colour variables of the page and labels of the rows' ways of sharing, each once."""
    present = {row.sharing for row in rows}
    return [(f"s{series_index(results, s)}", sharing_label(s)) for s in results.sharings if s in present]


def band_of(points: Sequence[Mapping[int, float]], *, common: bool = False) -> Band:
    """Estimates over seeds at every x that any seed has, or only at those that all have."""
    keys = [set(p) for p in points]
    xs = sorted(set.intersection(*keys) if common and keys else set().union(*keys))
    return [(x, e) for x in xs if (e := estimate([p[x] for p in points if x in p]))]


def band_rows(names: dict[str, Any], x: str, lines: Mapping[Row, Band]) -> list[dict[str, Any]]:
    """Bands as CSV rows: what they are of, the row, the value of x, mean, interval, seeds."""
    return [
        {**names, "row": row.label, x: at, "mean": e.mean, "low": e.low, "high": e.high, "seeds": e.n}
        for row, band in lines.items()
        for at, e in band
    ]


def marks_note(results: Results, groups: Sequence[int]) -> str:
    """Which mark is which group's, of the groups with these places; empty for one. With more groups than marks, that marks
    come again."""
    if len(groups) < 2:
        return ""
    if max(groups) >= len(MARKERS):
        return f" Marks are those of groups in the order of Table 1, and begin again after {len(MARKERS)}."
    marks = [f"{MARK_NAMES[g]} {results.groups[g].label}" for g in groups]
    return f" Marks: {', '.join(marks)}."


def shaded(results: Results, lines: Mapping[Row, Band], *, log: bool) -> Draw:
    """Lines of means with shaded intervals; on a logarithmic y when asked and all means are above 0."""

    def draw(axes: Axes) -> None:
        for row, band in lines.items():
            x, mean = [at for at, _ in band], np.array([e.mean for _, e in band])
            half = np.array([e.half or 0.0 for _, e in band])
            axes.plot(x, mean, color=colour(results, row.sharing), label=row.label)
            if half.any():
                low = np.maximum(mean - half, mean.min() / 2) if log else mean - half
                axes.fill_between(x, low, mean + half, color=colour(results, row.sharing), alpha=0.18, lw=0)
        if log and all(e.mean > 0 for band in lines.values() for _, e in band):
            logarithmic(axes, x=False)

    return draw


def bars(lines: Sequence[tuple[str, str, Band]], *, log: bool, ticks: bool) -> Draw:
    """Points with interval bars, joined: (colour, label, band) each; `ticks` puts one at every x and nowhere else.

    Lines with an x in common stand a little beside it, each on its side, so that no bar hides another.
    """
    xs = sorted({x for _, _, band in lines for x, _ in band})

    def draw(axes: Axes) -> None:
        for i, (shade, label, band) in enumerate(lines):
            axes.errorbar(
                [dodged(x, i - (len(lines) - 1) / 2, xs, log) for x, _ in band],
                [e.mean for _, e in band],
                [e.half or 0.0 for _, e in band],
                color=shade,
                label=label,
                marker="o",
                ms=3.5,
                elinewidth=0.9,
                lw=1.3,
            )
        if log:
            logarithmic(axes, x=True)
        if ticks:
            axes.set_xticks(xs, [f"{x:g}" for x in xs])
            axes.xaxis.set_minor_locator(NullLocator())

    return draw


def dodged(x: float, place: float, xs: Sequence[float], log: bool) -> float:
    """x moved by a fraction of the least gap between the xs, on a logarithmic axis in proportion."""
    if len(xs) < 2:
        return x
    if log:
        return x * math.pow(min(b / a for a, b in zip(xs, xs[1:])), 0.07 * place)
    return x + 0.012 * place * (xs[-1] - xs[0])


def row_lines(results: Results, lines: Mapping[Row, Band]) -> list[tuple[str, str, Band]]:
    """Rows' bands in their colours, for `bars`."""
    return [(colour(results, row.sharing), row.label, band) for row, band in lines.items()]


def logarithmic(axes: Axes, *, x: bool) -> None:
    """A logarithmic axis with plain numbers at 1, 2, 3 and 5 of each decade."""
    (axes.set_xscale if x else axes.set_yscale)("log")
    axis = axes.xaxis if x else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def scatter(
    results: Results, points: Sequence[Point], lines: Sequence[FrontLine], fronts: Sequence[Sequence[Point]]
) -> Draw:
    """One artist a checkpoint, so that each can be pointed at; a marker a group; last checkpoints larger; lines over L0; and
    fronts, that of flat dictionaries and that of nested ones, as steps: none better until the next, which is less sparse."""
    marker = {id(run): MARKERS[g % len(MARKERS)] for g, group in enumerate(results.groups) for run in group.runs}
    xs = [x for _, x, _ in points]

    def draw(axes: Axes) -> None:
        for best, shade in zip(fronts, (INK, QUIET)):
            steps = [(x, y) for _, x, y in best]
            steps += [(max(xs), y) for _, y in steps[-1:]]
            axes.step([x for x, _ in steps], [y for _, y in steps], where="post", color=shade, lw=0.9, ls=(0, (3, 2)))
        for sharing, _, band in lines:
            shade = colour(results, sharing)
            axes.errorbar(
                [x for x, _ in band],
                [e.mean for _, e in band],
                [e.half or 0.0 for _, e in band],
                color=shade,
                lw=1.3,
                elinewidth=0.9,
                label=sharing_label(sharing),
            )
        for i, (run, x, y) in enumerate(points):
            last = id(run) in marker
            axes.plot(
                [x],
                [y],
                marker.get(id(run), "o"),
                color=colour(results, run.sharing),
                ms=6 if last else 3,
                alpha=0.8 if last else 0.4,
                mew=0,
                gid=f"p{i}",
            )
        if min(xs) > 0 and max(xs) > 1.5 * min(xs):
            logarithmic(axes, x=True)

    return draw


@dataclass(frozen=True)
class Cross:
    """A row's mean with an interval along both axes, and its dictionaries as points; `group` says which mark."""

    sharing: Sharing
    group: int
    x: Estimate
    y: Estimate
    points: Sequence[tuple[float, float]]


def crosses(results: Results, rows: Sequence[Cross]) -> Draw:
    """A small mark a dictionary, named p0, p1 … in order so that each can be pointed at, and a large one a row with bars."""

    def draw(axes: Axes) -> None:
        n = 0
        for row in rows:
            shade, marker = colour(results, row.sharing), MARKERS[row.group % len(MARKERS)]
            for x, y in row.points:
                axes.plot([x], [y], marker, color=shade, ms=4, alpha=0.5, mew=0, gid=f"p{n}")
                n += 1
            axes.errorbar(
                [row.x.mean],
                [row.y.mean],
                [row.y.half or 0.0],
                [row.x.half or 0.0],
                fmt=marker,
                color=shade,
                ms=7,
                mew=0,
                elinewidth=1.1,
                label=sharing_label(row.sharing),
            )
        axes.margins(0.12)

    return draw


def trees(shown: Sequence[Sequence[Node]], level: int, sizes: Sequence[int]) -> Draw:
    """Trees side by side, roots on top: each feature a circle in the colour of the level that its latent in `level` is of.

    `sizes` are the cumulative sizes of a nested dictionary; empty draws in ink. Paler where |cosine| is smaller; roots and
    their children carry the latent's number; a thick line joins a feature and a parent of one latent.
    """

    def shade(node: Node) -> str:
        if not sizes:
            return INK
        return BLOCK_COLOURS["shared" if node.levels[level].latent < sizes[0] else "specialised"]

    def draw(axes: Axes) -> None:
        left, deepest = 0.0, max(node.depth for tree in shown for node in tree)
        for tree in shown:
            at, width = placed(tree, left)
            for node in tree:
                x, y = at[node.feature]
                held = node.levels[level]
                if node.parent in at:
                    up = next(other.levels[level].latent for other in tree if other.feature == node.parent)
                    axes.plot(
                        [x, at[node.parent][0]],
                        [y, at[node.parent][1]],
                        color=INK if up == held.latent else RULE,
                        lw=3 if up == held.latent else 0.8,
                        zorder=1,
                    )
                size = 4 if node.depth == deepest > 1 else 7
                axes.plot([x], [y], "o", color=PAPER, ms=size, mew=0, zorder=2)
                axes.plot(
                    [x], [y], "o", color=shade(node), alpha=min(1.0, held.cosine**2 + 0.08), ms=size, mew=0, zorder=3
                )
                axes.plot([x], [y], "o", mfc="none", mec=shade(node), ms=size, mew=0.6, zorder=4)
                if node.depth < max(deepest, 2):
                    axes.annotate(f"{held.latent}", (x, y), (4, 2), textcoords="offset points", fontsize=7, color=INK)
            left += width + 1
        axes.set_xlim(-0.8, left - 1.2)
        axes.set_ylim(-deepest - 0.35, 0.5)
        axes.set_axis_off()

    return draw


def placed(tree: Sequence[Node], left: float) -> tuple[dict[int, tuple[float, float]], float]:
    """Where each feature of a tree stands, leaves side by side from `left` on and parents over their children; its width."""
    children: dict[int, list[int]] = {}
    for node in tree[1:]:
        children.setdefault(node.parent, []).append(node.feature)
    x: dict[int, float] = {}
    waiting, n_leaves = [tree[0].feature], 0
    while waiting:
        feature = waiting.pop()
        if feature in children:
            waiting += reversed(children[feature])
        else:
            x[feature] = left + n_leaves
            n_leaves += 1
    for node in reversed(tree):
        if node.feature in children:
            x[node.feature] = sum(x[child] for child in children[node.feature]) / len(children[node.feature])
    return {node.feature: (x[node.feature], -float(node.depth)) for node in tree}, float(n_leaves)


def histograms(blocks: Mapping[str, Histogram]) -> Draw:
    """Step histograms, each scaled to its own number of latents."""

    def draw(axes: Axes) -> None:
        for name, (edges, counts) in blocks.items():
            share = np.array(counts) / max(sum(counts), 1)
            axes.stairs(share, edges, color=BLOCK_COLOURS[name], fill=True, alpha=0.25)
            axes.stairs(
                share, edges, color=BLOCK_COLOURS[name], lw=1.4, label=name, ls="-" if name == "shared" else "--"
            )

    return draw


def held(blocks: Mapping[str, Histogram]) -> tuple[float, float]:
    """The edges between which any latents lie, a bin to spare on either side."""
    edges = next(iter(blocks.values()))[0]
    filled = [i for _, counts in blocks.values() for i, n in enumerate(counts) if n]
    first, last = (min(filled), max(filled)) if filled else (0, len(edges) - 2)
    return edges[max(0, first - 1)], edges[min(len(edges) - 1, last + 2)]

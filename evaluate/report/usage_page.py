"""Table 2: how latents are used, shared and specialised apart: evenness, geometry, correlation."""

from __future__ import annotations

from typing import Any

from evaluate.report.markup import Html, h, join, text
from evaluate.report.runs import Results, Row, Run
from evaluate.report.table import number
from evaluate.report.table_page import download, number_half
from evaluate.statistics import Estimate, estimate

Path = tuple[str, ...]
COLUMNS: dict[str, tuple[str, Path]] = {
    "entropy": ("utilisation (entropy) ↑", ("utilisation", "{block}", "entropy")),
    "gini": ("utilisation (Gini) ↓", ("utilisation", "{block}", "gini")),
    "freq_over_1_percent": ("latents over 1 %", ("utilisation", "{block}", "freq_over_1_percent")),
    "encoder_decoder": ("encoder–decoder cosine, median", ("geometry", "encoder_decoder", "{block}", "p50")),
    "nearest": ("nearest neighbour’s cosine, median ↓", ("geometry", "nearest", "within {block}", "p50")),
    "pearson": ("mean |Pearson|", ("correlation", "within {block}", "mean_abs_pearson")),
}
"""Column id (a metric's) → its head, and where in a results file's `features` it stands for a block."""
ACROSS: dict[str, Path] = {
    "nearest": ("geometry", "nearest", "shared to specialised", "p50"),
    "pearson": ("correlation", "across", "mean_abs_pearson"),
}
BLOCKS = ("shared", "specialised", "shared with specialised")


def find(run: Run, path: Path) -> float | None:
    """A number deep in a run's features; None where any part of the path is not there."""
    at: Any = run.data.get("features") or {}
    for name in path:
        at = at.get(name) if isinstance(at, dict) else None
    return float(at) if isinstance(at, int | float) else None


def block_estimates(row: Row, block: str) -> dict[str, Estimate]:
    """Estimates over seeds of every column that is there, for a block or for pairs across blocks."""
    found: dict[str, Estimate] = {}
    for id, (_, template) in COLUMNS.items():
        path = ACROSS.get(id) if block == BLOCKS[2] else tuple(part.format(block=block) for part in template)
        values = [value for run in row.runs if path and (value := find(run, path)) is not None]
        if e := estimate(values):
            found[id] = e
    return found


def usage_rows(results: Results) -> list[dict[str, Any]]:
    """Table 2 as CSV rows."""
    return [
        {"group": group.label, "row": row.label, "block": block, "metric": id, "mean": e.mean, "low": e.low, "high": e.high,
         "seeds": e.n}
        for group in results.groups
        for row in group.rows
        for block in BLOCKS
        for id, e in block_estimates(row, block).items()
    ]  # fmt: skip


def usage_section(results: Results, folder: str) -> Html:
    """The table, or a sentence that says that it is missing."""
    lines = [
        (group.label, row, block, found)
        for group in results.groups
        for row in group.rows
        for block in BLOCKS
        if (found := block_estimates(row, block))
    ]
    ids = [id for id in COLUMNS if any(id in found for *_, found in lines)]
    if not ids:
        return h("p", "How latents are used: no table, because these results carry no such features.", class_="missing")
    heads = [h("th", h("a", COLUMNS[id][0], href=f"#metric-{id}"), scope="col") for id in ids]
    head = h("tr", h("th", "Latents", scope="col"), *heads)
    rows = [usage_row(label, row, block, [found.get(id) for id in ids]) for label, row, block, found in lines]
    drawn = h("table", h("thead", head), h("tbody", *rows), class_="scores usage")
    return h(
        "section",
        h("h2", "How latents are used"),
        h("p", h("b", "Table 2. "), "Each block of latents, and pairs across blocks; means over seeds ± half of the 95 % "
          "interval. Nothing here is tested. Correlations are of sampled latents.", class_="caption"),
        h("div", drawn, class_="scroll", tabindex="0", role="region", aria_label="Table 2, scrolls sideways"),
        h("p", download(folder, "table2.csv"), class_="files"),
        id="use",
    )  # fmt: skip


def usage_row(label: str, row: Row, block: str, estimates: list[Estimate | None]) -> Html:
    """One block of one row."""
    group = h("small", text(label)) if label else None
    name = h("th", join(row.label, ", ", block), group, scope="row")
    return h("tr", name, *(h("td", value_of(e)) for e in estimates))


def value_of(e: Estimate | None) -> Html:
    """Mean over interval, or a dash."""
    if e is None:
        return h("span", "–", title="not defined here")
    return h(
        "span",
        number(e.mean, e.half),
        h("span", f"± {number_half(e.half)}", class_="half") if e.half is not None else None,
    )

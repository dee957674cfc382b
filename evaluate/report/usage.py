"""Table 2: how latents are used, shared and specialised apart: evenness, geometry, correlation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evaluate.report.runs import Group, Results, Row
from evaluate.report.scored import BLOCKS
from evaluate.report.wording import column_decimals
from evaluate.statistics import Estimate, estimate

Path = tuple[str, ...]
MEASURES: dict[str, tuple[str, Path]] = {
    "entropy": ("utilisation (entropy)", ("utilisation", "{block}", "entropy")),
    "gini": ("utilisation (Gini)", ("utilisation", "{block}", "gini")),
    "freq_over_1_percent": ("latents over 1 %", ("utilisation", "{block}", "freq_over_1_percent")),
    "encoder_decoder": ("encoder–decoder cosine, median", ("geometry", "encoder_decoder", "{block}", "p50")),
    "nearest": ("nearest neighbour’s cosine, median", ("geometry", "nearest", "within {block}", "p50")),
    "pearson": ("mean |Pearson|", ("correlation", "within {block}", "mean_abs_pearson")),
}
"""A metric's id → its head, and where in a results file's `features` it stands for a block."""
ACROSS: dict[str, Path] = {
    "nearest": ("geometry", "nearest", "shared to specialised", "p50"),
    "pearson": ("correlation", "across", "mean_abs_pearson"),
}
PAIRS = "shared with specialised"


@dataclass(frozen=True)
class UsageLine:
    """One block of one row, or its pairs across blocks: estimates by metric id."""

    group: Group
    row: Row
    block: str
    found: Mapping[str, Estimate]


def usage_lines(results: Results) -> list[UsageLine]:
    """The lines of Table 2 that hold anything."""
    lines = [
        UsageLine(group, row, block, block_estimates(row, block))
        for group in results.groups
        for row in group.rows
        for block in (*BLOCKS, PAIRS)
    ]
    return [line for line in lines if line.found]


def block_estimates(row: Row, block: str) -> dict[str, Estimate]:
    """Estimates over seeds of every measure that is there, for a block or for pairs across blocks."""
    found: dict[str, Estimate] = {}
    for id, (_, template) in MEASURES.items():
        path = ACROSS.get(id) if block == PAIRS else tuple(part.format(block=block) for part in template)
        values = [value for run in row.runs if path and (value := run.feature(*path)) is not None]
        if e := estimate(values):
            found[id] = e
    return found


def usage_heads(lines: list[UsageLine]) -> dict[str, str]:
    """Metric ids that any line has, and their heads."""
    return {id: head for id, (head, _) in MEASURES.items() if any(id in line.found for line in lines)}


def usage_decimals(lines: list[UsageLine]) -> dict[str, int]:
    """Decimals by metric id, alike down a column."""
    return {id: column_decimals([line.found[id] for line in lines if id in line.found]) for id in usage_heads(lines)}


def usage_rows(lines: list[UsageLine]) -> list[dict[str, Any]]:
    """Table 2 as CSV rows."""
    return [
        {
            "group": line.group.label,
            "row": line.row.label,
            "block": line.block,
            "metric": id,
            "mean": e.mean,
            "low": e.low,
            "high": e.high,
            "seeds": e.n,
        }
        for line in lines
        for id, e in line.found.items()
    ]

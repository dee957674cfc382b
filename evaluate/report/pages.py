"""From results to HTML: what the templates in `templates/` are given. Text is escaped there unless it is our own markup."""

from __future__ import annotations

import base64
import hashlib
import json
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from evaluate.report import svg, wording
from evaluate.report.figures import Figure, Missing
from evaluate.report.found import what_was_found
from evaluate.report.latents import LatentPages, Summary
from evaluate.report.nesting import NestingTable
from evaluate.report.nesting_found import nesting_found
from evaluate.report.published import published_rows
from evaluate.report.runs import Group, Results, Row, called, sharing_label
from evaluate.report.scored import Run
from evaluate.report.table import Table
from evaluate.report.usage import UsageLine, usage_decimals, usage_heads
from evaluate.statistics import Estimate, estimate
from pipeline.definitions import METRICS, Better, Metric

HERE = Path(__file__).parent
ARROWS: dict[Better, tuple[str, str]] = {
    "lower": ("↓", "lower is better"),
    "higher": ("↑", "higher is better"),
    "neither": ("", "neither way is better"),
}
N_OPENING = 2
"""Figures that stand on the first screen: what nesting costs, and what it buys."""
KL_BASELINES = {"kl_zero": "zero ablation", "kl_mean": "mean ablation"}
Latents = list[tuple[Run, Summary, str]]
"""Of each checkpoint with latent pages: its run, their summary, and the address of the page, from the report."""


@cache
def environment() -> jinja2.Environment:
    """Templates that escape all text but ours, and know no undefined name."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "isolate": isolate,
        "isolated": isolated,
        "address": address,
        "called": called,
        "tidy": wording.tidy,
        "signed": wording.signed,
        "listed": wording.listed,
    }
    said = (wording.signed_plus_minus,)
    names = (
        *said,
        wording.count,
        wording.number,
        wording.half_text,
        wording.plus_minus,
        wording.p_text,
        wording.fixed,
        svg.inline,
    )
    made.globals |= {function.__name__: function for function in names}
    made.globals |= {"ARROWS": ARROWS}
    return made


def isolate(value: object) -> Markup:
    """Foreign text (a path, a name, a corpus) escaped and isolated: its direction cannot reorder what is around it."""
    return Markup("<bdi>{}</bdi>").format(str(value))


def address(path: str) -> str:
    """A relative path as a link: what a URL cannot hold, and what it would read as more than a path, is percent-encoded."""
    return urllib.parse.quote(path)


def isolated(values: Iterable[object]) -> Markup:
    """Foreign texts after one another, each isolated."""
    return Markup(", ").join(isolate(value) for value in values)


def document(template: str, asset: str, *, style: str = "", **values: Any) -> str:
    """A whole HTML document with its style and script inside, and a policy that lets it fetch nothing and run no other."""
    script = (HERE / "assets" / f"{asset}.js").read_text()
    css = style + "".join((HERE / "assets" / f"{name}.css").read_text() for name in ("base", asset))
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'; img-src data:"
    ours = {"policy": policy, "css": Markup(css), "script": Markup(script)}
    return environment().get_template(template).render(**ours, **values)


def report_page(
    title: str,
    results: Results,
    table: Table,
    nesting: NestingTable,
    usage: list[UsageLine],
    figures: Sequence[Figure | Missing],
    latents: Latents,
    folder: str,
) -> str:
    """The report."""
    last = last_runs(results)
    lead = [figure for figure in figures[:N_OPENING] if isinstance(figure, Figure)]
    return document(
        "report.html",
        "report",
        style=svg.style(len(results.sharings)),
        title=title,
        results=results,
        last=last,
        bought=nesting_found(table, results),
        found=what_was_found(table, results),
        models=distinct(run.store.name for run in last),
        layers=sorted({layer for run in last if (layer := run.store.layer) is not None and not run.is_known}),
        seeds=sorted({run.seed for run in last}),
        widths=[f"{width:,}" for width in sorted({run.checkpoint.width for run in last})],
        table=table,
        caveat=caveat(results),
        published=published_rows([metric.id for metric in table.metrics]),
        sample_note=sample_note(last),
        with_massive=with_massive(results, table),
        nesting=nesting,
        nesting_decimals=nesting.decimals,
        usage=usage,
        usage_heads=usage_heads(usage),
        usage_decimals=usage_decimals(usage),
        lead=lead,
        figures=[figure for figure in figures if figure not in lead],
        primary_names=[results.metric(id).label for id in table.primary],
        latents=latents,
        folder=folder,
        repeated=any(run.at("scr") for run in results.runs),
        definitions=definitions(results, nesting, usage),
        facts=provenance(results),
    )


def latents_page(run: Run, latents: LatentPages) -> str:
    """The page of a checkpoint's latents: data that its script reads, and cannot run."""
    sizes = latents.summary.sizes
    levels = [(level_name(i, len(sizes)), m - (sizes[i - 1] if i else 0)) for i, m in enumerate(sizes)]
    name = called(run)
    return document(
        "latents.html", "latents", title=f"Latents: {name}", name=name, run=run, latents=latents, levels=levels
    )


def level_name(level: int, n_levels: int) -> str:
    """shared, specialised, or the number of a level among several."""
    return f"level {level + 1}" if n_levels > 2 else ("shared" if level == 0 and n_levels == 2 else "specialised")


def last_runs(results: Results) -> list[Run]:
    """The last checkpoints of all groups."""
    return [run for group in results.groups for run in group.runs]


def sample_note(runs: Sequence[Run]) -> str:
    """What averages and dead shares are over, and what zero and mean ablation cost."""
    tokens = sorted({n for run in runs if (n := kept(run))})
    counts = " or ".join(f"{n:,}" for n in tokens)
    said = f"Averages, and the share of dead latents, are over {counts} evaluation tokens{spared(runs)}. "
    costs = {name: sorted({x for run in runs if (x := run.baselines.get(name)) is not None}) for name in KL_BASELINES}
    number = wording.number
    parts = [
        f"{label} costs {number(xs[0])}{f' to {number(xs[-1])}' if len(xs) > 1 else ''}"
        for (name, label) in KL_BASELINES.items()
        if (xs := costs[name])
    ]
    return (said if tokens else "") + (f"In KL, {' and '.join(parts)} nats/token." if parts else "")


def kept(run: Run) -> int:
    """Tokens that averages are over."""
    return run.sample.get("n_tokens_without_massive", run.sample.get("n_tokens", 0))


def spared(runs: Sequence[Run]) -> str:
    """Of massive rows left out, where there are any."""
    left = sorted({run.sample.get("n_tokens", 0) - kept(run) for run in runs} - {0})
    if not left:
        return ""
    return (
        f", {' or '.join(f'{n:,}' for n in left)} massive rows left out: their norm is far beyond the median’s, they are "
        "spliced all the same, and would weigh more in an average than all others"
    )


def with_massive(
    results: Results, table: Table
) -> tuple[list[Metric], list[tuple[Group, Row, list[Estimate | None]]]] | None:
    """Columns and rows of the same means with massive rows; None when they never differ."""
    rows = [(group, row) for group in results.groups for row in group.rows]
    metrics = [m for m in table.metrics if any(row.values(m.id) != row.values(m.id, massive=True) for _, row in rows)]
    if not metrics:
        return None
    return metrics, [
        (group, row, [estimate(list(row.values(m.id, massive=True).values())) for m in metrics]) for group, row in rows
    ]


def caveat(results: Results) -> str:
    """What the intervals are over, and what they leave out."""
    orders = {run.data_seed for run in last_runs(results)}
    if len(orders) > 1:
        return f"Intervals are over seeds of the initialisation and {len(orders)} orders of the data, counted alike."
    return (
        "Intervals are over seeds of the initialisation; they leave out the order of the data, which all seeds share."
    )


def definitions(results: Results, nesting: NestingTable, usage: Sequence[UsageLine]) -> list[Metric]:
    """Every metric that these results hold: unit, direction, definition."""
    held = {id for run in results.runs for level in run.levels for id, x in level.scores.items() if x is not None}
    held |= {name for run in results.runs for name in run.series}
    held |= {id for line in usage for id in line.found} | nesting.heads.keys()
    order = [id for id in METRICS if id in held] + sorted(held - METRICS.keys())
    return [results.metric(id) for id in order]


def provenance(results: Results) -> list[tuple[str, list[object]]]:
    """Where the numbers come from: models, stores, samples, versions; what nothing is known of is left out."""
    last = last_runs(results)
    facts: dict[str, list[Any]] = {
        "Model": [run.store.model for run in last],
        "Layer": [run.store.layer for run in last],
        "Corpus": [corpus_text(run.checkpoint.corpus or run.store.corpus) for run in last],
        "Store": [run.store.id[:16] for run in last],
        "Evaluation sample": [sample_text(run) for run in last],
        "Training rows seen": [rows_text(run.checkpoint.rows_seen) for run in last],
        "Dead latents in training counted over": [rows_text(run.checkpoint.fired_rows) for run in last],
        "Seeds": [run.seed for run in last],
        "Order of data (data_seed)": [as_text(run.train.get("data_seed")) for run in last],
        "Sharing": [sharing_label(sharing) for sharing in results.sharings],
        "Versions, evaluation": [versions_text(run.versions) for run in last],
        "Versions, training": [versions_text(run.checkpoint.versions) for run in last],
        "Code, evaluation": [run.git for run in last],
        "Code, training": [run.checkpoint.git for run in last],
    }
    return [(name, found) for name, values in facts.items() if (found := distinct(values))]


def distinct(values: Iterable[object]) -> list[object]:
    """Each value once, in order of appearance; None and empty ones left out."""
    return [value for value in dict.fromkeys(values) if value not in (None, "")]


def as_text(value: object) -> str | None:
    """A value of a config as text; None for none."""
    return None if value is None else str(value)


def corpus_text(corpus: object) -> str | None:
    """The corpus, where the results or the checkpoint name it."""
    if corpus is None or isinstance(corpus, str):
        return corpus
    return json.dumps(corpus, ensure_ascii=False, sort_keys=True)


def sample_text(run: Run) -> str:
    """What averages are over."""
    return ", ".join(f"{name} {value:,}" for name, value in run.sample.items())


def rows_text(rows: int | None) -> str | None:
    """A number of rows."""
    return None if rows is None else f"{rows:,} rows"


def versions_text(versions: Mapping[str, str]) -> str:
    """Libraries and their versions."""
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))

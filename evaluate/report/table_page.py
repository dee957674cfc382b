"""Table 1 and the tests behind it, as HTML and as CSV rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluate.report.markup import Html, h, join, text
from evaluate.report.runs import Group, Results, Row
from evaluate.report.table import Cell, Line, Table, decimals, number, p_text, plus_minus
from evaluate.statistics import CAVEAT, LEVEL, estimate
from pipeline.definitions import Metric

ARROWS = {
    "lower": ("↓", "lower is better"),
    "higher": ("↑", "higher is better"),
    "neither": ("", "neither way is better"),
}


def table_section(results: Results, table: Table, folder: str) -> Html:
    """Table 1, its notes, and the tests behind it."""
    head = h("tr", h("th", "Model", scope="col"), *map(column_head, table.metrics))
    bodies = [group_body(group, table, len(results.groups) > 1) for group in results.groups]
    drawn = h("table", h("thead", head), *bodies, published_body(table), class_="scores")
    return h(
        "section",
        h("h2", "Scores"),
        h(
            "p",
            h("b", "Table 1. "),
            "Means over seeds ± half of the 95 % interval; the paper’s own figures below.",
            class_="caption",
        ),
        h("div", drawn, class_="scroll", tabindex="0", role="region", aria_label="Table 1, scrolls sideways"),
        table_notes(results, table),
        tests_details(table),
        massive_details(results, table),
        h("p", download(folder, "table1.csv"), class_="files"),
        id="table",
    )


def column_head(metric: Metric) -> Html:
    """A metric's name, direction and unit."""
    arrow, words = ARROWS[metric.better]
    unit = metric.unit.replace("fraction", "")
    return h(
        "th",
        h("a", metric.label, href=f"#metric-{metric.id.partition('@')[0]}"),
        h("span", f" {arrow}", title=words, aria_label=words, role="img") if arrow else None,
        h("small", unit) if unit else None,
        scope="col",
    )


def group_body(group: Group, table: Table, several: bool) -> Html:
    """The rows of a group, under its label where there are several."""
    label = h("tr", h("th", text(group.label), colspan=str(len(table.metrics) + 1), scope="rowgroup"), class_="group")
    rows = [row_of(table.line(group, row), table.metrics) for row in group.rows]
    return h("tbody", label if several else None, *rows)


def row_of(line: Line, metrics: Sequence[Metric]) -> Html:
    """One row of the table."""
    name = join("Flat, ", line.row.label) if not line.row.sharing else join("Nested, ", line.row.label)
    n = len(line.row.runs)
    seeds = f"{n} seed{'s' * (n > 1)}"
    cells = [h("td", cell(line.cells[m.id], n)) for m in metrics]
    return h("tr", h("th", name, h("small", seeds), scope="row"), *cells)


def cell(c: Cell, n: int) -> Html:
    """Mean and interval, with its seeds where not all n have a value; bold with a word only where the corrected test says so."""
    if c.estimate is None:
        return h("span", "–", title="not computed, or undefined")
    half = c.estimate.half
    mean = number(c.estimate.mean, half)
    spread = h("span", f"± {number_half(half)}", class_="half") if half is not None else None
    some = h("span", f"n = {c.estimate.n}", class_="half") if c.estimate.n < n else None
    if c.verdict is None:
        return h("span", mean, spread, some, class_="value")
    return join(
        h("strong", mean, spread, class_="value"), some, h("span", f" {c.verdict}", class_=f"verdict {c.verdict}")
    )


def number_half(half: float) -> str:
    """The half-width with two digits."""
    return f"{half:.{decimals(half)}f}"


def published_body(table: Table) -> Html:
    """The paper's own figures, in the columns that they most likely belong to, each with a mark that a note explains."""
    ids = [m.id for m in table.metrics]
    rows = []
    for i, (name, kl) in enumerate((("Flat, as published", "0.795"), ("Nested, as published", "0.787"))):
        cells, skip = [], 0
        for id in ids:
            if skip:
                skip -= 1
            elif id in ("kl_nats", "kl_score"):
                skip = int(id == "kl_nats" and "kl_score" in ids)
                cells.append(h("td", kl, h("sup", "a"), colspan=str(skip + 1), class_="published"))
            elif id == "ev" and i == 0:
                cells.append(h("td", "0.299", h("sup", "b"), rowspan="2", class_="published"))
            elif id in ("l0", "sparsity"):
                skip = int(id == "l0" and "sparsity" in ids)
                if i == 0:
                    cells.append(
                        h("td", "85.07", h("sup", "c"), colspan=str(skip + 1), rowspan="2", class_="published")
                    )
            elif id != "ev":
                cells.append(h("td", h("span", "–", title="not published")))
        rows.append(h("tr", h("th", name, scope="row"), *cells))
    label = h(
        "tr", h("th", "The paper (Gemma-2-2B, layer 19)", colspan=str(len(ids) + 1), scope="rowgroup"), class_="group"
    )
    return h("tbody", label, *rows, class_="paper")


def table_notes(results: Results, table: Table) -> Html:
    """What bold means, what intervals leave out, and what the published columns likely are."""
    tested = f" over the {table.n_tests} tests of this table" if table.n_tests else ""
    return h(
        "div",
        h(
            "p",
            f"Intervals are t-intervals ({LEVEL:.0%}".replace("%", " %"),
            ", n − 1 degrees of freedom). A cell is bold, and says better or worse, only when its test against the flat "
            f"baseline passes at 0.05 after Holm’s correction{tested}: a t-test paired by seed where seeds pair, Welch’s "
            "otherwise. With one seed there is no interval and no test. A column that is another one rescaled (KL score of "
            "KL, sparsity of L0) shares its test. ",
            CAVEAT,
        ),
        h("p", h("sup", "a"), " Published as “KL divergence, lower is better”. Its form is that of SAEBench’s kl_div_score, "
          "where higher is better; read so, the published nested model is the worse of the two."),
        h("p", h("sup", "b"), " One figure is on record, without its definition; three are in use. A bfloat16 "
          "mean of the older one (ev_legacy) would fit."),
        h("p", h("sup", "c"), " One figure is on record, published as “L0 sparsity 85.07 %”. The benchmark that prints this "
          "column prints a count of active latents a token."),
        h("p", sample_note(results)),
        h("p", "The paper’s training losses, 200 flat and 405 nested, are no better or worse than each other: a nested loss "
          "adds one reconstruction term a level."),
        class_="notes",
    )  # fmt: skip


def sample_note(results: Results) -> str:
    """What averages and dead shares are over, and what zero and mean ablation cost."""
    runs = [run for group in results.groups for run in group.runs]
    tokens = sorted({n for run in runs if (n := (run.data.get("sample") or {}).get("n_tokens"))})
    said = (
        f"Averages, and the share of dead latents, are over {' or '.join(f'{n:,}' for n in tokens)} evaluation tokens. "
    )
    costs = {
        name: sorted({x for run in runs if (x := (run.data.get("baselines") or {}).get(name)) is not None})
        for name in KL_BASELINES
    }
    parts = [
        f"{label} costs {number(xs[0])}{f' to {number(xs[-1])}' if len(xs) > 1 else ''}"
        for (name, label) in KL_BASELINES.items()
        if (xs := costs[name])
    ]
    return (said if tokens else "") + (f"In KL, {' and '.join(parts)} nats/token." if parts else "")


KL_BASELINES = {"kl_zero": "zero ablation", "kl_mean": "mean ablation"}


def massive_details(results: Results, table: Table) -> Html | None:
    """The same means without massive rows, folded away; None when no run has them or they never differ."""
    ids = [
        m.id
        for m in table.metrics
        if any(row.values(m.id, scores="scores_without_massive") for g in results.groups for row in g.rows)
    ]
    rows = [(g, row) for g in results.groups for row in g.rows]
    if all(row.values(id) == row.values(id, scores="scores_without_massive") for _, row in rows for id in ids):
        return None
    head = h("tr", h("th", "Model", scope="col"), *(column_head(m) for m in table.metrics if m.id in ids))
    body = [massive_row(g, row, ids) for g, row in rows]
    return h(
        "details",
        h("summary", "The same scores without massive rows"),
        h(
            "p",
            "The few rows whose norm is far beyond the median’s are spliced all the same; only the averages leave them out.",
            class_="notes",
        ),
        h(
            "div",
            h("table", h("thead", head), h("tbody", *body), class_="scores"),
            class_="scroll",
            tabindex="0",
            role="region",
            aria_label="Scores without massive rows, scrolls sideways",
        ),
    )


def massive_row(group: Group, row: Row, ids: Sequence[str]) -> Html:
    """One row of means and intervals without massive rows."""
    found = [estimate(list(row.values(id, scores="scores_without_massive").values())) for id in ids]
    name = join(row.label, h("small", text(group.label)) if group.label else None)
    return h("tr", h("th", name, scope="row"), *(h("td", h("span", plus_minus(e) if e else "–")) for e in found))


def tests_details(table: Table) -> Html | None:
    """Every test with its numbers, folded away."""
    if not table.tested:
        return None
    names = ("Row", "Metric", "Difference", "Test", "n", "t (df)", "p", "Holm p", "Effect size")
    rows = [test_row(line, c) for line, c in table.tested]
    drawn = h(
        "table", h("thead", h("tr", *(h("th", name, scope="col") for name in names))), h("tbody", *rows), class_="tests"
    )
    return h(
        "details",
        h("summary", f"The {table.n_tests} tests behind the table"),
        h("div", drawn, class_="scroll", tabindex="0", role="region", aria_label="Tests, scrolls sideways"),
    )


def test_row(line: Line, c: Cell) -> Html:
    """One test: row minus baseline."""
    t, p = c.test, c.p
    assert t is not None, "only tested cells come here"
    assert p is not None, "every test was corrected"
    seeds = str(t.n[0]) if t.n[0] == t.n[1] else f"{t.n[0]}, {t.n[1]}"
    columns = (
        f"{number(t.difference, t.half)} ± {number_half(t.half)}",
        t.kind,
        seeds,
        f"{t.t:.2f} ({t.df:.3g})".replace("-", "−"),
        p_text(t.p),
        p_text(p),
        f"{t.effect_name} {t.effect:.2f}".replace("-", "−"),
    )
    name = join(
        line.row.label, ", " if line.group.label else None, text(line.group.label) if line.group.label else None
    )
    cells = [h("td", value) for value in columns]
    return h(
        "tr", h("th", name, scope="row"), h("td", c.metric.label), *cells, class_="significant" if c.verdict else None
    )


def download(folder: str, name: str) -> Html:
    """A link to a file beside the report."""
    return h("a", f"Numbers: {name}", href=f"{folder}/{name}")


def table_rows(table: Table) -> list[dict[str, Any]]:
    """Table 1 as CSV rows: one a row and metric."""
    return [
        {
            "group": line.group.label, "row": line.row.label, "metric": id, "unit": c.metric.unit, "better": c.metric.better,
            "mean": c.estimate.mean if c.estimate else None, "half_interval_95": c.estimate.half if c.estimate else None,
            "seeds": c.estimate.n if c.estimate else 0, "test": c.test.kind if c.test else None,
            "difference": c.test.difference if c.test else None, "t": c.test.t if c.test else None,
            "df": c.test.df if c.test else None, "p": c.test.p if c.test else None, "p_holm": c.p,
            "effect_size": c.test.effect if c.test else None, "effect_name": c.test.effect_name if c.test else None,
            "verdict": c.verdict,
        }
        for line in table.lines
        for id, c in line.cells.items()
    ]  # fmt: skip

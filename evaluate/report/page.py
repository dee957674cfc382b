"""The report's content as HTML, section by section in reading order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from evaluate.report import svg
from evaluate.report.figures import Figure, Missing
from evaluate.report.markup import Html, h, join, text
from evaluate.report.runs import Results, Run, sharing_label
from evaluate.report.table import Table, headline
from evaluate.report.table_page import ARROWS, download, table_section
from evaluate.report.usage_page import usage_rows, usage_section
from evaluate.statistics import CAVEAT
from pipeline.definitions import METRICS, Metric


def body(
    title: str,
    results: Results,
    table: Table,
    figures: Sequence[Figure | Missing],
    latents: Sequence[tuple[Run, dict[str, Any], str]],
    folder: str,
) -> Html:
    """Everything between the body tags, the script apart."""
    found = headline(table, results)
    return h(
        "main",
        h(
            "header",
            h("p", "Report", class_="kicker"),
            h("h1", text(title)),
            h("p", subtitle(results), class_="subtitle"),
        ),
        h(
            "section",
            h("h2", "What was found"),
            h("p", text(tidy(found[0])), class_="lead"),
            *(h("p", text(tidy(sentence))) for sentence in found[1:]),
            id="found",
        ),
        table_section(results, table, folder),
        figures_section(figures, folder),
        usage_section(results, folder),
        latents_section(latents),
        trust_section(results),
        definitions_section(results, table),
        provenance_section(results),
    )


def tidy(sentence: str) -> str:
    """A sentence whose numbers do not part from their signs at the end of a line."""
    for sign in (" = ", " ± "):
        sentence = sentence.replace(sign, sign.replace(" ", "\u00a0"))
    return sentence.replace(" %", "\u00a0%")


def subtitle(results: Results) -> Html:
    """What was trained on what, in one line."""
    runs = [run for group in results.groups for run in group.runs]
    models = join_texts(sorted({str(run.data["store"].get("model")) for run in runs}))
    layers = sorted({int(run.data["store"].get("layer", -1)) for run in runs})
    seeds = sorted({run.seed for run in runs})
    widths = sorted({int(run.data["checkpoint"]["sae"]["width"]) for run in runs})
    return join(
        models,
        f", layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}; "
        f"{len(runs)} dictionar{'ies' if len(runs) > 1 else 'y'} of {', '.join(f'{w:,}' for w in widths)} latents; "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}; "
        f"{len(results.runs)} checkpoint{'s' * (len(results.runs) > 1)} scored.",
    )


def join_texts(names: Sequence[object]) -> Html:
    """Foreign names after one another, each isolated."""
    return join(*(part for i, name in enumerate(names) for part in ((", " if i else None), text(name))))


def figures_section(figures: Sequence[Figure | Missing], folder: str) -> Html:
    """All figures, numbered in order; a sentence for each that is missing."""
    shown: list[Html] = []
    count = 0
    for figure in figures:
        if isinstance(figure, Missing):
            shown.append(h("p", f"{figure.title}: no figure, because {figure.reason}.", class_="missing"))
        else:
            count += 1
            shown.append(figure_of(figure, count, folder))
    return h("section", h("h2", "Figures"), *shown, id="figures")


def figure_of(figure: Figure, n: int, folder: str) -> Html:
    """One figure: legend, panels, and the sentence that says what it shows."""
    keys = [h("li", h("i", style=f"--c:var(--{variable})"), label) for variable, label in figure.legend]
    panels = [h("div", svg.inline(panel), class_="panel") for panel in figure.panels]
    return h(
        "figure",
        h("ul", *keys, class_="legend"),
        h("div", *panels, class_="panels"),
        h("p", "", class_="pointed", aria_live="polite"),
        h(
            "figcaption",
            h("b", f"Figure {n}. {figure.title}. "),
            text(tidy(figure.caption)),
            " ",
            download(folder, f"{figure.id}.csv"),
        ),
        id=f"figure-{figure.id}",
    )


def latents_section(latents: Sequence[tuple[Run, dict[str, Any], str]]) -> Html:
    """Links to the latent pages, with what they hold."""
    if not latents:
        return h("section", h("h2", "Latents"), h("p", "No latent pages lie beside these results."), id="latents")
    items = [
        h(
            "li",
            h("a", text(run.name), href=path),
            f": {s['n_latents']:,} latents, {s['n_shared']:,} of them shared, read on {s['n_tokens']:,} tokens; "
            f"{s['dead']:,} never fired there; {s['related_latents']:,} shared latents have specialised ones that fire "
            f"with them at least {s['criterion']['lift']:g} times as often as chance.",
        )
        for run, s, path in latents
    ]
    return h(
        "section",
        h("h2", "Latents"),
        h("p", "Top contexts, logit lens and hierarchy of:"),
        h("ul", *items),
        id="latents",
    )


def trust_section(results: Results) -> Html:
    """What the numbers do not say."""
    repeated = "Intervals over probe seeds are in the results files. " if has_series(results, "scr") else ""
    notes = (
        "A single SCR or TPP number is not to be trusted. Both ablate latents chosen by probes: the probes, the choice and "
        "the test pairs are all drawn, and published reliability checks find that at their canonical settings the two can "
        "fall as training goes on and can run against ground truth at large n (Chanin 2026, arXiv 2605.18229). They are here "
        f"because the paper reports SCR; read them over n and over seeds, and lead with KL and explained variance. {repeated}",
        "Scores against zero ablation saturate: where zeroing the residual is ruinous, a poor reconstruction still scores "
        "high. Raw KL leads for that reason.",
        "A dead share means nothing without the number of tokens it was counted on; that number is under provenance.",
        CAVEAT,
    )
    return h("section", h("h2", "How far to trust this"), *(h("p", note) for note in notes), id="trust")


def has_series(results: Results, name: str) -> bool:
    """Whether any run has a series."""
    return any(run.at(name) for run in results.runs)


def definitions_section(results: Results, table: Table) -> Html:
    """Every metric that these results hold: unit, direction, definition."""
    held = {id for run in results.runs for level in run.levels for id, v in level["scores"].items() if v is not None}
    held |= {name for run in results.runs for name in (run.data.get("series") or {})}
    held |= {id for row in usage_rows(results) if (id := row["metric"])}
    order = [id for id in METRICS if id in held] + sorted(held - METRICS.keys())
    head = h("tr", *(h("th", name, scope="col") for name in ("Metric", "Id", "Unit", "Better", "Definition")))
    rows = [definition_row(results.metric(id)) for id in order]
    drawn = h("table", h("thead", head), h("tbody", *rows), class_="definitions")
    return h("section", h("h2", "What each metric is"), drawn, id="definitions")


def definition_row(metric: Metric) -> Html:
    """One metric's row."""
    arrow = ARROWS[metric.better][0]
    return h(
        "tr",
        h("th", metric.label, scope="row", id=f"metric-{metric.id}"),
        h("td", h("code", text(metric.id))),
        h("td", text(metric.unit)),
        h("td", f"{metric.better} {arrow}".strip(), class_="better-way"),
        h("td", text(metric.definition)),
    )


def provenance_section(results: Results) -> Html:
    """Where the numbers come from: models, stores, samples, versions, and every configuration in full."""
    last = [run for group in results.groups for run in group.runs]
    facts: list[tuple[str, Sequence[object]]] = [
        ("Model", distinct(run.data["store"].get("model") for run in last)),
        ("Layer", distinct(run.data["store"].get("layer") for run in last)),
        ("Corpus", distinct(corpus_of(run) for run in last)),
        ("Store", distinct(run.data["store"].get("id", "")[:16] for run in last)),
        ("Evaluation sample", distinct(sample_text(run) for run in last)),
        ("Training rows seen", distinct(rows_text(provenance(run).get("rows_seen")) for run in last)),
        (
            "Dead latents in training counted over",
            distinct(rows_text(provenance(run).get("fired_rows")) for run in last),
        ),
        ("Seeds", distinct(run.seed for run in last)),
        ("Order of data (data_seed)", distinct(run.train.get("data_seed") for run in last)),
        ("Sharing", [sharing_label(s) for s in results.sharings]),
        ("Versions, evaluation", distinct(versions_text(run.data.get("versions")) for run in last)),
        ("Versions, training", distinct(versions_text(provenance(run).get("versions")) for run in last)),
        ("Code, evaluation", distinct(run.data.get("git") for run in last)),
        ("Code, training", distinct(provenance(run).get("git") for run in last)),
    ]
    pairs = [join(h("dt", name), h("dd", join_texts(values))) for name, values in facts if values]
    configs = h(
        "details",
        h("summary", f"Configuration of each of {len(last)} checkpoints"),
        *(config_details(run) for run in last),
    )
    return h("section", h("h2", "Provenance"), h("dl", *pairs), configs, id="provenance")


def provenance(run: Run) -> dict[str, Any]:
    """A checkpoint's provenance; empty for an SAE made elsewhere."""
    return run.data["checkpoint"].get("provenance") or {}


def distinct(values: Any) -> list[object]:
    """Each value once, in order of appearance; None and empty ones left out."""
    return [value for value in dict.fromkeys(values) if value not in (None, "")]


def corpus_of(run: Run) -> str | None:
    """The corpus, where the results or the checkpoint name it."""
    store = run.data["store"] | (provenance(run).get("store") or {})
    corpus = store.get("corpus")
    return json.dumps(corpus, ensure_ascii=False, sort_keys=True) if isinstance(corpus, dict) else corpus


def sample_text(run: Run) -> str:
    """What averages are over."""
    return ", ".join(
        f"{name} {value:,}" for name, value in (run.data.get("sample") or {}).items() if isinstance(value, int)
    )


def rows_text(rows: object) -> str | None:
    """A number of rows."""
    return f"{rows:,} rows" if isinstance(rows, int) else None


def versions_text(versions: dict[str, str] | None) -> str:
    """Libraries and their versions."""
    return ", ".join(f"{name} {version}" for name, version in sorted((versions or {}).items()))


def config_details(run: Run) -> Html:
    """One run's checkpoint, training and evaluation configuration, folded away."""
    full = {"checkpoint": {k: v for k, v in run.data["checkpoint"].items() if k != "provenance"}}
    full |= {"provenance": provenance(run), "evaluation": run.data.get("evaluation", {})}
    return h(
        "details",
        h("summary", text(run.name)),
        h("pre", text(json.dumps(full, indent=1, ensure_ascii=False, sort_keys=True))),
    )

"""The page of one checkpoint's latents, which `assets/latents.js` fills from the data files beside it."""

from __future__ import annotations

from typing import Any

from evaluate.report.markup import Html, h, text
from evaluate.report.runs import Run


def latents_body(run: Run, summary: dict[str, Any]) -> Html:
    """The page of a checkpoint's latents: what the script fills."""
    sorts = (("id", "number"), ("density", "density"), ("max", "highest activation"), ("related", "relatives"))
    levels = [h("option", "all levels", value="")] + [
        h("option", level_name(i, summary), value=str(i)) for i in range(len(summary["levels"]))
    ]
    controls = h(
        "form",
        h("label", "Search", h("input", type="search", id="q", placeholder="token or number", autocomplete="off")),
        h("label", "Level", h("select", *levels, id="level")),
        h("label", "Sort by", h("select", *(h("option", label, value=v) for v, label in sorts), id="sort")),
        h("label", h("input", type="checkbox", id="reverse"), "descending", class_="check"),
        id="controls",
        role="search",
    )
    source = f"{summary['n_tokens']:,} tokens of the {summary['split']} split"
    return h(
        "main",
        h(
            "header",
            h("p", "Latents", class_="kicker"),
            h("h1", text(run.name)),
            h("p", f"Read on {source}.", class_="subtitle"),
        ),
        h("noscript", h("p", "This page lists latents with a script of its own; it needs JavaScript.")),
        h(
            "div",
            h("div", controls, h("p", "Loading…", id="count", role="status"), h("ol", id="list"), pager(), id="browse"),
            h("article", h("p", "Choose a latent.", class_="quiet"), id="latent", aria_live="polite", tabindex="-1"),
            id="columns",
        ),
    )


def pager() -> Html:
    """Buttons that turn the list's pages."""
    return h(
        "p",
        h("button", "← Previous", type="button", id="back"),
        h("button", "Next →", type="button", id="next"),
        id="pager",
    )


def level_name(level: int, summary: dict[str, Any]) -> str:
    """shared, specialised, or the number of a level among several."""
    n = len(summary["levels"])
    size = summary["levels"][level] - (summary["levels"][level - 1] if level else 0)
    name = f"level {level + 1}" if n > 2 else ("shared" if level == 0 and n == 2 else "specialised")
    return f"{name} ({size:,})"

"""python -m evaluate.report: one HTML file from results files, with nothing to fetch. Imports no torch.

Reading order: what was found, Table 1, the figures, latents, what each metric is, where it all comes from. Beside it lies
a folder with every figure as SVG, all numbers as CSV, and the latent pages.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from evaluate.latents import files as latent_files
from evaluate.report import latent_page, svg, table_page, usage_page
from evaluate.report import page as report_page
from evaluate.report.figures import Figure, Missing
from evaluate.report.figures_across import make_figures
from evaluate.report.markup import Html, h, trusted
from evaluate.report.runs import Results, Run, read_results
from evaluate.report.table import Table, make_table
from pipeline.base.errors import UsageError
from pipeline.base.files import write_bytes
from pipeline.base.progress import say

ASSETS = Path(__file__).parent / "assets"


def write_report(paths: Sequence[Path], out: Path, title: str = "Nested sparse autoencoders") -> Path:
    """Read results, write the report and the folder beside it; return the report's path.

    The page appears last and whole. Raises UsageError without results, DamagedError for files that are not results.
    """
    results = read_results(paths)
    table, figures = make_table(results), make_figures(results)
    folder = out.with_name(f"{out.stem}_files")
    write_numbers(folder, results, table, figures)
    latents = copy_latents(folder, results)
    body = report_page.body(title, results, table, figures, latents, folder.name)
    n_series = len(results.sharings)
    write_bytes(out, page(title, body, "report", svg.style(n_series)).encode())
    return out


def page(title: str, body: Html, asset: str, style: str = "", sources: str = "") -> str:
    """A whole HTML document with its style and script inside, and a policy that lets it fetch nothing and run no other.

    `sources` are further script sources, for pages that load data files from beside them.
    """
    script = (ASSETS / f"{asset}.js").read_text()
    css = style + (ASSETS / "base.css").read_text() + (ASSETS / f"{asset}.css").read_text()
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'{sources}; img-src data:"
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=policy),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="color-scheme", content="light dark"),
        h("title", title),
        h("style", trusted(css)),
    )
    return "<!doctype html>\n" + h("html", head, h("body", body, h("script", trusted(script))), lang="en") + "\n"


def write_numbers(folder: Path, results: Results, table: Table, figures: Sequence[Figure | Missing]) -> None:
    """Every figure as SVG files, and the numbers of figures and table as CSV."""
    write_csv(folder / "table1.csv", table_page.table_rows(table))
    if usage := usage_page.usage_rows(results):
        write_csv(folder / "table2.csv", usage)
    for figure in figures:
        if isinstance(figure, Figure):
            write_csv(folder / f"{figure.id}.csv", figure.numbers)
            for panel in figure.panels:
                write_bytes(folder / f"{panel.id}.svg", svg.standalone(panel, len(results.sharings)))


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same keys, as CSV with a head; a missing value is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


Latents = list[tuple[Run, dict[str, Any], str]]
"""Of each checkpoint with latent pages: its run, their summary, and the path of the page, from the report."""


def copy_latents(folder: Path, results: Results) -> Latents:
    """Copy the latent pages found beside results files into the report's folder, and put their page there."""
    found: Latents = []
    for run in results.runs:
        if not run.has_latents:
            continue
        source = latent_files.latents_folder(run.path)
        summary = latent_files.read_summary(source)
        target = folder / "latents" / run.path.stem
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(source.glob("*.js")):
            shutil.copyfile(file, target / file.name)
        body = latent_page.latents_body(run, summary)
        write_bytes(
            target / "index.html", page(f"Latents: {run.name}", body, "latents", sources=" 'self' file:").encode()
        )
        found.append((run, summary, f"{folder.name}/latents/{run.path.stem}/index.html"))
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("results", nargs=-1, type=click.Path(path_type=Path), metavar="RESULTS...", required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="The HTML file; a folder NAME_files goes beside it."
)
@click.option("--title", default="Nested sparse autoencoders", show_default=True, help="Heading of the report.")
def cli(results: tuple[Path, ...], out: Path, title: str) -> None:
    """Write one self-contained HTML report from results files, or folders that evaluate wrote.

    \b
    Example: python -m evaluate.report demo/results --out report.html
    """
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise UsageError(f"--out {out}: give the name of an HTML file, like report.html")
    say(f"report: {write_report(results, out, title)}")

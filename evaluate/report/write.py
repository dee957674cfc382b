"""Writes one HTML file from results files, with nothing to fetch. Imports no torch.

Reading order: what was found and the figure that shows it, Table 1, the other figures, latents, what each metric is, where
it all comes from. Beside it lies a folder with every figure as SVG, all numbers as CSV, and the latent pages.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from evaluate.latents.files import latents_folder
from evaluate.report import svg
from evaluate.report.figures import Figure, Missing
from evaluate.report.figures_across import make_figures
from evaluate.report.latents import read_latents
from evaluate.report.nesting import NestingTable, nesting_rows, nesting_table
from evaluate.report.pages import Latents, latents_page, report_page
from evaluate.report.runs import Results, read_results
from evaluate.report.table import PRIMARY, Table, make_table, table_rows
from evaluate.report.usage import UsageLine, usage_lines, usage_rows
from pipeline.base.digests import DIGESTS, write_digests
from pipeline.base.files import PARTIAL, hash_file, sha256, sweep_partials, write_bytes, write_csv
from pipeline.base.progress import say


def write_report(
    paths: Sequence[Path], out: Path, title: str = "Nested sparse autoencoders", primary: Sequence[str] = PRIMARY
) -> Path:
    """Read results, write the report and the folder beside it; return the report's path.

    The page appears last and whole; what a killed report left is swept. Raises UsageError without results, DamagedError for
    files that are not results.
    """
    results = read_results(paths)
    table, usage, figures = make_table(results, primary), usage_lines(results), make_figures(results)
    bought = nesting_table(results)
    folder = out.with_name(f"{out.stem}_files")
    for left in [*sweep_partials(folder), *out.parent.glob(f"{glob.escape(out.name)}.*{PARTIAL}")]:
        left.unlink(missing_ok=True)
    write_numbers(folder, results, table, bought, usage, figures)
    latents = write_latents(folder, results)
    page = report_page(title, results, table, bought, usage, figures, latents, folder.name).encode()
    beside = {f"{folder.name}/{path.relative_to(folder).as_posix()}": hash_file(path) for path in files_in(folder)}
    write_digests(folder / DIGESTS, out.name, beside | {out.name: sha256(page)})
    write_bytes(out, page)
    return out


def files_in(folder: Path) -> list[Path]:
    """Every file of a report's folder but its digests."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / DIGESTS)


def write_numbers(
    folder: Path,
    results: Results,
    table: Table,
    bought: NestingTable,
    usage: list[UsageLine],
    figures: Sequence[Figure | Missing],
) -> None:
    """Every figure as SVG files, and the numbers of figures and table as CSV."""
    write_csv(folder / "table1.csv", table_rows(table))
    if bought.lines:
        write_csv(folder / "nesting_levels.csv", nesting_rows(bought))
    if usage:
        write_csv(folder / "table2.csv", usage_rows(usage))
    for figure in figures:
        if isinstance(figure, Figure):
            write_csv(folder / f"{figure.id}.csv", figure.numbers)
            for panel in figure.panels:
                write_bytes(folder / f"{panel.id}.svg", svg.standalone(panel, len(results.sharings)))


def write_latents(folder: Path, results: Results) -> Latents:
    """Read the latent pages found beside results files, and write a page of each into the report's folder."""
    found: Latents = []
    for run in results.runs:
        if run.has_latents:
            latents = read_latents(latents_folder(run.path))
            twins = sum(other.path.stem == run.path.stem for other, _, _ in found)
            page = Path("latents", f"{run.path.stem}{f'-{twins + 1}' * bool(twins)}.html")
            write_bytes(folder / page, latents_page(run, latents).encode())
            found.append((run, latents.summary, f"{folder.name}/{page.as_posix()}"))
        elif (pages := latents_folder(run.path)).is_dir():
            say(f"note     {pages}: latent pages without their index are left out; evaluate again to make them")
    return found

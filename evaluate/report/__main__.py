"""python -m evaluate.report: options of the command; what it does is in `write.py`."""

from __future__ import annotations

if __name__ == "__main__":
    from pipeline.base import startup  # before what takes time to import

    startup.begin()

from pathlib import Path

import click

from evaluate.report.table import PRIMARY, require_endpoints
from pipeline.base.cli import OUT_FILE, SOURCE, main, only_reads
from pipeline.base.errors import UsageError
from pipeline.base.progress import say


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("results", nargs=-1, type=SOURCE, metavar="RESULTS...", required=True)
@click.option("--out", type=OUT_FILE, required=True, help="The HTML file; a folder NAME_files goes beside it.")
@click.option("--title", default="Nested sparse autoencoders", show_default=True, help="Heading of the report.")
@click.option(
    "--primary",
    default=",".join(PRIMARY),
    show_default=True,
    metavar="IDS",
    help="Endpoints that are tested, at equal L0 and Holm-corrected; everything else is a difference with its interval.",
)
def cli(results: tuple[Path, ...], out: Path, title: str, primary: str) -> None:
    """Write one self-contained HTML report from results files, or folders that evaluate wrote.

    \b
    Example: python -m evaluate.report demo/results --out report.html
    """
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise UsageError(f"--out {out}: give the name of an HTML file, like report.html")
    endpoints = [id.strip() for id in primary.split(",") if id.strip()]
    require_endpoints(endpoints)
    if only_reads():
        return
    from evaluate.report.write import write_report  # draws, and what draws takes long to import

    say(f"report: {write_report(results, out, title, endpoints)}")


if __name__ == "__main__":
    main(cli, "evaluate.report")

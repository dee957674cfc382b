"""python -m pipeline: whole experiments, the demo, and everything that is about artefacts rather than one stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipeline import experiment as experiments
from pipeline import stages
from pipeline.cli import main, print_json
from pipeline.errors import DamagedError
from pipeline.progress import say

PATH = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Nested (Matryoshka) sparse autoencoders on one layer of a language model, from text to a report.

    \b
    python -m pipeline demo                     a real report in minutes, without a GPU
    python -m pipeline run paper.toml --dry-run what the paper's experiment would cost
    python -m harvest --help                    the stages, one by one: harvest, train, evaluate
    """


@cli.command()
@click.option("--out", type=PATH, default=Path("demo"), show_default=True, help="Folder that everything goes to.")
@click.option("--seed", type=int, multiple=True, help="Seeds of the SAEs instead of 0, 1, 2; repeat the option.")
def demo(out: Path, seed: tuple[int, ...]) -> None:
    """Harvest a small real Gemma-2 over real text, train 15 nested SAEs, score them, write the report.

    Takes about three minutes on two cores; nothing is downloaded and nothing is canned. Killed or stopped, the same
    command goes on where it was.
    """
    experiment = experiments.Experiment.read(Path("demo.toml"))
    if seed:
        experiment.train[0]["seed"] = list(seed)
    say(f"report: {experiments.run(experiment, out)}")


@cli.command()
@click.argument("experiment", type=PATH)
@click.option("--out", type=PATH, help="Folder that everything goes to.  [default: runs/NAME OF THE FILE]")
@click.option("--dry-run", is_flag=True, help="Print the plan with disk, memory and time; do nothing.")
def run(experiment: Path, out: Path | None, dry_run: bool) -> None:
    """Make an experiment file true: harvest, train, evaluate and report what is missing of it.

    EXPERIMENT is a TOML file or the name of a shipped one: demo, paper, ablations. Run it again and nothing is done
    twice; change a line and only what that line asks for is done.

    \b
    Example: python -m pipeline run paper --out /data/paper --dry-run
    """
    parsed = experiments.Experiment.read(experiment)
    out = out or Path("runs") / experiment.stem
    if dry_run:
        experiments.dry_run(parsed, out)
    else:
        say(f"report: {experiments.run(parsed, out)}")


@cli.command()
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def describe(path: Path, as_json: bool) -> None:
    """Print what a store, checkpoint, training folder or results file is and what made it."""
    from pipeline.describe import describe as describe_path

    data = describe_path(path)
    if as_json:
        print_json(data)
    else:
        click.echo("\n".join(outline(data)))


@cli.command()
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def verify(path: Path, as_json: bool) -> None:
    """Read every byte of a store, checkpoint, training folder or results file and check it. Exit code 1 if any is wrong."""
    from pipeline.describe import verify as verify_path

    problems = verify_path(path)
    if as_json:
        print_json({"path": str(path), "whole": not problems, "problems": problems})
    for problem in problems:
        say(problem)
    if problems:
        raise DamagedError(f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)} found")
    if not as_json:
        click.echo(f"{path}: whole")


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="RESULTS... --out report.html")
def report(words: tuple[str, ...]) -> None:
    """Write one self-contained HTML report from results files or folders of them.

    \b
    Example: python -m pipeline report demo/results --out report.html
    """
    stages.pass_on("evaluate.report", words)


def outline(data: Any, indent: str = "") -> list[str]:
    """Nested data as indented `name: value` lines for a person; long lists are shortened."""
    lines = []
    for name, value in data.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}:", *outline(value, indent + "  ")]
        elif isinstance(value, list) and len(value) > 12:
            lines.append(f"{indent}{name}: {json.dumps(value[:6])[:-1]}, … {len(value)} in all]")
        else:
            lines.append(
                f"{indent}{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
            )
    return lines


if __name__ == "__main__":
    main(cli, "pipeline")

"""python -m pipeline: whole experiments, the demo, and everything that is about artefacts rather than one stage."""

from __future__ import annotations

if __name__ == "__main__":
    from pipeline.base import startup  # before what takes time to import

    startup.begin()

import json
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.base.cli import (
    COUNT,
    NAMED_SOURCE,
    OUT_FILE,
    OUT_FOLDER,
    OUT_STORE,
    PLACE,
    REPOSITORY,
    SOURCE,
    WHOLE,
    main,
    print_json,
)
from pipeline.base.errors import DamagedError, UsageError
from pipeline.base.progress import say
from pipeline.base.token_text import visible
from pipeline.experiment import experiment as experiments
from pipeline.experiment import stages


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Nested (Matryoshka) sparse autoencoders on one layer of a language model, from text to a report.

    \b
    python -m pipeline demo                     a real report in minutes, without a GPU
    python -m pipeline run paper.toml --dry-run what the paper's experiment would cost
    python -m harvest --help                    the stages, one by one: harvest, train, evaluate
    """


@cli.command()
@click.option("--out", type=OUT_FOLDER, default=Path("demo"), show_default=True, help="Folder that everything goes to.")
@click.option("--seed", type=WHOLE, multiple=True, help="Seeds of the SAEs instead of 0, 1, 2; repeat the option.")
def demo(out: Path, seed: tuple[int, ...]) -> None:
    """Harvest a small real Gemma-2 over real text, train 22 flat and nested SAEs, score them, write the report.

    Takes about two minutes on two cores; nothing is downloaded and nothing is canned. Killed or stopped, the same
    command goes on where it was.
    """
    experiment = experiments.Experiment.read(Path("demo.toml"))
    if seed:
        for grid in (grid for one in (experiment, *experiment.parts) for grid in one.train):
            grid["seed"] = list(seed)
    experiments.run(experiment, out)


@cli.command()
@click.argument("experiment", type=SOURCE)
@click.option("--out", type=OUT_FOLDER, help="Folder that everything goes to.  [default: runs/NAME OF THE FILE]")
@click.option("--dry-run", is_flag=True, help="Print the plan with disk, memory and time; do nothing.")
@click.option(
    "--machine",
    type=click.Choice(["local", "slurm"]),
    default="local",
    show_default=True,
    help="slurm writes job scripts for a cluster to OUT/jobs instead of running.",
)
@click.option("--sbatch", default="", help="Further words for every Slurm job: '--partition=gpu --account=me'.")
@click.option(
    "--gpu",
    type=click.Choice(["a100", "h100", "h200", "l40s", "a6000"]),
    default="a100",
    show_default=True,
    help="Which GPUs the cluster has, for the time that its jobs ask for.",
)
@click.option("--parts", type=click.IntRange(1), help="Parts of each harvest.  [default: parts of about an hour]")
@click.option("--at-once", type=click.IntRange(1), help="Parts that run at the same time.  [default: all]")
@click.option(
    "--trust-remote-code", is_flag=True, help="Allow code that comes with a model, where the file asks for it too."
)
def run(
    experiment: Path, out: Path | None, dry_run: bool, machine: str, trust_remote_code: bool, **cluster: Any
) -> None:
    """Make an experiment file true: harvest, train, evaluate and report what is missing of it.

    EXPERIMENT is a TOML file or the name of a shipped one: demo, paper, ablations, truth. Run it again and nothing is done
    twice; change a line and only what that line asks for is done.

    \b
    Example: python -m pipeline run paper --out /data/paper --dry-run
    """
    parsed = experiments.Experiment.read(experiment, trust_remote_code=trust_remote_code)
    out = out or Path("runs") / experiment.stem
    if dry_run:
        experiments.dry_run(parsed, out)
    elif machine == "slurm":
        from pipeline.experiment.slurm import Cluster, write_jobs

        say(f"read the scripts, then run: bash {write_jobs(parsed, experiment, out, Cluster(**cluster))}")
    else:
        experiments.run(parsed, out)


@cli.command()
@click.argument("path", type=PLACE)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def describe(path: str, as_json: bool) -> None:
    """Print what a store, checkpoint, training folder or results file is and what made it."""
    from pipeline.experiment.describe import describe as describe_path

    data = describe_path(path)
    if as_json:
        print_json(data)
    else:
        click.echo("\n".join(outline(data)))


@cli.command()
@click.argument("path", type=PLACE)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def verify(path: str, as_json: bool) -> None:
    """Check that what lies at PATH is whole: a store, a checkpoint, a member, its metrics, results, latent pages, a report, an
    export, or a folder of them up to a whole experiment's. Every byte is read. Exit code 1 if any is wrong.

    What carries no digest is listed: nobody can vouch for it. Digests find accidents, not forgers.

    \b
    Example: python -m pipeline verify runs/paper
    """
    from pipeline.experiment.verify import describe_unvouched
    from pipeline.experiment.verify import verify as verify_path

    found = verify_path(path)
    if as_json:
        print_json(
            {"path": path, "whole": not found.problems, "problems": found.problems, "unvouched": found.unvouched}
        )
    for problem in found.problems:
        say(problem)
    for line in describe_unvouched(found):
        say(f"cannot vouch for {line}")
    if n := len(found.problems):
        raise DamagedError(f"{path}: {n} problem{'s' * (n > 1)} found")
    if not as_json:
        click.echo(f"{path}: whole")
        say(
            "whole: what was written is what is there, by digests that lie beside it. They say nothing of who wrote it: whoever "
            "can change a file can change its digest too, unless you kept one elsewhere (describe shows ids and hashes)"
        )


@cli.command()
@click.argument("runs", type=SOURCE)
@click.option("--page", type=OUT_FILE, help="Write an HTML page that renews itself instead; open it in a browser.")
@click.option("--every", type=click.FloatRange(min=0.5), default=5.0, show_default=True, help="Seconds between looks.")
@click.option("--once", is_flag=True, help="Look once and stop.")
def watch(runs: Path, page: Path | None, every: float, once: bool) -> None:
    """Show how trainings do while they run: loss, explained variance, L0 and dead latents, and held-out rows, of all members.

    RUNS is --out of python -m train, or one member in it. Looks again until all are finished; Ctrl-C stops looking, not
    training. Runs beside a training, on any machine that sees its folder.

    \b
    Example: python -m pipeline watch runs/l19 --page watch.html
    """
    from pipeline.watch import looks, screen, table, write_page

    for number, members in enumerate(looks(runs, every, once)):
        if page is None:
            click.echo(screen(table(members), sys.stdout.isatty(), number > 0))
            continue
        write_page(page, members, runs, every)
        if number == 0:
            click.echo(page)


@cli.command("import")
@click.argument(
    "kind", metavar="FORMAT", type=click.Choice(["npy", "safetensors", "saelens", "saev", "dictionary-learning"])
)
@click.argument("path", type=SOURCE)
@click.option("--store", type=OUT_STORE, required=True, help="Where to write the store.")
@click.option("--rows", type=COUNT, help="Rows to take, the first ones.  [default: all]")
@click.option(
    "--eval-rows",
    type=COUNT,
    help="Of these, to hold out for evaluation, whole sequences spread evenly.  [default: 1 in 21]",
)
@click.option("--context", type=COUNT, help="Rows called a sequence, where the source has none.  [default: 128]")
@click.option("--key", help="Tensor or column, where there are several.")
@click.option(
    "--layer", type=WHOLE, help="Layer they were taken at; of a saev folder: the one to take.  [default: what it says]"
)
@click.option("--hook", help="Where in the layer: resid_post, mlp_out, …  [default: what it says]")
@click.option(
    "--model", type=NAMED_SOURCE, help="Model they were taken from, for the record and checks.  [default: what it says]"
)
@click.option("--special-ids", default="", help="Of saelens: tokens whose rows are not trained on, like 0,50256.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "float32"]),
    default="auto",
    show_default=True,
    help="What is stored. auto: bf16 of bf16, float32 of all else, so that nothing but float64 is rounded.",
)
@click.option("--chunk-rows", type=COUNT, help="Rows read at once.  [default: about 1024, whole sequences]")
@click.option(
    "--shard-rows",
    type=COUNT,
    help="Rows of a file, a multiple of --chunk-rows.  [default: 64 chunks, of large stores up to 1024]",
)
@click.option(
    "--codec", type=click.Choice(["none", "lz4", "zstd"]), default="none", show_default=True, help="Compression."
)
@click.option("--dry-run", is_flag=True, help="Check every header and say what would be written, and stop.")
def import_rows(
    kind: str, path: Path, key: str | None, special_ids: str, dry_run: bool, layer: int | None, **options: Any
) -> None:
    """Write a store of activations that others saved, of any model: vision, proteins, or one that harvest cannot run.

    \b
    npy, safetensors     files of [row, d_model] or [sequence, position, d_model]
    saelens              what its CacheActivationsRunner saved
    saev                 a folder of its shards (metadata.json, shards.json, acts*.bin), one layer
    dictionary-learning  torch files of a buffer: a tensor each, or {"states": a tensor}; read as weights only

    The store has no tokens: it can be described, verified, trained on, and scored by all that needs no language model. Every
    row must be finite. Stopped at any moment, the same command goes on. From Python: pipeline.write_store(rows, path).

    \b
    Example: python -m pipeline import saev shards/07aed612 --layer 23 --store acts.zarr
    """
    from pipeline.imports.sources import Asked
    from pipeline.imports.write import Import, import_files

    words = [word.strip() for word in special_ids.split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise UsageError(f"--special-ids {special_ids!r}: give token ids with commas between, like 0,50256")
    asked = Asked(key, layer, tuple(map(int, words)))
    if import_files(kind, path, Import(layer=layer, **options), asked, dry_run=dry_run) is not None:
        click.echo(options["store"])


@cli.command()
@click.argument("url", type=PLACE)
@click.argument("path", type=OUT_FOLDER)
def stage(url: str, path: Path) -> None:
    """Copy a store from object storage to a local disk for training; every shard is checked against its commit record.

    Run again it copies what is missing. Needs the extra: pip install -e '.[remote]'.

    \b
    Example: python -m pipeline stage s3://bucket/acts.zarr /scratch/acts.zarr
    """
    from pipeline.store.staging import stage as stage_store

    stage_store(url, path)
    click.echo(f"{path}: staged")


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="CHECKPOINT --store acts.zarr ...")
def explain(words: tuple[str, ...]) -> None:
    """Explain latents in words, by any chat model: write prompts, read answers back, score them. No model is asked by us.

    \b
    Example: python -m pipeline explain runs/l19/alpha0.2-seed0-1a2b3c4d5e --store acts.zarr --prompts explain.jsonl
    All options: python -m evaluate.explain --help
    """
    stages.pass_on("evaluate.explain", words)


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="RESULTS... --out report.html")
def report(words: tuple[str, ...]) -> None:
    """Write one self-contained HTML report from results files or folders of them.

    \b
    Example: python -m pipeline report demo/results --out report.html
    """
    stages.pass_on("evaluate.report", words)


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("checkpoint", type=NAMED_SOURCE)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["saelens", "dictionary-learning", "neuronpedia"]),
    required=True,
    help="Whose folder to write.",
)
@click.option("--out", type=OUT_FOLDER, required=True, help="Folder to write.")
@click.option("--level", default=None, help="A level of the dictionary, 0 the innermost, or `all`: a folder each.")
@click.option(
    "--store",
    type=SOURCE,
    help="neuronpedia: whose rows and tokens are shown. Further options of it come behind.",
)
@click.argument("more", nargs=-1, type=click.UNPROCESSED, metavar="")
def export(checkpoint: str, kind: str, out: Path, level: str | None, store: Path | None, more: tuple[str, ...]) -> None:
    """Write a checkpoint, or an SAE on the Hub, as a folder that SAELens or dictionary_learning loads, folded to raw rows.

    The exported SAE takes raw residuals; its latents are in units of the residual. A LayerNorm SAE loads in SAELens
    after `import pipeline.sae.saelens`. For Neuronpedia it is latents that are written, with examples from a store:
    python -m evaluate.latents.neuronpedia --help lists what else can be said of them.

    \b
    Examples:
      python -m pipeline export runs/a/checkpoints/step_004882.safetensors --format saelens --out exported
      python -m pipeline export runs/a --format neuronpedia --store acts.zarr --out shown --creator "Our group"
    """
    if kind == "neuronpedia":
        if store is None:
            raise UsageError("--format neuronpedia needs --store, whose rows and tokens it shows")
        words = ["--out", str(out), "--store", str(store), *(["--level", level] if level else [])]
        stages.pass_on("evaluate.latents.neuronpedia", [checkpoint, *words, *more])
    elif store or more:
        raise UsageError(f"{'--store' if store else more[0]}: belongs to --format neuronpedia")
    from pipeline.sae.export import export as export_checkpoint
    from pipeline.sae.hub import find_checkpoint

    chosen = None if level is None else -1 if level == "all" else COUNT.convert(level, None, None)
    for folder in export_checkpoint(find_checkpoint(checkpoint), kind, out, chosen):  # type: ignore[arg-type]
        click.echo(folder)


@cli.command()
@click.argument("checkpoint", type=NAMED_SOURCE)
@click.option("--text", required=True, help="What the model reads.")
@click.option("--model", type=NAMED_SOURCE, help="Folder or Hub id.  [default: the one that made the SAE's store]")
@click.option("--layer", type=COUNT, help="The SAE sits at this layer.  [default: that of the SAE's store]")
@click.option("--hook", help="Where in it, as harvest names it.  [default: that of the SAE's store, else resid_post]")
@click.option("--top", type=COUNT, default=5, show_default=True, help="Latents of each level to show at a token.")
@click.option("--out", type=OUT_FILE, help="Write an HTML page instead of lines.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or auto.")
def inspect(
    checkpoint: str,
    text: str,
    model: str | None,
    layer: int | None,
    hook: str | None,
    top: int,
    out: Path | None,
    device: str,
) -> None:
    """Show which latents a text wakes: every token with its strongest shared and specialised latents.

    The text becomes a row as the SAE's store has them: its BOS first, its special tokens left alone, read at its hook.

    \b
    Example: python -m pipeline inspect runs/l19/alpha0.2-seed0-1a2b3c4d5e --text "The capital of France is Paris"
    """
    from pipeline.base.digests import write_vouched
    from pipeline.live.inspect import as_lines, as_page, block_names, inspect_checkpoint

    sae, tokens = inspect_checkpoint(checkpoint, text, model, layer, hook, top, device)
    if out is None:
        click.echo("\n".join(as_lines(tokens)))
        return
    write_vouched(out, as_page(tokens, block_names(sae.config.n_levels), text).encode())
    click.echo(out)


@cli.command()
@click.argument("checkpoint", type=SOURCE)
@click.argument("repository", type=REPOSITORY)
@click.option("--results", type=SOURCE, help="Its results file; the scores go into the model card.")
@click.option("--private", is_flag=True, help="Make the repository private.")
def push(checkpoint: Path, repository: str, results: Path | None, private: bool) -> None:
    """Upload a checkpoint to the Hugging Face Hub with a model card made from its provenance and results.

    REPOSITORY: owner/name, or owner/name/folder. An SAE made elsewhere is uploaded as its own files; one whose path alone says
    what it is of (Gemma Scope 1, sparsify) to a folder that ends like that path, or exported first. The token is the one that
    `hf auth login` or HF_TOKEN holds; it is never printed or stored.

    \b
    Example: python -m pipeline push runs/paper/checkpoints/layer_19/alpha0.2-seed0-1a2b3c4d5e me/gemma-nested
    """
    from pipeline.sae.hub import push as push_checkpoint

    click.echo(push_checkpoint(checkpoint, repository, results, private))


@cli.command()
@click.argument("repository", type=REPOSITORY)
@click.option("--out", type=OUT_FOLDER, required=True, help="Folder to write.")
@click.option("--revision", help="Branch, tag or commit.  [default: main]")
def pull(repository: str, out: Path, revision: str | None) -> None:
    """Download a checkpoint, or the files of an SAE made elsewhere, its card and its results from the Hugging Face Hub, checked.

    REPOSITORY: owner/name, or owner/name/folder where it holds many.

    \b
    Example: python -m pipeline pull me/gemma-nested --out gemma-nested
    """
    from pipeline.sae.hub import pull as pull_checkpoint

    click.echo(pull_checkpoint(repository, out, revision))


@cli.command("push-store")
@click.argument("store", type=SOURCE)
@click.argument("repository", type=REPOSITORY)
@click.option("--private", is_flag=True, help="Make the repository private.")
def push_store(store: Path, repository: str, private: bool) -> None:
    """Upload an activation store to the Hugging Face Hub as a data set repository, every byte checked first, with a card.

    Stopped at any moment, the same command goes on. The token is the one that `hf auth login` or HF_TOKEN holds.

    \b
    Example: python -m pipeline push-store acts.zarr me/gemma-l19-acts
    """
    from pipeline.store.hub import push_store as push

    click.echo(push(store, repository, private=private))


@cli.command("pull-store")
@click.argument("repository", type=REPOSITORY)
@click.argument("path", type=OUT_FOLDER)
@click.option("--revision", help="Branch, tag or commit.  [default: main]")
def pull_store(repository: str, path: Path, revision: str | None) -> None:
    """Download an activation store from the Hugging Face Hub, every shard checked; run again it copies what is missing.

    \b
    Example: python -m pipeline pull-store me/gemma-l19-acts acts.zarr
    """
    from pipeline.store.hub import pull_store as pull

    pull(repository, path, revision)
    click.echo(f"{path}: pulled")


def outline(data: Any, indent: str = "") -> list[str]:
    """Nested data as indented `name: value` lines for a person; long lists are shortened, what would move a cursor is spelled
    out."""
    lines = []
    for key, value in data.items():
        name = visible(key)
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}:", *outline(value, indent + "  ")]
        elif isinstance(value, list) and len(value) > 12:
            lines.append(f"{indent}{name}: {json.dumps(value[:6])[:-1]}, … {len(value)} in all]")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f"{indent}{name}: {visible(text)}")
    return lines


if __name__ == "__main__":
    main(cli, "pipeline")

"""`python -m evaluate`: scores checkpoints on a store's held-out rows."""

from __future__ import annotations

if __name__ == "__main__":
    from pipeline.base import startup  # before what takes time to import

    startup.begin()

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.base.cli import (
    COUNT,
    COUNT_OR_AUTO,
    NAMED_SOURCE,
    NAMED_SOURCES,
    OUT_FOLDER,
    SIZE,
    SOURCE,
    STORE,
    Remembering,
    main,
    only_reads,
    print_json,
)
from pipeline.base.errors import UsageError

PROBING = ("scr", "tpp", "k_sparse_probe")


@click.command(cls=Remembering, context_settings={"show_default": True})
@click.argument("places", metavar="CHECKPOINT_OR_DIR...", nargs=-1, required=True, type=NAMED_SOURCE)
@click.option("--store", required=True, type=STORE, help="Activation store, or its URL; its eval split is used.")
@click.option(
    "--model",
    type=NAMED_SOURCE,
    help="Folder or Hub id of the model that made the store.  [default: the one the store names]",
)
@click.option(
    "--cache",
    type=OUT_FOLDER,
    help="Keep chunks of a store at a URL in this folder, which trainings and evaluations may share.",
)
@click.option("--cache-size", type=SIZE, default="100GB", help="The most that --cache may take.")
@click.option(
    "--target",
    type=STORE,
    help="For transcoders: the store of the rows that they make of those of --store, which is where they are spliced in.",
)
@click.option("--revision", help="Of a Hub model.  [default: the store's]")
@click.option("--out", required=True, type=OUT_FOLDER, help="Folder for results; may hold others already.")
@click.option(
    "--scores",
    help="Comma-separated: kl, ev, l0, coding, features, truth, structure, absorption, first_letter, scr, tpp, "
    "k_sparse_probe.  [default: "
    "what the store has: kl to features, or ev to structure; and what --scr gives]",
)
@click.option("--levels", default="all", help="all, last, or indices from the innermost, like 0,1.")
@click.option("--all-steps", is_flag=True, help="Every checkpoint of a member, not only the final one.")
@click.option("--rows", "--tokens", "rows", type=COUNT, help="Evaluation rows, up to whole sequences.  [default: all]")
@click.option("--batch-size", default=16, type=COUNT, help="Sequences a batch; changes speed and rounding only.")
@click.option("--max-memory", type=SIZE, help="Bytes, like 8GB.  [default: four fifths of what is free]")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N.")
@click.option(
    "--device-map",
    type=click.Choice(["auto", "balanced", "sequential"]),
    help="Spread the layers of a model too large for one GPU over all of them, as transformers does it (needs accelerate).",
)
@click.option(
    "--processes",
    type=COUNT_OR_AUTO,
    default=1,
    help="Share checkpoints out over so many processes of this machine, its cores and memory divided among them; auto: one a "
    "core, or one a GPU. Several small SAEs on a CPU are scored faster so.",
)
@click.option(
    "--dtype",
    default="store",
    help="Of the language model: store, bf16, float32 (exact). SAEs run in float32; on CUDA they encode in TF32.",
)
@click.option("--seed", default=0, help="Draws the latents whose correlations are taken.")
@click.option(
    "--scr",
    "sources",
    type=NAMED_SOURCES,
    multiple=True,
    help="Texts with two attributes: folder, TRAIN,TEST or Hub id.",
)
@click.option("--scr-text", help="Column of the text, where it is not plain.")
@click.option("--scr-attributes", help="Two columns, like profession,gender, where they are not plain.")
@click.option(
    "--scr-seeds", default=3, type=click.IntRange(1), help="How often draws and probes are repeated, for intervals."
)
@click.option("--scr-train-size", default=4000, type=COUNT, help="Texts a probe is trained on, at most.")
@click.option("--scr-test-size", default=1000, type=COUNT, help="Texts a probe is tested on, at most.")
@click.option(
    "--scr-resample/--no-scr-resample", default=True, help="Further seeds use other rows too, not only other draws."
)
@click.option("--scr-pair", "scr_pairs", multiple=True, help="Two values of the first attribute, like professor,nurse.")
@click.option("--scr-n", default="2,5,10,20,50,100,500", help="Latents that SCR and TPP ablate.")
@click.option("--probe-k", default="1,2,5", help="Latents that sparse probes see.")
@click.option("--scr-context", default=128, type=COUNT, help="Positions a text is cut to.")
@click.option(
    "--latents",
    default="",
    metavar="MEMBER",
    help="Also write pages of every latent (contexts, logit lens, relatives) of members whose name begins so, or all.",
)
@click.option(
    "--words",
    type=SOURCE,
    help="Words of first_letter, one a line.  [default: the tokens of the model's tokenizer that are letters alone]",
)
@click.option("--allow-other-store", is_flag=True, help="Evaluate on a store other than the one trained on.")
@click.option(
    "--allow-other-model", is_flag=True, help="Evaluate SAEs of another model's rows, and texts with another tokenizer."
)
@click.option("--trust-remote-code", is_flag=True, help="Run the model's own code from its folder or the Hub.")
@click.option("--dry-run", is_flag=True, help="Print what it would take, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print {results, failed} to stdout as JSON.")
def evaluate(
    places: tuple[str, ...], as_json: bool, all_steps: bool, dry_run: bool, processes: int | str, **options: Any
) -> None:
    """Score checkpoints: what they do to the language model when spliced in, how well they rebuild the residual stream,
    and how they use their latents; at every level, with and without massive rows.

    A folder of train stands for the final checkpoint of each member in it; an SAE on the Hub goes by owner/name, or
    owner/name/folder in a suite. Starts from the store's cached residuals: only
    the layers after the cut run, the clean ones once for all checkpoints. Results are one JSON file a checkpoint and
    results.csv in --out; what is done already is skipped. Exits 1 when a checkpoint failed; the others are finished.

    \b
    python -m evaluate runs/paper --store acts.zarr --model google/gemma-2-2b --out results
    python -m evaluate runs/paper/alpha0.2-seed0-1a2b3c4d5e/checkpoints/step_001000.safetensors \\
        --store acts.zarr --model google/gemma-2-2b --out results --scores kl,ev --rows 100k
    torchrun --nproc-per-node 8 -m evaluate runs/paper --store acts.zarr --model google/gemma-2-2b --out results
    """
    config = make_config(**options)
    if only_reads():
        return
    from evaluate.run import processes_for, run
    from evaluate.scores.scorer import default_scores
    from pipeline.base.spread import Others
    from pipeline.store.reader import Store

    if options["scores"] is None:
        config = dataclasses.replace(config, scores=default_scores(Store.load(config.store)))
    paths = [found(place) for place in places]
    n = 1 if dry_run else processes_for(config, paths, processes, all_steps=all_steps)
    with Others("evaluate", n, "checkpoints") as others:
        outcome = run(config, paths, all_steps=all_steps, dry_run=dry_run)
        outcome.take_in(others.results())
    if as_json:
        failed = [{"path": str(path), "error": str(error)} for path, error in outcome.failed]
        print_json({"out": str(options["out"]), "results": outcome.results, "failed": failed})
    if outcome.failed:
        n_failed, n_done = len(outcome.failed), len(outcome.results)
        print(f"error: checkpoints that failed: {n_failed}; that have results: {n_done}", file=sys.stderr)
        sys.exit(1)


def found(place: str) -> Path:
    """A path as it is; of an id on the Hub what was downloaded. Raises CheckpointError."""
    from pipeline.sae.hub import find_checkpoint, hub_id

    return Path(place) if hub_id(place) is None else find_checkpoint(place)


def make_config(
    scores: str | None,
    sources: tuple[str, ...],
    scr_text: str | None,
    scr_attributes: str | None,
    scr_seeds: int,
    scr_train_size: int,
    scr_test_size: int,
    scr_resample: bool,
    scr_pairs: tuple[str, ...],
    scr_n: str,
    probe_k: str,
    scr_context: int,
    **options: Any,
) -> Any:
    """The config that the options mean. Raises UsageError when scores of texts are asked for without texts."""
    from evaluate.config import EvaluateConfig
    from evaluate.probing.datasets import require_source
    from evaluate.probing.job import ProbingConfig
    from evaluate.scores.scorer import OF_A_MODEL

    asked = [name.strip() for name in scores.split(",")] if scores else [*OF_A_MODEL, *(PROBING if sources else ())]
    of_texts = tuple(name for name in asked if name in PROBING)
    if of_texts and not sources:
        raise UsageError(f"--scores {of_texts[0]} needs texts with two attributes; give --scr PATH_OR_ID")
    probing = None
    if of_texts:
        for source in sources:
            require_source(source)
        probing = ProbingConfig(
            sources=sources,
            scores=of_texts,
            text=scr_text,
            attributes=two(scr_attributes, "--scr-attributes", "columns, like profession,gender")
            if scr_attributes
            else None,
            pairs=tuple(two(pair, "--scr-pair", "values, like professor,nurse") for pair in scr_pairs),
            n_values=numbers(scr_n, "--scr-n"),
            k_values=numbers(probe_k, "--probe-k"),
            seeds=tuple(range(42, 42 + scr_seeds)),
            train_size=scr_train_size,
            test_size=scr_test_size,
            resample=scr_resample,
            context=scr_context,
        )
    return EvaluateConfig(scores=tuple(name for name in asked if name not in PROBING), probing=probing, **options)


def two(text: str, option: str, what: str) -> tuple[str, str]:
    """Two words with a comma between. Raises UsageError."""
    words = [word.strip() for word in text.split(",")]
    if len(words) != 2 or not all(words):
        raise UsageError(f"{option} {text!r}: give two {what}")
    return words[0], words[1]


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Rising whole numbers with commas between. Raises UsageError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise UsageError(f"{option} {text!r}: give whole numbers from 1, like 2,5,10")
    return tuple(sorted({int(word) for word in words}))


if __name__ == "__main__":
    main(evaluate, "evaluate", "what is finished is kept; run the same command again to go on")

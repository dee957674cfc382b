"""Writes something in child processes that kill themselves at their n-th write, n growing by a step each round.

    python tests/support/write_crasher.py KIND FOLDER OUT FIRST STEP

Rounds FIRST, FIRST + STEP, … until a child gets to its end; prints how many were killed. A program, for test_write_crash: it
forks before torch runs anything, so that a round costs no import.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import harvest.run
from evaluate.explain.__main__ import Asked
from evaluate.explain.__main__ import report as explained
from evaluate.explain.prompts import explain_id, questions
from evaluate.latents.files import write_labels
from evaluate.latents.neuronpedia import export_neuronpedia
from evaluate.probing.probes import load_or_train
from evaluate.report.write import write_report
from evaluate.run import EvaluateConfig
from evaluate.run import run as run_evaluate
from harvest.truth.run import TruthConfig, run_truth
from pipeline.base import kept as base_kept
from pipeline.base.digests import write_sealed
from pipeline.base.files import sha256
from pipeline.base.token_text import TokenText
from pipeline.experiment.slurm import write_script
from pipeline.imports.sources import Asked as AskedRows
from pipeline.imports.write import Import, import_files
from pipeline.sae import hub
from pipeline.sae.export import FORMATS, export
from pipeline.store.cache import open_cache
from pipeline.store.reader import Store
from pipeline.store.staging import open_cached, stage
from pipeline.watch import watched, write_page
from support.harvests import harvest_config
from support.train_crasher import die_at_write, small
from test_explain import SHA, made
from test_latents import Words, make_sae
from test_neuronpedia import SOURCE, sample_of
from test_probes import RECIPE, small_task
from train.plan import RunConfig
from train.run import run as run_training


def evaluation(folder: Path, out: Path) -> None:
    """Results of all members, with latent pages."""
    config = EvaluateConfig(store=folder / "acts.zarr", out=out, scores=("ev",), latents="all", device="cpu")
    if failed := run_evaluate(config, [folder / "runs"]).failed:
        raise failed[0][1]


def report(folder: Path, out: Path) -> None:
    """A report of results and latent pages."""
    write_report([folder / "results"], out / "report.html")


def neuronpedia(folder: Path, out: Path) -> None:
    """Latents for Neuronpedia."""
    store = Store.open(folder / "tiny.zarr")
    unembedding = torch.randn(50, store.d_model, generator=torch.Generator().manual_seed(1))
    sae = make_sae(store).requires_grad_(False)
    export_neuronpedia(sae, unembedding, TokenText(Words()), sample_of(store), SOURCE, out, quiet=True)


def mixed(folder: Path, out: Path) -> None:
    """The rest of a harvest that another version of torch began."""
    harvest.run.maker = lambda device, packages: {"torch": "1.0", "transformers": "1.0", "device": "cpu"}
    config = harvest_config(folder / "model", folder / "corpus.jsonl", out / "acts.zarr", mixed=True)
    harvest.run.run(config, quiet=True)


def pieces(folder: Path, out: Path) -> None:
    """All that is written of one SAE: exports of every level in both formats, a copy as `pull` makes it, explanations and their
    prompts, labels; and what an experiment writes beside its stages: job scripts, a harvest's plan, a page of watch."""
    checkpoint = next(folder.glob("runs/*/checkpoints/*.safetensors"))
    for kind in FORMATS:
        export(checkpoint, kind, out / kind, level=-1)
    hub.download = lambda *_: folder / "remote"
    hub.pull("owner/name", out / "pulled")
    text, found = TokenText(Words()), made()
    asked = Asked(folder / "sae", SHA, SHA, 0, 8, (8,), [found], {3: list(questions(SHA, found, 0))}, text)
    explained(asked, {explain_id(SHA, 3): "rivers"}, out / "prompts.jsonl", out / "explained.json", None)
    write_labels(out / "labels", {3: "rivers"})
    write_script(out / "jobs" / "train_0.sh", "#!/usr/bin/env bash\n")
    write_sealed(out / "logs" / "harvest-plan.json", {"stores": []})
    write_page(out / "watch.html", watched(folder / "runs", 0.0), Path("runs"), 1.0)


def copies(folder: Path, out: Path) -> None:
    """Stores that no model makes: one staged, one of rows of others, one of known features."""
    stage(str(folder / "tiny.zarr"), out / "staged.zarr", quiet=True)
    import_files(
        "npy", folder / "rows", Import(str(out / "rows.zarr"), context=16, shard_rows=128, chunk_rows=64), AskedRows()
    )
    run_truth(TruthConfig("tree", str(out / "truth.zarr"), 640, 320, context=16, chunk_rows=64))


def extended(folder: Path, out: Path) -> None:
    """A finished training gone on with, for more steps than it had."""
    longer = small(steps=40)
    run_training(RunConfig(folder / "tiny.zarr", out / "runs", (longer,), "cpu", extend=True, threads=1))


def kept(folder: Path, out: Path) -> None:
    """What is read through what is kept beside the work: ranges of a store at a URL, in a cache that must make room, hashes of
    files, probes."""
    base_kept.LARGE, base_kept.SETTLED_S = 0, -1.0
    place = out.with_name(f"{out.name}.kept")
    os.environ["XDG_CACHE_HOME"] = str(place / "home")
    store = open_cached(f"file://{folder / 'tiny.zarr'}", open_cache(place / "cache", 150_000))
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    probes = load_or_train(x, small_task(), (1, 2), RECIPE, {}, place / "probes")
    rows = store.train.read(0, store.train.n_rows)
    found = {"rows": sha256(rows.float().numpy().tobytes()), "probes": sha256(probes.weight.numpy().tobytes())}
    for path in sorted((folder / "tiny.zarr").glob("train/*/zarr.json")):
        found[path.parent.name] = base_kept.kept_hash(path)
    write_sealed(out / "read.json", found)


KINDS: dict[str, Callable[[Path, Path], None]] = {
    work.__name__: work for work in (evaluation, report, neuronpedia, mixed, pieces, copies, extended, kept)
}


def child(kind: str, folder: Path, out: Path, die_at: int) -> None:
    """Work to the end, or until killed. Never returns."""
    torch.set_num_threads(1)
    die_at_write(die_at)
    try:
        KINDS[kind](folder, out)
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main() -> None:
    """Rounds of killing, until one is left alone."""
    kind, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    n, step, n_killed = int(sys.argv[4]), int(sys.argv[5]), 0
    while True:
        if (pid := os.fork()) == 0:
            child(kind, folder, out, n)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            break
        n, n_killed = n + step, n_killed + 1
    if os.WEXITSTATUS(status):
        sys.exit("the child failed")
    print(n_killed)


if __name__ == "__main__":
    main()

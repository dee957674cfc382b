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
from evaluate.latents.neuronpedia import export_neuronpedia
from evaluate.report.write import write_report
from evaluate.run import EvaluateConfig
from evaluate.run import run as run_evaluate
from pipeline.base.token_text import TokenText
from pipeline.store.reader import Store
from support.harvests import harvest_config
from support.train_crasher import die_at_write
from test_latents import Words, make_sae
from test_neuronpedia import SOURCE, sample_of


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


KINDS: dict[str, Callable[[Path, Path], None]] = {
    work.__name__: work for work in (evaluation, report, neuronpedia, mixed)
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

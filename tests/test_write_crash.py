"""Killed at any write, whatever writes several files ends with the same bytes, and leaves nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harvest.run import run as harvest
from pipeline.experiment.verify import verify
from support import lm_stores, tiny_models
from support.harvests import harvest_config
from support.results_files import write_latent_pages, write_results
from support.saved_rows import npy_folder
from support.stores import lose_shards, make_store
from support.train_crasher import small
from train.plan import RunConfig
from train.run import run as train

ROOT = Path(__file__).parents[1]
CRASHER = Path(__file__).parent / "support" / "write_crasher.py"


def begin_evaluation(folder: Path) -> None:
    """A store and two members."""
    store = lm_stores.make_lm_store(folder, eval_sequences=4)
    for seed in (0, 1):
        lm_stores.save_member(folder / "runs", store, lm_stores.make_sae(store, seed=seed), seed=seed)


def begin_report(folder: Path) -> None:
    """Results of two members, one of them with latent pages."""
    paths = write_results(folder / "results", alphas=(0.0, 0.2), seeds=(0,), steps=(400,))
    write_latent_pages(paths[0], ["one", "two"])


def begin_neuronpedia(folder: Path) -> None:
    """A store."""
    make_store(folder / "tiny.zarr")


def begin_mixed(folder: Path) -> None:
    """A model, a corpus, and a harvest of it that two shards are missing of."""
    tiny_models.make_model(folder / "model", "gemma2")
    corpus = tiny_models.make_corpus(folder / "corpus.jsonl")
    begun = folder / "begun" / "acts.zarr"
    harvest(harvest_config(folder / "model", corpus, begun), quiet=True)
    lose_shards(begun, ("train", 2), ("train", 6))


def begin_pieces(folder: Path) -> None:
    """A member, and a repository's files."""
    store = lm_stores.make_lm_store(folder, eval_sequences=4)
    sae = lm_stores.make_sae(store)
    member = lm_stores.save_member(folder / "runs", store, sae)
    (folder / "remote").mkdir()
    shutil.copy(next(member.glob("checkpoints/*")), folder / "remote" / "sae.safetensors")
    (folder / "remote" / "README.md").write_text("a card")


def begin_copies(folder: Path) -> None:
    """A store, and rows of others."""
    make_store(folder / "tiny.zarr", codec="lz4", group_shards=2)
    npy_folder(folder / "rows")


def begin_kept(folder: Path) -> None:
    """A store."""
    make_store(folder / "tiny.zarr")


def begin_extended(folder: Path) -> None:
    """A store, and a training of it that kept its state."""
    store = make_store(folder / "tiny.zarr")
    train(RunConfig(Path(store.path), folder / "begun" / "runs", (small(steps=20),), "cpu", keep_state=True, threads=1))


BEGIN = {
    "evaluation": begin_evaluation,
    "report": begin_report,
    "neuronpedia": begin_neuronpedia,
    "mixed": begin_mixed,
    "pieces": begin_pieces,
    "copies": begin_copies,
    "extended": begin_extended,
    "kept": begin_kept,
}


@pytest.fixture(scope="module", params=BEGIN)
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is needed for the work of a kind, which names the folder, and what nobody kills makes of it. Read-only."""
    folder = tmp_path_factory.mktemp("crash") / request.param
    folder.mkdir()
    BEGIN[request.param](folder)
    assert written(folder, folder / "whole", 10_000, 1) == 0
    return folder


def written(folder: Path, out: Path, first: int, step: int) -> int:
    """How many children were killed before one got to its end."""
    if (folder / "begun").is_dir():
        shutil.copytree(folder / "begun", out)
    words = [str(CRASHER), folder.name, str(folder), str(out), str(first), str(step)]
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


def files(out: Path) -> dict[str, bytes]:
    """Every file by path, but for what the clock writes."""
    found = [path for path in sorted(out.rglob("*")) if path.is_file() and not path.name.startswith("timings.jsonl")]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def kills_change_nothing(places: Path, out: Path, first: int, step: int) -> int:
    """Compare what killed writers leave with what an undisturbed one does; how many were killed."""
    n_killed = written(places, out, first, step)
    assert files(out) == files(places / "whole")
    assert verify(str(out)).problems == []
    return n_killed


def test_some_kills_change_nothing(places: Path, tmp_path: Path) -> None:
    """Killed at every ninth write."""
    assert kills_change_nothing(places, tmp_path / "out", 2, 9) > 2


@pytest.mark.slow
def test_kills_at_every_write_change_nothing(places: Path, tmp_path: Path) -> None:
    """Killed at each write in turn."""
    assert kills_change_nothing(places, tmp_path / "out", 1, 1) > 10

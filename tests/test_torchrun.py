"""torchrun itself, two processes: members and checkpoints are shared out, and what comes out is what one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.sae.checkpoint import load_checkpoint
from support import tiny_models
from support.harvests import store_bytes
from support.lm_stores import make_lm_store, make_sae, save_member
from support.stores import make_store

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
pytestmark = pytest.mark.slow


def run(words: list[str]) -> None:
    """One command with one thread a process, as torchrun sets it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def train_words(store: Path, out: Path, *more: str) -> list[str]:
    sizes = "--width 64 --steps 20 --batch-size 64 --lr-warmup-steps 5 --sparsity-warmup-steps 5 --dtype float32"
    grid = "--alpha 0 --alpha 0.25 --alpha auto --seed 0 --seed 1"
    return ["-m", "train", "--store", str(store), "--out", str(out), *sizes.split(), *grid.split(), *more]


def files(out: Path, suffix: str) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob(f"*{suffix}"))}


def test_torchrun_members_have_equal_bytes(tmp_path: Path) -> None:
    """Members trained under torchrun have the bytes of one process."""
    store = make_store(tmp_path / "s.zarr", n_sequences=200, eval_sequences=4).path
    run([sys.executable, *train_words(store, tmp_path / "one")])
    run([*TORCHRUN, *train_words(store, tmp_path / "two")])
    one = files(tmp_path / "one", ".safetensors") | files(tmp_path / "one", "metrics.jsonl")
    assert len(one) == 12
    assert files(tmp_path / "two", ".safetensors") | files(tmp_path / "two", "metrics.jsonl") == one


def test_data_parallel_member_agrees(tmp_path: Path) -> None:
    """One member trained data-parallel under torchrun is the same within rounding."""
    store = make_store(tmp_path / "s.zarr", n_sequences=200, eval_sequences=4).path
    run([sys.executable, *train_words(store, tmp_path / "one")])
    run([*TORCHRUN, *train_words(store, tmp_path / "two", "--data-parallel")])
    pairs = list(zip(*(sorted(out.rglob("*.safetensors")) for out in (tmp_path / "one", tmp_path / "two"))))
    assert len(pairs) == 6
    for one, two in pairs:
        for (name, a), b in zip(
            load_checkpoint(one)[0].state_dict().items(), load_checkpoint(two)[0].state_dict().values()
        ):
            assert (a - b).abs().max() < 2e-3, name


def test_torchrun_error_is_said_once(tmp_path: Path) -> None:
    """An error that every rank has is one line, once."""
    words = [*TORCHRUN, *train_words(tmp_path / "missing.zarr", tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1


def results(out: Path) -> dict[str, Any]:
    found = {path.name: json.loads(path.read_text()) for path in sorted(out.glob("*-step_*.json"))}
    assert (out / "results.csv").read_text().count("\n") == 1 + sum(len(one["levels"]) for one in found.values())
    return found


def test_torchrun_evaluation_has_equal_scores(tmp_path: Path) -> None:
    """Checkpoints evaluated under torchrun have the scores of one process."""
    store = make_lm_store(tmp_path, eval_sequences=8)
    for seed in range(3):
        save_member(tmp_path / "runs", store, make_sae(store, seed=seed), seed=seed)
    words = ["-m", "evaluate", str(tmp_path / "runs"), "--store", str(store.path), "--scores", "kl,ev,l0"]
    run([sys.executable, *words, "--out", str(tmp_path / "one")])
    run([*TORCHRUN, *words, "--out", str(tmp_path / "two")])
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert len(results(tmp_path / "two")) == 3


RESTARTED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from pipeline.base.runtime import process_group, rank
with process_group("gloo"):
    dist.barrier()
    if rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] != "2":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    print(f"rank {rank()} met the others")
"""
"""A worker: rank 1 dies in its first two attempts, after all have met."""


@pytest.mark.parametrize("meeting", [[], ["--standalone"]])
def test_restarted_workers_meet(tmp_path: Path, meeting: list[str]) -> None:
    """Workers that torchrun restarts, twice, meet each other and not those that were killed, whichever rendezvous it has."""
    (tmp_path / "worker.py").write_text(RESTARTED)
    words = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", "2", "--max-restarts", "2"]
    environment = os.environ | {"MASTER_PORT": "0"}
    done = subprocess.run(
        [*words, str(tmp_path / "worker.py"), str(ROOT)], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split("\n")) == ["", "rank 0 met the others", "rank 1 met the others"]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
from harvest.__main__ import command
from pipeline.store import writer
commit, committed = writer.commit, []
def commit_or_die(*words):
    commit(*words)
    committed.append(words)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(committed) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
writer.commit = commit_or_die
command()
"""
"""A worker of harvest: rank 1 dies in its first attempt, after its second shard."""


@pytest.mark.parametrize("n", [2, 4])
def test_harvest_restarts_after_a_kill(tmp_path: Path, n: int) -> None:
    """Of two and four workers of a harvest one is killed: torchrun starts all again, and the bytes are those of one process."""
    model, corpus = tiny_models.make_model(tmp_path / "model", "gemma2"), tiny_models.make_corpus(tmp_path / "c.jsonl")
    options = "--layer 2 --tokens 1600 --eval-tokens 320 --context 16 --batch-size 1 --chunk-rows 16 --shard-rows 64 --device cpu"
    words = ["--model", str(model), "--corpus", str(corpus), *options.split()]
    run([sys.executable, "-m", "harvest", *words, "--store", str(tmp_path / "one.zarr")])
    (tmp_path / "worker.py").write_text(KILLED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--max-restarts", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    words = [*torchrun, str(tmp_path / "worker.py"), str(ROOT), *words, "--store", str(tmp_path / "shared.zarr")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "exitcode: -9" in done.stderr
    assert store_bytes(tmp_path / "shared.zarr") == store_bytes(tmp_path / "one.zarr")

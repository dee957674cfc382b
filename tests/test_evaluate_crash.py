"""Killed at any write, an evaluation with latent pages ends with the same bytes, and leaves nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.experiment.verify import verify
from support import lm_stores

ROOT = Path(__file__).parents[1]
CRASHER = Path(__file__).parent / "support" / "evaluate_crasher.py"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, two members, and what an evaluation that nobody kills makes of them. Read-only."""
    folder = tmp_path_factory.mktemp("crash")
    store = lm_stores.make_lm_store(folder, eval_sequences=4)
    for seed in (0, 1):
        lm_stores.save_member(folder / "runs", store, lm_stores.make_sae(store, seed=seed), seed=seed)
    assert evaluated(folder, folder / "whole", 10_000, 1) == 0
    return folder


def evaluated(folder: Path, out: Path, first: int, step: int) -> int:
    """How many children were killed before one got to its end."""
    words = [str(CRASHER), str(folder / "acts.zarr"), str(folder / "runs"), str(out), str(first), str(step)]
    return int(subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def files(out: Path) -> dict[str, bytes]:
    """Every file by path."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def kills_change_nothing(places: Path, out: Path, first: int, step: int) -> int:
    """Compare what killed evaluations leave with what an undisturbed one does; how many were killed."""
    n_killed = evaluated(places, out, first, step)
    assert files(out) == files(places / "whole")
    assert verify(str(out)).problems == []
    return n_killed


def test_some_kills_change_nothing(places: Path, tmp_path: Path) -> None:
    """Killed at every fifth write."""
    assert kills_change_nothing(places, tmp_path / "out", 2, 5) > 2


@pytest.mark.slow
def test_kills_at_every_write_change_nothing(places: Path, tmp_path: Path) -> None:
    """Killed at each write in turn."""
    assert kills_change_nothing(places, tmp_path / "out", 1, 1) > 10

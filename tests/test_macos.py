"""What macOS lacks: the stages run without it, and what Linux alone can do is asked for there alone."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harvest.tokens import scratch_array
from pipeline.base.processes import die_with_parent

ROOT = Path(__file__).parents[1]
STAND_IN = ROOT / "tests" / "support" / "macos.py"


def run(folder: Path, *words: str) -> str:
    """The standard output of Python with the stand-in for macOS, which is put in the folder; it must end well."""
    shutil.copy(STAND_IN, folder / "sitecustomize.py")
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_stand_in_takes_away(tmp_path: Path) -> None:
    """The stand-in hides what these tests are about."""
    lacks = "import os; print(hasattr(os, 'posix_fallocate'), os.path.exists('/proc'), os.path.exists('/tmp'))"
    assert run(tmp_path, "-c", lacks).split() == ["False", "False", "True"]
    with pytest.raises(AssertionError, match="a fork without exec"):
        run(tmp_path, "-c", "import os; os.fork()")


@pytest.mark.slow
def test_every_stage_runs(tmp_path: Path) -> None:
    """Harvest, training in two processes, and evaluation need nothing that Linux alone has."""
    store, runs, results = (str(tmp_path / name) for name in ("acts.zarr", "runs", "results"))
    corpus = ("--corpus", "data/corpus/train.jsonl.zst", "--tokens", "4k", "--eval-tokens", "1k", "--context", "64")
    run(tmp_path, "-m", "harvest", "--model", "data/tiny-gemma2", "--layer", "3", *corpus, "--store", store)
    shape = ("--width", "64", "--k", "8", "--steps", "4", "--batch-size", "256", "--seed", "0", "--seed", "1")
    run(tmp_path, "-m", "train", "--store", store, "--out", runs, *shape, "--processes", "2")
    run(tmp_path, "-m", "evaluate", runs, "--store", store, "--out", results, "--scores", "kl,ev")
    assert len(list(Path(results).glob("*.json"))) == 2


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_disks_may_not_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Where the file system does not know the call (ZFS, some network disks), the zeros are written."""

    def unknown(_descriptor: int, _offset: int, _length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    array = scratch_array(tmp_path, (700_000,), np.int32)
    assert array.shape == (700_000,)
    assert not array.any()


def test_only_linux_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's call that ends a child with its parent is made on Linux alone."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("macOS has no prctl"))
    die_with_parent()

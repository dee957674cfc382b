"""What opens files closes them: as many descriptors after as before, whether it was read or refused."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluate.checkpoints.find import find_checkpoints, open_checkpoint
from evaluate.probing.datasets import load_attribute_data
from evaluate.report.reading import read_run
from harvest.corpus import LocalCorpus, Source
from pipeline.base.errors import PipelineError
from pipeline.base.files import read_bytes
from pipeline.experiment.describe import describe
from pipeline.experiment.verify import verify
from pipeline.sae.checkpoint import load_checkpoint, save_checkpoint
from pipeline.sae.foreign.reader import load_sae
from pipeline.store.reader import Store
from support.results_files import write_results
from test_sae import KINDS, random_sae

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc/self/fd on this system")


def n_open() -> int:
    """Descriptors of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def read_store(path: Path) -> None:
    """A store, its rows and its tokens."""
    store = Store.open(path)
    for split in store.splits:
        split.read(0, split.n_rows), split.tokens_of(0, 1), split.moments


READERS: dict[str, Callable[[Path], object]] = {
    "store": lambda folder: read_store(folder / "acts.zarr"),
    "store, verify": lambda folder: verify(str(folder / "acts.zarr")),
    "store, describe": lambda folder: describe(str(folder / "acts.zarr")),
    "checkpoint": lambda folder: load_checkpoint(folder / "step_000005.safetensors"),
    "checkpoint, evaluate": lambda folder: [open_checkpoint(one) for one in find_checkpoints([folder], False)[0]],
    "checkpoint, load": lambda folder: load_sae(folder / "step_000005.safetensors"),
    "results": lambda folder: [read_run(path) for path in (folder / "results").glob("*.json")],
    "corpus": lambda folder: list(LocalCorpus(Source(str(folder / "corpus.jsonl"))).documents()),
    "texts": lambda folder: load_attribute_data(f"{folder / 'corpus.jsonl'},{folder / 'corpus.jsonl'}"),
    "pipe": lambda folder: read_bytes(folder / "pipe"),
}


@pytest.fixture(scope="module")
def made(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each kind."""
    folder = tmp_path_factory.mktemp("open")
    shutil.copytree(tiny_store, folder / "acts.zarr")
    save_checkpoint(folder / "step_000005.safetensors", random_sae(KINDS["batchtopk"]), 5, {"member": "a"})
    write_results(folder / "results", alphas=(0.0,), seeds=(0,), steps=(400,))
    lines = (f'{{"text": "text {i}", "a": {i % 2}, "b": {i // 2 % 2}}}\n' for i in range(40))
    (folder / "corpus.jsonl").write_text("".join(lines))
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_readers_close_what_they_open(made: Path, tmp_path: Path, kind: str, cut: bool) -> None:
    """Ten times each, of whole files and of files cut short, which are refused."""
    folder = Path(shutil.copytree(made, tmp_path / "x", ignore=shutil.ignore_patterns("pipe")))
    os.mkfifo(folder / "pipe")
    for file in (file for file in folder.rglob("*") if file.is_file() and cut):
        os.truncate(file, file.stat().st_size // 2)
    counts, refused = [], 0
    for _ in range(10):
        try:
            READERS[kind](folder)
        except PipelineError:
            refused += 1
        counts.append(n_open())
    assert counts[-1] == counts[0]
    assert refused in (0, 10)


def test_opened_stores_are_closed(made: Path) -> None:
    """Fifty stores opened and let go leave no descriptor, whether memory was mapped or not."""
    read_store(made / "acts.zarr")
    before = n_open()
    for _ in range(50):
        store = Store.open(made / "acts.zarr")
        with contextlib.suppress(PipelineError):
            store.train.mapped_shard(0)
    del store
    assert n_open() == before

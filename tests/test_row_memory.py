"""Memory that grows with rows: of what reads a split, counted as allocated, on stores of two sizes."""

from __future__ import annotations

import gc
import shutil
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate.work
from evaluate.explain.examples import find_examples
from evaluate.latents import collect
from evaluate.latents.collect import choose_chunks, write_latents
from evaluate.latents.neuronpedia import Sample, export_neuronpedia
from evaluate.run import EvaluateConfig, run
from evaluate.scores import labels
from evaluate.scores.behaviour import Clean
from evaluate.scores.labels import read_probes
from evaluate.scores.reconstruction import Reconstruction
from evaluate.scores.sample import GROUP_SEQUENCES, Batch, GroupMeans, Survey
from evaluate.scores.scorer import Batched
from harvest.splits import Seen
from harvest.texts import Piece
from harvest.truth.run import TruthConfig, make_plan, prepare_store
from pipeline.base.errors import CorpusError
from pipeline.base.token_text import TokenText
from pipeline.imports.sources import Source
from pipeline.imports.write import Import
from pipeline.imports.write import make_plan as import_plan
from pipeline.sae.checkpoint import save_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from pipeline.store.reader import Store, describe_store
from pipeline.store.split import Split
from support.stores import lose_shards, make_store
from test_latents import Words
from test_neuronpedia import SOURCE
from train.config import batchtopk
from train.plan import RunConfig
from train.run import run as train_run

ROWS, CONTEXT, SAMPLE = (65_536, 196_608), 64, 4096
"""Of the stores' evaluation splits, in groups of 8,192 rows; of which so many are looked at, or all."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Stores of the two sizes."""
    made = []
    for n in ROWS:
        made.append(tmp_path_factory.mktemp("rows") / f"{n}.zarr")
        kind = {"d_model": 4, "context": CONTEXT, "shard_rows": 8192, "chunk_rows": 1024, "group_shards": 1}
        make_store(made[-1], n_sequences=16, eval_sequences=n // CONTEXT, **kind)
    return made


def small_sae(store: Store) -> NestedSAE:
    """Eight latents that fire on few rows."""
    sae = NestedSAE(SAEConfig(store.d_model, 8, (4, 8)))
    sae.W_dec.data = torch.nn.functional.normalize(torch.eye(4).repeat(2, 1) + 0.1, dim=1)
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    sae.b_enc.data.fill_(-1.5)
    sae.center.copy_(store.mean)
    sae.scale.fill_(store.scale)
    return sae.requires_grad_(False)


def pages(store: Store, out: Path) -> None:
    write_latents(small_sae(store), store, Words(), out, rows=SAMPLE, quiet=True)


def pages_of_all(store: Store, out: Path) -> None:
    write_latents(small_sae(store), store, Words(), out, rows=store.eval.n_rows, quiet=True)


def explain(store: Store, out: Path) -> None:
    list(find_examples(small_sae(store), store, [0, 5], store.eval.n_rows, 0))


def neuronpedia(store: Store, out: Path) -> None:
    sample = Sample(store.eval, store.context, choose_chunks(store.eval, SAMPLE, 0))
    export_neuronpedia(small_sae(store), torch.eye(4), TokenText(Words()), sample, SOURCE, out, quiet=True)


def absorption(store: Store, out: Path) -> None:
    read_probes(store, store.eval.n_rows // CONTEXT, lambda i: f" {'abcde'[i % 5]}{i}", 0, torch.device("cpu"))


BOOKKEEPING = 4
"""Bits a row of chunks and shards, which are smaller here than any real store's."""
BITS: Mapping[Callable[[Store, Path], None], float] = {
    pages: BOOKKEEPING,
    pages_of_all: BOOKKEEPING,
    explain: BOOKKEEPING + 2 * (1 + 32 / CONTEXT) + 64 / CONTEXT,
    neuronpedia: BOOKKEEPING,
    absorption: BOOKKEEPING,
}
"""Bits a row by which each may grow; explain's by what evaluate/README.md says, of two latents."""


@pytest.mark.parametrize("reader", BITS, ids=lambda reader: reader.__name__)
def test_memory_grows_by_bits(
    stores: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[[Store, Path], None]
) -> None:
    """Three times the rows take no more memory than bits a row: neither tokens nor masks of a split are held whole."""
    monkeypatch.setattr(collect, "BATCH_VALUES", 1024 * 8)
    monkeypatch.setattr(labels, "BLOCK_ROWS", 8192)
    peaks = []
    for path in (stores[0], *stores):  # once before, for what is imported and kept by first use
        store = Store.open(path)
        gc.collect()
        tracemalloc.start()
        reader(store, tmp_path / f"{len(peaks)}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 8 * (peaks[2] - peaks[1]) < BITS[reader] * (ROWS[1] - ROWS[0])


@pytest.mark.parametrize("reader", BITS, ids=lambda reader: reader.__name__)
def test_nothing_reads_whole_splits(
    stores: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[[Store, Path], None]
) -> None:
    """Tokens, masks and norms are asked for by sequences or shards, never all at once."""

    def refused(*_: object) -> None:
        raise AssertionError("read whole")

    for name in ("tokens", "special", "norm"):
        monkeypatch.setattr(Split, name, property(refused))
    monkeypatch.setattr(Split, "kept", refused)
    reader(Store.open(stores[0]), tmp_path / "out")


def tensor_bytes() -> int:
    """Bytes of all tensors that are held now; a storage counts once."""
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    storages = [o.untyped_storage() for o in tensors if o.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the bytes of tensors that an evaluation holds beside its last batch."""
    found: list[int] = []
    shared_work = evaluate.work.shared_work

    def noted(batch: Batch, clean: Clean | None, means: GroupMeans) -> Batched:
        shared = shared_work(batch, clean, means)
        if batch.first + len(batch.kept) == means.sample.n_sequences:
            found.append(tensor_bytes())
        return shared

    monkeypatch.setattr(evaluate.work, "shared_work", noted)
    return found


def score(store: Store, out: Path, rows: int, *scores: str) -> None:
    """Evaluate `small_sae` on some rows."""
    save_checkpoint(out.with_suffix(".safetensors"), small_sae(store), step=1, provenance=made_on(store))
    config = EvaluateConfig(store.path, out, scores=scores, rows=rows, batch_size=64)
    assert len(run(config, [out.with_suffix(".safetensors")]).results) == 1


def made_on(store: Store) -> dict[str, Any]:
    """What a checkpoint says of its training."""
    return {"member": "small", "train": {}, "store": {"id": store.id}}


def test_scores_hold_numbers_of_groups(stores: list[Path], tmp_path: Path, held: list[int]) -> None:
    """A group of sixteen sequences costs the survey and each level what `plan` counts, a few numbers, whatever d_model."""
    peaks, sizes = [], (ROWS[0] // 2, ROWS[0])
    for rows in (8192, *sizes):  # once before, for what is imported and kept by first use
        gc.collect()
        tracemalloc.start()
        score(Store.open(stores[0]), tmp_path / f"{rows}", rows, "ev", "l0", "coding")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    first, second = (n // CONTEXT // GROUP_SEQUENCES for n in sizes)
    expected = Survey.n_bytes(second, 4) - Survey.n_bytes(first, 4)
    expected += 2 * (Reconstruction.n_bytes(second) - Reconstruction.n_bytes(first))
    assert held[2] - held[1] == expected
    assert 8 * (peaks[2] - peaks[1]) < BOOKKEEPING * (sizes[1] - sizes[0])


TRAINING_ROWS = (32_768, 98_304)


@pytest.fixture(scope="module")
def training_stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same with the rows in the training split, of half the sizes."""
    made = []
    for n in TRAINING_ROWS:
        made.append(tmp_path_factory.mktemp("training rows") / f"{n}.zarr")
        kind = {"d_model": 4, "context": 256, "shard_rows": 8192, "chunk_rows": 1024, "group_shards": 1}
        make_store(made[-1], n_sequences=n // 256, eval_sequences=16, **kind)
    return made


def trained(path: Path, out: Path, **order: Any) -> None:
    """Two members trained side by side on a few batches."""
    changes = {"width": 8, "k": 2, "aux_k": 2, "steps": 4, "batch_size": 256, "dtype": "float32", "eval_every": 2}
    members = tuple(batchtopk(**changes, seed=seed) for seed in range(2))
    outcomes = train_run(RunConfig(path, out, members, device="cpu", **order))
    assert all(outcome.final is not None for outcome in outcomes)


def train_computed(path: Path, out: Path) -> None:
    trained(path, out, mode="global")


def train_windows(path: Path, out: Path) -> None:
    trained(path, out, mode="window", window_rows=8192)


def other_norm(path: Path, out: Path) -> None:
    Store.open(path).mean_and_scale(1.0)  # half of all rows are massive


def finish(path: Path, out: Path) -> None:
    shutil.copytree(path, out)
    assert lose_shards(out).finish().complete


def verify(path: Path, out: Path) -> None:
    assert Store.open(path).verify(quiet=True) == []


def describe(path: Path, out: Path) -> None:
    describe_store(Store.open(path))


TRAINING_BITS: Mapping[Callable[[Path, Path], None], float] = {
    train_computed: 8,
    train_windows: 8,
    other_norm: 7,
    finish: 7,
    verify: 7,
    describe: 10,  # a kilobyte a file, of which there are six a shard here and a hundredth of that in a real store
}
"""Bits a row by which each may grow, half of them shards', which are smaller here than any real store's; an array of a byte a row
is eight more."""


@pytest.mark.parametrize("work", TRAINING_BITS, ids=lambda work: work.__name__)
def test_training_memory_grows_by_bits(
    training_stores: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Path, Path], None]
) -> None:
    """Three times the rows to train on take no more memory than `plan` counts bits: no array of them is held in bytes."""
    monkeypatch.setattr("train.plan.MOST_HELD", 1000)
    peaks = []
    for path in (training_stores[0], *training_stores):
        gc.collect()
        tracemalloc.start()
        work(path, tmp_path / f"{len(peaks)}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 8 * (peaks[2] - peaks[1]) < TRAINING_BITS[work] * (TRAINING_ROWS[1] - TRAINING_ROWS[0])


def test_truth_is_prepared_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the rows of known features take no more memory while their store is prepared: neither masks nor what fires."""
    monkeypatch.setattr("pipeline.store.layout.GROUP_SHARDS", 1)
    for module in ("layout", "beside"):
        monkeypatch.setattr(f"pipeline.store.{module}.BLOCK", 1 << 16)
    peaks = []
    for n in (TRAINING_ROWS[0], *TRAINING_ROWS):
        sizes = {"tokens": n, "eval_tokens": n, "context": CONTEXT, "chunk_rows": 1024, "shard_rows": 8192}
        plan = make_plan(TruthConfig("tree", str(tmp_path / f"{len(peaks)}"), **sizes))
        gc.collect()
        tracemalloc.start()
        prepare_store(plan, [{}], repair=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 8 * (peaks[2] - peaks[1]) < BOOKKEEPING * 2 * (TRAINING_ROWS[1] - TRAINING_ROWS[0])


def test_imports_hold_no_masks() -> None:
    """A source of 64 M rows that marks no special tokens is planned with a few bytes a sequence, not one or two a row."""
    n_rows, about = 1 << 26, {"format": "iterator", "name": "python", "files": 0}
    tracemalloc.start()
    try:
        plan = import_plan(Import("acts.zarr"), Source([], 4, None, "float32", about), n_rows)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert plan.special.shape == (n_rows // 128, 128)
    assert not plan.special[:3].any()
    assert held < n_rows // 100
    assert most < n_rows // 2


def test_shared_documents_are_few_bytes() -> None:
    """Documents of both splits are counted once each, from 9 bytes a document of evaluation."""
    seen, n = Seen(), 5_000
    documents = [*range(n), 3, 3]
    tracemalloc.start()
    try:
        for i in documents:
            seen.evaluated(Piece(np.array([i, 7], np.int32)))
        for i in (5, 5, n + 1, n - 1, 0):
            seen.trained(Piece(np.array([i, 7], np.int32)))
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(seen.evaluation), int(seen.both.sum())) == (n, 3)
    assert held < 10 * n + 5_000
    assert most < 27 * n + 5_000
    seen.require_apart(separate=True)
    for i in range(n):
        seen.trained(Piece(np.array([i, 7], np.int32)))
    with pytest.raises(CorpusError, match=f"{n:,} of its {n:,} documents"):
        seen.require_apart(separate=True)


def test_nothing_is_shared_with_nothing() -> None:
    """Without a document of evaluation, none is in both."""
    seen = Seen()
    seen.trained(Piece(np.array([1], np.int32)))
    seen.require_apart(separate=True)

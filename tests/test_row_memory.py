"""Memory that grows with rows: of what reads a split, counted as allocated, on stores of two sizes."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
from pipeline.base.token_text import TokenText
from pipeline.sae.checkpoint import save_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from pipeline.store.reader import Store
from pipeline.store.split import Split
from support.stores import make_store
from test_latents import Words
from test_neuronpedia import SOURCE

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
    storages = [o.untyped_storage() for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
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

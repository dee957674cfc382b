"""Memory that grows with rows: of what reads a split, counted as allocated, on stores of two sizes."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from evaluate.explain.examples import find_examples
from evaluate.latents import collect
from evaluate.latents.collect import choose_chunks, write_latents
from evaluate.latents.neuronpedia import Sample, export_neuronpedia
from evaluate.scores import labels
from evaluate.scores.labels import read_probes
from pipeline.base.token_text import TokenText
from pipeline.sae.nested import NestedSAE, SAEConfig
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

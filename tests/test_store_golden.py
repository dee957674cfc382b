"""Stores that earlier releases wrote, kept in tests/golden: read, verified and delivered as on the day they were made."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.base.errors import StoreError
from pipeline.store.reader import Store
from support.stores import make_rows, make_store, make_tokens
from test_store import SMALL, tree
from train.feed.loader import Loader
from train.feed.order import Order

NAMES = ["v1_none", "v2_none", "v3_none", "v3_zstd", "v3_lz4"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all of them. Each has 19 sequences to train on and 5 to evaluate; v3_half has one shard of three."""
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(Path(__file__).parent / "golden" / "stores.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_golden_store_reads_as_written(golden: Path, name: str) -> None:
    """Version, rows, tokens, norms and statistics are those that were written, and every byte is whole."""
    store = Store.open(golden / f"{name}.zarr")
    assert store.attributes["version"] == int(name[1])
    assert store.verify(quiet=True) == []
    for split in store.splits:
        rows = make_rows(store.config, split.name, 0, split.n_rows)
        assert torch.equal(split.read(0, split.n_rows), rows)
        assert split.norm == pytest.approx(rows.double().norm(dim=1).numpy(), rel=1e-6)
        assert np.array_equal(split.tokens, make_tokens(0, split.name, split.n_sequences, 4).tokens)
    kept = torch.from_numpy(store.train.kept())
    x = store.train.read(0, store.train.n_rows)[kept].double()
    assert store.statistics.n_kept == len(x)
    assert store.mean64 == pytest.approx(x.mean(0).numpy(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_golden_store_feeds_training(golden: Path, name: str) -> None:
    """An epoch of a batch a row is the kept rows, bit for bit."""
    split = Store.open(golden / f"{name}.zarr").train
    order = Order(split.kept_rows(), 0, 16)
    with Loader(split, order, order.n_kept) as loader:
        rows = loader.next().clone()
    expected = split.read(0, split.n_rows)[torch.from_numpy(split.kept())]
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


def test_golden_half_made_harvest_goes_on(golden: Path, tmp_path: Path) -> None:
    """A harvest that an earlier release began ends as the store of that release, byte for byte."""
    shutil.copytree(golden / "v3_half.zarr", tmp_path / "s.zarr")
    with pytest.raises(StoreError, match="1 of 4 shards"):
        Store.open(tmp_path / "s.zarr")
    make_store(tmp_path / "s.zarr", n_sequences=19, eval_sequences=5, **SMALL)
    found, expected = tree(tmp_path / "s.zarr"), tree(golden / "v3_none.zarr")
    assert found.keys() == expected.keys()
    assert {key for key in found if found[key] != expected[key]} <= {"zarr.json", "mean/c/0"}
    statistics = [Store.open(path).statistics for path in (tmp_path / "s.zarr", golden / "v3_none.zarr")]
    assert statistics[0].scale == pytest.approx(statistics[1].scale, rel=1e-12)

"""Stores that earlier releases wrote, kept in tests/golden: read, verified and delivered as on the day they were made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.base.errors import StoreError
from pipeline.store.reader import Store
from support.stores import make_rows, make_store, make_tokens
from test_store import SMALL, tree
from train.feed.loader import Loader
from train.feed.order import Order

OLD: dict[str, Any] = {name: value for name, value in SMALL.items() if name != "group_shards"}
NAMES = ["v1_none", "v2_none", "v3_none", "v3_zstd", "v3_lz4"]


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


def test_golden_half_made_harvest_refused(golden: Path, tmp_path: Path) -> None:
    """A harvest that an earlier release began is opened as one, and refused in a line by whoever would go on with it."""
    shutil.copytree(golden / "v3_half.zarr", tmp_path / "s.zarr")
    before = tree(tmp_path / "s.zarr")
    with pytest.raises(StoreError, match="1 of 4 shards"):
        Store.open(tmp_path / "s.zarr")
    held = Store.open(tmp_path / "s.zarr", complete=False)
    assert [[k for k in range(split.n_shards) if split.has_record(k)] for split in held.splits].count([]) == 1
    for repair in (False, True):
        with pytest.raises(StoreError, match=r"is of version 3, .* not extended, repaired or gone on with \(version 4"):
            make_store(tmp_path / "s.zarr", n_sequences=19, eval_sequences=5, repair=repair, **OLD)
    assert tree(tmp_path / "s.zarr") == before

"""Finishing a store without a second read of its shards: rows of large norm lie beside them until then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.base.errors import DamagedError
from pipeline.base.runtime import numpy_rng
from pipeline.store.large import SHARE, large_rows, read_large
from pipeline.store.reader import Store
from pipeline.store.shards import with_crc
from pipeline.store.split import Split
from pipeline.store.writer import StoreWriter
from support.stores import make_store, prepare_store, store_config, write_shards

SIZES: dict[str, Any] = {"d_model": 6, "context": 16, "shard_rows": 512, "chunk_rows": 128}
"""Three training shards of 512 rows and a ragged one; every 97th row is massive, so some chunks have two, the most kept."""


@pytest.fixture
def written(tmp_path: Path) -> StoreWriter:
    """A store whose shards are all there, not finished."""
    writer = prepare_store(tmp_path / "s.zarr", store_config(**SIZES), 100, 9)
    write_shards(writer)
    return writer


def large_files(path: Path) -> list[Path]:
    """What lies beside the shards."""
    return sorted(path.glob("*/resid/large/*"))


@pytest.mark.parametrize("dtype", ["bf16", "float32"])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_finish_reads_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, codec: str) -> None:
    """The statistics are those of shards read again, sums but for the order of their terms, and no chunk is read for them."""
    options: dict[str, Any] = SIZES | {"dtype": dtype, "codec": codec}
    for name in ("beside", "read"):
        write_shards(prepare_store(tmp_path / name, store_config(**options), 100, 9))
    assert large_files(tmp_path / "beside")
    for file in large_files(tmp_path / "read"):
        file.unlink()
    expected = StoreWriter.open(tmp_path / "read").finish()
    assert expected.statistics.n_massive > 10
    monkeypatch.setattr(Split, "read_chunk", lambda *_: pytest.fail("a chunk was read"))
    found = StoreWriter.open(tmp_path / "beside").finish()
    for field, value in expected.statistics.to_dict().items():
        if field != "mean_sha256":
            assert found.statistics.to_dict()[field] == pytest.approx(value, rel=1e-12), field
    assert found.mean64 == pytest.approx(expected.mean64, rel=1e-12, abs=1e-14)
    assert large_files(tmp_path / "beside") == []


def test_large_rows_are_the_largest() -> None:
    """Of a chunk: not special, beyond twice the median of those that are not, one in 64 at most, those of largest norm."""
    rng = numpy_rng("large")
    for n, n_large in ((128, 1), (128, 9), (200, 4), (7, 0), (7, 3)):
        norm = rng.uniform(0.9, 1.1, n).astype(np.float32)
        usable = rng.random(n) > 0.2
        norm[rng.permutation(n)[:n_large]] = rng.uniform(2.5, 9, n_large)
        rows = rng.integers(0, 1 << 16, (n, 3)).astype(np.uint16)
        beyond = [i for i in range(n) if usable[i] and norm[i] > 2 * np.median(norm[usable])]
        expected = sorted(sorted(beyond, key=lambda i: -norm[i])[: -(-n // SHARE)])
        found = large_rows(rows, norm, usable, 1000)
        assert found.row.tolist() == [1000 + i for i in expected]
        assert np.array_equal(found.data, rows[expected])
    assert len(large_rows(rows, norm, np.zeros(n, np.bool_), 0).row) == 0


def test_rows_beyond_the_share_are_read(tmp_path: Path) -> None:
    """Where a chunk has more massive rows than are kept, it is read, and the statistics are right."""
    config = store_config(**(SIZES | {"chunk_rows": 512}))
    writer = prepare_store(tmp_path / "s.zarr", config, 100, 9)
    split = writer.split("train")
    x = numpy_rng("many").standard_normal((split.n_rows, 6)).astype(np.float32)
    x[numpy_rng("which").permutation(split.n_rows)[:90]] *= 50
    rows = torch.from_numpy(x).bfloat16()
    for k in range(split.n_shards):
        start, stop = split.shard_rows_range(k)
        with writer.shard("train", k) as shard:
            shard.write(rows[start:stop])
    write_shards(writer)
    held = [read_large(writer.files, split.shape, k) for k in range(split.n_shards)]
    store = writer.finish()
    kept = torch.from_numpy(store.train.kept())
    assert sum(len(one.row) for one in held if one is not None) < store.statistics.n_massive
    assert store.mean64 == pytest.approx(rows[kept].double().mean(0).numpy(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_damaged_large_rows_are_refused(written: StoreWriter, how: str) -> None:
    """Bytes that changed are refused by name; without the file the shard is read instead."""
    first = large_files(written.store.path)[0]
    data = first.read_bytes()
    first.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:] if how == "flipped" else data[:-3])
    with pytest.raises(DamagedError, match=f"{first}: .*delete it and run the same command again"):
        written.finish()
    first.unlink()
    assert written.finish().verify(quiet=True) == []


def test_large_rows_of_flipped_bits_differ(written: StoreWriter) -> None:
    """Rows that were changed and given a checksum anew do not have the norms that were committed."""
    first = large_files(written.store.path)[0]
    data = bytearray(first.read_bytes()[:-4])
    data[-1] ^= 0x40
    first.write_bytes(with_crc(np.frombuffer(bytes(data), np.uint8)))
    with pytest.raises(DamagedError, match="not the rows of shard 0"):
        written.finish()


def test_given_up_shards_leave_no_rows(written: StoreWriter) -> None:
    """A shard that is given up has nothing beside it, and a finished store nothing that a killed process left."""
    path = written.store.path
    before = large_files(path)
    written.give_up("train", 0)
    assert large_files(path) == before[1:]
    make_store(path, n_sequences=100, eval_sequences=9, **SIZES)
    before[0].parent.mkdir(exist_ok=True)
    before[0].write_bytes(b"left")
    Store.open(path)
    make_store(path, n_sequences=100, eval_sequences=9, **SIZES)
    assert large_files(path) == []

"""Arrays beside a store's rows, read in parts: equal to the whole, checked as they are read, of bounded memory."""

from __future__ import annotations

import tracemalloc
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.base.errors import DamagedError
from pipeline.store import beside
from pipeline.store.backend import LocalFiles
from pipeline.store.beside import BesideRows
from pipeline.store.layout import Extra
from pipeline.store.shards import crc_bytes

PATH = "eval/truth/feature"


def written(root: Path, data: npt.NDArray[np.int32]) -> tuple[Path, LocalFiles, Extra]:
    """The array's file, and what describes it."""
    file = root / PATH / "c/0"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data.tobytes() + crc_bytes(data.tobytes()))
    return file, LocalFiles(root), Extra(PATH, "int32", data.shape, sha256(data.tobytes()).hexdigest())


def test_parts_equal_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part, across blocks too, is what the array has there."""
    monkeypatch.setattr(beside, "BLOCK", 64)
    data = np.arange(100, dtype="<i4")
    _, files, extra = written(tmp_path, data)
    rows = BesideRows(files, extra)
    assert len(rows) == 100
    for first in range(101):
        for stop in range(first, 101):
            np.testing.assert_array_equal(rows[first:stop], data[first:stop])


@pytest.mark.parametrize("at", [0, 70, 399, 401], ids=["first", "second block", "last", "checksum"])
def test_changed_bytes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """A byte that is another is found when the array is opened; one that changes afterwards, when its block is read."""
    monkeypatch.setattr(beside, "BLOCK", 64)
    file, files, extra = written(tmp_path, np.arange(100, dtype="<i4"))
    rows, stored = BesideRows(files, extra), bytearray(file.read_bytes())
    stored[at] ^= 1
    file.write_bytes(stored)
    with pytest.raises(DamagedError, match=PATH):
        BesideRows(files, extra)
    if at < 400:
        with pytest.raises(DamagedError, match="changed while it was read"):
            rows[at // 4 : at // 4 + 1]
    file.write_bytes(stored[:-5])
    with pytest.raises(DamagedError, match="expected 404"):
        BesideRows(files, extra)


def test_blocks_alone_are_held(tmp_path: Path) -> None:
    """Reading an array of 8 MiB through takes what `n_bytes` says, and not the array."""
    _, files, extra = written(tmp_path, np.arange(2 << 20, dtype="<i4"))
    tracemalloc.start()
    rows = BesideRows(files, extra)
    for first in range(0, len(rows), 4096):
        rows[first : first + 4096]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < BesideRows.n_bytes(8 << 20) + 100_000

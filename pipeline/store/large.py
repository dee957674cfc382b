"""Rows of large norm, kept beside their shard until the store is finished: massive ones leave its sums without a second read.

Which rows are massive is known when the median of all norms is, after the last shard. Those that may be are copied while their
chunk is in memory, to `train/resid/large/K`: int64 rows [n] counted within the shard, ascending, what they hold [n, d_model] as
stored, and the crc32c of both. A row that is massive and not there is read from its chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.base.errors import DamagedError
from pipeline.store.backend import Files
from pipeline.store.layout import SplitLayout
from pipeline.store.shards import with_crc, without_crc

MULTIPLE, SHARE = 2.0, 64
"""Rows of a chunk are large beyond this multiple of its median norm, and no more than one in so many of them, the largest."""


@dataclass(frozen=True)
class LargeRows:
    """`row` int64 [n], ascending, counted within the shard; `data` [n, d_model] as stored."""

    row: npt.NDArray[np.int64]
    data: npt.NDArray[Any]

    def find(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where each of some rows is among these, −1 for those that are not, int64 [row]."""
        at = np.searchsorted(self.row, rows)
        there = at < len(self.row)
        there[there] = self.row[at[there]] == rows[there]
        return np.where(there, at, -1)


def large_rows(
    rows: npt.NDArray[Any], norm: npt.NDArray[np.float32], usable: npt.NDArray[np.bool_], first: int
) -> LargeRows:
    """Those of a chunk whose first row is the shard's row `first`: copies. `norm`, `usable` (not special): [row]."""
    beyond = np.flatnonzero(usable & (norm > MULTIPLE * np.median(norm[usable]))) if usable.any() else np.empty(0, int)
    most = -(-len(rows) // SHARE)
    if len(beyond) > most:
        beyond = np.sort(beyond[np.argsort(-norm[beyond], kind="stable")[:most]])
    return LargeRows(beyond + first, rows[beyond])


def large_key(split: str, k: int) -> str:
    """The file of shard k's; a Zarr reader lists nothing within an array."""
    return f"{split}/resid/large/{k}"


def large_bytes(chunks: Sequence[LargeRows]) -> bytes:
    """The file of those of a shard's chunks, one after the other; empty where there are none, and then there is no file."""
    if not sum(len(chunk.row) for chunk in chunks):
        return b""
    row, data = (np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("row", "data"))
    return with_crc(np.frombuffer(row.astype("<i8").tobytes() + data.tobytes(), np.uint8))


def read_large(files: Files, shape: SplitLayout, k: int) -> LargeRows | None:
    """Those of shard k; None where there is no such file. Raises DamagedError for one that changed."""
    key, dtype = large_key(shape.name, k), shape.arrays["resid"].numpy_dtype
    size = files.size(key)
    if size is None:
        return None
    where, (start, stop) = files.where(key), shape.shard_rows_range(k)
    n, rest = divmod(size - 4, 8 + shape.layout.d_model * dtype.itemsize)
    if rest or not 0 < n <= stop - start:
        raise DamagedError(f"{where}: {size} bytes are no rows of a shard; {ADVICE}")
    try:
        data = without_crc(files.read(key, most=size), where)
    except DamagedError as error:
        raise DamagedError(f"{where}: bytes changed since it was written (crc32c); {ADVICE}") from error
    found = np.frombuffer(data[: 8 * n], "<i8").astype(np.int64)
    return LargeRows(found, np.frombuffer(data[8 * n :], dtype).reshape(n, shape.layout.d_model))


ADVICE = "delete it and run the same command again, which reads the shard instead"

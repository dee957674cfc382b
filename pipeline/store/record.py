"""Commit records: what vouches for a shard. In groups of shards when a store is finished, a file each until then.

A record is a row of the array `commit`: 2³² · tag + digest for each of COMMITTED, then from version 4 on 2³² · bytes + crc32c for
each chunk of the shard, 0 where there is none. The file of an unfinished store's shard, `train/resid/record/K`, holds

    commit   uint64 [record width]    the record
    moments  float64 [2 + d_model]    of the shard
    norm     float32 [shard_rows]     of the shard, padded with NaN

each part followed by its crc32c. It is written last, so that its appearance commits the shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.base.errors import DamagedError
from pipeline.base.files import crc32c
from pipeline.store.backend import Files
from pipeline.store.layout import COMMITTED, Layout
from pipeline.store.shards import digest, with_crc, without_crc


def commit_tags(origin: str | None, split: str, k: int) -> tuple[int, ...]:
    """The upper 32 bits of the record of shard k, a number for each part that it vouches for: whose record it is.

    Of a store with an `origin` (FORMAT.md): the crc32c of "origin/split/k/array" with the top bit set, so that a record
    that was never written, 0, is none. Of version 1, which has none: 1.
    """
    if origin is None:
        return (1,) * len(COMMITTED)
    return tuple(crc32c(f"{origin}/{split}/{k}/{name}".encode()) | 1 << 31 for name in COMMITTED)


@dataclass(frozen=True)
class Record:
    """What one shard was committed with: `digests` of COMMITTED, and of each of its chunks 2³² · bytes + crc32c, uint64 [chunk],
    which no record before version 4 says."""

    digests: tuple[int, ...]
    chunks: npt.NDArray[np.uint64]

    def digest(self, name: str) -> int:
        """Of resid, norm or moments."""
        return self.digests[COMMITTED.index(name)]

    @property
    def nbytes(self) -> npt.NDArray[np.uint64]:
        """Bytes of each chunk in its file, its checksum included."""
        return self.chunks >> np.uint64(32)

    def checksum(self, slot: int) -> bytes:
        """The crc32c that stands behind a chunk."""
        return (int(self.chunks[slot]) & 0xFFFFFFFF).to_bytes(4, "little")


def record_of(row: npt.NDArray[np.uint64], tags: tuple[int, ...], n_chunks: int) -> Record | None:
    """What a row of `commit` says; None unless it is the record of the shard with these tags, and whole."""
    values = [int(value) for value in row[: len(COMMITTED)]]
    chunks = row[len(COMMITTED) :]
    digests = tuple(value & 0xFFFFFFFF for value in values)
    if tuple(value >> 32 for value in values) != tags or (len(chunks) and digests[0] != chunks_digest(chunks)):
        return None
    return Record(digests, chunks[:n_chunks])


def chunks_digest(chunks: npt.NDArray[np.uint64]) -> int:
    """What a record's first digest is of, from version 4 on: the crc32c of what it says of the chunks, absent ones included."""
    return crc32c(chunks.astype("<u8").tobytes())


def part_digest(data: npt.NDArray[Any]) -> int:
    """The digest of a shard's norms (padded) or moments: of the crc32c of their bytes."""
    return digest([with_crc(data)[-4:]])


def part_sizes(layout: Layout) -> dict[str, int]:
    """Bytes of the parts of a record's file, their checksums included, in order."""
    return {
        "commit": 8 * layout.record_width + 4,
        "moments": 8 * (2 + layout.d_model) + 4,
        "norm": 4 * layout.shard_rows + 4,
    }


def record_bytes(parts: Mapping[str, npt.NDArray[Any]], layout: Layout) -> bytes:
    """The whole file of a shard's record; `parts`: commit, moments, and norm, which is padded."""
    return b"".join(with_crc(parts[name]) for name in part_sizes(layout))


def read_record(files: Files, key: str, layout: Layout, name: str) -> npt.NDArray[Any]:
    """One part of a record's file: commit, moments or norm. Raises DamagedError."""
    sizes = part_sizes(layout)
    names = list(sizes)
    held = bytearray(sizes[name])
    files.read_into(key, sum(sizes[before] for before in names[: names.index(name)]), [memoryview(held)])
    dtype = {"commit": "<u8", "moments": "<f8", "norm": "<f4"}[name]
    return np.frombuffer(without_crc(bytes(held), f"{files.where(key)} ({name})"), dtype)


def require_digest(where: str, found: int, committed: int) -> None:
    """Raise DamagedError unless a file, or a shard's part of it, is the one that was committed."""
    if found != committed:
        raise DamagedError(
            f"{where}: whole, but not the file that was committed (digest {found:#010x}, committed {committed:#010x}); run "
            f"harvest --repair"
        )

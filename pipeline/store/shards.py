"""The bytes of chunks and shards: compression, crc32c, the shard index. Zarr v3, sharding_indexed, index at the end.

chunk  = [compressed] little-endian rows, then crc32c as uint32
shard  = chunk 0, chunk 1, …, index
index  = (offset, nbytes) as uint64 for each slot, 2⁶⁴ − 1 twice where a slot is empty, then crc32c as uint32
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pipeline.base.errors import DamagedError
from pipeline.base.files import crc32c
from pipeline.store.backend import Files, Readable

CODECS = ("none", "lz4", "zstd")
"""lz4 is Blosc lz4 with bitshuffle (plain lz4 gains nothing on residuals); zstd is level 1. STORAGE.md has the costs."""

ABSENT = 2**64 - 1
Bytes = npt.NDArray[np.uint8]
Index = npt.NDArray[np.uint64]


def codec_json(codec: str, itemsize: int) -> list[dict[str, Any]]:
    """The compressor's entry in zarr.json, both codecs of Zarr's own."""
    if codec == "lz4":
        settings = {"typesize": itemsize, "cname": "lz4", "clevel": 1, "shuffle": "bitshuffle", "blocksize": 0}
        return [{"name": "blosc", "configuration": settings}]
    return [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}] if codec == "zstd" else []


@cache
def compressor(codec: str) -> Any:
    """The numcodecs codec that writes what `codec_json` names."""
    import numcodecs
    import numcodecs.blosc

    if codec == "lz4":
        numcodecs.blosc.use_threads = False  # with threads, blocks land in the order in which they finish
        return numcodecs.Blosc(cname="lz4", clevel=1, shuffle=numcodecs.Blosc.BITSHUFFLE, blocksize=0)
    return numcodecs.Zstd(level=1)


def chunk_bound(codec: str, nbytes: int) -> int:
    """The most bytes a chunk of `nbytes` can take: exact for none, the compressors' documented bounds otherwise."""
    if codec == "lz4":
        return nbytes + 16
    if codec == "zstd":
        return nbytes + (nbytes >> 8) + (max(0, 131072 - nbytes) >> 11)
    return nbytes


def entry_bounds(codec: str, nbytes: int) -> tuple[int, int]:
    """The fewest and the most bytes of a chunk of `nbytes` in its shard, checksum included."""
    return (nbytes if codec == "none" else 1) + 4, chunk_bound(codec, nbytes) + 4


def index_nbytes(n_slots: int) -> int:
    """Bytes of the index of a shard of so many slots."""
    return 16 * n_slots + 4


def as_bytes(array: npt.NDArray[Any]) -> Bytes:
    """A contiguous array's memory, not a copy."""
    return array.reshape(-1).view(np.uint8)


def crc_bytes(data: Bytes | bytes) -> bytes:
    """The crc32c of the data, as it stands behind it."""
    return crc32c(data).to_bytes(4, "little")


def with_crc(array: npt.NDArray[Any]) -> bytes:
    """A whole chunk file of an array that is not sharded."""
    data = np.ascontiguousarray(array).tobytes()
    return data + crc_bytes(data)


def without_crc(data: bytes, where: str) -> bytes:
    """The data of a chunk file. Raises DamagedError when it does not fit its crc32c."""
    if len(data) < 4 or crc_bytes(data[:-4]) != data[-4:]:
        raise DamagedError(f"{where}: bytes changed since it was written (crc32c); run harvest --repair")
    return data[:-4]


def digest(checksums: Iterable[bytes]) -> int:
    """What a commit record holds of a file: the crc32c of its chunks' checksums, 4 bytes each, in order.

    Not the crc32c of the file: bytes followed by their own crc32c leave every crc32c in one and the same state, so that
    of a file made of such parts depends on the parts' lengths alone and never on what is in them.
    """
    return crc32c(b"".join(checksums))


class ShardStream:
    """Writes a shard into an open file, chunk by chunk, and no chunk is held after it is written."""

    def __init__(self, file: BinaryIO, codec: str, n_slots: int) -> None:
        self.file, self.codec, self.offset = file, codec, 0
        self.index = np.full((n_slots, 2), ABSENT, "<u8")
        self.n_chunks = 0
        self.entries = np.zeros(n_slots, "<u8")  # 2³² · bytes of a chunk + its crc32c, as commit records have them

    def append(self, chunk: npt.NDArray[Any]) -> None:
        """The next chunk, contiguous [chunk_rows, d_model], a ragged one already padded."""
        data = (
            as_bytes(chunk) if self.codec == "none" else np.frombuffer(compressor(self.codec).encode(chunk), np.uint8)
        )
        checksum = crc_bytes(data)
        self.file.write(data.data)
        self.file.write(checksum)
        self.index[self.n_chunks] = self.offset, len(data) + 4
        self.entries[self.n_chunks] = len(data) + 4 << 32 | int.from_bytes(checksum, "little")
        self.offset += len(data) + 4
        self.n_chunks += 1

    def close(self) -> npt.NDArray[np.uint64]:
        """Write the index; returns what a commit record says of each chunk, uint64 [n_slots], 0 where there is none."""
        self.file.write(with_crc(self.index))
        return self.entries


def check_bodies(files: Readable, key: str, index: Index) -> list[bytes]:
    """Read every chunk of a shard; returns the checksums as they stand behind them. Raises DamagedError where one is wrong."""
    buffer = np.empty(int(index[:, 1].max()), np.uint8)
    checksums = []
    for offset, nbytes in index.tolist():
        chunk = buffer[:nbytes]
        files.read_into(key, offset, [chunk.data])
        checksums.append(chunk[-4:].tobytes())
        require_crc(files.where(key), (offset, nbytes), chunk[:-4], checksums[-1])
    return checksums


def require_crc(where: str, entry: tuple[int, int], data: Bytes, checksum: bytes) -> None:
    """Raise DamagedError unless a chunk fits its checksum."""
    if crc_bytes(data) != checksum:
        raise DamagedError(
            f"{where}: bytes {entry[0]} to {sum(entry)} changed since they were written (crc32c); run harvest --repair"
        )


def read_index(
    files: Readable, key: str, n_slots: int, n_chunks: int, entry: tuple[int, int], size: int | None = None
) -> Index:
    """A shard's (offset, nbytes) of each chunk it holds, uint64 [n_chunks, 2]; `entry`: the bounds of nbytes.

    `size`: of the file, where it is known.

    Raises DamagedError when the index does not fit its crc32c, when chunks are not at consecutive offsets from 0, when
    there are more or fewer than `n_chunks`, or when the file does not end with the index.
    """
    if size is None and (size := files.size(key)) is None:
        raise DamagedError(f"{files.where(key)}: the shard is gone; run harvest --repair to make it again")
    if size < index_nbytes(n_slots):
        raise DamagedError(f"{files.where(key)}: {size} bytes are too few for a shard; run harvest --repair")
    raw = bytearray(index_nbytes(n_slots))
    files.read_into(key, size - len(raw), [memoryview(raw)])
    index = np.frombuffer(without_crc(bytes(raw), files.where(key) + " (index)"), "<u8").reshape(n_slots, 2)
    present = index[:n_chunks]
    fitting = (present[:, 1] >= entry[0]).all() and (present[:, 1] <= entry[1]).all()  # so that no sum goes round
    ends = np.cumsum(present[:, 1], dtype=np.uint64)
    starts = ends - present[:, 1]
    whole = fitting and (index[n_chunks:] == ABSENT).all() and (present[:, 0] == starts).all()
    if not whole or int(ends[-1]) + len(raw) != size:
        raise DamagedError(
            f"{files.where(key)}: expected {n_chunks} chunks one after the other and an index, found {size} bytes with "
            f"another index; run harvest --repair"
        )
    return present


def read_chunk(
    files: Files, key: str, entry: tuple[int, int], codec: str, committed: bytes, out: npt.NDArray[Any]
) -> None:
    """Read one whole chunk into `out`, contiguous [chunk_rows, d_model]. Raises DamagedError when its crc32c is wrong.

    `committed`: the checksum that the shard's commit record vouches for.
    """
    offset, nbytes = entry
    stored = bytearray(4)
    data = as_bytes(out) if codec == "none" else np.empty(max(nbytes - 4, 0), np.uint8)
    if len(data) != nbytes - 4:
        raise DamagedError(
            f"{files.where(key)}: a chunk of {nbytes} bytes, expected {len(data) + 4}; run harvest --repair"
        )
    files.read_into(key, offset, [data.data, memoryview(stored)])
    require_crc(files.where(key), entry, data, committed)
    if codec != "none":
        decompress(compressor(codec).decode, data, out, f"{files.where(key)}, byte {offset}")


def decompress(decode: Callable[..., Any], data: Bytes, out: npt.NDArray[Any], where: str) -> None:
    """Decode into `out`. Raises DamagedError when the codec refuses or gives another number of bytes."""
    try:
        n = len(as_bytes(np.asarray(decode(data, out=as_bytes(out)))))
    except (RuntimeError, ValueError) as error:
        raise DamagedError(f"{where}: cannot be decompressed ({error}); run harvest --repair") from error
    if n != out.nbytes:
        raise DamagedError(f"{where}: {n} bytes decompressed, expected {out.nbytes}; run harvest --repair")

"""One split of a store: tokens, special positions, norms, and rows in order. Nothing missing is ever read as data."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Shaped
from torch import Tensor

from pipeline.base.errors import DamagedError, StoreError, UsageError
from pipeline.base.files import crc32c
from pipeline.store.backend import Files, LocalFiles
from pipeline.store.kept import KeptRows
from pipeline.store.kept import Mask as Mask
from pipeline.store.layout import COMMITTED, Array, SplitLayout
from pipeline.store.mapping import MappedShard, map_file
from pipeline.store.moments import Statistics, not_massive
from pipeline.store.shards import Index, check_bodies, digest, entry_bounds, read_chunk, read_index, without_crc


def commit_tags(origin: str | None, split: str, k: int) -> tuple[int, ...]:
    """The upper 32 bits of the record of shard k, a number for each file that it vouches for: whose record it is.

    Of a store with an `origin` (FORMAT.md): the crc32c of "origin/split/k/array" with the top bit set, so that a record
    that was never written, 0, is none. Of version 1, which has none: 1.
    """
    if origin is None:
        return (1,) * len(COMMITTED)
    return tuple(crc32c(f"{origin}/{split}/{k}/{name}".encode()) | 1 << 31 for name in COMMITTED)


Rows = npt.NDArray[np.int32]
PARTS_HELD = 4
"""Shards' tokens, masks and norms that a split keeps in memory, those last read."""


def to_numpy(rows: Tensor) -> npt.NDArray[Any]:
    """The memory of bf16 or float32 rows as the store's dtype: uint16 bits, or float32. Not a copy."""
    return rows.view(torch.int16).numpy().view(np.uint16) if rows.dtype == torch.bfloat16 else rows.numpy()


def read_array(files: Files, array: Array) -> npt.NDArray[Any]:
    """A whole array that is not sharded. Raises DamagedError when a chunk is missing, cut short or changed."""
    return np.concatenate([read_part(files, array, k) for k in range(array.n_files)])


def read_part(files: Files, array: Array, k: int, committed: int | None = None) -> npt.NDArray[Any]:
    """What the k-th file of such an array holds, without the padding of the last. Raises DamagedError.

    With `committed`, the digest of its commit record, it must be that very file.
    """
    where, stored = files.where(array.key(k)), files.read(array.key(k), most=array.file_nbytes)
    data = without_crc(stored, where)
    if len(stored) != array.file_nbytes:
        raise DamagedError(f"{where}: {len(stored)} bytes, expected {array.file_nbytes}")
    if committed is not None:
        require_digest(where, digest([stored[-4:]]), committed)
    return np.frombuffer(data, array.numpy_dtype).reshape(array.chunk)[: array.shape[0] - k * array.chunk[0]]


def require_size(files: Files, array: Array, k: int) -> None:
    """Raise DamagedError unless the k-th file of an array that is not sharded has its size."""
    if (size := files.size(array.key(k))) is None:
        raise DamagedError(f"{files.where(array.key(k))}: the file is gone; run harvest --repair to make it again")
    if size != array.file_nbytes:
        raise DamagedError(f"{files.where(array.key(k))}: {size} bytes, expected {array.file_nbytes}")


def require_digest(where: str, found: int, committed: int) -> None:
    """Raise DamagedError unless a file is the one that was committed."""
    if found != committed:
        raise DamagedError(
            f"{where}: whole, but not the file that was committed (digest {found:#010x}, committed {committed:#010x}); run "
            f"harvest --repair"
        )


@dataclass(frozen=True)
class Prepared:
    """What a split was prepared with: SHA-256 of the bytes of `tokens` and `special`, where the root has them, and the model's
    number of tokens, where that is known."""

    sha256: Mapping[str, str]
    vocab: int | None


class Split:
    """The training or the evaluation part of a store. Row r is position r % context of sequence r // context.

    Rows, norms and moments that are read are those that were committed, for this shard of this store (`origin`).
    """

    def __init__(
        self,
        files: Files,
        shape: SplitLayout,
        statistics: Statistics | None,
        prepared: Prepared,
        origin: str | None = None,
    ) -> None:
        self.files, self.shape, self.statistics, self.prepared, self.origin = files, shape, statistics, prepared, origin
        self.name, self.n_rows, self.n_sequences = shape.name, shape.n_rows, shape.n_sequences
        self.n_shards, self.shard_rows, self.chunk_rows = (
            shape.n_shards,
            shape.layout.shard_rows,
            shape.layout.chunk_rows,
        )
        self.n_chunks = -(-self.n_rows // self.chunk_rows)
        self.arrays = shape.arrays
        self._whole: set[str] = set()
        self._lock = threading.Lock()
        self._part = functools.lru_cache(PARTS_HELD)(self._read_part)
        self._index: dict[int, Index] = {}
        self._records: dict[int, tuple[int, ...]] = {}
        self._checksums: dict[int, list[bytes]] = {}

    @cached_property
    def tokens(self) -> Rows:
        """Token ids, int32 [n_sequences, context]. Raises StoreError for a store whose rows are of no text."""
        array = self.require_tokens()
        self.require_whole("tokens")
        return read_array(self.files, array)

    @cached_property
    def special(self) -> Mask:
        """Special positions, bool [n_sequences, context]; position 0 always is."""
        self.require_whole("special")
        return read_array(self.files, self.arrays["special"]).view(np.bool_)

    @cached_property
    def norm(self) -> npt.NDArray[np.float32]:
        """‖x‖ of every row before centring, float32 [n_rows]."""
        return np.concatenate([self.shard_norm(k) for k in range(self.n_shards)])

    @cached_property
    def moments(self) -> npt.NDArray[np.float64]:
        """Count, Σ‖x‖², Σx of each shard's non-special rows, float64 [n_shards, 2 + d_model]."""
        return np.stack([self.shard_moments(k) for k in range(self.n_shards)])

    def kept(self, max_norm: float | Literal["store"] | None = "store") -> Mask:
        """Rows that count, bool [n_rows]: not special, and norm at most `max_norm` times the training median.

        "store" takes the multiple of the store's own statistics; None keeps massive rows too.
        """
        return np.concatenate([self.shard_kept(k, max_norm) for k in range(self.n_shards)])

    def kept_rows(self, max_norm: float | Literal["store"] | None = "store") -> KeptRows:
        """The same, a bit a row. Reads one shard's norms at a time."""
        return KeptRows.of((self.shard_kept(k, max_norm) for k in range(self.n_shards)), self.chunk_rows)

    def kept_of(self, first: int, stop: int, max_norm: float | Literal["store"] | None = "store") -> Mask:
        """The same of the rows of sequences first … stop − 1, bool [row]."""
        context = self.shape.layout.context
        return self._rows_of(first * context, stop * context, lambda k: self.shard_kept(k, max_norm))

    def shard_kept(self, k: int, max_norm: float | Literal["store"] | None = "store") -> Mask:
        """The same of shard k, bool [row]."""
        usable = self.shard_usable(k)
        if max_norm is None:
            return usable
        if self.statistics is None:
            raise StoreError(f"{self.files.where('')}: unfinished, so its median norm is not known; finish the harvest")
        multiple = self.statistics.massive_multiple if max_norm == "store" else max_norm
        return usable & not_massive(self.shard_norm(k), multiple, self.statistics.median_norm)

    def tokens_of(self, first: int, stop: int) -> Rows:
        """Token ids of sequences first … stop − 1, int32 [seq, context]. Raises StoreError for rows of no text."""
        context = self.shape.layout.context
        tokens = self._rows_of(first * context, stop * context, lambda k: self.shard_tokens(k).reshape(-1))
        return tokens.reshape(-1, context)

    def special_of(self, first: int, stop: int) -> Mask:
        """Special positions of sequences first … stop − 1, bool [seq, context]."""
        context = self.shape.layout.context
        return ~self._rows_of(first * context, stop * context, self.shard_usable).reshape(-1, context)

    def _rows_of(self, start: int, stop: int, of_shard: Callable[[int], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Rows start … stop of what `of_shard` says of the rows of a shard, of the shards that they lie in."""
        first = start // self.shard_rows
        parts = [of_shard(k) for k in range(first, max(-(-stop // self.shard_rows), first + 1))]
        return np.concatenate(parts)[start - first * self.shard_rows : stop - first * self.shard_rows]

    def shard_tokens(self, k: int) -> Rows:
        """Token ids of shard k alone, int32 [seq, context]. Raises StoreError likewise."""
        self.require_tokens()
        return self._part("tokens", k)

    def require_tokens(self) -> Array:
        """The array of tokens. Raises StoreError when there is none."""
        if "tokens" not in self.arrays:
            raise StoreError(
                f"{self.files.where('')}: its rows are of no text, so it has no tokens; use a model's store"
            )
        return self.arrays["tokens"]

    def shard_usable(self, k: int) -> Mask:
        """Rows of shard k that are not special, bool [row]."""
        return ~self._part("special", k).reshape(-1).view(np.bool_)

    def shard_norm(self, k: int) -> npt.NDArray[np.float32]:
        """‖x‖ of the rows of shard k, float32 [row]."""
        return self._part("norm", k)

    def shard_moments(self, k: int) -> npt.NDArray[np.float64]:
        """Count, Σ‖x‖², Σx of the rows of shard k that are not special, float64 [2 + d_model]."""
        found: npt.NDArray[np.float64] = self._read_part("moments", k)[0]
        return found

    def _read_part(self, name: str, k: int) -> npt.NDArray[Any]:
        """Shard k's part of an array, compared with its commit record where that vouches for it, else with its hash."""
        if name in self.prepared.sha256:
            self.require_whole(name)
        committed = self.record(k)[COMMITTED.index(name)] if name in COMMITTED else None
        return read_part(self.files, self.arrays[name], k, committed)

    def require_whole(self, name: str) -> None:
        """Raise DamagedError unless `tokens` or `special` is as it was prepared: read whole before any of it is first used."""
        with self._lock:
            if name not in self._whole:
                self.check_whole(name)
                self._whole.add(name)

    def check_whole(self, name: str) -> None:
        """The same, whether or not it was read before; and no token is beyond the model's. Reads one shard's at a time."""
        array, expected, vocab = self.arrays[name], self.prepared.sha256[name], self.prepared.vocab
        hasher = hashlib.sha256()
        for k in range(array.n_files):
            part = read_part(self.files, array, k)
            if name == "tokens" and vocab is not None and not 0 <= part.min() <= part.max() < vocab:
                where = self.files.where(array.key(k))
                raise DamagedError(f"{where}: token ids beyond the model's {vocab}; harvest again")
            hasher.update(part.tobytes())
        if (found := hasher.hexdigest()) != expected:
            raise DamagedError(f"{self.files.where(array.path)}: SHA-256 {found[:10]}…, expected {expected[:10]}…")

    def massive(self, multiple: float | None, median: float) -> npt.NDArray[np.int64]:
        """Rows, in order, that are not special and whose norm is beyond `multiple` medians; none when it is None.

        Reads one shard's norms at a time.
        """
        if multiple is None:
            return np.empty(0, np.int64)
        found = []
        for k in range(self.n_shards):
            beyond = self.shard_usable(k) & ~not_massive(self.shard_norm(k), multiple, median)
            found.append(np.flatnonzero(beyond) + k * self.shard_rows)
        return np.concatenate(found)

    def shard_rows_range(self, k: int) -> tuple[int, int]:
        """First row of shard k, and one past its last."""
        return self.shape.shard_rows_range(k)

    def shard_path(self, k: int) -> Path:
        """The local file of shard k. Raises UsageError when the store is on object storage."""
        if not isinstance(self.files, LocalFiles):
            raise UsageError(
                f"{self.files.where('')}: not a local folder; copy it with python -m pipeline stage URL PATH"
            )
        return self.files.root / self.arrays["resid"].key(k)

    def commit(self, k: int) -> tuple[int, ...] | None:
        """Digests of shard k's resid, norm and moments files (shards.py); None when it is not committed."""
        array = self.arrays["commit"]
        if self.files.size(array.key(k)) is None:
            return None
        where = self.files.where(array.key(k))
        data = without_crc(self.files.read(array.key(k), most=array.file_nbytes), where)
        if len(data) != array.file_nbytes - 4:
            raise DamagedError(f"{where}: not a commit record; run harvest --repair")
        record = [int(value) for value in np.frombuffer(data, array.numpy_dtype)]
        if tuple(value >> 32 for value in record) != commit_tags(self.origin, self.name, k):
            raise DamagedError(
                f"{where}: not the commit record of shard {k} of {self.name} of this store (another shard, split, store or "
                f"layer wrote it); run harvest --repair"
            )
        return tuple(value & 0xFFFFFFFF for value in record)

    def record(self, k: int) -> tuple[int, ...]:
        """As `commit`, read once. Raises DamagedError when shard k is not committed."""
        if k not in self._records:
            record = self.commit(k)
            if record is None:
                where = self.files.where(self.arrays["commit"].key(k))
                raise DamagedError(f"{where}: gone, so shard {k} is not committed; run harvest --repair")
            self._records[k] = record
        return self._records[k]

    def forget(self, k: int) -> None:
        """Read shard k's record, index and checksums again when they are next needed: its files are others now."""
        self._part.cache_clear()
        self._records.pop(k, None)
        self._index.pop(k, None)
        self._checksums.pop(k, None)

    def checksums(self, k: int) -> list[bytes]:
        """The crc32c behind each chunk of shard k, which its commit record vouches for; read once, 4 bytes a chunk."""
        if k not in self._checksums:
            key, found = self.arrays["resid"].key(k), []
            for offset, nbytes in self.index(k).tolist():
                stored = bytearray(4)
                self.files.read_into(key, offset + nbytes - 4, [memoryview(stored)])
                found.append(bytes(stored))
            require_digest(self.files.where(key), digest(found), self.record(k)[COMMITTED.index("resid")])
            self._checksums[k] = found
        return self._checksums[k]

    def index(self, k: int) -> Index:
        """Where shard k's chunks stand in its file, (offset, nbytes) uint64 [chunk, 2]; read once, checked."""
        if k not in self._index:
            layout, key = self.shape.layout, self.arrays["resid"].key(k)
            entry = entry_bounds(layout.codec, layout.chunk_nbytes)
            self._index[k] = read_index(self.files, key, layout.chunks_per_shard, self.shape.n_chunks(k), entry)
        return self._index[k]

    def check_shard(self, k: int, bodies: bool = True) -> None:
        """Raise DamagedError unless shard k is committed, its files have their sizes and its index is right.


        With `bodies`, every byte of its files is read and compared with the commit record; without, the sizes of its tokens and
        special positions count too, which `check_whole` reads.
        """
        self.forget(k)
        record = self.record(k)
        for name in ("norm", "moments") if bodies else ("tokens", "special", "norm", "moments"):
            if name in self.arrays:
                require_size(self.files, self.arrays[name], k)
        index = self.index(k)
        if bodies:
            self._check_bodies(k, index, record)

    def _check_bodies(self, k: int, index: Index, record: tuple[int, ...]) -> None:
        found = [check_bodies(self.files, self.arrays["resid"].key(k), index)]
        for name in ("norm", "moments"):
            data = self.files.read(self.arrays[name].key(k), most=self.arrays[name].file_nbytes)
            without_crc(data, self.files.where(self.arrays[name].key(k)))
            found.append(digest([data[-4:]]))
        for name, digest_found, expected in zip(COMMITTED, found, record):
            require_digest(self.files.where(self.arrays[name].key(k)), digest_found, expected)

    def chunk_rows_range(self, chunk: int) -> tuple[int, int]:
        """First row of an inner chunk counted through the split, and one past its last."""
        return chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.n_rows)

    def read_chunk(self, chunk: int, out: Shaped[Tensor, "row d_model"]) -> None:
        """Read the rows of one chunk into `out`, contiguous, the store's dtype, exactly as many rows as the chunk has.

        One preadv straight into `out` with codec none; the crc32c is checked, and is the one that was committed. Safe to
        call from several threads.
        """
        start, stop = self.chunk_rows_range(chunk)
        if out.shape != (stop - start, self.shape.layout.d_model) or out.dtype != self.shape.layout.torch_dtype:
            raise ValueError(f"chunk {chunk} is [{stop - start}, d_model], out is {tuple(out.shape)} {out.dtype}")
        ragged = stop - start < self.chunk_rows
        whole = torch.empty(self.chunk_rows, out.shape[1], dtype=out.dtype) if ragged else out
        k, slot = divmod(chunk, self.shape.layout.chunks_per_shard)
        offset, nbytes = (int(value) for value in self.index(k)[slot])
        codec, committed = self.shape.layout.codec, self.checksums(k)[slot]
        read_chunk(self.files, self.arrays["resid"].key(k), (offset, nbytes), codec, committed, to_numpy(whole))
        if ragged:
            out.copy_(whole[: stop - start])

    def read(self, start: int, stop: int) -> Shaped[Tensor, "row d_model"]:
        """Rows start … stop in order, in the store's dtype, crc checked. Raises DamagedError, never zeros."""
        if not 0 <= start <= stop <= self.n_rows:
            raise UsageError(f"rows {start} to {stop} are not within 0 and {self.n_rows} of split {self.name}")
        out = torch.empty(stop - start, self.shape.layout.d_model, dtype=self.shape.layout.torch_dtype)
        for chunk in range(start // self.chunk_rows, -(-stop // self.chunk_rows)):
            first, last = self.chunk_rows_range(chunk)
            a, b = max(first, start), min(last, stop)
            if (a, b) == (first, last):
                self.read_chunk(chunk, out[a - start : b - start])
            else:
                whole = torch.empty(last - first, out.shape[1], dtype=out.dtype)
                self.read_chunk(chunk, whole)
                out[a - start : b - start] = whole[a - first : b - first]
        return out

    def mapped_shard(self, k: int) -> MappedShard:
        """Shard k mapped for reading rows in any order; bodies are not checked (`check_shard` does that).

        The index is checked to say that chunks stand one after the other. Raises UsageError when the store is compressed.
        """
        layout = self.shape.layout
        if layout.codec != "none":
            raise UsageError(f"{self.files.where('')}: codec {layout.codec} cannot be mapped; train in window mode")
        path = self.shard_path(k)
        self.index(k)
        return map_file(str(path), path.stat().st_size, layout.torch_dtype, layout.d_model, layout.chunk_rows)

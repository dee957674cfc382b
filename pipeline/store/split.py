"""One split of a store: tokens, special positions, norms, and rows in order. Nothing missing is ever read as data."""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from pipeline.base.files import sha256
from pipeline.store.backend import Files, HeldFile, LocalFiles, Readable, require_size
from pipeline.store.kept import KeptRows
from pipeline.store.kept import Mask as Mask
from pipeline.store.layout import COMMITTED, Array, SplitLayout
from pipeline.store.mapping import MappedShard, map_file
from pipeline.store.moments import Statistics, not_massive
from pipeline.store.record import (
    Record,
    chunks_digest,
    commit_tags,
    part_digest,
    part_sizes,
    read_record,
    record_of,
    require_digest,
)
from pipeline.store.shards import (
    Index,
    check_bodies,
    digest,
    entry_bounds,
    index_nbytes,
    read_chunk,
    read_index,
    without_crc,
)

Rows = npt.NDArray[np.int32]
MassiveRows = tuple[int, npt.NDArray[np.int64]]
"""A shard, and its rows that are massive, counted through the split."""
PARTS_HELD = 4
"""Shards' and groups' tokens, masks and norms that a split keeps in memory, those last read."""
SMALL = 1 << 20
"""Bytes of a file up to which it is read whole where all of it is needed."""
READ_AHEAD = 8
"""Groups of a store at a URL that are read side by side where all are needed."""


def open_bytes(shape: SplitLayout, *, at_url: bool = False) -> int:
    """Most bytes that an open split holds of its rows: where each chunk stands and its checksum, 24 bytes; 1.5 kB a shard; and
    of the PARTS_HELD groups that were last read 4 bytes a row, or of READ_AHEAD at a URL norms and masks."""
    chunks, group = -(-shape.n_rows // shape.layout.chunk_rows), shape.group * shape.layout.shard_rows
    return (
        24 * chunks + 1536 * shape.n_shards + (5 * READ_AHEAD if at_url else 4 * PARTS_HELD) * min(group, shape.n_rows)
    )


def to_numpy(rows: Tensor) -> npt.NDArray[Any]:
    """The memory of bf16 or float32 rows as the store's dtype: uint16 bits, or float32. Not a copy."""
    return rows.view(torch.int16).numpy().view(np.uint16) if rows.dtype == torch.bfloat16 else rows.numpy()


def usable(special: npt.NDArray[Any]) -> Mask:
    """Rows that are not special, bool [row], of special positions as they are stored, [sequence, position]."""
    found: Mask = ~special.reshape(-1).view(np.bool_)
    return found


def read_array(files: Files, array: Array) -> npt.NDArray[Any]:
    """A whole array that is not sharded. Raises DamagedError when a chunk is missing, cut short or changed."""
    return np.concatenate([read_part(files, array, k) for k in range(array.n_files)])


def read_part(files: Files, array: Array, k: int, committed: int | None = None) -> npt.NDArray[Any]:
    """What the k-th file of such an array holds, without the padding of the last. Raises DamagedError.

    With `committed`, the digest of its commit record, it must be that very file.
    """
    where, stored = files.where(array.key(k)), files.read(array.key(k), most=array.file_nbytes)
    data = without_crc(stored, where)
    require_size(where, len(stored), array.file_nbytes)
    if committed is not None:
        require_digest(where, digest([stored[-4:]]), committed)
    return np.frombuffer(data, array.numpy_dtype).reshape(array.chunk)[: array.shape[0] - k * array.chunk[0]]


def require_sha256(where: str, found: str, expected: str) -> None:
    """Raise DamagedError unless a file, or an array, is the one that the root names."""
    if found != expected:
        raise DamagedError(f"{where}: SHA-256 {found[:10]}…, expected {expected[:10]}…; run harvest --repair")


@dataclass(frozen=True)
class Prepared:
    """What the root says of a split: SHA-256 of the bytes of `tokens` and `special`, where it has them, and the model's number of
    tokens, where that is known. `groups`, from version 4 on: SHA-256s too, of what each group has of these two and, of a finished
    store, of each group's file of `commit`."""

    sha256: Mapping[str, str]
    vocab: int | None
    groups: Mapping[str, Sequence[str]]


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
        self.arrays, self.in_groups = shape.arrays, shape.layout.in_groups
        self.packed = "commit" in prepared.groups
        """Whether norms, moments and commit records lie in groups: those of a finished store, from version 4 on."""
        self._whole: set[str] = set()
        self._lock = threading.Lock()
        self._part = functools.lru_cache(PARTS_HELD)(self._read_part)
        self._group = functools.lru_cache(PARTS_HELD)(self._read_group)
        self._index: dict[int, Index] = {}
        self._records: dict[int, Record] = {}
        self._rows: dict[int, npt.NDArray[np.uint64]] = {}
        self._checksums: dict[int, list[bytes]] = {}

    @cached_property
    def tokens(self) -> Rows:
        """Token ids, int32 [n_sequences, context]. Raises StoreError for a store whose rows are of no text."""
        self.require_tokens()
        return self._whole_array("tokens")

    @cached_property
    def special(self) -> Mask:
        """Special positions, bool [n_sequences, context]; position 0 always is."""
        return self._whole_array("special").view(np.bool_)

    def _whole_array(self, name: str) -> npt.NDArray[Any]:
        """`tokens` or `special`, as it was prepared."""
        if self.in_groups:
            parts = (self._read_group(name, g) for g in range(self.shape.n_groups))
            return np.concatenate(list(parts))[: self.n_sequences]
        self.require_whole(name)
        return read_array(self.files, self.arrays[name])

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
        """The same, a bit a row. Reads one shard's norms at a time; a few groups' of a store at a URL."""
        return KeptRows.of(self._kept_in_order(max_norm), self.chunk_rows)

    def _kept_in_order(self, max_norm: float | Literal["store"] | None) -> Iterator[Mask]:
        """The same of one shard after the other."""
        names = ("special",) if max_norm is None else ("special", "norm")
        for parts in self.in_order(*names):
            yield self._kept(max_norm, dict(zip(names, parts)).__getitem__)

    def in_order(self, *names: str) -> Iterator[list[npt.NDArray[Any]]]:
        """Each shard's parts of some arrays, one shard after the other; at a URL READ_AHEAD files of each are asked for side by
        side."""
        if isinstance(self.files, LocalFiles):
            yield from ([self._part(name, k) for name in names] for k in range(self.n_shards))
            return
        together = self.shape.group if self.packed else 1
        starts = range(0, self.n_shards, together)
        with ThreadPoolExecutor(READ_AHEAD, "in order") as pool:
            for first in range(0, len(starts), READ_AHEAD):
                shards = [range(a, min(a + together, self.n_shards)) for a in starts[first : first + READ_AHEAD]]
                for parts in pool.map(lambda some: self._parts_together(names, some), shards):
                    yield from parts

    def _parts_together(self, names: Sequence[str], shards: range) -> list[list[npt.NDArray[Any]]]:
        """The same of shards that lie together, each file read once."""
        if not self.packed:
            return [[self._read_part(name, k) for name in names] for k in shards]
        held = {name: self._read_group(name, shards[0] // self.shape.group) for name in names}
        return [[self._cut(held[name], name, k) for name in names] for k in shards]

    def kept_of(self, first: int, stop: int, max_norm: float | Literal["store"] | None = "store") -> Mask:
        """The same of the rows of sequences first … stop − 1, bool [row]."""
        return self._kept(max_norm, lambda name: self._rows_of(name, first, stop))

    def shard_kept(self, k: int, max_norm: float | Literal["store"] | None = "store") -> Mask:
        """The same of shard k, bool [row]."""
        return self._kept(max_norm, lambda name: self._part(name, k))

    def _kept(self, max_norm: float | Literal["store"] | None, part: Callable[[str], npt.NDArray[Any]]) -> Mask:
        """The same of the shard whose special positions and norms these are."""
        counted = usable(part("special"))
        if max_norm is None:
            return counted
        if self.statistics is None:
            raise StoreError(f"{self.files.where('')}: unfinished, so its median norm is not known; finish the harvest")
        multiple = self.statistics.massive_multiple if max_norm == "store" else max_norm
        return counted & not_massive(part("norm"), multiple, self.statistics.median_norm)

    def tokens_of(self, first: int, stop: int) -> Rows:
        """Token ids of sequences first … stop − 1, int32 [seq, context]. Raises StoreError for rows of no text."""
        self.require_tokens()
        return self._rows_of("tokens", first, stop).reshape(-1, self.shape.layout.context)

    def special_of(self, first: int, stop: int) -> Mask:
        """Special positions of sequences first … stop − 1, bool [seq, context]."""
        return self._rows_of("special", first, stop).view(np.bool_).reshape(-1, self.shape.layout.context)

    def _rows_of(self, name: str, first: int, stop: int) -> npt.NDArray[Any]:
        """What an array of a value a row has of sequences first … stop − 1, [row]; no more than these is copied."""
        start, stop = (sequence * self.shape.layout.context for sequence in (first, stop))
        shards = range(start // self.shard_rows, max(-(-stop // self.shard_rows), start // self.shard_rows + 1))
        within = [(max(start - k * self.shard_rows, 0), stop - k * self.shard_rows) for k in shards]
        return np.concatenate([self._part(name, k).reshape(-1)[a:b] for k, (a, b) in zip(shards, within)])

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
        return usable(self._part("special", k))

    def shard_norm(self, k: int) -> npt.NDArray[np.float32]:
        """‖x‖ of the rows of shard k, float32 [row]."""
        return self._part("norm", k)

    def shard_moments(self, k: int) -> npt.NDArray[np.float64]:
        """Count, Σ‖x‖², Σx of the rows of shard k that are not special, float64 [2 + d_model]."""
        found: npt.NDArray[np.float64] = self._read_part("moments", k)[0]
        return found

    def _read_part(self, name: str, k: int) -> npt.NDArray[Any]:
        """Shard k's part of an array, compared with its commit record where that vouches for it, else with its hash."""
        if self.in_groups:
            if self.packed or name not in COMMITTED:
                return self._cut(self._group(name, k // self.shape.group), name, k)
            return self._cut(self.committed_part(name, k), name, k)
        if name in self.prepared.sha256:
            self.require_whole(name)
        committed = self.record(k).digest(name) if name in COMMITTED else None
        return read_part(self.files, self.arrays[name], k, committed)

    def _read_group(self, name: str, g: int) -> npt.NDArray[Any]:
        """What a group's file of an array holds, padding included: `tokens` and `special` are compared with the root, of others
        each shard's part by who takes it."""
        array, where = self.arrays[name], self.files.where(self.arrays[name].key(g))
        stored = self.files.read(array.key(g), most=array.file_nbytes)
        require_size(where, len(stored), array.file_nbytes)
        data = np.frombuffer(stored, array.numpy_dtype, count=math.prod(array.chunk)).reshape(array.chunk)
        if name in self.prepared.sha256:
            part = data[: array.shape[0] - g * array.chunk[0]]
            require_sha256(where, sha256(part.tobytes()), self.prepared.groups[name][g])
            self.require_vocabulary(name, part, where)
        return data

    def _cut(self, held: npt.NDArray[Any], name: str, k: int) -> npt.NDArray[Any]:
        """Shard k's part of what its group's file holds (or, unfinished, its record), without padding: the one that was
        committed."""
        array = self.arrays[name]
        per_shard, slot = array.chunk[0] // self.shape.group, k % self.shape.group
        if name in self.prepared.sha256 or self.packed:
            held = held[slot * per_shard : (slot + 1) * per_shard]
        if self.packed and name in COMMITTED:
            where = f"{self.files.where(array.key(k // self.shape.group))} (shard {k})"
            require_digest(where, part_digest(held), self.record(k).digest(name))
        return held[: array.shape[0] - k * per_shard]

    def committed_part(self, name: str, k: int) -> npt.NDArray[Any]:
        """commit, moments or norm (padded) of shard k of an unfinished store, from its record: as they were committed."""
        record, key = self.record(k), self.shape.record_key(k)
        found = read_record(self.files, key, self.shape.layout, name)
        if name in COMMITTED:
            require_digest(f"{self.files.where(key)} ({name})", part_digest(found), record.digest(name))
        return found if name != "moments" else found[None]

    def require_whole(self, name: str) -> None:
        """Raise DamagedError unless `tokens` or `special` is as it was prepared: read whole before any of it is first used."""
        with self._lock:
            if name not in self._whole:
                self.check_whole(name)
                self._whole.add(name)

    def check_whole(self, name: str) -> None:
        """The same, whether or not it was read before; and no token is beyond the model's. Reads one shard's at a time."""
        array, hasher = self.arrays[name], hashlib.sha256()
        for k in range(array.n_files):
            part = read_part(self.files, array, k)
            where = self.files.where(array.key(k))
            if self.in_groups:
                require_sha256(where, sha256(part.tobytes()), self.prepared.groups[name][k])
            self.require_vocabulary(name, part, where)
            hasher.update(part.tobytes())
        require_sha256(self.files.where(array.path), hasher.hexdigest(), self.prepared.sha256[name])

    def require_vocabulary(self, name: str, part: npt.NDArray[Any], where: str) -> None:
        """Raise DamagedError for tokens that the model does not have."""
        vocab = self.prepared.vocab
        if name == "tokens" and vocab is not None and not 0 <= part.min() <= part.max() < vocab:
            raise DamagedError(f"{where}: token ids beyond the model's {vocab}; harvest again")

    def massive(self, multiple: float | None, median: float) -> Iterator[MassiveRows]:
        """Of each shard: the rows, in order, that are not special and whose norm is beyond `multiple` medians; nothing when it
        is None."""
        if multiple is None:
            return
        for k, (special, norm) in enumerate(self.in_order("special", "norm")):
            beyond = usable(special) & ~not_massive(norm, multiple, median)
            yield k, np.flatnonzero(beyond) + k * self.shard_rows

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

    def has_record(self, k: int) -> bool:
        """Whether shard k is committed, whatever its record says."""
        return self.packed or self.files.size(self.shape.record_key(k)) is not None

    def commit(self, k: int) -> Record | None:
        """What shard k was committed with, read anew; None when it is not. Raises DamagedError for what is no record of it."""
        if self.packed:
            array, g = self.arrays["commit"], k // self.shape.group
            where, row = self.files.where(array.key(g)), self._group_rows(g)[k % self.shape.group]
        else:
            key = self.shape.record_key(k)
            where = self.files.where(key)
            if self.files.size(key) is None:
                return None
            row = self._single_row(key)
        record = record_of(row, commit_tags(self.origin, self.name, k), self.shape.n_chunks(k))
        if record is None:
            raise DamagedError(
                f"{where}: not the commit record of shard {k} of {self.name} of this store (another shard, split, store or "
                f"layer wrote it); run harvest --repair"
            )
        return record

    def _single_row(self, key: str) -> npt.NDArray[np.uint64]:
        """The row of `commit` in a file of its own."""
        if self.in_groups:
            return read_record(self.files, key, self.shape.layout, "commit")
        array, where = self.arrays["commit"], self.files.where(key)
        data = without_crc(self.files.read(key, most=array.file_nbytes), where)
        if len(data) != array.file_nbytes - 4:
            raise DamagedError(f"{where}: not a commit record; run harvest --repair")
        return np.frombuffer(data, array.numpy_dtype)

    def _group_rows(self, g: int) -> npt.NDArray[np.uint64]:
        """The commit records of group g, uint64 [shard, record width]; read once, the file that the root names."""
        if (rows := self._rows.get(g)) is None:
            array, where = self.arrays["commit"], self.files.where(self.arrays["commit"].key(g))
            stored = self.files.read(array.key(g), most=array.file_nbytes)
            require_size(where, len(stored), array.file_nbytes)
            require_sha256(where, sha256(stored), self.prepared.groups["commit"][g])
            rows = self._rows[g] = np.frombuffer(stored[:-4], array.numpy_dtype).reshape(array.chunk)
        return rows

    def record(self, k: int) -> Record:
        """As `commit`, read once. Raises DamagedError when shard k is not committed."""
        if (record := self._records.get(k)) is None:
            record = self.commit(k)
            if record is None:
                where = self.files.where(self.shape.record_key(k))
                raise DamagedError(f"{where}: gone, so shard {k} is not committed; run harvest --repair")
            self._records[k] = record
        return record

    def forget(self, k: int) -> None:
        """Read shard k's record, index and checksums again when they are next needed: its files are others now."""
        self._part.cache_clear()
        self._group.cache_clear()
        self._records.pop(k, None)
        self._index.pop(k, None)
        self._checksums.pop(k, None)

    def checksum(self, k: int, slot: int) -> bytes:
        """The crc32c of a chunk of shard k that its commit record vouches for."""
        return self.record(k).checksum(slot) if self.in_groups else self.checksums(k)[slot]

    def checksums(self, k: int) -> list[bytes]:
        """The crc32c behind each chunk of shard k, which its commit record vouches for; before version 4 read once, 4 bytes a
        chunk."""
        if self.in_groups:
            record = self.record(k)
            return [record.checksum(slot) for slot in range(len(record.chunks))]
        if k not in self._checksums:
            key, found = self.arrays["resid"].key(k), []
            for offset, nbytes in self.index(k).tolist():
                stored = bytearray(4)
                self.files.read_into(key, offset + nbytes - 4, [memoryview(stored)])
                found.append(bytes(stored))
            require_digest(self.files.where(key), digest(found), self.record(k).digest("resid"))
            self._checksums[k] = found
        return self._checksums[k]

    def index(self, k: int) -> Index:
        """Where shard k's chunks stand in its file, (offset, nbytes) uint64 [chunk, 2]; read once, checked.

        From version 4 on the commit record says so too, and the index is the one that was committed.
        """
        if k not in self._index:
            self._index[k] = self._read_index(k, self.files)
        return self._index[k]

    def _read_index(self, k: int, files: Readable) -> Index:
        """The same, read anew from these files."""
        layout, key, n_chunks = self.shape.layout, self.arrays["resid"].key(k), self.shape.n_chunks(k)
        entry = entry_bounds(layout.codec, layout.chunk_nbytes)
        index = read_index(files, key, layout.chunks_per_shard, n_chunks, entry, self.shard_nbytes(k))
        if self.in_groups and not np.array_equal(index[:, 1], self.record(k).nbytes):
            raise DamagedError(f"{self.files.where(key)}: another index than was committed; run harvest --repair")
        return index

    def resid_nbytes(self, chunks: npt.NDArray[np.uint64]) -> list[int]:
        """Bytes of shards' files of rows, of what their records say of their chunks, uint64 [shard, chunk]."""
        index = index_nbytes(self.shape.layout.chunks_per_shard)
        return [n + index for n in (chunks >> np.uint64(32)).sum(axis=1).tolist()]

    def shard_nbytes(self, k: int) -> int | None:
        """Bytes of shard k's file of rows, where its record says so (from version 4 on)."""
        return self.resid_nbytes(self.record(k).chunks[None])[0] if self.in_groups else None

    def group_files(self, g: int) -> dict[str, int]:
        """Key → bytes of the small files of group g, its commit records excepted."""
        arrays = (array for name, array in self.arrays.items() if name not in ("resid", "commit"))
        return {array.key(g): array.file_nbytes for array in arrays}

    def check_group(self, g: int, sizes: Mapping[str, int | None]) -> None:
        """Raise DamagedError unless the commit records of group g are those that the root names and every file of it and of its
        shards has its size in `sizes`. Reads one file."""
        self._rows.pop(g, None)
        rows, shards = self._group_rows(g), self.shape.shards_of(g)
        of_resid = self.resid_nbytes(rows[: len(shards), len(COMMITTED) :])
        resid = self.arrays["resid"]
        expected = self.group_files(g) | {resid.key(k): n for k, n in zip(shards, of_resid)}
        for key, size in expected.items():
            require_size(self.files.where(key), sizes[key], size)

    def check_norms(self, g: int) -> None:
        """Raise DamagedError unless every byte of the norms, moments and commit records of group g is what was committed."""
        self._rows.pop(g, None)
        held = {name: self._read_group(name, g) for name in ("norm", "moments")}
        for k in self.shape.shards_of(g):
            self._records.pop(k, None)
            for name, data in held.items():
                self._cut(data, name, k)
        for name in held:
            read_part(self.files, self.arrays[name], g)  # padding and checksum, which other readers see

    def check_shard(self, k: int, bodies: bool = True) -> None:
        """Raise DamagedError unless shard k is committed, its files have their sizes and its index is right.

        With `bodies`, every byte of its files is read and compared with the commit record; without, the sizes of its tokens and
        special positions count too, which `check_whole` reads. Files of its group are not looked at (`check_group`). A file of
        rows that is SMALL is read whole, by one request.
        """
        self.forget(k)
        record, files, resid = self.record(k), self.files, self.arrays["resid"].key(k)
        source: Readable = files
        for key, expected in self._sizes_of(k, () if bodies else ("tokens", "special")).items():
            if bodies and key == resid and expected <= SMALL:
                source = HeldFile(files, key, expected)
            else:
                require_size(files.where(key), files.size(key), expected)
        index = self._read_index(k, source)
        if bodies:
            self._check_bodies(k, check_bodies(source, resid, index), index, record)

    def _sizes_of(self, k: int, also: Sequence[str]) -> dict[str, int]:
        """Key → bytes of shard k's files, where its record or the layout says them, and of its part of some arrays."""
        if not self.in_groups:
            arrays = [self.arrays[name] for name in (*also, "norm", "moments") if name in self.arrays]
            return {array.key(k): array.file_nbytes for array in arrays}
        found = {self.arrays["resid"].key(k): self.resid_nbytes(self.record(k).chunks[None])[0]}
        if self.packed:
            return found
        prepared = {key: n for key, n in self.group_files(k // self.shape.group).items() if key.split("/")[1] in also}
        return found | {self.shape.record_key(k): sum(part_sizes(self.shape.layout).values())} | prepared

    def _check_bodies(self, k: int, checksums: list[bytes], index: Index, record: Record) -> None:
        found = digest(checksums)
        if self.in_groups:
            entries = np.zeros(self.shape.layout.chunks_per_shard, np.uint64)
            entries[: len(index)] = index[:, 1] << np.uint64(32) | np.frombuffer(b"".join(checksums), "<u4")
            found = chunks_digest(entries)
        require_digest(self.files.where(self.arrays["resid"].key(k)), found, record.digest("resid"))
        if not self.packed:
            for name in ("norm", "moments"):
                self._read_part(name, k)

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
        codec, committed = self.shape.layout.codec, self.checksum(k, slot)
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

"""Writing the shards of an activation store, and finishing it. Used by harvest alone; `store_prepare.py` comes first.

    writer = resume(path, config, n_train, n_eval)             # the store is there: no text is needed again
    writer = writer or prepare(path, config, train, evaluation, versions)
    for split in ("train", "eval"):
        for k in writer.pending(split):                        # several workers: those with k % world_size == rank
            with writer.shard(split, k) as shard:
                shard.write(rows)                              # [row, d_model], in order, blocks of any size
    writer.finish()                                            # one process, when all shards are committed

Killed anywhere, the same steps go on, and the bytes that result are those of a harvest that was never stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped
from torch import Tensor

from pipeline.base.errors import DamagedError, ModelError, StoreError, UsageError
from pipeline.base.files import PARTIAL
from pipeline.store.backend import Files
from pipeline.store.groups import pack, pack_bytes
from pipeline.store.large import SHARE, LargeRows, large_bytes, large_key, large_rows
from pipeline.store.layout import Layout, SplitLayout, pad_rows
from pipeline.store.moments import MASSIVE_MULTIPLE, Measured, merge, norms_and_moments
from pipeline.store.reader import Store, checkers, measure
from pipeline.store.record import chunks_digest, commit_tags, part_digest, record_bytes
from pipeline.store.root import write_root
from pipeline.store.shards import ShardStream, with_crc
from pipeline.store.split import Split, open_bytes, to_numpy


class StoreWriter:
    """Writes the shards of a prepared store. Several processes may hold one; each shard must have one owner."""

    def __init__(self, store: Store) -> None:
        self.store, self.files, self.layout = store, store.files, store.layout

    @staticmethod
    def open(path: Path | str) -> StoreWriter:
        """The writer of a store that is prepared or complete. Raises StoreError, or DamagedError for its metadata."""
        store = Store.load(path)
        if store.attributes["state"] == "preparing":
            raise StoreError(f"{path}: its preparation was stopped; run the same harvest command again")
        store.check_metadata()
        return StoreWriter(store)

    def split(self, name: str) -> Split:
        """The reading side of a split: tokens, special, n_shards, shard_rows_range."""
        return self.store.train if name == "train" else self.store.eval

    def pending(self, name: str) -> list[int]:
        """Shards of a split that are not committed, in order. A commit record that is damaged counts as none.

        Records of the shards that have one are read side by side; of a finished store, those of a shard of each group. Another
        process may finish the store at any moment, and then a shard's own record is no more.
        """
        left = self._without_record(name)
        return self._without_record(name) if left and self._finished_meanwhile() else left

    def _without_record(self, name: str) -> list[int]:
        """What `pending` says, by what the root said when it was last read."""
        split, shards = self.split(name), range(self.split(name).n_shards)
        there = set[str]() if split.packed else set(self.files.keys())
        held = [k for k in shards if split.packed or split.shape.record_key(k) in there]
        with checkers(self.files) as pool:
            for _ in pool.map(lambda k: is_committed(split, k), shards[:: split.shape.group] if split.packed else ()):
                pass  # the others' records are in the same files, which are read once
            done = {k for k, whole in zip(held, pool.map(lambda k: is_committed(split, k), held)) if whole}
        return [k for k in shards if k not in done]

    def _finished_meanwhile(self) -> bool:
        """Whether another process finished the store since its root was read; then it is read anew.

        Asked after a record was not found, it tells a shard that was never committed from one whose record lies in its group
        now: `finish` takes records away only when the root says so.
        """
        if not self.store.complete and (now := Store.load(self.store.where)).complete:
            self.store = now
            return True
        return False

    def sweep(self) -> None:
        """Delete what killed workers left half-written. Only while nobody writes; `prepare` and `finish` do it too."""
        sweep(self.files)

    @contextlib.contextmanager
    def shard(self, name: str, k: int) -> Iterator[ShardWriter]:
        """Write shard k inside a with-block; leaving it commits the shard, an exception leaves nothing behind.

        Raises UsageError when too few or too many rows were written, DiskError when the disk is full, StoreError when
        the shard is committed already. One that another process committed meanwhile (a part that was thought lost, and taken
        again) stays as that one wrote it.
        """
        split = self.split(name)
        if self._is_committed(split, k):
            raise StoreError(
                f"{self.store.where}: shard {k} of {name} is committed; harvest --repair gives up damaged ones"
            )
        with contextlib.suppress(Overtaken):
            with self.files.create(split.arrays["resid"].key(k)) as file:
                writer = ShardWriter(file, split, k)
                yield writer
                chunks = writer.end()
                if self._is_committed(split, k):
                    raise Overtaken
            commit(self.files, split, k, chunks, writer)

    def _is_committed(self, split: Split, k: int) -> bool:
        """Whether a shard is committed by now, by whomever."""
        return is_committed(split, k) or self._finished_meanwhile()

    def give_up(self, name: str, k: int) -> None:
        """Take a shard's commit record away, then its files: it is pending again. Raises StoreError for a finished store, whose
        shards have no records of their own."""
        if self.split(name).packed:
            raise StoreError(f"{self.store.where}: is finished; harvest --repair takes damaged shards back")
        give_up(self.files, self.split(name).shape, k)
        self.split(name).forget(k)

    def give_up_damaged(self) -> list[tuple[str, int]]:
        """Read every committed shard and give up those that are not as they were committed; returns (split, shard)."""
        damaged = []
        for split in self.store.splits:
            for k in range(split.n_shards):
                try:
                    if split.commit(k) is not None:
                        split.check_shard(k)
                except DamagedError:
                    damaged.append((split.name, k))
                    self.give_up(split.name, k)
        return damaged

    def finish(self) -> Store:
        """Write the groups of norms, moments and commit records, mean, statistics, state "complete"; returns the store, opened.
        Nothing changes when it is complete.

        Raises StoreError when a shard is not committed, or when no training row is left to make statistics of, and
        DamagedError when tokens, or a committed shard, are not as they were (bodies are not read). Where another process finished
        it meanwhile, that is enough.
        """
        try:
            return self._finish()
        except DamagedError:
            if not self._finished_meanwhile():
                raise
            return Store.open(self.store.where)

    def _finish(self) -> Store:
        left = {split.name: n for split in self.store.splits if (n := len(self.pending(split.name)))}
        if left:
            raise StoreError(f"{self.store.where}: shards are not committed ({left}); run harvest again")
        self.sweep()
        store = Store.load(self.store.where)
        store.check_tokens()
        if not store.complete:
            store.check()
            attributes = store.attributes | {
                "committed": {split.name: {"commit": pack(split)} for split in store.splits}
            }
            mean, statistics = measure(Store(self.files, store.where, attributes), MASSIVE_MULTIPLE)
            self.files.write(store.layout.mean.key(0), with_crc(mean))
            write_root(self.files, attributes | {"state": "complete", "statistics": statistics.to_dict()})
        sweep(self.files, finished=True)
        return Store.open(self.store.where)


class Overtaken(Exception):
    """Another process committed the shard that is being written."""


class ShardWriter:
    """Takes one shard's rows: chunks go to disk as they fill, norms, moments, rows of large norm are kept. Memory: `n_bytes`."""

    @staticmethod
    def n_bytes(layout: Layout) -> int:
        """Most bytes of a shard that is written: a chunk; a norm twice (once more as the record has it) and a mask a row; and of
        the rows one in 64, usually one in a thousand, three times while their file is made."""
        row = layout.chunk_nbytes // layout.chunk_rows
        large = min(layout.shard_rows, layout.chunks_per_shard * -(-layout.chunk_rows // SHARE))
        return layout.chunk_nbytes + 9 * layout.shard_rows + 3 * large * (row + 8)

    def __init__(self, file: BinaryIO, split: Split, k: int) -> None:
        start, stop = split.shard_rows_range(k)
        layout = self.layout = split.shape.layout
        self.name, self.first_row, self.n_rows, self.n_written = split.name, start, stop - start, 0
        self.stream = ShardStream(file, layout.codec, layout.chunks_per_shard)
        self.padding = split.arrays["resid"].padding
        self.special = ~split.shard_usable(k)
        self.norm = np.empty(self.n_rows, np.float32)
        self.is_measured: bool | None = None  # whether norms and moments come with the rows; None before the first
        self.moments: list[npt.NDArray[np.float64]] = []
        self.large: list[LargeRows] = []
        self.held = np.empty((layout.chunk_rows, layout.d_model), split.arrays["resid"].numpy_dtype)
        self.n_held = 0

    def write(self, rows: Shaped[Tensor, "row d_model"], measured: Measured | None = None) -> None:
        """Append rows, CPU, contiguous, the store's dtype, in order; blocks may be of any size.

        Whole chunks are written from the caller's memory; only what does not fill one is copied. measured: norms and moments
        of these rows, on the CPU, for all blocks of a shard or for none, whose are then taken here. Raises UsageError for
        rows of another kind or too many of them, ModelError for one that is not finite.
        """
        layout = self.layout
        if rows.dtype != layout.torch_dtype or rows.ndim != 2 or rows.shape[1] != layout.d_model:
            raise UsageError(
                f"expected {layout.torch_dtype} [row, {layout.d_model}], got {rows.dtype} {list(rows.shape)}"
            )
        if self.n_written + self.n_held + len(rows) > self.n_rows:
            raise UsageError(f"{self.name}: a shard of {self.n_rows} rows, more were written")
        if self.is_measured not in (None, measured is not None):
            raise UsageError(f"{self.name}: norms came with some rows of a shard and not with others")
        self.is_measured = measured is not None
        if measured is not None:
            self._note(self.n_written + self.n_held, measured.norm.numpy(), measured.moments.numpy())
        left = to_numpy(rows.contiguous())
        while len(left):
            room = layout.chunk_rows - self.n_held
            block, left = left[:room], left[room:]
            if len(block) == layout.chunk_rows:
                self._append(block)
                continue
            self.held[self.n_held : self.n_held + len(block)] = block
            self.n_held += len(block)
            if self.n_held == layout.chunk_rows:
                self._append_held()

    def _append_held(self) -> None:
        n, self.n_held = self.n_held, 0
        self._append(self.held[:n])

    def _append(self, rows: npt.NDArray[Any]) -> None:
        """One chunk: its norms and moments, unless they are there, then its bytes; a ragged one is padded."""
        chunk = slice(self.n_written, self.n_written + len(rows))
        if not self.is_measured:
            self._note(self.n_written, *norms_and_moments(rows, self.special[chunk]))
        if self.name == "train":
            self.large.append(large_rows(rows, self.norm[chunk], ~self.special[chunk], self.n_written))
        self.stream.append(pad_rows(rows, self.layout.chunk_rows, self.padding))
        self.n_written += len(rows)

    def _note(self, first: int, norm: npt.NDArray[np.float32], moments: npt.NDArray[np.float64]) -> None:
        """Keep norms and moments of rows from the shard's row `first` on. Raises ModelError for one that is not finite."""
        if not (finite := np.isfinite(norm)).all():
            row = self.first_row + first + int(np.argmin(finite))
            raise ModelError(f"{self.name}: the model's residual at row {row} is not finite; try --dtype float32")
        self.norm[first : first + len(norm)] = norm
        self.moments.append(moments)

    def end(self) -> npt.NDArray[np.uint64]:
        """Write what is held and the index; returns what the commit record says of each chunk. Raises UsageError when rows are
        missing."""
        if self.n_held:
            self._append_held()
        if self.n_written != self.n_rows:
            raise UsageError(f"{self.name}: a shard of {self.n_rows} rows, only {self.n_written} were written")
        return self.stream.close()


def writing_bytes(config: Mapping[str, Any], n_train: int, n_eval: int) -> int:
    """Most bytes that making a store of so many sequences holds of its rows: the open splits, and the shard that is written, or
    what finishing packs."""
    layout = Layout.from_config(config)
    shapes = [SplitLayout("train", layout, n_train), SplitLayout("eval", layout, n_eval)]
    return sum(map(open_bytes, shapes)) + max(ShardWriter.n_bytes(layout), *map(pack_bytes, shapes))


def commit(files: Files, split: Split, k: int, chunks: npt.NDArray[np.uint64], written: ShardWriter) -> None:
    """Write the large rows of a shard whose resid file is in place, and then the record that makes it count."""
    norm = pad_rows(written.norm, split.shard_rows, split.arrays["norm"].padding).astype("<f4")
    moments = merge(np.stack(written.moments)).astype("<f8")
    if large := large_bytes(written.large):
        files.write(large_key(split.name, k), large)
    digests = (chunks_digest(chunks), part_digest(norm), part_digest(moments))
    first = [tag << 32 | value for tag, value in zip(commit_tags(split.origin, split.name, k), digests)]
    row = np.concatenate([np.array(first, "<u8"), chunks])
    parts = {"commit": row, "moments": moments, "norm": norm}
    files.write(split.shape.record_key(k), record_bytes(parts, split.shape.layout))


def give_up(files: Files, shape: SplitLayout, k: int) -> None:
    """Take a shard of an unfinished store away, its commit record first."""
    for key in (shape.record_key(k), shape.arrays["resid"].key(k), large_key(shape.name, k)):
        files.delete(key)


def is_committed(split: Split, k: int) -> bool:
    """Whether a shard has a commit record that can be read."""
    try:
        return split.commit(k) is not None
    except DamagedError:
        return False


def sweep(files: Files, *, finished: bool = False) -> None:
    """Delete every half-written file of a killed process, and of a finished store what lay beside its shards until then
    (large.py, record.py)."""
    beside = ("/resid/large/", "/resid/record/") if finished else ()
    keys = files.keys()
    files.delete_all([key for key in keys if key.endswith(PARTIAL) or any(part in key for part in beside)])

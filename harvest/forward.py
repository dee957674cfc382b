"""The forward passes: fixed batches that never straddle a shard, and a thread that writes while the next one runs."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from pipeline.base.progress import Progress
from pipeline.model.points import Point
from pipeline.model.split_lm import SplitLM
from pipeline.store.writer import StoreWriter

BLOCKS_WAITING = 2
"""Blocks that may wait for the writing thread; with the one it holds and the one being computed, four are in memory."""


@dataclass(frozen=True)
class Shard:
    """A shard of a split to be made, for the stores of these points."""

    split: str
    k: int
    n_rows: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Block:
    """One batch's rows [row, d_model] by point, on the CPU once `ready` has happened."""

    shard: Shard
    rows: Mapping[Point, Tensor]
    last: bool
    ready: torch.cuda.Event | None = None


def pending_shards(writers: Mapping[Point, StoreWriter], rank: int, world: int) -> list[Shard]:
    """The shards that are not committed and that this process owns; who owns one depends on its number alone."""
    shards = []
    first = next(iter(writers.values()))
    for split, offset in (("train", 0), ("eval", first.split("train").n_shards)):
        pending = {point: set(writer.pending(split)) for point, writer in writers.items()}
        for k in range(first.split(split).n_shards):
            points = tuple(point for point in writers if k in pending[point])
            if points and (offset + k) % world == rank:
                start, stop = first.split(split).shard_rows_range(k)
                shards.append(Shard(split, k, stop - start, points))
    return shards


def batches(writer: StoreWriter, shard: Shard, batch_size: int) -> Iterator[tuple[Int[Tensor, "seq pos"], bool]]:
    """The shard's sequences in order, `batch_size` at a time, fewer in its last batch; and whether it is the last.

    A function of the config and the shard alone: the same sequences share a batch whoever computes it, and whenever.
    """
    tokens = torch.from_numpy(writer.split(shard.split).shard_tokens(shard.k).astype("int64"))
    for a in range(0, len(tokens), batch_size):
        yield tokens[a : a + batch_size], a + batch_size >= len(tokens)


def harvest_shards(
    lm: SplitLM, writers: Mapping[Point, StoreWriter], shards: Sequence[Shard], batch_size: int, progress: Progress
) -> None:
    """Run the model's prefix over every shard's tokens and write the rows of each point, in the store's dtype."""
    first = next(iter(writers.values()))
    gigabyte = sum(rows_nbytes(writer) for writer in writers.values()) / len(writers) / 1e9
    written = 0.0
    with ShardThread(writers) as thread:
        copy = HostCopies(lm.device, first.layout.torch_dtype)
        for shard in shards:
            for tokens, last in batches(first, shard, batch_size):
                residuals = lm.prefix(copy.to_device(tokens))
                thread.put(copy.to_host(shard, residuals, last))
                written += gigabyte * tokens.numel() * len(shard.points)
                progress.advance(tokens.numel(), f"{written:.2f} GB")


def rows_nbytes(writer: StoreWriter) -> int:
    """Bytes of one row."""
    return writer.layout.d_model * writer.layout.torch_dtype.itemsize


class HostCopies:
    """Copies between device and CPU that do not hold the device up: pinned memory, and a stream of their own.

    Rows are rounded to `dtype` on the device, to the nearest.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        cuda: Any = torch.cuda
        self.stream = cuda.Stream(device) if device.type == "cuda" else None

    def to_device(self, tokens: Tensor) -> Tensor:
        """Token ids on the device."""
        return tokens if self.stream is None else tokens.pin_memory().to(self.device, non_blocking=True)

    def to_host(self, shard: Shard, residuals: Mapping[Point, Tensor], last: bool) -> Block:
        """The residuals as rows of a block; on a GPU they are still on their way until the block's event."""
        rows = {point: residuals[point].flatten(0, 1).to(self.dtype) for point in shard.points}
        if self.stream is None:
            return Block(shard, rows, last)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            pinned = {point: torch.empty(r.shape, dtype=r.dtype, pin_memory=True) for point, r in rows.items()}
            for point, r in rows.items():
                pinned[point].copy_(r, non_blocking=True)
                r.record_stream(self.stream)
            ready = self.stream.record_event()
        return Block(shard, pinned, last, ready)


class ShardThread:
    """Writes blocks in a thread, in the order in which they are put; a shard is committed after its last block.

    An error of the thread is raised by the next `put`, or at the end. When the with-block is left by an exception, the
    shard that is being written is dropped and nothing of it is left behind.
    """

    def __init__(self, writers: Mapping[Point, StoreWriter]) -> None:
        self.writers = writers
        self.queue: queue.Queue[Block | None] = queue.Queue(BLOCKS_WAITING)
        self.error: BaseException | None = None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="write shards")

    def __enter__(self) -> ShardThread:
        self.thread.start()
        return self

    def put(self, block: Block | None) -> None:
        """Hand over a block; waits while too many wait. None is the end."""
        while self.error is None:
            with contextlib.suppress(queue.Full):
                self.queue.put(block, timeout=0.1)
                return
        raise self.error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.put(None)
        finally:
            if kind is not None:
                self.stopped.set()
            self.thread.join()
        if kind is None and self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while (block := self._next()) is not None:
                self._write_shard(block)
        except BaseException as error:
            self.error = error

    def _next(self) -> Block | None:
        while not self.stopped.is_set():
            with contextlib.suppress(queue.Empty):
                return self.queue.get(timeout=0.1)
        raise InterruptedError("stopped")

    def _write_shard(self, block: Block) -> None:
        """Write the blocks of one shard, this one first, to the stores of all its points."""
        shard = block.shard
        with contextlib.ExitStack() as stack:
            files = {
                point: stack.enter_context(self.writers[point].shard(shard.split, shard.k)) for point in shard.points
            }
            while True:
                if block.ready is not None:
                    block.ready.synchronize()
                for point, rows in block.rows.items():
                    files[point].write(rows)
                if block.last:
                    return
                following = self._next()
                assert following is not None, "a shard ends with a block that is its last"
                block = following

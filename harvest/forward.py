"""The forward passes: fixed batches that never straddle a shard, and threads that write while the next one runs."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from pipeline.base.errors import ModelError
from pipeline.base.progress import Progress
from pipeline.base.runtime import sent
from pipeline.model.points import Point, as_point
from pipeline.model.specials import plain_token
from pipeline.model.split_lm import SplitLM
from pipeline.store.moments import Measured, measure_rows
from pipeline.store.writer import StoreWriter

BLOCKS_WAITING = 2
"""Blocks that may wait for a writing thread; with the one it holds and the one being computed, four are in memory."""


@dataclass(frozen=True)
class Shard:
    """A shard of a split to be made, for the stores of these points."""

    split: str
    k: int
    n_rows: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Block:
    """One batch's rows [row, d_model] of one point, from a GPU with norms and moments, on the CPU once `ready` has happened."""

    shard: Shard
    rows: Tensor
    measured: Measured | None
    last: bool
    ready: torch.cuda.Event | None = None


def pending_shards(writers: Mapping[Point, StoreWriter]) -> dict[int, Shard]:
    """The shards that are not committed, by their number: those of training first."""
    shards = {}
    first = next(iter(writers.values()))
    for split, offset in (("train", 0), ("eval", first.split("train").n_shards)):
        pending = {point: set(writer.pending(split)) for point, writer in writers.items()}
        for k in range(first.split(split).n_shards):
            if points := tuple(point for point in writers if k in pending[point]):
                start, stop = first.split(split).shard_rows_range(k)
                shards[offset + k] = Shard(split, k, stop - start, points)
    return shards


@dataclass(frozen=True)
class Sequences:
    """Sequences that share a forward pass: tokens, which of their rows are special, and whether they end their shard."""

    tokens: Int[Tensor, "seq pos"]
    special: Bool[Tensor, " row"]
    last: bool


def batches(writer: StoreWriter, shard: Shard, batch_size: int) -> Iterator[Sequences]:
    """The shard's sequences in order, `batch_size` at a time, fewer in its last batch.

    A function of the config and the shard alone: the same sequences share a batch whoever computes it, and whenever.
    """
    split = writer.split(shard.split)
    tokens = torch.from_numpy(split.shard_tokens(shard.k).astype("int64"))
    special = torch.from_numpy(~split.shard_usable(shard.k)).view_as(tokens)
    for a in range(0, len(tokens), batch_size):
        b = a + batch_size
        yield Sequences(tokens[a:b], special[a:b].reshape(-1), b >= len(tokens))


def harvest_shards(
    lm: SplitLM, writers: Mapping[Point, StoreWriter], shards: Iterable[Shard], batch_size: int, progress: Progress
) -> None:
    """Run the model's prefix over every shard's tokens and write the rows of each point, in the store's dtype. The next shard is
    asked for when the forward passes of the one before are done."""
    first = next(iter(writers.values()))
    gigabyte = sum(rows_nbytes(writer) for writer in writers.values()) / len(writers) / 1e9
    written = 0.0
    with ShardThreads(writers) as threads:
        copy = HostCopies(lm.device, first.layout.torch_dtype)
        for shard in shards:
            for sequences in batches(first, shard, batch_size):
                residuals = lm.prefix(copy.to_device(sequences.tokens))
                threads.put(copy.to_host(shard, residuals, sequences))
                n_rows = sequences.tokens.numel()
                written += gigabyte * n_rows * len(shard.points)
                progress.advance(n_rows, f"{written:.2f} GB")


def rows_nbytes(writer: StoreWriter) -> int:
    """Bytes of one row."""
    return writer.layout.d_model * writer.layout.torch_dtype.itemsize


def fitting_batch(lm: SplitLM, context: int, batch_size: int, dtype: torch.dtype) -> int:
    """The largest of batch_size, a half of it, a quarter, … whose forward pass, with what is made of its rows, fits into the
    device's memory. Raises ModelError when not even one sequence does."""
    while True:
        try:
            try_batch(lm, context, batch_size, dtype)
            return batch_size
        except torch.OutOfMemoryError as error:
            if batch_size == 1:
                raise ModelError(
                    f"{lm.info.folder}: not even one sequence of {context} tokens fits into the memory of {lm.device}; lower "
                    "--context, or spread the model with --device-map"
                ) from error
        batch_size //= 2
        if lm.device.type == "cuda":
            torch.cuda.empty_cache()


def try_batch(lm: SplitLM, context: int, batch_size: int, dtype: torch.dtype) -> None:
    """A batch of made-up tokens as a harvest runs it, two in flight. Raises torch.OutOfMemoryError."""
    points = tuple(as_point(layer) for layer in lm.layers)
    shard, copy = Shard("train", 0, batch_size * context, points), HostCopies(lm.device, dtype)
    tokens = torch.full((batch_size, context), plain_token(lm.config, lm.vocab))
    sequences = Sequences(tokens, torch.zeros(tokens.numel(), dtype=torch.bool), last=True)
    blocks = [copy.to_host(shard, lm.prefix(copy.to_device(tokens)), sequences) for _ in range(2)]
    for block in blocks[-1].values():
        if block.ready is not None:
            block.ready.synchronize()


class HostCopies:
    """Copies between device and CPU that do not hold the device up: pinned memory, and a stream of their own.

    Rows are rounded to `dtype` on the device, to the nearest; a GPU measures them there too.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        cuda: Any = torch.cuda
        self.stream = cuda.Stream(device) if device.type == "cuda" else None

    def to_device(self, numbers: Tensor) -> Tensor:
        """Token ids, or a mask, on the device."""
        return sent(numbers, self.device)

    def to_host(self, shard: Shard, residuals: Mapping[Point, Tensor], sequences: Sequences) -> dict[Point, Block]:
        """The residuals as a block of rows a point; on a GPU they are still on their way until the block's event."""
        rows = {point: residuals[point].flatten(0, 1).to(self.device, self.dtype) for point in shard.points}
        if self.stream is None:
            return {point: Block(shard, of_point, None, sequences.last) for point, of_point in rows.items()}
        special = self.to_device(sequences.special)
        measured = {point: measure_rows(of_point, special) for point, of_point in rows.items()}
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        ready, blocks = torch.cuda.Event(), {}  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.stream):
            for point, m in measured.items():
                there = Measured(self._pinned(m.norm), self._pinned(m.moments))
                blocks[point] = Block(shard, self._pinned(rows[point]), there, sequences.last, ready)
            ready.record(self.stream)
        return blocks

    def _pinned(self, tensor: Tensor) -> Tensor:
        """A copy that is on its way, on the stream at hand."""
        assert self.stream is not None, "on a CPU nothing is copied"
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        pinned.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)
        return pinned


class ShardThreads:
    """A writing thread a store, so that no store waits for another's disk or sums; blocks are put for all of them at once.

    An error of a thread is raised by the next `put`, or at the end. When the with-block is left by an exception, the
    shards that are being written are dropped and nothing of them is left behind.
    """

    def __init__(self, writers: Mapping[Point, StoreWriter]) -> None:
        self.threads = {point: ShardThread(writer) for point, writer in writers.items()}

    def put(self, blocks: Mapping[Point, Block]) -> None:
        """Hand over a block a point; waits while too many of one wait."""
        for point, block in blocks.items():
            self.threads[point].put(block)

    def __enter__(self) -> ShardThreads:
        for thread in self.threads.values():
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed: list[BaseException] = []
        for thread in self.threads.values():
            if kind is None and not failed:
                try:
                    thread.put(None)
                except BaseException as one:
                    failed.append(one)
        if kind is not None or failed:
            for thread in self.threads.values():
                thread.stopped.set()
        for thread in self.threads.values():
            thread.join()
        failed += [thread.error for thread in self.threads.values() if thread.error is not None]
        if kind is None and failed:
            raise failed[0]


class ShardThread(threading.Thread):
    """Writes blocks of one store, in the order in which they are put; a shard is committed after its last block."""

    def __init__(self, writer: StoreWriter) -> None:
        super().__init__(name="write shards")
        self.writer = writer
        self.queue: queue.Queue[Block | None] = queue.Queue(BLOCKS_WAITING)
        self.error: BaseException | None = None
        self.stopped = threading.Event()

    def put(self, block: Block | None) -> None:
        """Hand over a block; waits while too many wait. None is the end. Raises what the thread met."""
        while self.error is None:
            with contextlib.suppress(queue.Full):
                self.queue.put(block, timeout=0.1)
                return
        raise self.error

    def run(self) -> None:
        """Until the end, an error, or a stop."""
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
        """Write the blocks of one shard, this one first."""
        with self.writer.shard(block.shard.split, block.shard.k) as file:
            while True:
                if block.ready is not None:
                    block.ready.synchronize()
                file.write(block.rows, block.measured)
                if block.last:
                    return
                following = self._next()
                assert following is not None, "a shard ends with a block that is its last"
                block = following

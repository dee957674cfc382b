"""Shuffled batches of a store's kept rows, gathered by background threads a few batches ahead of the training.

    mapped    shards are mapped into memory and rows are gathered straight from the kernel's cache of the files, which
              every training on this machine shares. In an exact order bodies are checked beside it: `bodies.py`. In
              windows, the chunks of the coming one are read and checked while rows of this one are gathered: that also
              brings them from the disk in large reads, so a store may be larger than memory.
    buffered  for compressed stores and those at a URL: the chunks of a window are read, checked and decompressed into one of
              two buffers, while rows are gathered from the other. From object storage REQUESTS of them are fetched at a time.

Which row comes when is `order.py`'s; both ways deliver the same batches for the same order. Within a batch, rows stand
in the order of the store wherever they come from one window.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from pipeline.base.errors import UsageError
from pipeline.base.memory import available_memory
from pipeline.store.backend import LocalFiles
from pipeline.store.layout import SplitLayout
from pipeline.store.reader import Split
from train.config import Mode
from train.feed.order import Order, Piece, Rows, Window, share_of

WINDOW_ROWS = 262_144
"""Default window: batch means vary 4 % more than under an exact permutation (STORAGE.md). 1.2 GB at d_model 2304."""

MOST_MAPPED = 16_384
"""Shards mapped at a time, the last that were read: a process of Linux may have 65,530 mappings, two stores are fed at most."""
REQUESTS = 16
"""Chunks that are asked of object storage at a time."""

AHEAD = 4
"""Batches gathered ahead of the one in use."""

Gather = Callable[[Rows, Tensor], None]
"""Writes some rows of the split, in the order given, into contiguous [row, d_model]."""


def resolve_mode(mode: Mode, rows: SplitLayout, *, is_remote: bool = False) -> Mode:
    """`auto` is global where shards can be mapped and fit into the memory that is available, else window.

    Raises UsageError when a compressed store, or one at a URL, is asked for in global mode.
    """
    layout = rows.layout
    mappable = layout.codec == "none" and not is_remote
    if mode == "global" and is_remote:
        raise UsageError(
            "--mode global needs a local store; use window, or copy it with python -m pipeline stage URL PATH"
        )
    if mode == "global" and not mappable:
        raise UsageError(f"--mode global needs a store with codec none, this has {layout.codec}; use window")
    if mode != "auto":
        return mode
    nbytes = -(-rows.n_rows // layout.chunk_rows) * layout.chunk_nbytes
    return "global" if mappable and nbytes <= available_memory() else "window"


@runtime_checkable
class Source(Protocol):
    """Where rows are gathered from."""

    def load(self, window: Window) -> Gather:
        """Make a window's rows ready; called for one window while rows of the one before are still being gathered."""


class MappedRows:
    """Rows straight from mapped shards; a batch sorted by row walks each file forwards.

    `readers`: threads that read and check a window's chunks before its rows are gathered; None: nothing is checked here.
    """

    def __init__(self, split: Split, readers: ThreadPoolExecutor | None) -> None:
        self.split = split
        self.readers = readers
        self.shard_rows = split.shard_rows
        self.shard = functools.lru_cache(MOST_MAPPED)(split.mapped_shard)
        self.own = threading.local()

    def load(self, window: Window) -> Gather:
        """Check the window's chunks. Raises DamagedError when a chunk's crc32c is wrong."""
        if self.readers is not None:
            list(self.readers.map(self.check, window.chunks.tolist()))
        return self.gather

    def check(self, chunk: int) -> None:
        """Read a chunk into memory of this thread's own, which stays in its cache."""
        start, stop = self.split.chunk_rows_range(chunk)
        if not hasattr(self.own, "rows"):
            layout = self.split.shape.layout
            self.own.rows = torch.empty(layout.chunk_rows, layout.d_model, dtype=layout.torch_dtype)
        self.split.read_chunk(chunk, self.own.rows[: stop - start])

    def gather(self, rows: Rows, out: Shaped[Tensor, "row d_model"]) -> None:
        """`rows` ascending."""
        shard, within = np.divmod(rows, self.shard_rows)
        at = self.shard(int(shard[0])).at(torch.from_numpy(within))  # all shards are laid out alike
        present, starts = np.unique(shard, return_index=True)
        for k, a, b in zip(present.tolist(), starts.tolist(), [*starts[1:].tolist(), len(rows)]):
            torch.index_select(self.shard(k).view, 0, at[a:b], out=out[a:b])


class BufferedRows:
    """Rows of windows that are read into two buffers in turn. Raises DamagedError when a chunk's crc32c is wrong."""

    def __init__(self, split: Split, order: Order, readers: ThreadPoolExecutor) -> None:
        self.split = split
        self.readers = readers
        self.turn = 0
        shape = (order.most_chunks, split.chunk_rows, split.shape.layout.d_model)
        self.buffers = [torch.empty(shape, dtype=split.shape.layout.torch_dtype) for _ in range(2)]

    def load(self, window: Window) -> Gather:
        """Read the window's chunks by several threads into the buffer that is not in use."""
        buffer = self.buffers[self.turn]
        self.turn = 1 - self.turn
        slot_of_chunk = np.full(self.split.n_chunks, -1)
        slot_of_chunk[window.chunks] = np.arange(len(window.chunks))
        list(self.readers.map(lambda c: self.read(c, buffer[slot_of_chunk[c]]), window.chunks.tolist()))
        flat, chunk_rows = buffer.flatten(0, 1), self.split.chunk_rows

        def gather(rows: Rows, out: Shaped[Tensor, "row d_model"]) -> None:
            chunk, within = np.divmod(rows, chunk_rows)
            torch.index_select(flat, 0, torch.from_numpy(slot_of_chunk[chunk] * chunk_rows + within), out=out)

        return gather

    def read(self, chunk: int, out: Shaped[Tensor, "row d_model"]) -> None:
        """One chunk; a ragged one leaves the rest of its slot as it was, which no row points to."""
        start, stop = self.split.chunk_rows_range(chunk)
        self.split.read_chunk(chunk, out[: stop - start])


def is_local(split: Split) -> bool:
    """Whether a split's shards are files on this machine."""
    return isinstance(split.files, LocalFiles)


def n_readers(split: Split, threads: int) -> int:
    """Threads that read chunks: as many as were asked for; of object storage, where they wait most of the time, REQUESTS."""
    return threads if is_local(split) else max(threads, REQUESTS)


def open_source(split: Split, order: Order, readers: ThreadPoolExecutor) -> Source:
    """Mapped rows where shards can be mapped, buffers otherwise."""
    if split.shape.layout.codec != "none" or not is_local(split):
        return BufferedRows(split, order, readers)
    return MappedRows(split, None if order.exact else readers)


class Loader:
    """Batches of exactly `batch_size` rows of the split in its own dtype, from stream position `position` on, no end.

    `with Loader(...) as loader: x = loader.next()`. `waited` counts the seconds in which the device had nothing to do for want
    of rows, `n_delivered` the batches. share: (part, number of parts) of every batch that this process takes. On CUDA each batch
    is copied when it is asked for, and waited for: `resident.py` is for rows that have room there.
    """

    def __init__(
        self,
        split: Split,
        order: Order,
        batch_size: int,
        *,
        position: int = 0,
        share: tuple[int, int] = (0, 1),
        device: torch.device | str = "cpu",
        threads: int = 2,
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.start = position
        self.share = share
        self.device = torch.device(device)
        self.threads = threads
        self.waited = 0.0
        self.n_delivered = 0
        self.readers = ThreadPoolExecutor(n_readers(split, threads), "read", one_torch_thread)
        self.gatherers = ThreadPoolExecutor(threads, "gather", one_torch_thread)
        self.ahead = ThreadPoolExecutor(1, "window", one_torch_thread)
        self.source = open_source(split, order, self.readers)
        self.free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self.ready: queue.SimpleQueue[Tensor | BaseException] = queue.SimpleQueue()
        self.in_use: Tensor | None = None
        layout, n_rows = split.shape.layout, batch_size // share[1]
        for _ in range(AHEAD + 1):
            self.free.put(torch.empty(n_rows, layout.d_model, dtype=layout.torch_dtype))
        self.copy = None
        if self.device.type == "cuda":
            self.copy = torch.empty(n_rows, layout.d_model, dtype=layout.torch_dtype, device=self.device)
        torch.get_num_threads()  # fixes this thread's number before `one_torch_thread` sets that of new threads
        self.producer = threading.Thread(target=self._produce, name="batches", daemon=True)
        self.producer.start()

    def next(self) -> Shaped[Tensor, "row d_model"]:
        """The next batch on the device, contiguous; its memory is written again after the next call. Raises DamagedError."""
        used, self.in_use = self.in_use, None
        if used is not None:
            self.free.put(used)
        if self.copy is not None:
            torch.cuda.current_stream(self.device).synchronize()  # from here on the device has nothing to do
        start = time.perf_counter()
        batch = self.ready.get()
        if isinstance(batch, BaseException):
            raise batch
        self.in_use = batch
        if self.copy is not None:
            batch = self.copy.copy_(batch)
        self.waited += time.perf_counter() - start
        self.n_delivered += 1
        return batch

    def close(self) -> None:
        """Stop the threads; what was gathered ahead is dropped."""
        self.free.put(None)
        self.producer.join()
        for pool in (self.ahead, self.readers, self.gatherers):
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _produce(self) -> None:
        try:
            one_torch_thread()
            windows, loaded = self._windows(), None
            for batch in self.order.batches(self.start, self.batch_size):
                memory = self.free.get()
                if memory is None:
                    return
                filled = 0
                for piece in share_of(batch, *self.share):
                    while loaded is None or (loaded.epoch, loaded.index) != (piece.epoch, piece.window):
                        loaded = next(windows)
                    self._gather(loaded, piece, memory[filled : filled + piece.n_rows])
                    filled += piece.n_rows
                self.ready.put(memory)
        except BaseException as error:
            self.ready.put(error)

    def _gather(self, loaded: Loaded, piece: Piece, out: Tensor) -> None:
        rows = np.sort(loaded.window.rows[piece.start : piece.stop])
        bounds = np.linspace(0, len(rows), self.threads + 1).astype(int).tolist()
        parts = [(rows[a:b], out[a:b]) for a, b in zip(bounds, bounds[1:]) if b > a]
        jobs = [self.gatherers.submit(loaded.gather, *part) for part in parts[1:]]
        loaded.gather(*parts[0])
        for job in jobs:
            job.result()

    def _windows(self) -> Iterator[Loaded]:
        """The stream's windows in turn; the next one is loaded while one is being delivered."""
        pieces = self.order.pieces(self.start)
        coming = self.ahead.submit(self._load, next(pieces))
        while True:
            loaded = coming.result()
            coming = self.ahead.submit(self._load, next(pieces))
            yield loaded

    def _load(self, piece: Piece) -> Loaded:
        window = self.order.window(piece.epoch, piece.window)
        return Loaded(piece.epoch, piece.window, window, self.source.load(window))


@dataclass(frozen=True)
class Loaded:
    """A window whose rows can be gathered now."""

    epoch: int
    index: int
    window: Window
    gather: Gather


@runtime_checkable
class Feed(Protocol):
    """What delivers batches to a training: `Loader`, or rows that lie on the device (`resident.py`)."""

    waited: float
    n_delivered: int

    def next(self) -> Tensor:
        """The next batch on the device."""

    def __enter__(self) -> Feed: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Feeds:
    """One stream of batches over one store, or over two that hold other rows of the same positions: `next` has one batch of
    each. Enters and leaves the feeds it is made of, which are of one order and position."""

    def __init__(self, parts: Sequence[Feed]) -> None:
        self.parts = parts
        self.stack = contextlib.ExitStack()

    @property
    def waited(self) -> float:
        """Seconds in which the device had nothing to do for want of rows."""
        return sum(part.waited for part in self.parts)

    @property
    def n_delivered(self) -> int:
        """Batches so far."""
        return self.parts[0].n_delivered

    def next(self) -> list[Tensor]:
        """The next batch of each."""
        return [part.next() for part in self.parts]

    def __enter__(self) -> Feeds:
        for part in self.parts:
            self.stack.enter_context(part)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()


def one_torch_thread() -> None:
    """Run torch calls of this thread on this thread alone: a team of OpenMP threads a gather, beside the one that trains,
    was up to 25 times slower on a busy machine. Other threads that already ran a torch call keep their own number."""
    torch.set_num_threads(1)

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
from typing import Protocol, TypeVar, runtime_checkable

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


@dataclass
class Slot:
    """Memory of one batch. On CUDA: pinned, its copy on the device, and events that say when each may be used again."""

    host: Tensor
    device: Tensor
    copied: torch.cuda.Event | None = None
    used: torch.cuda.Event | None = None


class Loader:
    """Batches of exactly `batch_size` rows of the split in its own dtype, from stream position `position` on, no end.

    `with Loader(...) as loader: x = loader.next()`. `waited` counts the seconds in which the device had nothing to do for want
    of rows, `n_delivered` the batches. share: (part, number of parts) of every batch that this process takes.
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
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.readers = ThreadPoolExecutor(n_readers(split, threads), "read", one_torch_thread)
        self.gatherers = ThreadPoolExecutor(threads, "gather", one_torch_thread)
        self.ahead = ThreadPoolExecutor(1, "window", one_torch_thread)
        self.source = open_source(split, order, self.readers)
        self.free: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self.ready: queue.SimpleQueue[Slot | BaseException] = queue.SimpleQueue()
        self.in_use: Slot | None = None
        for _ in range(AHEAD + 1):
            self.free.put(
                self._new_slot(batch_size // share[1], split.shape.layout.d_model, split.shape.layout.torch_dtype)
            )
        torch.get_num_threads()  # fixes this thread's number before `one_torch_thread` sets that of new threads
        self.producer = threading.Thread(target=self._produce, name="batches", daemon=True)
        self.producer.start()

    def next(self) -> Shaped[Tensor, "row d_model"]:
        """The next batch on the device, contiguous; its memory is written again after the next call. Raises DamagedError."""
        self._give_back()
        found: tuple[Slot | BaseException, float] = idle_seconds(self._ready_within, self.device)
        slot, seconds = found
        self.waited += seconds
        if isinstance(slot, BaseException):
            raise slot
        self.in_use = slot
        self.n_delivered += 1
        if slot.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.copied)
        return slot.device

    def _ready_within(self, limit: float | None) -> Slot | BaseException | None:
        """A batch that is ready within some seconds, else None."""
        try:
            return self.ready.get(timeout=limit)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Stop the threads; what was gathered ahead is dropped. On CUDA until no copy is on its way into memory that others get
        then."""
        self.free.put(None)
        self.producer.join()
        for pool in (self.ahead, self.readers, self.gatherers):
            pool.shutdown(wait=True, cancel_futures=True)
        if self.stream is not None:
            self.stream.synchronize()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _new_slot(self, n_rows: int, d_model: int, dtype: torch.dtype) -> Slot:
        if self.stream is None:
            host = torch.empty(n_rows, d_model, dtype=dtype)
            return Slot(host, host)
        host = torch.empty(n_rows, d_model, dtype=dtype, pin_memory=True)
        slot = Slot(host, torch.empty_like(host, device=self.device))
        self._mark_used(slot)  # by whoever had this memory before
        return slot

    def _give_back(self) -> None:
        slot, self.in_use = self.in_use, None
        if slot is None:
            return
        if self.stream is not None:
            self._mark_used(slot)
        self.free.put(slot)

    def _mark_used(self, slot: Slot) -> None:
        """After what was asked of the device so far, a slot's memory there may be written."""
        slot.used = torch.cuda.Event()  # type: ignore[no-untyped-call]
        slot.used.record(torch.cuda.current_stream(self.device))

    def _produce(self) -> None:
        try:
            one_torch_thread()
            windows, loaded = self._windows(), None
            for batch in self.order.batches(self.start, self.batch_size):
                slot = self.free.get()
                if slot is None:
                    return
                if slot.copied is not None:
                    slot.copied.synchronize()
                filled = 0
                for piece in share_of(batch, *self.share):
                    while loaded is None or (loaded.epoch, loaded.index) != (piece.epoch, piece.window):
                        loaded = next(windows)
                    self._gather(loaded, piece, slot.host[filled : filled + piece.n_rows])
                    filled += piece.n_rows
                self._send(slot)
                self.ready.put(slot)
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

    def _send(self, slot: Slot) -> None:
        if self.stream is None:
            return
        if slot.used is not None:
            self.stream.wait_event(slot.used)
        with torch.cuda.stream(self.stream):
            slot.device.copy_(slot.host, non_blocking=True)
            slot.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            slot.copied.record(self.stream)

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


POLL = 5e-4
"""Seconds between two looks at whether a device is still busy."""

Item = TypeVar("Item")


def idle_seconds(get: Callable[[float | None], Item | None], device: torch.device) -> tuple[Item, float]:
    """Something that is waited for, and for how long the device had nothing to do meanwhile: a CPU all the time, a GPU from
    when it had done what it was given. `get` takes the most seconds to wait (None: any); None is that it has not come."""
    busy = None
    if device.type == "cuda":
        busy = torch.cuda.Event()  # type: ignore[no-untyped-call]
        busy.record(torch.cuda.current_stream(device))
    while busy is not None and not busy.query():  # type: ignore[no-untyped-call]
        found = get(POLL)
        if found is not None:
            return found, 0.0
    start = time.perf_counter()
    found = get(None)
    assert found is not None
    return found, time.perf_counter() - start


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

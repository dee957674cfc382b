"""Batches of rows that lie in the device's own memory: the whole store, or the window at hand and the one to come.

Chunks are read in the order of the store by several threads, checked (crc32c) and, on CUDA, copied from pinned memory on a stream
of their own; a batch is one `index_select` of what is there. Which row comes when is `order.py`'s, so batches are bit for bit
those of `Loader`; no slot, gathering thread or check beside the training is needed. Members of a pass share each batch.
"""

from __future__ import annotations

import queue
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from pipeline.base.runtime import sent
from pipeline.store.reader import Split
from train.feed.loader import n_readers, one_torch_thread
from train.feed.order import Order, Piece, Rows, Window, share_of


@dataclass(frozen=True)
class Place:
    """How many chunks the device holds at a time, and whether those are all of the store."""

    n_chunks: int
    whole: bool

    def n_bytes(self, *splits: Split) -> int:
        """Device memory that they take, of one store or of two."""
        return self.n_chunks * sum(split.shape.layout.chunk_nbytes for split in splits)


def place_for(split: Split, order: Order, free: int, *others: Split) -> Place | None:
    """What fits into `free` bytes of device memory: the store, else two windows; None where neither does. others: stores of the
    same positions that lie there likewise."""
    whole = Place(order.n_chunks, True)
    if whole.n_bytes(split, *others) <= free:
        return whole
    if order.exact:
        return None
    windows = Place(min(2 * order.most_chunks, order.n_chunks), False)
    return windows if windows.n_bytes(split, *others) <= free else None


@dataclass(frozen=True)
class Held:
    """A window whose chunks are on the device, or on their way in the order of a stream."""

    epoch: int
    index: int
    window: Window
    place_of: Rows  # [chunk] where each chunk of the split lies, −1 for those that are not there
    copied: torch.cuda.Event | None


class DeviceRows:
    """Batches of exactly `batch_size` rows of the split in its own dtype on the device, from stream position `position` on, no
    end; used like `Loader`.

    `waited` counts the seconds in which the device had nothing to do for want of rows, `n_delivered` the batches. share: (part,
    number of parts) of every batch that this process takes. threads: that read. Raises DamagedError for a chunk whose crc32c is
    wrong, before any row of it is delivered.
    """

    def __init__(
        self,
        split: Split,
        order: Order,
        batch_size: int,
        place: Place,
        *,
        position: int = 0,
        share: tuple[int, int] = (0, 1),
        device: torch.device | str = "cpu",
        threads: int = 2,
    ) -> None:
        self.split = split
        self.order = order
        self.share = share
        self.device = torch.device(device)
        self.waited = 0.0
        self.n_delivered = 0
        layout = split.shape.layout
        on_cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if on_cuda else None  # type: ignore[no-untyped-call]
        self.chunks = torch.empty(
            place.n_chunks, split.chunk_rows, layout.d_model, dtype=layout.torch_dtype, device=self.device
        )
        self.out = torch.empty(batch_size // share[1], layout.d_model, dtype=layout.torch_dtype, device=self.device)
        self.staging: queue.SimpleQueue[Staging] = queue.SimpleQueue()
        threads = n_readers(split, threads)
        for _ in range(threads):
            rows = torch.empty(split.chunk_rows, layout.d_model, dtype=layout.torch_dtype, pin_memory=on_cuda)
            self.staging.put(Staging(rows))
        self.chunk_at = np.full(place.n_chunks, -1)  # which chunk lies where
        torch.get_num_threads()  # fixes this thread's number before `one_torch_thread` sets that of new threads
        self.readers = ThreadPoolExecutor(threads, "read", one_torch_thread)
        self.ahead = ThreadPoolExecutor(1, "window", one_torch_thread)
        self.pieces = order.pieces(position)
        self.batches = order.batches(position, batch_size)
        self.held: Held | None = None
        self.needed: Rows = np.empty(0, np.int64)  # chunks of the window being delivered
        self.coming = self._load_next(self._mark())  # what this memory held before may still be read

    def next(self) -> Shaped[Tensor, "row d_model"]:
        """The next batch on the device, contiguous; its memory is written again by the next call. Raises DamagedError."""
        filled = 0
        for piece in share_of(next(self.batches), *self.share):
            held = self._window(piece)
            rows = np.sort(held.window.rows[piece.start : piece.stop])
            chunk, within = np.divmod(rows, self.split.chunk_rows)
            at = sent(torch.from_numpy(held.place_of[chunk] * self.split.chunk_rows + within), self.device)
            torch.index_select(self.chunks.flatten(0, 1), 0, at, out=self.out[filled : filled + piece.n_rows])
            filled += piece.n_rows
        self.n_delivered += 1
        return self.out

    def _window(self, piece: Piece) -> Held:
        """The window of a piece; when it begins, the next one is sent for."""
        while self.held is None or (self.held.epoch, self.held.index) != (piece.epoch, piece.window):
            self.waited += idle_seconds(self.coming, self.device)
            self.held = held = self.coming.result()
            self.needed = held.window.chunks
            if held.copied is not None:
                torch.cuda.current_stream(self.device).wait_event(held.copied)
            self.coming = self._load_next(self._mark())
        return self.held

    def _mark(self) -> torch.cuda.Event | None:
        """After this on the device, nothing that was asked for so far reads or writes any more."""
        if self.stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _load_next(self, unused: torch.cuda.Event | None) -> Future[Held]:
        return self.ahead.submit(self._load, next(self.pieces), self.needed, unused)

    def _load(self, piece: Piece, needed: Rows, unused: torch.cuda.Event | None) -> Held:
        """Bring a window's chunks in, over those that neither it nor the one being delivered needs."""
        window = self.order.window(piece.epoch, piece.window)
        missing = np.setdiff1d(window.chunks, self.chunk_at)
        free = np.flatnonzero(~np.isin(self.chunk_at, np.concatenate([window.chunks, needed])))
        if self.stream is not None and unused is not None:
            self.stream.wait_event(unused)
        pairs = list(zip(missing.tolist(), free[: len(missing)].tolist(), strict=True))
        for chunk, place in pairs:
            self.chunk_at[place] = chunk
        list(self.readers.map(lambda pair: self._fetch(*pair), pairs))
        copied = None
        if self.stream is not None:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self.stream)
        place_of = np.full(self.split.n_chunks, -1)
        taken = np.flatnonzero(self.chunk_at >= 0)
        place_of[self.chunk_at[taken]] = taken
        return Held(piece.epoch, piece.window, window, place_of, copied)

    def _fetch(self, chunk: int, place: int) -> None:
        """Read and check one chunk, and send it to its place; a ragged one leaves the rest of it as it was."""
        staging = self.staging.get()
        try:
            if staging.sent is not None:
                staging.sent.synchronize()
            start, stop = self.split.chunk_rows_range(chunk)
            rows = staging.rows[: stop - start]
            self.split.read_chunk(chunk, rows)
            if self.stream is None:
                self.chunks[place, : stop - start].copy_(rows)
                return
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                self.chunks[place, : stop - start].copy_(rows, non_blocking=True)
                staging.sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
                staging.sent.record(self.stream)
        finally:
            self.staging.put(staging)

    def close(self) -> None:
        """Stop the threads; on CUDA until no copy is on its way into memory that others get then."""
        for pool in (self.ahead, self.readers):
            pool.shutdown(wait=True, cancel_futures=True)
        if self.stream is not None:
            self.stream.synchronize()

    def __enter__(self) -> DeviceRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class Staging:
    """Host memory of one chunk on its way to the device, pinned on CUDA; `sent`: it may be written again."""

    rows: Tensor
    sent: torch.cuda.Event | None = None


POLL = 5e-4
"""Seconds between two looks at whether a device is still busy."""


def idle_seconds(coming: Future[Held], device: torch.device) -> float:
    """Wait for a window; for how long the device had nothing to do meanwhile: a CPU all the time, a GPU from when it had done
    what it was given."""
    if device.type == "cuda":
        busy = torch.cuda.Event()  # type: ignore[no-untyped-call]
        busy.record(torch.cuda.current_stream(device))
        while not busy.query():  # type: ignore[no-untyped-call]
            if wait([coming], POLL).done:
                return 0.0
    start = time.perf_counter()
    wait([coming])
    return time.perf_counter() - start

"""Which row comes when: a pure function of the seed and the epoch. Bookkeeping only; no file is touched here.

Rows are delivered in one endless stream. Position p of it is row p % n_kept of epoch p // n_kept, so that one integer
says where a training stands. Every kept row comes exactly once an epoch.

    exact       an epoch is one window: a permutation of all kept rows, held as it is in memory
    computed    the same, of which any part is computed when it is asked for (`ComputedRows`): for stores too large to hold one
    windowed    chunks are permuted, dealt into windows of nearly equal size, and rows are permuted within a window;
                var(batch mean) is then 1 + (deff − 1) · batch / window times that of an exact permutation (STORAGE.md).
                The very first window comes in two, an eighth of its chunks and the rest, so that a training begins before
                a whole one was read

Processes that train together on a store at a URL have an order each, over every n-th chunk: what one reads no other does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.base.errors import StoreError
from pipeline.base.runtime import numpy_rng
from pipeline.store.kept import KeptRows

Rows = npt.NDArray[np.int64]

MOST_HELD = 1 << 24
"""Rows of the largest store of which a new member's global order is held in memory, 8 bytes a row; of others it is computed."""
ROUNDS = 8
"""Of a computed permutation's network. Of 600 permutations of 1,000 to 20,000 rows each, with 5, 6 and 8 the counts of
neighbours that stay neighbours and of rows of one chunk in a batch had the mean and the spread of true ones; with 4 half as many
neighbours again stayed so, with 3 the spread was half too large."""


class ComputedRows:
    """`[first:stop]` of a random permutation of the kept rows, computed when it is asked for.

    A Feistel network over numbers left · side + right below side², the square just above the number of rows: a round makes (left,
    right) into (right, (left + table[right]) mod side), which can be undone whatever the table holds, so that the whole is a
    permutation; its tables are random numbers. What comes out beyond the last row goes in again until it is one (Black and
    Rogaway, Ciphers with arbitrary finite domains, 2002).

    Memory: `n_bytes`.
    """

    def __init__(self, kept: KeptRows, n_kept: int, rng: np.random.Generator) -> None:
        self.kept, self.n_kept, self.side = kept, n_kept, self.side_of(n_kept)
        self.tables = rng.integers(0, self.side, (ROUNDS, self.side))

    @staticmethod
    def side_of(n_rows: int) -> int:
        """The smallest number whose square is not below `n_rows`, at least 1."""
        return math.isqrt(n_rows - 1) + 1

    @staticmethod
    def n_bytes(n_rows: int) -> int:
        """Bytes of a permutation of so many rows."""
        return 8 * ROUNDS * ComputedRows.side_of(n_rows)

    def __len__(self) -> int:
        return self.n_kept

    def __getitem__(self, part: slice) -> Rows:
        first, stop, _ = part.indices(self.n_kept)
        ranks = self._mixed(np.arange(first, stop))
        while (beyond := ranks >= self.n_kept).any():
            ranks[beyond] = self._mixed(ranks[beyond])
        return self.kept.nth(ranks)

    def _mixed(self, numbers: Rows) -> Rows:
        """Each number's image below side²."""
        left, right = np.divmod(numbers, self.side)
        for table in self.tables:
            left, right = right, (left + table[right]) % self.side
        mixed: Rows = left * self.side + right
        return mixed


@dataclass(frozen=True)
class Window:
    """A part of an epoch: `rows` of the split in the order of delivery, all of them in `chunks`."""

    chunks: Rows
    rows: Rows | ComputedRows


@dataclass(frozen=True)
class Piece:
    """Rows start … stop of a window, counted in its order of delivery."""

    epoch: int
    window: int
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        """Rows in this piece."""
        return self.stop - self.start


class Order:
    """The stream of kept rows. `window_rows` is the most rows a window may span, kept or not; None: exact, and `computed`
    unless it is to be held. part: (k, n), the stream of every n-th chunk from the k-th on alone, in windows.

    Memory: `n_bytes`.
    Raises StoreError when no row is kept.
    """

    def __init__(
        self,
        kept: KeptRows,
        seed: int,
        window_rows: int | None,
        part: tuple[int, int] = (0, 1),
        computed: bool = False,
    ) -> None:
        self.kept = kept
        self.computed = computed
        self.seed = seed
        self.kept_in_chunk = kept.in_chunks()
        self.own: Rows = np.arange(part[0], kept.n_chunks, part[1])
        self.names = (part[0],) if part[1] > 1 else ()
        self.n_kept = int(self.kept_in_chunk[self.own].sum())
        if not self.n_kept:
            raise StoreError(
                "no training row is left without special and massive ones; raise --max-norm or harvest more"
            )
        self.n_chunks = len(self.own)
        chunks_a_window = self.n_chunks if window_rows is None else max(window_rows // kept.chunk_rows, 1)
        self.exact = window_rows is None
        self.n_windows = -(-self.n_chunks // chunks_a_window)

    def chunks(self, epoch: int) -> list[Rows]:
        """The chunks of every window of an epoch, in order."""
        if self.exact:
            return [np.arange(self.n_chunks)]
        permuted: Rows = numpy_rng("chunks", self.seed, epoch, *self.names).permutation(self.own)
        windows = np.array_split(permuted, self.n_windows)
        first = len(windows[0]) // 8
        return np.split(windows[0], [first]) + windows[1:] if epoch == 0 and first else windows

    @staticmethod
    def n_bytes(n_rows: int, chunk_rows: int, window_rows: int | None, computed: bool = False) -> int:
        """Most bytes that an order takes: which rows are kept (`KeptRows.n_bytes`), 32 a chunk, and for two windows, the one that
        is delivered and the next, 8 a row, or of a computed order its tables; an exact order's window is all rows."""
        window = n_rows if window_rows is None else min(window_rows, n_rows)
        held = ComputedRows.n_bytes(n_rows) if computed else 8 * window
        return KeptRows.n_bytes(n_rows, chunk_rows) + 32 * -(-n_rows // chunk_rows) + 2 * held

    @property
    def most_chunks(self) -> int:
        """Chunks of the largest window of any epoch; the first epoch's are in parts smaller."""
        return max(map(len, self.chunks(1)))

    def window_sizes(self, epoch: int) -> list[int]:
        """Kept rows of every window of an epoch; a window may have none."""
        return [int(self.kept_in_chunk[chunks].sum()) for chunks in self.chunks(epoch)]

    def window(self, epoch: int, index: int) -> Window:
        """One window with its rows in the order of delivery."""
        chunks = self.chunks(epoch)[index]
        if self.computed:
            return Window(chunks, ComputedRows(self.kept, self.n_kept, numpy_rng("computed", self.seed, epoch)))
        rows = self.kept.rows(chunks)
        numpy_rng("rows", self.seed, epoch, index, *self.names).shuffle(rows)
        return Window(chunks, rows)

    def pieces(self, position: int) -> Iterator[Piece]:
        """What is left of the stream from `position` on, window by window, without end."""
        epoch, skip = divmod(position, self.n_kept)
        while True:
            for index, size in enumerate(self.window_sizes(epoch)):
                if skip < size:
                    yield Piece(epoch, index, skip, size)
                skip = max(skip - size, 0)
            epoch += 1

    def batches(self, position: int, batch_size: int) -> Iterator[list[Piece]]:
        """Batches of exactly `batch_size` rows from `position` on, without end; one may cross windows and epochs."""
        batch: list[Piece] = []
        missing = batch_size
        for piece in self.pieces(position):
            start = piece.start
            while start < piece.stop:
                stop = min(start + missing, piece.stop)
                batch.append(Piece(piece.epoch, piece.window, start, stop))
                missing -= stop - start
                start = stop
                if not missing:
                    yield batch
                    batch, missing = [], batch_size


def share_of(batch: list[Piece], part: int, n_parts: int) -> list[Piece]:
    """One of `n_parts` equal parts of a batch, whose size they divide."""
    n_rows = sum(piece.n_rows for piece in batch) // n_parts
    first, last, share = part * n_rows, (part + 1) * n_rows, []
    for piece in batch:
        start, stop = max(piece.start, piece.start + first), min(piece.stop, piece.start + last)
        if start < stop:
            share.append(Piece(piece.epoch, piece.window, start, stop))
        first, last = first - piece.n_rows, last - piece.n_rows
    return share

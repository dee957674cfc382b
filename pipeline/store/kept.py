"""Which rows of a split count, a bit each: what a training holds of a store in memory, however large it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

BLOCK_ROWS, BLOCK_BYTES = 1 << 16, 1 << 19
"""Rows, and bytes of bits, that are looked at together where numbers of rows are made of bits."""


@dataclass(frozen=True)
class KeptRows:
    """`bits` uint8 [chunk, ⌈chunk_rows / 8⌉], packed chunk by chunk, so that a chunk's rows are found without the others.

    Rows beyond the split's last are not kept. Memory: `n_bytes`.
    """

    bits: npt.NDArray[np.uint8]
    chunk_rows: int

    @staticmethod
    def n_bytes(n_rows: int, chunk_rows: int) -> int:
        """Most bytes that the rows of a split take: a bit each, whole bytes a chunk, twice while they are read; and 8 bytes
        a chunk where they are counted."""
        n_chunks = -(-n_rows // chunk_rows)
        return n_chunks * (2 * -(-chunk_rows // 8) + 8)

    @staticmethod
    def of(masks: Iterator[Mask], chunk_rows: int) -> KeptRows:
        """Of the masks of consecutive rows, each but the last of whole chunks."""
        packed = [np.empty((0, -(-chunk_rows // 8)), np.uint8)]
        for mask in masks:
            whole = np.zeros(-(-len(mask) // chunk_rows) * chunk_rows, np.bool_)
            whole[: len(mask)] = mask
            packed.append(np.packbits(whole.reshape(-1, chunk_rows), axis=1))
        return KeptRows(np.concatenate(packed), chunk_rows)

    def __and__(self, other: KeptRows) -> KeptRows:
        """Rows that both keep; of splits of the same rows."""
        return KeptRows(self.bits & other.bits, self.chunk_rows)

    @property
    def n_chunks(self) -> int:
        """Chunks of the split."""
        return len(self.bits)

    def in_chunks(self) -> Rows:
        """How many rows of each chunk are kept, int64 [chunk]."""
        counts: Rows = np.bitwise_count(self.bits).sum(axis=1, dtype=np.int64)
        return counts

    def mask(self, chunks: Rows) -> Mask:
        """Which rows of some chunks are kept, bool [chunk, chunk_rows]."""
        return np.unpackbits(self.bits[chunks], axis=1, count=self.chunk_rows).view(np.bool_)

    def rows(self, chunks: Rows) -> Rows:
        """The kept rows of some chunks, counted through the split, chunk after chunk. Memory beside them: a block's."""
        found = np.empty(int(self.in_chunks()[chunks].sum()), np.int64)
        step, done = max(BLOCK_ROWS // self.chunk_rows, 1), 0
        for first in range(0, len(chunks), step):
            own = chunks[first : first + step]
            chunk, within = np.nonzero(self.mask(own))
            found[done : done + len(chunk)] = own[chunk] * self.chunk_rows + within
            done += len(chunk)
        return found

    @cached_property
    def ends(self) -> Rows:
        """How many rows are kept up to the end of each chunk, int64 [chunk]."""
        return np.cumsum(self.in_chunks())

    def nth(self, ranks: Rows) -> Rows:
        """Which rows of the split the kept ones of these numbers are, counted from 0. Memory beside them: a block's."""
        step = max(BLOCK_BYTES // self.bits.shape[1], 1)
        blocks = [self._nth(ranks[first : first + step]) for first in range(0, len(ranks), step)]
        return np.concatenate([np.empty(0, np.int64), *blocks])

    def _nth(self, ranks: Rows) -> Rows:
        """The same: the chunk in which it is, of that chunk's bits the 64, of those the 8, and of those the bit."""
        chunk, each = np.searchsorted(self.ends, ranks, side="right"), np.arange(len(ranks))
        words = np.pad(self.bits[chunk], ((0, 0), (0, -self.bits.shape[1] % 8))).view(np.uint64)
        word, left = found_at(np.bitwise_count(words), ranks - np.where(chunk, self.ends[chunk - 1], 0))
        own = words[each, word, None].view(np.uint8)
        byte, left = found_at(np.bitwise_count(own), left)
        bit, _ = found_at(np.unpackbits(own[each, byte, None], axis=1), left)
        found: Rows = chunk * self.chunk_rows + 64 * word + 8 * byte + bit
        return found


def found_at(counts: npt.NDArray[np.uint8], numbers: Rows) -> tuple[Rows, Rows]:
    """For each row of counts of things in places, [row, place]: where its thing of a number lies, and its number there."""
    ends = counts.cumsum(axis=1, dtype=np.int32)
    place: Rows = (ends <= numbers[:, None]).sum(axis=1)
    each = np.arange(len(place))
    return place, numbers - ends[each, place] + counts[each, place]

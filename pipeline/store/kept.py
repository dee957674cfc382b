"""Which rows of a split count, a bit each: what a training holds of a store in memory, however large it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class KeptRows:
    """`bits` uint8 [chunk, ⌈chunk_rows / 8⌉], packed chunk by chunk, so that a chunk's rows are found without the others.

    Rows beyond the split's last are not kept. Memory: a bit a row, and 7 bits a chunk at most.
    """

    bits: npt.NDArray[np.uint8]
    chunk_rows: int

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
        """The kept rows of some chunks, counted through the split, chunk after chunk."""
        chunk, within = np.nonzero(self.mask(chunks))
        return chunks[chunk] * self.chunk_rows + within

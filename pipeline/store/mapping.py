"""One shard mapped into memory as a tensor of rows, for reading rows in any order.

A crc32c of 4 bytes stands behind every chunk, so rows are not at one stride. They are at multiples of a small step,
though: a view of overlapping rows, one a step, has each true row somewhere, and `index_select` on it copies rows at
full speed. The pages are the kernel's cache of the file, shared by every process that maps it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MappedShard:
    """`view[at(r)]` is the shard's row r. `view` [step, d_model] is read-only by agreement: writes would not reach the disk."""

    view: Tensor
    step: int
    chunk_rows: int
    crc_elements: int

    def at(self, rows: Tensor) -> Tensor:
        """Index into `view` of rows counted within the shard, int64 [row]."""
        d_model = self.view.shape[1]
        offset = (rows // self.chunk_rows) * (self.chunk_rows * d_model + self.crc_elements)
        return (offset + (rows % self.chunk_rows) * d_model) // self.step


def map_file(path: str, nbytes: int, dtype: torch.dtype, d_model: int, chunk_rows: int) -> MappedShard:
    """Map an uncompressed shard file of `nbytes` whose chunks stand one after the other from byte 0 on."""
    crc_elements = 4 // dtype.itemsize
    step = math.gcd(d_model, crc_elements)
    n = nbytes // dtype.itemsize
    flat = torch.from_file(path, shared=False, size=n, dtype=dtype)
    view = flat.as_strided(((n - d_model) // step + 1, d_model), (step, 1))
    return MappedShard(view, step, chunk_rows, crc_elements)

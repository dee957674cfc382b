"""An array beside a store's rows, read in parts: checked whole once, and part by part again as it is read."""

from __future__ import annotations

import functools
import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.base.errors import DamagedError
from pipeline.base.files import crc32c
from pipeline.store.backend import Files
from pipeline.store.layout import BLOCK, Extra, in_blocks

BLOCKS_HELD = 2
"""Of them, those last read."""


class BesideRows:
    """`array[first:stop]` of an array of one dimension, without the rest. Raises DamagedError when it is made, unless the
    file is the one that the root names, and for every part that has changed since.

    Memory: `n_bytes`.
    """

    def __init__(self, files: Files, extra: Extra) -> None:
        self.files, self.array, self.where = files, extra.array, files.where(extra.path)
        self.dtype, self.n_data = self.array.numpy_dtype, self.array.file_nbytes - 4
        whole, crc, digests = hashlib.sha256(), 0, []
        if (size := files.size(self.array.key(0))) != self.array.file_nbytes:
            raise DamagedError(f"{self.where}: {size} bytes, expected {self.array.file_nbytes}; run harvest --repair")
        for k in range(-(-self.n_data // BLOCK)):
            data = self._read(k * BLOCK, min(BLOCK, self.n_data - k * BLOCK))
            whole.update(data.data)
            crc = crc32c(data, crc)
            digests.append(hashlib.sha256(data.data).digest())
        if self._read(self.n_data, 4).tobytes() != crc.to_bytes(4, "little"):
            raise DamagedError(f"{self.where}: bytes changed since it was written (crc32c); run harvest --repair")
        if (found := whole.hexdigest()) != extra.sha256:
            raise DamagedError(f"{self.where}: SHA-256 {found[:10]}…, expected {extra.sha256[:10]}…")
        self.digests = b"".join(digests)
        self._block = functools.lru_cache(BLOCKS_HELD)(self._checked)

    @staticmethod
    def n_bytes(n_data: int) -> int:
        """Bytes that reading an array of so many takes: blocks, one more while it is made, and a SHA-256 each."""
        return (BLOCKS_HELD + 1) * BLOCK + 32 * math.ceil(n_data / BLOCK)

    def __len__(self) -> int:
        return self.array.shape[0]

    def __getitem__(self, part: slice) -> npt.NDArray[np.generic]:
        first, stop, _ = part.indices(len(self))
        a, b = first * self.dtype.itemsize, max(first, stop) * self.dtype.itemsize
        blocks = range(a // BLOCK, -(-b // BLOCK))
        parts = [self._block(k)[max(a - k * BLOCK, 0) : b - k * BLOCK] for k in blocks]
        return np.concatenate([np.empty(0, np.uint8), *parts]).view(self.dtype)

    def _checked(self, k: int) -> npt.NDArray[np.uint8]:
        data = self._read(k * BLOCK, min(BLOCK, self.n_data - k * BLOCK))
        if hashlib.sha256(data.data).digest() != self.digests[32 * k : 32 * k + 32]:
            raise DamagedError(f"{self.where}: changed while it was read")
        return data

    def _read(self, offset: int, n: int) -> npt.NDArray[np.uint8]:
        data = np.empty(n, np.uint8)
        self.files.read_into(self.array.key(0), offset, [data.data])
        return data


def write_beside(files: Files, extra: Extra, data: npt.NDArray[Any]) -> None:
    """Write the array that `extra` describes, block by block, unless it is there."""
    if is_beside(files, extra):
        return
    with files.create(extra.array.key(0)) as file:
        crc = 0
        for block in in_blocks(data):
            crc = crc32c(block, crc)
            file.write(block)
        file.write(crc.to_bytes(4, "little"))


def is_beside(files: Files, extra: Extra) -> bool:
    """Whether the file of an array is the one that is described."""
    try:
        BesideRows(files, extra)
    except DamagedError:
        return False
    return True

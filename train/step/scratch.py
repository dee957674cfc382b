"""Buffers that live as long as the run, so that no step allocates large memory: fresh pages cost more than arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CACHE_NUMBERS = 1 << 19
"""Numbers of a [row, latent] array that a CPU works on at a time, so that a chain of operations stays in cache."""


class Scratch:
    """Named buffers shared by the members of one device: activations and gradients of whichever member is stepping.

    A buffer grows to the largest shape asked of it and never shrinks. Its contents mean nothing before they are written.
    `generation` counts how often one was made or grew: while it stays, all are where they were.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generation = 0
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor over the buffer of this name and dtype; it aliases every other one taken of it."""
        n = math.prod(shape)
        if (name, dtype) not in self._flat or self._flat[name, dtype].numel() < n:
            self._flat[name, dtype] = torch.empty(n, dtype=dtype, device=self.device)
            self.generation += 1
        return self._flat[name, dtype][:n].view(shape)

    def n_bytes(self) -> int:
        """Memory held."""
        return sum(flat.numel() * flat.element_size() for flat in self._flat.values())


def row_chunks(n_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices over the rows of a [row, width] array: pieces that stay in cache on a CPU, all of it on an accelerator."""
    size = max(1, CACHE_NUMBERS // width) if device.type == "cpu" else n_rows
    return (slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size))

"""Gradients summed over processes while the next ones are computed: in buckets, each sent off as soon as it is whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 32 << 20
"""Of a gradient that is sent off at once: large enough for the links' full rate, small enough that most of it is on its way
while the rest is computed."""


class Reducer:
    """Sums tensors over the processes of a group, in the order in which they are handed over, without waiting.

    On CUDA the sums run on a stream of the library's own and `wait` makes the current stream wait; on a CPU they run in gloo's
    threads. Without a group nothing is done.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.pending: list[dist.Work] = []

    def add(self, tensor: Tensor) -> None:
        """Begin to sum a contiguous tensor in place; nobody may touch it before `wait`."""
        if self.group is not None:
            self.pending.append(dist.all_reduce(tensor, group=self.group, async_op=True))

    def add_whole(self, gradient: Tensor) -> None:
        """Begin to sum all of a gradient, bucket by bucket."""
        for rows in self.buckets(gradient):
            self.add(gradient[rows])

    def wait(self) -> None:
        """Until all sums are there."""
        while self.pending:
            self.pending.pop(0).wait()

    def buckets(self, gradient: Tensor) -> Iterator[slice]:
        """Slices over the first dimension of a gradient, each at most a bucket; all of it where nothing is summed."""
        n_rows = len(gradient)
        size = n_rows
        if self.group is not None:
            size = max(1, BUCKET_BYTES // (gradient.nbytes // max(n_rows, 1)))
        return (slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size))

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """a b into `out`, bucket by bucket of its rows, each summed while the next is computed."""
        for rows in self.buckets(out):
            torch.mm(a[rows], b, out=out[rows])
            self.add(out[rows])

"""Several processes under torchrun: they share members out, or all train every member on their share of each batch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.base.errors import PipelineError
from pipeline.base.runtime import process_group, rank, require_world, world_size


@dataclass(frozen=True)
class Processes:
    """Who trains what. `group` is set when all processes train the same members, data-parallel; what they tell one another beside
    gradients goes from host to host, so that nobody waits for a device."""

    rank: int
    n: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of its members: the first one when all train the same."""
        return self.group is None or self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """This process's part of every batch: (part, number of parts)."""
        return (0, 1) if self.group is None else (self.rank, self.n)

    def wait(self) -> None:
        """Until all processes of the group are here."""
        if self.group is not None:
            self.any(False)

    def told(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the first process of the group, JSON data, in all of them; alone, what it returns here.

        Raises what `make` raises in the first process, and PipelineError in the others then.
        """
        if self.group is None:
            return make()
        if self.rank == 0:
            try:
                text = json.dumps(make()).encode()
            except BaseException:
                self._broadcast(b"")
                raise
            return json.loads(self._broadcast(text))
        text = self._broadcast(b"")
        if not text:
            raise PipelineError("the first process made no plan of the training; its error says why")
        return json.loads(text)

    def _broadcast(self, text: bytes) -> bytes:
        """The first process's bytes in all."""
        n_bytes = torch.tensor(len(text), dtype=torch.int64)
        dist.broadcast(n_bytes, 0, group=self.group)
        found = torch.zeros(int(n_bytes), dtype=torch.uint8)
        if self.rank == 0:
            found.copy_(torch.tensor(list(text), dtype=torch.uint8))
        if len(found):
            dist.broadcast(found, 0, group=self.group)
        return bytes(found.tolist())

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        if self.group is None:
            return number
        numbers = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(numbers, dist.ReduceOp.MIN, group=self.group)
        return int(numbers)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process of the group."""
        if self.group is None:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return bool(flags)


@contextlib.contextmanager
def join(data_parallel: bool, device: torch.device) -> Iterator[Processes]:
    """The processes of this torchrun; just this one outside of it. Raises UsageError when the environment names none."""
    require_world("--data-parallel" if data_parallel else "")
    if not data_parallel or world_size() == 1:
        yield Processes(rank(), world_size(), device, None)
        return
    with process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo") as group:
        yield Processes(rank(), world_size(), device, group)
        dist.barrier()  # one that leaves while another still sums has made gloo abort that one

"""Several processes under torchrun: they share members out, or all train every member on their share of each batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.base.runtime import rank, world_size


@dataclass(frozen=True)
class Processes:
    """Who trains what. `group` is set when all processes train the same members, data-parallel."""

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

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process of the group."""
        if self.group is None:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return bool(flags)


@contextlib.contextmanager
def join(data_parallel: bool, device: torch.device) -> Iterator[Processes]:
    """The processes of this torchrun; just this one outside of it."""
    if not data_parallel or world_size() == 1:
        yield Processes(rank(), world_size(), device, None)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank(), world_size(), device, dist.group.WORLD)
    finally:
        dist.destroy_process_group()

"""Several processes under torchrun: they share members out, or all train every member on their share of each batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.base.errors import UsageError
from pipeline.base.runtime import local_rank, rank, world_size


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

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        if self.group is None:
            return number
        numbers = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.all_reduce(numbers, dist.ReduceOp.MIN, group=self.group)
        return int(numbers)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process of the group."""
        if self.group is None:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return bool(flags)


def require_launched(data_parallel: bool) -> None:
    """Raise UsageError for a rank outside the world, and for processes that are to meet with no place to do so."""
    if rank() >= world_size():
        raise UsageError(
            f"the environment has RANK={rank()} and WORLD_SIZE={world_size()}, so no such process; unset both, or use torchrun"
        )
    if data_parallel and world_size() > 1 and "MASTER_ADDR" not in os.environ:
        raise UsageError(
            f"--data-parallel: the environment has WORLD_SIZE={world_size()} but no MASTER_ADDR; start with torchrun, or unset it"
        )


def is_torchrun() -> bool:
    """Whether torchrun started this process, and not another launcher or a variable left over."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def current(device: torch.device) -> torch.device:
    """The device, by its number on CUDA, and made the current one there: streams, graphs and kernels go to the current one."""
    if device.type != "cuda":
        return device
    numbered = torch.device("cuda", local_rank() if device.index is None else device.index)
    torch.cuda.set_device(numbered)
    return numbered


@contextlib.contextmanager
def join(data_parallel: bool, device: torch.device) -> Iterator[Processes]:
    """The processes of this torchrun; just this one outside of it. Raises UsageError when the environment names none."""
    require_launched(data_parallel)
    device = current(device)
    if not data_parallel or world_size() == 1:
        yield Processes(rank(), world_size(), device, None)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank(), world_size(), device, dist.group.WORLD)
    finally:
        dist.destroy_process_group()

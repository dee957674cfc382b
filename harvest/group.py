"""The processes that share one harvest out: those of torchrun, or the only one."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator

from pipeline.base.runtime import process_group, require_world, world_size
from pipeline.store.makers import Maker


class Group:
    """The processes that torchrun started, or the only one."""

    def barrier(self) -> None:
        """Wait for all."""
        if world_size() > 1:
            import torch.distributed as dist

            dist.barrier()

    def gathered(self, mine: Maker) -> list[Maker]:
        """What every process says of itself, by rank."""
        if world_size() == 1:
            return [mine]
        import torch.distributed as dist

        found: list[Maker] = [{}] * world_size()
        dist.all_gather_object(found, mine)
        return found

    def told(self, mine: bool) -> bool:
        """What rank 0 says."""
        if world_size() == 1:
            return mine
        import torch.distributed as dist

        said = [mine]
        dist.broadcast_object_list(said)
        return said[0]

    def handed_out(self, n: int) -> Iterator[int]:
        """The numbers below n, each to the process that asks next. Once a group."""
        if world_size() == 1:
            yield from range(n)
            return
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()
        while (k := store.add("handed out", 1) - 1) < n:
            yield k


@contextlib.contextmanager
def workers() -> Iterator[Group]:
    """The group of torchrun's processes; alone nothing is set up. Raises UsageError for an environment that names none."""
    require_world("harvest")
    if world_size() == 1:
        yield Group()
        return
    with process_group("gloo", timeout=datetime.timedelta(days=7)):
        yield Group()

"""What `python -m train --dry-run` says: what a run would do, here or on another machine, on a store that is there or planned."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.base.digests import is_sealed
from pipeline.base.errors import UsageError
from pipeline.base.fields import Fields
from pipeline.base.files import read_json
from pipeline.base.spread import cores_divided, environment
from pipeline.store.layout import VERSION, SplitLayout
from pipeline.store.root import layout_of
from train import plan
from train.announce import announce, announce_planned, say_costs
from train.folder import check_out
from train.parallel import Processes
from train.plan import RunConfig
from train.run import own_members
from train.stores import Stores
from train.trainee import Outcome, in_order


def show_plan(
    job: RunConfig, device: torch.device, n: int, planned: Path | None = None, *, elsewhere: bool = False
) -> tuple[list[Outcome], dict[str, Any]]:
    """Print what `run` would do in n processes; where members stand as outcomes, and what the rest costs (`plan.cost`) with
    the `seconds` that were measured on `device_type`.

    `elsewhere`: members that this machine has no memory for are planned too, in passes of their own; there are no seconds then.
    """
    check_out(job.out)
    if planned is None:
        stores = Stores.open(job.store, job.target)
        rows = stores.train.shape
    else:
        rows = planned_rows(job.store, planned)
        target = None if job.target is None else planned_rows(job.target, planned)
    shares, costs, fits = [], [], True
    with cores_divided(n), environment({"LOCAL_WORLD_SIZE": str(n)} if n > 1 else {}):
        for rank_ in range(n):
            members = own_members(job, Processes(rank_, n, device, None))
            free = plan.free_memory(device)
            tasks = (
                plan.make_tasks(job, stores, members, device, sys.maxsize if elsewhere else free)
                if planned is None
                else plan.planned_tasks(job, rows, members, target)
            )
            if elsewhere and (largest := plan.largest_memory(rows, tasks, device)) > free:
                free, fits = largest, False
            passes = plan.make_passes(rows, tasks, device, free)
            if planned is None:
                announce(stores, tasks, passes, device)
            else:
                announce_planned(rows, tasks, passes, device)
            shares.append(tasks)
            costs.append(plan.cost(rows, passes, device))
        seconds = say_costs(job, rows, [task for tasks in shares for task in tasks], device, n, measure=fits)
    outcomes = [[Outcome(task.folder.path, task.step, task.folder.final()) for task in tasks] for tasks in shares]
    total = {name: sum(cost[name] for cost in costs) for name in costs[0]}
    return in_order(outcomes), total | {"seconds": seconds, "device_type": device.type}


def planned_rows(path: Path | str, plan_file: Path) -> SplitLayout:
    """Training rows of the store at `path`, as a plan of harvest says. Raises UsageError when the plan has none there, and
    DamagedError where it is none."""
    about = Fields(plan_file, read_json(plan_file))
    is_sealed(plan_file, about.data)
    for one in about.objects("stores"):
        if (there := one.text("path")) == path or Path(there).absolute() == Path(path).absolute():
            n_sequences = one.inner("n_sequences").whole("train", least=1)
            return SplitLayout("train", layout_of(Fields(plan_file, {**one.data, "version": VERSION})), n_sequences)
    raise UsageError(f"{plan_file}: plans no store at {path}; give harvest and train the same --store")

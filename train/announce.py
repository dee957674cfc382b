"""What a training run says of itself before and while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pipeline.base.files import human_bytes
from pipeline.base.processes import is_launched
from pipeline.base.progress import format_seconds, say
from pipeline.store.layout import SplitLayout
from train import plan
from train.folder import Keep
from train.parallel import Processes
from train.plan import RunConfig, Task
from train.stores import Stores


def announce(stores: Stores, tasks: Sequence[Task], passes: Sequence[Sequence[Task]], device: torch.device) -> None:
    """Say what will be trained on what, and the memory it takes, before the first step."""
    n_done = sum(task.finished for task in tasks)
    over = " and ".join(store.where for store in stores.all)
    say(f"{len(tasks)} members, {n_done} finished, {len(passes)} passes over {over} on {device}")
    for group in passes:
        order, config = plan.make_order(stores, group[0]), group[0].config
        usable = stores.train.n_rows - stores.read.statistics.n_special
        say(
            f"{len(group)} side by side in {group[0].order['mode']} order over {order.n_kept:,} rows; left out: "
            f"{usable - order.n_kept:,} massive and {stores.train.n_rows - usable:,} special; "
            f"{config.steps * config.batch_size / order.n_kept:.2f} epochs"
        )
        say(f"memory: {plan.memory_text(plan.pass_memory(stores.train.shape, group, device))}")
        if n_sparse := sum(task.is_sparse(device) for task in group):
            say(f"{n_sparse} of them with products over active latents alone, once k has stopped falling")


def say_share(job: RunConfig, tasks: Sequence[Task], processes: Processes) -> None:
    """Say that this process trains a part of the members, where RANK and WORLD_SIZE say so."""
    if processes.group is None and processes.n > 1:
        alone = "" if is_launched() else " but not torchrun's; unset both to train all of them here"
        say(
            f"process {processes.rank} of {processes.n}: {len(tasks)} of {len(job.members)} members, as RANK and WORLD_SIZE in "
            f"the environment say{alone}"
        )


def announce_planned(
    rows: SplitLayout, tasks: Sequence[Task], passes: Sequence[Sequence[Task]], device: torch.device
) -> None:
    """The same of a store that is not there yet: `rows` of it will be trained on."""
    say(f"{len(tasks)} members, {len(passes)} passes over {rows.n_rows:,} rows of a store still to be made")
    for group in passes:
        say(f"{len(group)} side by side, memory: {plan.memory_text(plan.pass_memory(rows, group, device))}")


def say_costs(
    job: RunConfig, rows: SplitLayout, tasks: Sequence[Task], device: torch.device, n: int, *, measure: bool = True
) -> float | None:
    """For a dry run in n processes: every member, memory, disk and, to `measure`, a rough time, which is returned in seconds."""
    for task in tasks:
        config = task.config
        say(f"  {task.folder.name}: {config.recipe}, width {config.width}, {config.steps} steps, {task.status}")
    disk = plan.disk_bytes(rows, tasks, Keep.parse(job.keep))
    say(f"memory free: {human_bytes(plan.free_memory(device))}; disk: at most {human_bytes(disk)}")
    if not measure:
        say("time: not measured, since a member does not fit into this machine's memory")
        return None
    turns = math.ceil(len(tasks) / n) / len(tasks)  # the process with most members ends last
    seconds = plan.estimate_seconds(rows, tasks, device) * turns
    in_processes = f" in {n} processes" if n > 1 else ""
    say(f"time: about {format_seconds(seconds)}{in_processes} (a step of each kind of member, measured now)")
    return seconds


def say_second_epoch(step: int, batch_size: int, n_kept: int) -> None:
    """Say that the data begins anew, when the step after `step` finished ones uses the first epoch's last row."""
    before, after = (n * batch_size // n_kept for n in (step, step + 1))
    if before == 0 and after > 0:
        say(f"step {step + 1}: every row was used once; the second epoch begins, in another order")

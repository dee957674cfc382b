"""The training run: one read of the store feeds every member of the grid.

    open and check the store → see where every member stands → plan passes, check memory and disk
    for each pass:  every batch is fetched, normalised and moved once, then each member takes a step on it
    members log, are checkpointed, fail and finish one by one (`trainee.py`)

A pass begins at its members' smallest step. A member that is further stands by until the stream reaches its step, so
each sees exactly the batches that it would see alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.base.files import human_bytes, require_free
from pipeline.base.progress import Progress, say
from pipeline.base.runtime import rank, resolve_device, resolve_dtype, tf32
from pipeline.store.cache import open_cache
from pipeline.store.reader import Store
from train import plan
from train.announce import announce, say_second_epoch, say_share
from train.config import TrainConfig
from train.extend import extend
from train.feed.bodies import BodyCheck
from train.feed.loader import Feeds, Loader
from train.feed.resident import DeviceRows
from train.folder import Folder, Keep, check_out
from train.held_out import HeldOut
from train.log import require_logs
from train.parallel import Processes, join
from train.plan import RunConfig, Task
from train.step.fused.choice import make_normalise, member_kind
from train.step.graphs import cuda_capture
from train.step.member import Batch, Pairs
from train.step.scratch import Scratch
from train.step.weights import named_by_content
from train.stop import Stop, Stopped, stop_on_signals
from train.stores import Stores
from train.trainee import Clock, Outcome, Trainee, summary
from train.writer import Writer


def run(job: RunConfig) -> list[Outcome]:
    """Train every member of the grid that is not finished; outcomes in the order of the grid.

    Under torchrun this process takes every world-size-th member, or with `data_parallel` its share of every batch. Raises
    what a store, a disk or memory is the cause of; a member that diverges is an outcome, and the others go on.
    KeyboardInterrupt after Ctrl-C, states written.
    """
    check_out(job.out)
    require_logs(job.log)
    stores = Stores.open(
        job.store, job.target, open_cache(job.cache, job.cache_size) if job.cache is not None else None
    )
    with (
        stores.steady(),
        join(job.data_parallel, resolve_device(job.device)) as processes,
        tf32(processes.device),
        BodyCheck(*(store.train for store in stores.all)) as check,
        stop_on_signals() as stop,
    ):
        device, members = processes.device, own_members(job, processes)
        tasks, passes = make_plan(job, stores, members, processes)
        require_free(job.out, plan.disk_bytes(stores.train.shape, tasks, Keep.parse(job.keep)), "training")
        say_share(job, tasks, processes)
        if processes.writes:
            announce(stores, tasks, passes, device)
        if job.verify_first and passes:
            say("checking every byte of the training shards")
            check.require()
        outcomes = {task.folder.name: standing(task, processes, job.keep_state) for task in tasks}
        for group in passes:
            outcomes |= Pass(job, stores, processes, group, check, stop).run()
    return list(outcomes.values())


def make_plan(
    job: RunConfig, stores: Stores, members: Sequence[TrainConfig], processes: Processes
) -> tuple[list[Task], list[list[Task]]]:
    """Where every member stands, and the passes over the store that are left; of processes that train together the first one
    decides for all, by the least memory that one of them has."""
    rows, free = stores.train.shape, processes.least(plan.free_memory(processes.device))

    def first() -> Any:
        if job.extend:
            extend(job, stores, members)
        tasks = plan.make_tasks(job, stores, members, processes.device, free)
        return plan.as_data(tasks, plan.make_passes(rows, tasks, processes.device, free))

    return plan.from_data(job, stores, members, processes.told(first))


def standing(task: Task, processes: Processes, keeps_state: bool) -> Outcome:
    """Where a member stands before this run; what a kill left of a finished one goes, its state unless that is to be kept."""
    if task.finished and processes.writes and not keeps_state:
        task.folder.drop_state()
    return Outcome(task.folder.path, task.step, task.folder.final())


def own_members(job: RunConfig, processes: Processes) -> list[TrainConfig]:
    """This process's members, each once, with the dtype that `auto` stands for on this device."""
    members = list(dict.fromkeys(resolve(member, processes.device) for member in job.members))
    return members[processes.rank :: processes.n] if processes.group is None else members


def resolve(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config with the dtype that `auto` stands for on this device, and the file to start from known by its content."""
    changes = {"dtype": resolve_dtype(config.dtype, device)}
    if config.init_from:
        changes["init_from"] = named_by_content(config.init_from)
    return TrainConfig.from_dict(config.to_dict() | changes)


def n_unfinished(job: RunConfig, device: torch.device) -> int:
    """Members of the grid that are not finished."""
    members = own_members(job, Processes(0, 1, device, None))
    return sum(Folder(job.out, config, {}).final() is None for config in members)


def kept_rows(store: Path | str, target: Path | str | None, max_norm: float | None) -> int:
    """Rows of one epoch of a store, or of the rows that two have in common."""
    both = Stores(Store.open(store, check=False), None if target is None else Store.open(target, check=False))
    return int(both.kept("train", max_norm).in_chunks().sum())


class Pass:
    """Members side by side on one stream of batches."""

    def __init__(
        self, job: RunConfig, stores: Stores, processes: Processes, tasks: Sequence[Task], check: BodyCheck, stop: Stop
    ) -> None:
        self.job = job
        self.stores = stores
        self.processes = processes
        self.stop = stop
        self.tasks = tasks
        self.device = processes.device
        self.order = plan.make_order(stores, tasks[0], processes.rank)
        self.parts = tasks[0].order.get("parts", 1)
        self.n_kept = int(stores.kept("train", tasks[0].config.max_norm).in_chunks().sum())
        self.place = plan.place_on_device(stores, tasks, self.device, processes.least(plan.free_memory(self.device)))
        self.check = check if self.order.exact and processes.writes and self.place is None else None
        self.batch_size = tasks[0].config.batch_size
        self.center, self.scale = stores.space(tasks[0].config, self.device)
        self.target = stores.target_space(tasks[0].config, self.device)
        self.scratch = Scratch(self.device)
        self.held_out = self.read_held_out()
        self.prepare = self.preparing()
        self.capture = cuda_capture(self.device) if job.cuda_graphs and self.device.type == "cuda" else None

    def preparing(self) -> Callable[..., Batch]:
        """What makes a batch of the rows of one store, or of both; it is written again by the next call."""
        if self.target is not None:
            return Pairs(self.center, self.scale, self.target).normalise
        normalise, last = make_normalise(self.tasks[0].config, self.device, self.scratch), list[Batch]()

        def prepare(x_raw: Tensor) -> Batch:
            last[:] = [normalise(x_raw, self.center, self.scale, out=last[0] if last else None)]
            return last[0]

        return prepare

    def read_held_out(self) -> HeldOut | None:
        """Rows of the evaluation split, where a member is to be scored on them."""
        if not self.processes.writes or not any(task.config.eval_every for task in self.tasks):
            return None
        kept = self.stores.kept("eval", self.tasks[0].config.max_norm)
        target = self.stores.target
        return HeldOut.read(self.stores.read.eval, kept, self.device, None if target is None else target.eval)

    def run(self) -> dict[str, Outcome]:
        """Train to the end; outcomes by member's name. Raises KeyboardInterrupt when stopped, states written."""
        with contextlib.ExitStack() as stack:
            if self.check is not None:
                self.check.begin()
            writer = stack.enter_context(Writer(self.check, plan.pending_bytes(self.device)))
            trainees = [stack.enter_context(self.trainee(task, writer)) for task in self.tasks]
            self.processes.wait()
            try:
                self.stream(trainees)
            except Stopped:
                self.save(trainees)
                writer.finish()
                raise KeyboardInterrupt from None
            writer.finish()
            if self.check is not None:
                self.check.require()
            return {trainee.folder.name: trainee.outcome() for trainee in trainees}

    def trainee(self, task: Task, writer: Writer) -> Trainee:
        """A member made or gone on with; all of a pass share one set of buffers."""
        group = self.processes.group
        member = member_kind(task.config, self.device, is_transcoder=self.target is not None)(
            task.config,
            self.stores.read.d_model,
            self.center,
            self.scale,
            self.device,
            self.scratch,
            group,
            self.capture,
            self.target,
            task.is_sparse(self.device),
        )
        return Trainee(self.job, task, member, writer, self.n_kept, self.processes.writes, self.held_out)

    def stream(self, trainees: Sequence[Trainee]) -> None:
        """Deliver batches until every member is done or has failed. Raises Stopped."""
        first = min(trainee.member.n_steps for trainee in trainees)
        last = max(trainee.task.config.steps for trainee in trainees)
        if first == last:
            return
        with self.loader(first) as loader, self.progress(first, last, len(trainees)) as bar:
            clock = Clock(loader, self.batch_size, self.stores)
            for step in range(first, last):
                if not any(trainee.waits for trainee in trainees):
                    break
                self.raise_if_stopped(step)
                batch = self.prepare(*loader.next())
                for trainee in trainees:
                    if trainee.takes(step):
                        trainee.advance(batch, clock)
                bar.advance(self.batch_size, summary(trainees, clock, step + 1))
                say_second_epoch(step, self.batch_size, self.n_kept)
                self.poll(trainees[0].writer)
            clock.say_if_starved()
            clock.say_traffic()

    def loader(self, first: int) -> Feeds:
        """The stream of batches from that of step `first` on: on CUDA from the device's memory where rows fit beside members."""
        size = self.batch_size // self.parts
        options: dict[str, Any] = {
            "position": first * size,
            "share": self.processes.share if self.parts == 1 else (0, 1),
            "device": self.device,
            "threads": self.job.threads,
        }
        splits = [store.train for store in self.stores.all]
        if self.place is None:
            if self.device.type == "cuda":
                smaller = "--mode window" if self.order.exact else "a smaller --window-rows"
                say(
                    f"rows stay on the host: beside the members they do not fit into the memory of {self.device}; every "
                    f"step waits until its batch is copied, which is slow; in a new --out, {smaller} or fewer members would "
                    "let them lie there"
                )
            return Feeds([Loader(split, self.order, size, **options) for split in splits])
        part = "all rows" if self.place.whole else "two windows of rows"
        say(f"{part}, {human_bytes(self.place.n_bytes(*splits))}, lie in the memory of {self.device}")
        return Feeds([DeviceRows(split, self.order, size, self.place, **options) for split in splits])

    def progress(self, first: int, last: int, n_members: int) -> Progress:
        """The bar, in rows."""
        label = f"train {n_members}" if n_members > 1 else "train"
        done, total = first * self.batch_size, last * self.batch_size
        return Progress(total, label, "row", done=done, quiet=rank() > 0)

    def raise_if_stopped(self, step: int) -> None:
        """Raise Stopped when a signal came. Data-parallel processes agree on it, and so ask now and then only."""
        if self.processes.group is not None and step % 10:
            return
        if self.processes.any(self.stop.asked):
            raise Stopped

    def poll(self, writer: Writer) -> None:
        """Raise what background threads met."""
        if self.check is not None:
            self.check.poll()
        writer.poll()

    def save(self, trainees: Sequence[Trainee]) -> None:
        """After a signal: have every unfinished member's state written."""
        say("stopping: writing the state of every member")
        for trainee in trainees:
            if not trainee.problem and trainee.member.n_steps > trainee.saved:
                trainee.save(sae=False)

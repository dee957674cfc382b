"""The training run: one read of the store feeds every member of the grid.

    open and check the store → see where every member stands → plan passes, check memory and disk
    for each pass:  every batch is fetched, normalised and moved once, then each member takes a step on it
    members log, are checkpointed, fail and finish one by one

A pass begins at its members' smallest step. A member that is further stands by until the stream reaches its step, so
each sees exactly the batches that it would see alone.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from pipeline.base.files import require_free
from pipeline.base.progress import Progress, say
from pipeline.base.runtime import rank, resolve_device, resolve_dtype
from pipeline.store.reader import Store
from train import plan
from train.config import TrainConfig
from train.feed.bodies import BodyCheck
from train.feed.loader import Loader
from train.folder import Keep, check_out
from train.parallel import Processes, join
from train.plan import RunConfig, Task
from train.step.graphs import cuda_capture
from train.step.member import Batch, Member, normalise_batch
from train.step.scratch import Scratch
from train.step.weights import named_by_content
from train.trainee import Clock, Outcome, Trainee, summary
from train.writer import Writer


def run(config: RunConfig) -> list[Outcome]:
    """Train every member of the grid that is not finished; outcomes in the order of the grid.

    Under torchrun this process takes every world-size-th member, or with `data_parallel` its share of every batch. Raises
    what a store, a disk or memory is the cause of; a member that diverges is an outcome, and the others go on.
    KeyboardInterrupt after Ctrl-C, states written.
    """
    check_out(config.out)
    store = Store.open(config.store)
    device = resolve_device(config.device)
    with join(config.data_parallel, device) as processes, BodyCheck(store.train) as check, stop_on_signals() as stop:
        tasks = plan.make_tasks(config, store, own_members(config, processes))
        passes = plan.make_passes(store, tasks, device, plan.free_memory(device))
        require_free(config.out, plan.disk_bytes(store, tasks, Keep.parse(config.keep)), "training")
        if processes.writes:
            announce(store, tasks, passes, device)
        if config.verify_first and passes:
            say("checking every byte of the training shards")
            check.require()
        for task in tasks:
            if task.finished and processes.writes:
                task.folder.drop_state()
        outcomes = {task.folder.name: Outcome(task.folder.path, task.step, task.folder.final()) for task in tasks}
        for group in passes:
            for outcome in Pass(config, store, processes, group, check, stop).run():
                outcomes[outcome.folder.name] = outcome
    return list(outcomes.values())


def own_members(config: RunConfig, processes: Processes) -> list[TrainConfig]:
    """This process's members, each once, with the dtype that `auto` stands for on this device."""
    members = list(dict.fromkeys(resolve(member, processes.device) for member in config.members))
    return members[processes.rank :: processes.n] if processes.group is None else members


def resolve(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config with the dtype that `auto` stands for on this device, and the file to start from known by its content."""
    changes = {"dtype": resolve_dtype(config.dtype, device)}
    if config.init_from:
        changes["init_from"] = named_by_content(config.init_from)
    return TrainConfig.from_dict(config.to_dict() | changes)


def announce(store: Store, tasks: Sequence[Task], passes: Sequence[Sequence[Task]], device: torch.device) -> None:
    """Say what will be trained on what, and the memory it takes, before the first step."""
    n_done = sum(task.finished for task in tasks)
    say(f"{len(tasks)} members, {n_done} finished, {len(passes)} passes over {store.path} on {device}")
    for group in passes:
        order, config = plan.make_order(store, group[0]), group[0].config
        usable = int((~store.train.special).sum())
        say(
            f"{len(group)} side by side in {group[0].order['mode']} order over {order.n_kept:,} rows; left out: "
            f"{usable - order.n_kept:,} massive and {store.train.n_rows - usable:,} special; "
            f"{config.steps * config.batch_size / order.n_kept:.2f} epochs"
        )
        say(f"memory: {plan.memory_text(plan.pass_memory(store, group, device))}")


class Pass:
    """Members side by side on one stream of batches."""

    def __init__(
        self, run: RunConfig, store: Store, processes: Processes, tasks: Sequence[Task], check: BodyCheck, stop: Stop
    ) -> None:
        self.config, self.store, self.processes, self.stop = run, store, processes, stop
        self.device = processes.device
        self.order = plan.make_order(store, tasks[0])
        self.check = check if self.order.exact and processes.writes else None
        self.tasks, self.batch_size = tasks, tasks[0].config.batch_size
        self.center, self.scale = self.space(tasks[0].config)
        self.scratch = Scratch(self.device)
        self.capture = cuda_capture() if run.cuda_graphs and self.device.type == "cuda" else None

    def space(self, config: TrainConfig) -> tuple[Tensor, float]:
        """Centre and scale of the training space on the device."""
        center, scale = self.store.mean_and_scale(plan.max_norm_of(self.store, config))
        wide = torch.float64 if config.dtype == "float64" else torch.float32
        return center.to(self.device, wide), scale

    def run(self) -> list[Outcome]:
        """Train to the end, and name each member's outcome. Raises KeyboardInterrupt when stopped, states written."""
        with contextlib.ExitStack() as stack:
            if self.check is not None:
                self.check.begin()
            writer = stack.enter_context(Writer(self.check))
            trainees = [stack.enter_context(self.trainee(task, writer)) for task in self.tasks]
            self.processes.wait()
            if not self.stream(trainees):
                self.save(trainees, writer)
                raise KeyboardInterrupt
            writer.finish()
            if self.check is not None:
                self.check.require()
            return [trainee.outcome() for trainee in trainees]

    def trainee(self, task: Task, writer: Writer) -> Trainee:
        """A member made or gone on with; all of a pass share one set of buffers."""
        group = self.processes.group
        member = Member(
            task.config, self.store.d_model, self.center, self.scale, self.device, self.scratch, group, self.capture
        )
        return Trainee(self.config, task, member, writer, self.order.n_kept, self.processes.writes)

    def stream(self, trainees: Sequence[Trainee]) -> bool:
        """Deliver batches until every member is done or has failed; False when a stop was asked for before that."""
        first, last = min(t.member.n_steps for t in trainees), max(t.task.config.steps for t in trainees)
        if first == last:
            return True
        label = f"train {len(trainees)}" if len(trainees) > 1 else "train"
        batch: Batch | None = None
        with (
            Loader(
                self.store.train, self.order, self.batch_size, position=first * self.batch_size,
                share=self.processes.share, device=self.device, threads=self.config.threads,
            ) as loader,
            Progress(last * self.batch_size, label, "row", done=first * self.batch_size, quiet=rank() > 0) as bar,
        ):  # fmt: skip
            clock = Clock(loader, self.batch_size)
            for step in range(first, last):
                active = [t for t in trainees if t.takes(step)]
                if not any(t.waits for t in trainees):
                    break
                if self.stops(step):
                    return False
                batch = normalise_batch(loader.next(), self.center, self.scale, out=batch)
                for trainee in active:
                    trainee.advance(batch, clock)
                bar.advance(
                    self.batch_size, summary(trainees, clock) if any(t.logged == step + 1 for t in active) else ""
                )
                self.say_epoch(step)
                self.poll(trainees)
            clock.say_if_starved()
        return True

    def stops(self, step: int) -> bool:
        """Whether Ctrl-C asked for an end. Data-parallel processes agree on it, and so ask now and then only."""
        if self.processes.group is not None and step % 10:
            return False
        return self.processes.any(self.stop.asked)

    def say_epoch(self, step: int) -> None:
        """Say that the data begins anew, when this step used the first epoch's last row."""
        before, after = (n * self.batch_size // self.order.n_kept for n in (step, step + 1))
        if before == 0 and after > 0:
            say(f"step {step + 1}: every row was used once; the second epoch begins, in another order")

    def poll(self, trainees: Sequence[Trainee]) -> None:
        """Raise what background threads met."""
        if self.check is not None:
            self.check.poll()
        trainees[0].writer.poll()

    def save(self, trainees: Sequence[Trainee], writer: Writer) -> None:
        """After Ctrl-C: write every unfinished member's state."""
        say("stopping: writing the state of every member")
        for trainee in trainees:
            if not trainee.problem and trainee.member.n_steps > trainee.saved:
                trainee.save(checkpoint=False)
        writer.finish()


@dataclass
class Stop:
    """Whether Ctrl-C or SIGTERM asked this run to end after the step in hand."""

    asked: bool = False
    previous: dict[int, Any] = field(default_factory=dict)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """The first SIGINT or SIGTERM is noted, so that states are written whole; a second SIGINT interrupts at once."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    if threading.current_thread() is threading.main_thread():
        stop.previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in stop.previous.items():
            signal.signal(number, handler)

"""What a training run will do, before it does it: members, passes over the store, memory, disk and time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.base.errors import MismatchError, PipelineError, UsageError
from pipeline.base.files import human_bytes
from pipeline.base.runtime import available_memory, measured_seconds, world_size
from pipeline.store.layout import SplitLayout
from pipeline.store.reader import Store
from train import held_out
from train.config import TrainConfig
from train.feed.loader import AHEAD, WINDOW_ROWS, Mode, resolve_mode
from train.feed.order import Order
from train.feed.resident import Place, place_for
from train.folder import Folder, Keep
from train.step.fused import make_member, make_normalise
from train.step.member import product_dtype
from train.step.sample import n_held
from train.step.scratch import CACHE_NUMBERS, Scratch
from train.step.weights import initial_shapes

PENDING_BYTES = 2 * 10**9
"""Snapshots that may wait to be written before training waits for the disk; one of any size always may."""

SHARED_PARTS = ("activations", "gradients")
"""Parts that all members on a device share: count the largest member's once, not the sum."""


@dataclass(frozen=True)
class RunConfig:
    """One `python -m train`: which members, and what may differ from machine to machine. Raises UsageError.

    mode, window_rows: the order of rows (`order.py`); a member that is there goes on in its own unless another is asked
    for. threads: that gather rows. keep: which checkpoints stay (`Keep`). log: besides metrics.jsonl, which is always
    written. data_parallel: all processes of torchrun train every member together, instead of sharing members out.
    cuda_graphs: record steps and replay them, on CUDA; for small SAEs, whose kernels take longer to launch than to run.
    extend: a new member begins with the state of a shorter one that is the same but for its steps (`extend.py`).
    """

    store: Path
    out: Path
    members: tuple[TrainConfig, ...]
    device: str = "auto"
    mode: Mode = "auto"
    window_rows: int | None = None
    threads: int = 2
    keep: str = "last:3,every:1000"
    log: tuple[str, ...] = ("jsonl",)
    verify_first: bool = False
    data_parallel: bool = False
    cuda_graphs: bool = False
    extend: bool = False

    def __post_init__(self) -> None:
        if not self.members:
            raise UsageError("the grid is empty: no member to train; give each repeated option at least one value")
        if self.threads < 1 or (self.window_rows is not None and self.window_rows < 1):
            raise UsageError("--threads and --window-rows must be at least 1")
        if self.window_rows is not None and self.mode == "global":
            raise UsageError("--window-rows goes with --mode window; a global order has no windows")
        if self.data_parallel and (odd := [c.batch_size for c in self.members if c.batch_size % world_size()]):
            raise UsageError(f"--batch-size {odd[0]} does not divide evenly over {world_size()} processes")
        Keep.parse(self.keep)


@dataclass(frozen=True)
class Task:
    """One member and where it stands."""

    folder: Folder
    order: Mapping[str, Any]
    step: int
    finished: bool

    @property
    def config(self) -> TrainConfig:
        """Its config, dtype resolved."""
        return self.folder.config

    @property
    def stream(self) -> tuple[Any, ...]:
        """Members with equal streams can be fed by the same batches."""
        c = self.config
        return (c.data_seed, c.batch_size, c.max_norm, c.dtype == "float64", tuple(sorted(self.order.items())))

    @property
    def status(self) -> str:
        """In a word."""
        return "finished" if self.finished else f"at step {self.step}" if self.step else "new"


def max_norm_of(store: Store, config: TrainConfig) -> float | None:
    """The multiple of the median norm beyond which rows are left out; None: none is."""
    return multiple_of(store, config.max_norm)


def multiple_of(store: Store, max_norm: float | None) -> float | None:
    """The same of the option alone: None is the store's own, 0 leaves none out."""
    return store.statistics.massive_multiple if max_norm is None else max_norm or None


def store_identity(store: Store, config: TrainConfig) -> dict[str, Any]:
    """What checkpoints say of the store they were trained on: FORMAT.md, `provenance.store`."""
    names = ("model", "revision", "weights_sha256", "layer", "d_model", "context")
    own = {name: store.config[name] for name in names}
    own |= {"hook": store.config["hook"]} if "hook" in store.config else {}
    measured = {"massive_multiple": store.statistics.massive_multiple, "mean_share": store.statistics.mean_share}
    return {"id": store.id, **own, **measured, "max_norm": max_norm_of(store, config)}


def make_order(store: Store, task: Task) -> Order:
    """The order of rows of a member's stream."""
    kept = store.train.kept(max_norm_of(store, task.config))
    return Order(kept, store.train.chunk_rows, task.config.data_seed, task.order.get("window_rows"))


def make_tasks(
    job: RunConfig, store: Store, members: Sequence[TrainConfig], least: Callable[[int], int] = int
) -> list[Task]:
    """Where every member stands. `members` have their dtype resolved; `least` is the smallest of the numbers of all processes
    that train a member together and have to agree on its order. Raises MismatchError for a folder of another config."""
    new = new_order(job, store.train.shape, least)
    return [make_task(job, Folder(job.out, config, store_identity(store, config)), new) for config in members]


def planned_tasks(job: RunConfig, rows: SplitLayout, members: Sequence[TrainConfig]) -> list[Task]:
    """The members of a store still to be made. Raises MismatchError when one is there, which another store has made."""
    tasks = [Task(Folder(job.out, config, {}), new_order(job, rows), 0, False) for config in members]
    for task in tasks:
        if task.folder.path.exists():
            raise MismatchError(
                f"{task.folder.path}: trained on another store than the one to be made; choose another --out"
            )
    return tasks


def new_order(job: RunConfig, rows: SplitLayout, least: Callable[[int], int] = int) -> dict[str, Any]:
    """The order of rows of a member that is new (`order.py`); `least` as in `make_tasks`."""
    mode = "global" if least(resolve_mode(job.mode, rows) == "global") else "window"
    return {"mode": mode} | ({"window_rows": job.window_rows or WINDOW_ROWS} if mode == "window" else {})


def make_task(job: RunConfig, folder: Folder, new: Mapping[str, Any]) -> Task:
    """One member: in its recorded order when it is there, else in the run's."""
    recorded = folder.recorded_order()
    order = new if recorded is None else recorded
    if (job.mode != "auto" and order["mode"] != job.mode) or (
        job.window_rows is not None and order.get("window_rows") != job.window_rows
    ):
        raise MismatchError(
            f"{folder.path}: trained in order {dict(order)}, asked mode {job.mode}, window_rows {job.window_rows}; "
            "leave both options out to go on, or choose another --out"
        )
    return Task(folder, order, folder.step(), folder.final() is not None)


def stream_memory(rows: SplitLayout, task: Task) -> int:
    """Bytes that feeding takes on the host: batches ahead, the normalised batch, the bookkeeping, and of a compressed
    store two windows."""
    layout = rows.layout
    row = layout.d_model * layout.torch_dtype.itemsize
    batches: int = task.config.batch_size * (row * (AHEAD + 1) + 2 * layout.d_model * 4)
    window_rows: int = min(task.order.get("window_rows", 0), rows.n_rows) if layout.codec != "none" else 0
    return batches + 17 * rows.n_rows + 2 * row * window_rows


def memory_bytes(config: TrainConfig, d_model: int, device: torch.device) -> dict[str, int]:
    """Bytes of one member by part: weights (with the products' copy), optimiser, counters; activations and gradients are
    those of the member that is stepping (SHARED_PARTS). `config.dtype` is resolved."""
    low = product_dtype(config.dtype).itemsize
    wide = max(low, 4)
    n_rows, width, shape = config.batch_size, config.width, config.sae_config(d_model)
    n_weights = sum(torch.Size(size).numel() for size in initial_shapes(config, d_model).values())
    matrices = 2 * d_model * width
    n_latent_arrays = 2 + (shape.layernorm != "none" or shape.activation == "jumprelu")
    chunk = min(CACHE_NUMBERS, n_rows * width) if device.type == "cpu" else n_rows * width
    n_chunks = 6 if shape.layernorm != "none" else 3
    rows = n_rows * d_model * (low * (1 + shape.n_levels + bool(config.aux_k)) + 3 * wide)
    pool = min(2 * config.aux_k, width) * (n_rows * 3 + d_model) * low
    return {
        "weights": n_weights * wide + (matrices * low if low != wide else 0),
        "optimiser": 2 * n_weights * wide,
        "counters": width * (8 + 2 * wide) + 8 * d_model + n_held(config) * d_model * low,
        "activations": n_latent_arrays * n_rows * width * low + n_chunks * chunk * wide + rows + pool,
        "gradients": matrices * low,
    }


def member_memory(rows: SplitLayout, task: Task, device: torch.device) -> dict[str, int]:
    """Bytes by part, with the snapshots from which its checkpoints are written."""
    parts = memory_bytes(task.config, rows.layout.d_model, device)
    snapshot = 2 * parts["optimiser"] + parts["counters"]  # weights and both moments; the SAE
    return parts | {"snapshot": snapshot, "held out": held_out.memory_bytes(task.config, rows.layout.d_model)}


def pass_memory(rows: SplitLayout, tasks: Sequence[Task], device: torch.device) -> dict[str, int]:
    """Bytes by part that members side by side take."""
    parts = [member_memory(rows, task, device) for task in tasks]
    shared = (*SHARED_PARTS, "snapshot", "held out")
    total = {name: (max if name in shared else sum)(part[name] for part in parts) for name in parts[0]}
    total["snapshot"] = max(total["snapshot"], min(sum(part["snapshot"] for part in parts), PENDING_BYTES))
    return total | {"feed": stream_memory(rows, tasks[0])}


def free_memory(device: torch.device) -> int:
    """Bytes that this process may use where members live; processes on one machine share its memory evenly."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return available_memory() // n_processes


RESERVE = 0.1
"""Share of a device's free memory that rows leave alone: what kernels and libraries take beside what is planned."""


def place_on_device(store: Store, tasks: Sequence[Task], device: torch.device, free: int) -> Place | None:
    """Where the rows of a pass lie on the device when its members are accounted for: all of the store, two windows of it, or
    (None) not there. `free`: bytes of device memory before there are members. On a CPU they stay where they are."""
    if device.type != "cuda":
        return None
    members = sum(on_device(pass_memory(store.train.shape, tasks, device), device).values())
    return place_for(store.train, make_order(store, tasks[0]), int(free * (1 - RESERVE)) - members)


def make_passes(rows: SplitLayout, tasks: Sequence[Task], device: torch.device, free: int) -> list[list[Task]]:
    """Unfinished members in passes over the store: one stream a pass, as many side by side as fit into `free` bytes.

    Raises PipelineError when one alone does not fit.
    """
    passes: list[list[Task]] = []
    for task in sorted((task for task in tasks if not task.finished), key=lambda task: task.step):
        alone = sum(on_device(pass_memory(rows, [task], device), device).values())
        if alone > free:
            raise PipelineError(
                f"{task.folder.name} needs {human_bytes(alone)} of memory, {human_bytes(free)} are free on {device}; "
                "lower --width or --batch-size, or free some"
            )
        for group in passes:
            together = on_device(pass_memory(rows, [*group, task], device), device)
            if group[0].stream == task.stream and sum(together.values()) <= free:
                group.append(task)
                break
        else:
            passes.append([task])
    return passes


def memory_text(parts: Mapping[str, int]) -> str:
    """1.3 GB (weights 0.6 GB, …)."""
    return f"{human_bytes(sum(parts.values()))} ({', '.join(f'{name} {human_bytes(n)}' for name, n in parts.items())})"


def on_device(parts: Mapping[str, int], device: torch.device) -> dict[str, int]:
    """The parts that lie where members live: on an accelerator all but the feed; a snapshot passes through its memory."""
    if device.type == "cpu":
        return dict(parts)
    return {name: n for name, n in parts.items() if name != "feed"}


def disk_bytes(rows: SplitLayout, tasks: Sequence[Task], keep: Keep) -> int:
    """Bytes that unfinished members will have on disk at most: kept checkpoints, state, and one of each being written."""
    total = 0
    for task in tasks:
        if task.finished:
            continue
        config = task.config
        parts = memory_bytes(config, rows.layout.d_model, torch.device("cpu"))
        weights, state = (
            4 * (2 * rows.layout.d_model + 4) * config.width,
            parts["optimiser"] * 3 // 2 + parts["counters"],
        )
        steps = {*range(config.checkpoint_every, config.steps, config.checkpoint_every), config.steps}
        total += (len(keep.kept(steps)) + 1) * weights + state
    largest = max(
        (2 * 4 * 3 * rows.layout.d_model * task.config.width for task in tasks if not task.finished), default=0
    )
    return total + largest


def estimate_seconds(rows: SplitLayout, tasks: Sequence[Task], device: torch.device) -> float:
    """A rough time for the unfinished members: steps of each kind of them on made-up rows, measured now."""
    left = [(task.config, task.config.steps - task.step) for task in tasks if not task.finished]
    measured = {
        kind: step_seconds(kind, rows.layout.d_model, device) for kind in {kind_of(config) for config, _ in left}
    }
    return sum(n_steps * measured[kind_of(config)] for config, n_steps in left)


def kind_of(config: TrainConfig) -> TrainConfig:
    """The config without what a step takes no other time for."""
    return dataclasses.replace(config, seed=0, data_seed=0, init_from="")


def step_seconds(config: TrainConfig, d_model: int, device: torch.device) -> float:
    """Seconds of one step of such a member, the best of three."""
    scratch, center = Scratch(device), torch.zeros(d_model, device=device)
    member = make_member(config, d_model, center, 1.0, device, scratch)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(config.batch_size, d_model, generator=generator).to(device) / d_model**0.5
    batch = make_normalise(config, device, scratch)(x, center.to(member.wide), 1.0)
    return measured_seconds(lambda: member.step(batch), device)

"""What a training run will do, before it does it: members, passes over the store, memory, disk and time."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.base.errors import MismatchError, PipelineError, UsageError
from pipeline.base.files import human_bytes, is_url
from pipeline.base.memory import available_memory
from pipeline.base.runtime import measured_seconds, world_size
from pipeline.store.layout import SplitLayout
from pipeline.store.split import open_bytes
from train import held_out
from train.config import Mode, Sparse, TrainConfig
from train.feed.loader import AHEAD, WINDOW_ROWS, resolve_mode
from train.feed.order import MOST_HELD, Order
from train.feed.resident import Place, place_for
from train.folder import Folder, Keep
from train.step.fused.choice import make_normalise, member_kind
from train.step.member import Pairs, Target, product_dtype
from train.step.sample import n_held
from train.step.scratch import CACHE_NUMBERS, Scratch
from train.step.sparse import is_sparse
from train.step.weights import initial_shapes
from train.stores import Stores

CACHE_SIZE = 100 * 10**9
"""Bytes that a cache of remote chunks may take where nobody says."""
PENDING_BYTES = 2 * 10**9
"""Snapshots that may wait to be written before training waits for the disk; one of any size always may. On CUDA, where members
are not in the host's memory, a quarter of what is free there may, if that is more."""

SHARED_PARTS = ("activations", "gradients")
"""Parts that all members on a device share: count the largest member's once, not the sum."""


@dataclass(frozen=True)
class RunConfig:
    """One `python -m train`: which members, and what may differ from machine to machine. Raises UsageError.

    mode, window_rows: the order of rows (`order.py`); a member that is there goes on in its own unless another is asked
    for. threads: that gather rows. keep: which checkpoints stay (`Keep`). log: besides metrics.jsonl, which is always
    written. keep_state: a finished member's training state stays too, so that it can be extended. checkpoint_minutes: write
    the training state every so many minutes, and not with every checkpoint of the SAE. data_parallel: all processes of
    torchrun train every member together, instead of sharing members out. cuda_graphs: record steps and replay them, on
    CUDA; for small SAEs, whose kernels take longer to launch than to run. sparse: products over active latents alone
    (`step/sparse.py`). extend: a new member begins with the state of a
    shorter one that is the same but for its steps (`extend.py`). target: members are transcoders, from the rows of `store` to
    those of this one. Stores may be at a URL; cache, cache_size: a folder in which their chunks are kept, and its most bytes.
    """

    store: Path | str
    out: Path
    members: tuple[TrainConfig, ...]
    device: str = "auto"
    mode: Mode = "auto"
    window_rows: int | None = None
    threads: int = 2
    keep: str = "last:3,every:1000"
    keep_state: bool = False
    checkpoint_minutes: float | None = None
    log: tuple[str, ...] = ("jsonl",)
    verify_first: bool = False
    data_parallel: bool = False
    cuda_graphs: bool = False
    sparse: Sparse = "auto"
    extend: bool = False
    target: Path | str | None = None
    cache: Path | None = None
    cache_size: int = CACHE_SIZE

    @property
    def is_remote(self) -> bool:
        """Whether a store is at a URL, so that its rows are read into buffers."""
        return is_url(self.store) or (self.target is not None and is_url(self.target))

    @property
    def n_together(self) -> int:
        """Processes that train each member together."""
        return world_size() if self.data_parallel else 1

    def __post_init__(self) -> None:
        if not self.members:
            raise UsageError("the grid is empty: no member to train; give each repeated option at least one value")
        if self.threads < 1 or (self.window_rows is not None and self.window_rows < 1):
            raise UsageError("--threads and --window-rows must be at least 1")
        if self.window_rows is not None and self.mode == "global":
            raise UsageError("--window-rows goes with --mode window; a global order has no windows")
        if self.data_parallel and (odd := [c.batch_size for c in self.members if c.batch_size % world_size()]):
            raise UsageError(f"--batch-size {odd[0]} does not divide evenly over {world_size()} processes")
        if self.target is None and any(config.skip for config in self.members):
            raise UsageError("--skip is of transcoders; give --target, the store of the rows that they are to make")
        if self.checkpoint_minutes is not None and not 0 < self.checkpoint_minutes < math.inf:
            raise UsageError(f"--checkpoint-minutes {self.checkpoint_minutes}: must be above 0")
        if self.sparse == "on":
            for config in self.members:
                is_sparse("on", config, torch.device("cpu"), is_transcoder=self.target is not None)
        if self.cache is not None and not self.is_remote:
            raise UsageError("--cache is for stores at a URL; a local one is read where it is")
        Keep.parse(self.keep)


@dataclass(frozen=True)
class Task:
    """One member and where it stands. `target`: the rows that it makes, where it is a transcoder. `sparse`: as the run chose.
    `is_remote`: a store is at a URL."""

    folder: Folder
    order: Mapping[str, Any]
    step: int
    finished: bool
    target: SplitLayout | None = None
    sparse: Sparse = "auto"
    is_remote: bool = False

    @property
    def d_out(self) -> int | None:
        """Dimensions of the rows that a transcoder makes."""
        return None if self.target is None else self.target.layout.d_model

    @property
    def config(self) -> TrainConfig:
        """Its config, dtype resolved."""
        return self.folder.config

    def is_sparse(self, device: torch.device) -> bool:
        """Whether it steps with sparse products on the device."""
        return is_sparse(self.sparse, self.config, device, is_transcoder=self.target is not None)

    @property
    def stream(self) -> tuple[Any, ...]:
        """Members with equal streams can be fed by the same batches."""
        c = self.config
        return (c.data_seed, c.batch_size, c.max_norm, c.dtype == "float64", tuple(sorted(self.order.items())))

    @property
    def status(self) -> str:
        """In a word."""
        return "finished" if self.finished else f"at step {self.step}" if self.step else "new"


def make_order(stores: Stores, task: Task, process: int = 0) -> Order:
    """The order of rows of a member's stream; of one in `parts`, that of a process's own."""
    parts, window = task.order.get("parts", 1), task.order.get("window_rows")
    own = window if window is None else -(-window // parts)
    kept, computed = stores.kept("train", task.config.max_norm), task.order["mode"] == "computed"
    return Order(kept, task.config.data_seed, own, (process % parts, parts), computed)


def make_tasks(
    job: RunConfig, stores: Stores, members: Sequence[TrainConfig], device: torch.device, free: int
) -> list[Task]:
    """Where every member stands. `members` have their dtype resolved. On CUDA, with `free` bytes, `auto` gives new members an
    order in windows where all rows are not to lie beside them in its memory, but two windows are. Raises MismatchError for a
    folder of another config."""

    def standing(job_of_order: RunConfig) -> list[Task]:
        new, target = new_order(job_of_order, stores.train.shape), stores.target_layout
        return [make_task(job, Folder(job.out, config, stores.identity(config)), new, target) for config in members]

    def are_there(tasks: Sequence[Task]) -> bool:
        groups = make_passes(stores.train.shape, tasks, device, free)
        return all(place_on_device(stores, group, device, free) is not None for group in groups)

    tasks = standing(job)
    if device.type != "cuda" or job.mode != "auto" or are_there(tasks):
        return tasks
    in_windows = standing(dataclasses.replace(job, mode="window"))
    return in_windows if are_there(in_windows) else tasks


def planned_tasks(
    job: RunConfig, rows: SplitLayout, members: Sequence[TrainConfig], target: SplitLayout | None = None
) -> list[Task]:
    """The members of a store still to be made, `target` beside it. Raises MismatchError when one is there, which another store
    has made."""
    tasks = [
        Task(Folder(job.out, config, {}), new_order(job, rows), 0, False, target, job.sparse) for config in members
    ]
    for task in tasks:
        if task.folder.path.exists():
            raise MismatchError(
                f"{task.folder.path}: trained on another store than the one to be made; choose another --out"
            )
    return tasks


def as_data(tasks: Sequence[Task], passes: Sequence[Sequence[Task]]) -> dict[str, Any]:
    """What a process that plans for others tells them, as JSON data; without the configs, which all have."""
    stand = [{"order": dict(task.order), "step": task.step, "finished": task.finished} for task in tasks]
    return {"tasks": stand, "passes": [[tasks.index(task) for task in group] for group in passes]}


def from_data(
    job: RunConfig, stores: Stores, members: Sequence[TrainConfig], data: Mapping[str, Any]
) -> tuple[list[Task], list[list[Task]]]:
    """The tasks of these members, and the passes, that another process told."""
    folders = [Folder(job.out, config, stores.identity(config)) for config in members]
    stands = zip(folders, data["tasks"], strict=True)
    more: dict[str, Any] = {"target": stores.target_layout, "sparse": job.sparse, "is_remote": job.is_remote}
    tasks = [Task(folder, **more, **stand) for folder, stand in stands]
    return tasks, [[tasks[n] for n in group] for group in data["passes"]]


def new_order(job: RunConfig, rows: SplitLayout) -> dict[str, Any]:
    """The order of rows of a member that is new (`order.py`): FORMAT.md, "Training folder"."""
    mode = resolve_mode(job.mode, rows, is_remote=job.is_remote)
    order: dict[str, Any] = {"mode": "computed" if mode == "global" and rows.n_rows > MOST_HELD else mode}
    if mode == "window":
        order["window_rows"] = job.window_rows or WINDOW_ROWS
        if job.is_remote and (parts := job.n_together) > 1:
            order["parts"] = parts
    return order


def make_task(job: RunConfig, folder: Folder, new: Mapping[str, Any], target: SplitLayout | None) -> Task:
    """One member: in its recorded order when it is there, else in the run's."""
    recorded = folder.recorded_order()
    order = new if recorded is None else recorded
    mode = "global" if order["mode"] == "computed" else order["mode"]
    if (job.mode != "auto" and mode != job.mode) or (
        job.window_rows is not None and order.get("window_rows") != job.window_rows
    ):
        raise MismatchError(
            f"{folder.path}: trained in order {dict(order)}, asked mode {job.mode}, window_rows {job.window_rows}; "
            "leave both options out to go on, or choose another --out"
        )
    if (parts := order.get("parts", 1)) > 1 and parts != job.n_together:
        raise MismatchError(
            f"{folder.path}: trained by {parts} processes together, each on its own chunks of a store at a URL; start as many "
            "with torchrun and --data-parallel, or choose another --out"
        )
    if mode == "global" and job.is_remote:
        raise MismatchError(
            f"{folder.path}: trained in global order, which needs a local store; copy it with python -m pipeline stage URL "
            "PATH, or choose another --out"
        )
    return Task(folder, order, folder.step(), folder.final() is not None, target, job.sparse, job.is_remote)


def stream_memory(rows: SplitLayout, task: Task) -> int:
    """Bytes that feeding takes on the host: batches ahead, the normalised batch, the order and the open split, and of a
    compressed store or one at a URL two windows; of a transcoder twice."""
    total = 0
    for part in (rows, *([] if task.target is None else [task.target])):
        layout = part.layout
        row = layout.d_model * layout.torch_dtype.itemsize
        is_buffered = layout.codec != "none" or task.is_remote
        batches: int = task.config.batch_size * (row * (AHEAD + 1) + 2 * layout.d_model * 4)
        window_rows: int = min(task.order.get("window_rows", 0), part.n_rows) if is_buffered else 0
        computed = task.order["mode"] == "computed"
        order = Order.n_bytes(part.n_rows, layout.chunk_rows, task.order.get("window_rows"), computed)
        total += batches + order + 2 * row * window_rows + open_bytes(part, at_url=task.is_remote)
    return total


def memory_bytes(
    config: TrainConfig, d_model: int, device: torch.device, d_out: int | None = None, is_sparse: bool = False
) -> dict[str, int]:
    """Bytes of one member by part: weights (with the products' copy), optimiser, counters; activations and gradients are
    those of the member that is stepping (SHARED_PARTS). `config.dtype` is resolved; `d_out`: of a transcoder; `is_sparse`: with
    lists of active latents, which have room for all on CUDA, and a gradient's copy elsewhere."""
    low = product_dtype(config.dtype).itemsize
    wide = max(low, 4)
    n_rows, width, shape = config.batch_size, config.width, config.sae_config(d_model, d_out)
    sizes = {name: math.prod(size) for name, size in initial_shapes(config, d_model, d_out).items()}
    n_weights, made = sum(sizes.values()), shape.d_made
    matrices = sizes["W_enc"] + sizes["W_dec"] + sizes.get("W_skip", 0)
    n_latent_arrays = 2 + (shape.layernorm != "none" or shape.activation == "jumprelu")
    chunk = min(CACHE_NUMBERS, n_rows * width) if device.type == "cpu" else n_rows * width
    n_chunks = 6 if shape.layernorm != "none" else 3
    rows = n_rows * (low * (d_model + made * (shape.n_levels + bool(config.aux_k) + config.skip)) + 3 * made * wide)
    rows += n_rows * made * wide * (config.skip + (d_out is not None))
    lists = n_rows * width * 8 if device.type == "cuda" else width * d_model * low + config.k * n_rows * 64
    pool = min(2 * config.aux_k, width) * (n_rows * 3 + made) * low
    return {
        "weights": n_weights * wide + (matrices * low if low != wide else 0),
        "optimiser": 2 * n_weights * wide,
        "counters": width * (8 + 2 * wide) + 8 * made + n_held(config) * d_model * low,
        "activations": n_latent_arrays * n_rows * width * low
        + n_chunks * chunk * wide
        + rows
        + pool
        + lists * is_sparse,
        "gradients": matrices * low,
    }


def member_memory(rows: SplitLayout, task: Task, device: torch.device) -> dict[str, int]:
    """Bytes by part, with the snapshots from which its checkpoints are written."""
    d_model = rows.layout.d_model
    parts = memory_bytes(task.config, d_model, device, task.d_out, task.is_sparse(device))
    snapshot = 2 * parts["optimiser"] + parts["counters"]  # weights and both moments; the SAE
    return parts | {"snapshot": snapshot, "held out": held_out.memory_bytes(task.config, d_model, task.d_out)}


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
        gc.collect()  # members of an earlier pass are in cycles
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return available_memory() // n_processes


def pending_bytes(device: torch.device) -> int:
    """Bytes of snapshots that may wait to be written."""
    return PENDING_BYTES if device.type == "cpu" else max(PENDING_BYTES, free_memory(torch.device("cpu")) // 4)


RESERVE = 0.1
"""Share of a device's free memory that rows leave alone: what kernels and libraries take beside what is planned."""


def place_on_device(stores: Stores, tasks: Sequence[Task], device: torch.device, free: int) -> Place | None:
    """Where the rows of a pass lie on the device when its members are accounted for: all of the store, two windows of it, or
    (None) not there. `free`: bytes of device memory before there are members. On a CPU they stay where they are."""
    if device.type != "cuda":
        return None
    members = sum(on_device(pass_memory(stores.train.shape, tasks, device), device).values())
    splits = [store.train for store in stores.all]
    return place_for(splits[0], make_order(stores, tasks[0]), int(free * (1 - RESERVE)) - members, *splits[1:])


def largest_memory(rows: SplitLayout, tasks: Sequence[Task], device: torch.device) -> int:
    """Bytes that the largest of the unfinished members takes alone, where members live."""
    alone = (on_device(pass_memory(rows, [task], device), device) for task in tasks if not task.finished)
    return max((sum(parts.values()) for parts in alone), default=0)


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
        d_model, d_out = rows.layout.d_model, task.d_out
        parts = memory_bytes(config, d_model, torch.device("cpu"), d_out)
        weights, state = (
            4 * (d_model + (d_out or d_model) + 4) * config.width + 4 * d_model * (d_out or 0) * config.skip,
            parts["optimiser"] * 3 // 2 + parts["counters"],
        )
        total += (keep.n_kept(config.checkpoint_every, config.steps) + 1) * weights + state
    largest = max(
        (
            4 * 3 * (rows.layout.d_model + (task.d_out or rows.layout.d_model)) * task.config.width
            for task in tasks
            if not task.finished
        ),
        default=0,
    )
    return total + largest


def estimate_seconds(rows: SplitLayout, tasks: Sequence[Task], device: torch.device) -> float:
    """A rough time for the unfinished members: steps of each kind of them on made-up rows, measured now."""
    left = [task for task in tasks if not task.finished]
    d_model = rows.layout.d_model
    measured = {
        kind: step_seconds(kind[0], d_model, device, kind[1], kind[2])
        for kind in {time_kind(task, device) for task in left}
    }
    return sum((task.config.steps - task.step) * measured[time_kind(task, device)] for task in left)


def cost(rows: SplitLayout, passes: Sequence[Sequence[Task]], device: torch.device) -> dict[str, float]:
    """Of one process: bytes of `memory`, wherever, of its largest pass; `steps` that are left and their `flop`; bytes of rows
    `read` for them, by a pass once for all of its members."""
    row = rows.layout.d_model * rows.layout.torch_dtype.itemsize
    found = {"memory": 0.0, "steps": 0.0, "flop": 0.0, "read": 0.0}
    for tasks in passes:
        left = [(task, (task.config.steps - task.step) * task.config.batch_size) for task in tasks if not task.finished]
        found["memory"] = max(found["memory"], sum(pass_memory(rows, tasks, device).values()))
        found["read"] += row * max((n_rows for _, n_rows in left), default=0)
        for task, n_rows in left:
            shapes = initial_shapes(task.config, rows.layout.d_model, task.d_out)
            n_weights = sum(math.prod(shapes[name]) for name in ("W_enc", "W_dec"))
            found["steps"] += task.config.steps - task.step
            found["flop"] += STEP_OVER_WEIGHTS * n_weights * n_rows
    return found


STEP_OVER_WEIGHTS = 6.0
"""Operations of a step a row and a weight: a product forward and two backward, of two operations each."""


def time_kind(task: Task, device: torch.device) -> tuple[TrainConfig, int | None, bool]:
    """What a step's time depends on: the config without what it does not, d_out of a transcoder, sparse products."""
    config = dataclasses.replace(task.config, seed=0, data_seed=0, init_from="")
    return config, task.d_out, task.is_sparse(device)


def step_seconds(
    config: TrainConfig, d_model: int, device: torch.device, d_out: int | None = None, is_sparse: bool = False
) -> float:
    """Seconds of one step of such a member, of a transcoder with `d_out`, the best of three."""
    wide = torch.float64 if config.dtype == "float64" else torch.float32
    scratch, center = Scratch(device), torch.zeros(d_model, device=device, dtype=wide)
    target = None if d_out is None else Target(torch.zeros(d_out, device=device, dtype=wide), 1.0)
    kind = member_kind(config, device, is_transcoder=target is not None)
    member = kind(config, d_model, center, 1.0, device, scratch, target=target, is_sparse=is_sparse)
    generator = torch.Generator().manual_seed(0)

    def made_up(d: int) -> Tensor:
        rows: Tensor = torch.randn(config.batch_size, d, generator=generator).to(device) / d**0.5
        return rows

    if target is None:
        batch = make_normalise(config, device, scratch)(made_up(d_model), center, 1.0)
    else:
        batch = Pairs(center, 1.0, target).normalise(made_up(d_model), made_up(len(target.center)))
    return measured_seconds(lambda: member.step(batch), device)

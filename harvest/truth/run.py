"""Writing a store of known features: plan, prepare with the truth beside the rows, make the shards, finish."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from harvest.group import workers
from harvest.truth.forest import make_directions
from harvest.truth.rows import BLOCK, Firings, Rows
from harvest.truth.spec import Spec, load_spec
from pipeline.base.errors import DamagedError, StoreError, UsageError
from pipeline.base.files import beside, disk_errors, hash_config, human_bytes
from pipeline.base.progress import Progress, format_seconds, say, silenced
from pipeline.base.runtime import maker, rank, versions, world_size
from pipeline.store.layout import CHUNK_ROWS, EVAL_SHARE, estimate_bytes, shard_rows_for
from pipeline.store.makers import Maker, record_makers, require_extender
from pipeline.store.prepare import SplitTokens, locked, prepare, require_space, resume
from pipeline.store.reader import Store, finished
from pipeline.store.writer import StoreWriter, writing_bytes

COMPUTE = ("torch", "numpy")
"""The packages that compute rows."""
AHEAD = 4
"""Blocks of rows that are made ahead of the one that is written."""
ROWS_PER_SECOND = 200_000
"""What one core makes of `forest`, less what disks take: for estimates of time."""


@dataclass(frozen=True)
class TruthConfig:
    """A harvest of known features. `truth`: path of a spec or the name of a shipped one; `tokens` and `eval_tokens` count
    rows; `context` rows are one sequence. Raises UsageError when fields contradict."""

    truth: str
    store: str
    tokens: int = 10_000_000
    eval_tokens: int | None = None
    context: int = 128
    seed: int = 0
    dtype: Literal["auto", "bf16", "float32"] = "bf16"
    shard_rows: int | None = None
    chunk_rows: int | None = None
    codec: Literal["none", "lz4", "zstd"] = "none"
    mixed: bool = False

    def __post_init__(self) -> None:
        if self.context < 1:
            raise UsageError(f"--context {self.context}: a sequence needs at least 1 row")
        for name, value in (("--tokens", self.tokens), ("--eval-tokens", self.eval_tokens)):
            if value is not None and value < self.context:
                raise UsageError(f"{name} {value}: fewer than one sequence of {self.context} rows")


@dataclass(frozen=True)
class TruthPlan:
    """A harvest with nothing left open: the spec, and the config that the store records."""

    config: TruthConfig
    spec: Spec
    store_config: dict[str, Any]
    n_train: int
    n_eval: int

    @property
    def n_rows(self) -> int:
        """Rows of both splits."""
        return (self.n_train + self.n_eval) * self.config.context

    @property
    def estimate(self) -> int:
        """Bytes of the finished store, nearly: how many features will fire is known on average."""
        from harvest.truth.forest import make_forest

        forest = make_forest(self.spec)
        rows = self.n_eval * self.config.context
        firings = float(forest.probability.sum()) * rows
        extra = self.spec.n_features * (4 * self.spec.d_model + 24) + 8 * rows + round(8.2 * firings)
        return estimate_bytes(self.store_config, self.n_train, self.n_eval, extra)


def run_truth(config: TruthConfig, *, repair: bool = False, quiet: bool = False) -> str:
    """Write the store of a spec, or go on with one that was stopped; returns its path.

    Under torchrun rank 0 prepares and finishes, and every rank makes its own shards. Raises any PipelineError.
    """
    with workers() as group, silenced(quiet):
        plan = make_plan(config)
        makers = group.gathered(maker(torch.device("cpu"), COMPUTE))
        if rank() == 0:
            say(describe(plan))
        with locked([config.store]) if rank() == 0 else contextlib.nullcontext():
            if rank() == 0:
                require_space(config.store, [config.store], plan.estimate)
                prepare_store(plan, makers, repair)
            group.barrier()
            write_shards(StoreWriter.open(config.store), plan)
            group.barrier()
            if rank() == 0:
                say(finished(StoreWriter.open(config.store).finish()))
            group.barrier()
    return config.store


def planned_truth(config: TruthConfig) -> dict[str, Any]:
    """Say what would be done, and return it as JSON data, as a model's harvest does."""
    plan = make_plan(config)
    seconds = plan.n_rows / ROWS_PER_SECOND
    say(f"{describe(plan)}\ntime     about {format_seconds(seconds)}")
    n_sequences = {"train": plan.n_train, "eval": plan.n_eval}
    store = {"layer": 0, "path": config.store, "config": plan.store_config, "n_sequences": n_sequences}
    spec, held = plan.spec, writing_bytes(plan.store_config, plan.n_train, plan.n_eval)
    block = BLOCK * (12 * spec.d_model + 9 * sum(trees.count for trees in spec.trees))
    memory = float(held + (AHEAD + 1) * block + 16 * spec.n_features * spec.d_model)
    cost = {"flop": 0.0, "seconds": seconds, "memory": memory, "suffix_flop": 0.0, "suffix_seconds": 0.0}
    return {"stores": [store], "bytes": plan.estimate, "cost": cost}


def make_plan(config: TruthConfig) -> TruthPlan:
    """Read and check the spec, settle sizes. Raises UsageError."""
    spec = load_spec(config.truth)
    chunk = config.chunk_rows or max(CHUNK_ROWS // config.context, 1) * config.context
    n_train = config.tokens // config.context
    held = held_store(config.store)
    n_eval = (
        config.eval_tokens // config.context if config.eval_tokens is not None else held.eval.n_sequences if held else 0
    )
    shard = config.shard_rows or (held.layout.shard_rows if held else shard_rows_for(config.tokens, chunk))
    data = spec.to_dict()
    sha256 = hash_config(data)
    store_config = {
        "kind": "truth",
        "truth": data,
        "model": f"truth:{sha256[:10]}",
        "revision": None,
        "weights_sha256": sha256,
        "layer": 0,
        "corpus": None,
        "d_model": spec.d_model,
        "context": config.context,
        "seed": config.seed,
        "dtype": "bf16" if config.dtype == "auto" else config.dtype,
        "shard_rows": shard,
        "chunk_rows": chunk,
        "codec": config.codec,
    }
    return TruthPlan(config, spec, store_config, n_train, n_eval or max(1, n_train // EVAL_SHARE))


def held_store(store: str) -> Store | None:
    """The store that is there already, of which what is not asked for is taken."""
    try:
        return Store.load(store)
    except (StoreError, DamagedError):
        return None


def describe(plan: TruthPlan) -> str:
    """What will be done, in a few lines."""
    spec, c = plan.spec, plan.config
    return (
        f"truth    {c.truth}: {spec.n_features:,} features in {spec.d_model} dimensions, seed {c.seed}\n"
        f"rows     {plan.n_train * c.context:,} for training, {plan.n_eval * c.context:,} for evaluation\n"
        f"store    {c.store}: about {human_bytes(plan.estimate)}"
    )


def prepare_store(plan: TruthPlan, makers: Sequence[Maker], repair: bool) -> None:
    """Make the store ready for its shards, its truth written beside them."""
    path, mixed = plan.config.store, plan.config.mixed
    if not repair:
        require_extender(path, plan.n_train, makers, mixed=mixed)
    writer = None if repair else resume(path, plan.store_config, plan.n_train, plan.n_eval)
    if writer is None:
        train, evaluation = (
            SplitTokens(None, np.broadcast_to(np.False_, (n, plan.config.context))) for n in (plan.n_train, plan.n_eval)
        )
        writer = prepare(path, plan.store_config, train, evaluation, versions(), extras=truth_of(plan), repair=repair)
    writer.sweep()
    if writer.pending("train") or writer.pending("eval"):
        record_makers(writer.store, makers, mixed=mixed)


def truth_of(plan: TruthPlan) -> dict[str, npt.NDArray[Any]]:
    """The arrays that the store carries beside its rows: FORMAT.md, "Truth". Raises UsageError when nothing ever fires."""
    rows = Rows(plan.spec, make_directions(plan.spec), plan.config.seed)
    fired, forest = spooled(rows, plan.n_eval * plan.config.context, beside(plan.config.store)), rows.forest
    if fired is None:
        raise UsageError(f"--truth {plan.config.truth}: no feature fires on an evaluation row; raise its probabilities")
    return {
        "truth/directions": rows.directions.numpy(),
        "truth/parent": forest.parent,
        "truth/depth": forest.depth,
        "truth/probability": forest.probability,
        "truth/magnitude": forest.mean,
        "eval/truth/start": fired.start,
        "eval/truth/feature": fired.feature,
        "eval/truth/strength": fired.strength,
    }


def spooled(rows: Rows, n_rows: int, folder: Path) -> Firings | None:
    """What fires on the first evaluation rows, block by block into unnamed files in `folder`, so that memory does not grow with
    them; None where nothing does. Raises DiskError."""
    n = 0
    with disk_errors(folder), contextlib.ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        start, feature, strength = (stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(3))
        start.write(np.zeros(1, np.int64).tobytes())
        for part in rows.firings_in_blocks("eval", 0, n_rows):
            start.write((part.start[1:] + n).tobytes())
            feature.write(part.feature.tobytes())
            strength.write(part.strength.tobytes())
            n += len(part.feature)
        for file in (start, feature, strength):
            file.flush()
        if not n:
            return None
        kinds = ((start, np.int64), (feature, np.int32), (strength, np.float32))
        return Firings(*(np.memmap(file, kind, "r") for file, kind in kinds))


def write_shards(writer: StoreWriter, plan: TruthPlan) -> None:
    """Make this process's shards, with the directions that the store carries."""
    rows = Rows(plan.spec, writer.store.extra("truth/directions"), plan.config.seed)
    shards = [(name, k) for name in ("train", "eval") for k in writer.pending(name)][rank() :: world_size()]
    ranges = [writer.split(name).shard_rows_range(k) for name, k in shards]
    with Progress(sum(b - a for a, b in ranges), "harvest", "row") as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for (name, k), (first, stop) in zip(shards, ranges):
            with writer.shard(name, k) as shard:
                for block in in_order(pool, rows, name, first, stop):
                    shard.write(block.to(writer.layout.torch_dtype))
                    bar.advance(len(block))


def in_order(
    pool: ThreadPoolExecutor, rows: Rows, split: str, first: int, stop: int
) -> Iterator[Float[Tensor, "row d_model"]]:
    """Rows first … stop − 1, made by several threads a few blocks ahead, in order."""
    ahead: deque[Future[Float[Tensor, "row d_model"]]] = deque()
    for number in range(first // BLOCK, -(-stop // BLOCK)):
        a, b = max(first, number * BLOCK), min(stop, (number + 1) * BLOCK)
        ahead.append(pool.submit(rows.rows, split, a, b))
        if len(ahead) > AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()

"""Any rows into a store of kind "rows": no tokens, no language model. From a source of files, or from Python.

    pipeline.write_store(rows, "acts.zarr")                          # an array [row, d_model] or [sequence, position, d_model]
    pipeline.write_store(buffer, "acts.zarr", n_rows=1_000_000)      # anything that yields such blocks, or single rows

Rows pass by once: every so manyth sequence goes to the evaluation split, the others to training. Files are resumed at the
first row that a missing shard needs; what only Python can make again is written anew. Either way the store counts as none
until its last shard is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.base.errors import MismatchError, UsageError
from pipeline.base.files import hash_config, human_bytes
from pipeline.base.progress import Progress, say, silenced
from pipeline.base.runtime import versions
from pipeline.imports.sources import BLOCK, FLOATS, Asked, Source, require_finite
from pipeline.imports.sources import FORMATS as FORMATS
from pipeline.store.layout import CHUNK_ROWS, EVAL_SHARE, estimate_bytes, shard_rows_for
from pipeline.store.prepare import SplitTokens, locked, prepare, require_space, resume
from pipeline.store.reader import Store
from pipeline.store.writer import ShardWriter, StoreWriter

CONTEXT = 128
"""Rows that are called a sequence where they stand alone: what is held out, and resampled for intervals, as one."""


@dataclass(frozen=True)
class Import:
    """How rows become a store. rows, eval_rows: to take in all and to hold out, up to whole sequences; None: all there are, and
    one for every EVAL_SHARE. context: of rows that stand alone. model, layer, hook: where they were taken, for the record and
    for checks against SAEs; None: what the source says. dtype: auto loses nothing (but of float64). Raises UsageError."""

    store: str
    rows: int | None = None
    eval_rows: int | None = None
    context: int | None = None
    model: str | None = None
    layer: int | None = None
    hook: str | None = None
    dtype: Literal["auto", "bf16", "float32"] = "auto"
    shard_rows: int | None = None
    chunk_rows: int | None = None
    codec: Literal["none", "lz4", "zstd"] = "none"

    def __post_init__(self) -> None:
        for name in ("rows", "eval_rows", "context", "shard_rows", "chunk_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} {value}: must be at least 1")


@dataclass(frozen=True)
class Plan:
    """An import with nothing left open. special: bool [sequence, context] over both splits, one byte that stands for all where
    the source marks none; held_out: bool [sequence]."""

    store: str
    config: dict[str, Any]
    special: npt.NDArray[np.bool_]
    held_out: npt.NDArray[np.bool_]

    @property
    def n_train(self) -> int:
        """Training sequences."""
        return int((~self.held_out).sum())

    @property
    def n_eval(self) -> int:
        """Evaluation sequences."""
        return int(self.held_out.sum())

    @property
    def estimate(self) -> int:
        """Bytes of the store."""
        return estimate_bytes(self.config, self.n_train, self.n_eval)


def make_plan(job: Import, source: Source, n_rows: int) -> Plan:
    """Settle sizes. `n_rows`: that the source has. Raises UsageError when they contradict."""
    if source.context is not None and job.context not in (None, source.context):
        raise UsageError(f"--context {job.context}: this source has sequences of {source.context} rows; leave it out")
    context = source.context or job.context or CONTEXT
    if job.rows is not None and job.rows > n_rows:
        raise UsageError(f"{job.rows:,} rows are asked for, the source has {n_rows:,}; ask for fewer")
    n = (n_rows if job.rows is None else job.rows) // context
    n_eval = max(1, n // (EVAL_SHARE + 1)) if job.eval_rows is None else -(-job.eval_rows // context)
    if n_eval >= n:
        raise UsageError(
            f"{n_rows:,} rows are {n} sequences of {context}, of which {n_eval} to hold out; give more rows"
        )
    number = np.arange(n)
    held_out = (number + 1) * n_eval // n > number * n_eval // n
    chunk = job.chunk_rows or max(CHUNK_ROWS // context, 1) * context
    places = {"model": None, "layer": 0, "hook": None} | dict(source.places)
    places |= {name: value for name in places if (value := getattr(job, name)) is not None}
    identity = {"model": places["model"]} if places["model"] else dict(source.about)
    digest = hash_config(identity)
    config = {
        "kind": "rows",
        "source": dict(source.about) | {"rows": n * context},
        "model": places["model"] or f"rows:{digest[:10]}",
        "revision": None,
        "weights_sha256": digest,
        "layer": places["layer"],
        "hook": places["hook"],
        "corpus": None,
        "d_model": source.d_model,
        "context": context,
        "seed": 0,
        "dtype": source.dtype if job.dtype == "auto" else job.dtype,
        "shard_rows": job.shard_rows or shard_rows_for(n * context, chunk),
        "chunk_rows": chunk,
        "codec": job.codec,
    }
    special = no_rows(n, context) if source.special is None else source.special[:n]
    return Plan(job.store, config, special, held_out)


def no_rows(n: int, context: int) -> npt.NDArray[np.bool_]:
    """A mask [n, context] of no row, of one byte."""
    return np.broadcast_to(np.False_, (n, context))


def describe(plan: Plan, n_rows: int, after: str = "") -> str:
    """What will be done, in a few lines. after: said of rows beyond n_rows, of which nobody knows whether there are any."""
    config, source = plan.config, plan.config["source"]
    context, left = config["context"], n_rows - len(plan.held_out) * config["context"]
    lines = [
        f"source   {source['format']} {source['name']}: {n_rows:,} rows of {config['d_model']}, sequences of {context}",
        f"rows     {plan.n_train * context:,} for training, {plan.n_eval * context:,} for evaluation, every "
        f"{len(plan.held_out) / plan.n_eval:.3g}th sequence; {int(plan.special.sum()):,} special, {left:,} not taken{after}",
        f"store    {plan.store}: {config['dtype']}, about {human_bytes(plan.estimate)}",
    ]
    return "\n".join(lines)


def import_files(kind: str, place: Path, job: Import, asked: Asked, *, dry_run: bool = False) -> Store | None:
    """Write the store of a source of FORMATS, or go on with a stopped one; None for a dry run. Raises any PipelineError."""
    source = FORMATS[kind](place, asked)
    plan = make_plan(job, source, source.n_rows)
    say(describe(plan, source.n_rows))
    return None if dry_run else write(plan, source.blocks, again=False)


def write_store(
    rows: Float[Tensor, "row d_model"] | npt.NDArray[Any] | Iterable[Any],
    path: str | Path,
    *,
    n_rows: int | None = None,
    eval_rows: int | None = None,
    context: int | None = None,
    name: str = "python",
    model: str | None = None,
    layer: int | None = None,
    hook: str | None = None,
    dtype: Literal["auto", "bf16", "float32"] = "auto",
    shard_rows: int | None = None,
    chunk_rows: int | None = None,
    codec: Literal["none", "lz4", "zstd"] = "none",
    quiet: bool = False,
) -> Store:
    """Write a store of rows that Python makes; returns it, opened.

    rows: a tensor or array [row, d_model] or [sequence, position, d_model]; or whatever yields such blocks, or single rows
    [d_model], of floats, all of one shape but for the first dimension. n_rows: how many to take, from the first on; None: all of
    an array, or of a list or tuple of blocks. An iterator, which may have no end, needs it, and is asked for no block more.
    context: rows of a sequence where blocks have two dimensions (128). eval_rows: held out, of these; None: one for every 20.
    name, model, layer, hook: where they come from, for the record and for checks against SAEs.

    Raises UsageError (shapes, dtypes, too few rows), DamagedError (a row that is not finite), MismatchError (a finished
    store is there), DiskError; what an iterator itself raises goes through as it is. What a call that failed or was killed has
    written is no store, and is written anew by the next call, since its rows may be others.
    """
    blocks, source, n_there = from_python(rows, n_rows, name)
    after = "" if isinstance(rows, Tensor | np.ndarray | list | tuple) else ", nor what the iterator yields after them"
    options = (context, model, layer, hook, dtype, shard_rows, chunk_rows, codec)
    job = Import(str(path), n_rows, eval_rows, *options)
    with silenced(quiet):
        plan = make_plan(job, source, n_there)
        say(describe(plan, n_there, after))
        return write(plan, lambda first: checked(blocks, source), again=True)


def from_python(rows: Any, n_rows: int | None, name: str) -> tuple[Iterator[Tensor], Source, int]:
    """Blocks, what their first one says of them, and how many rows there are."""
    if isinstance(rows, Tensor | np.ndarray):
        whole = as_block(rows)
        pieces = (
            iter(torch.split(whole, max(1, BLOCK // max(1, whole[0].numel() // whole.shape[-1]))))
            if len(whole)
            else iter(())
        )
        blocks, n_there = pieces, whole.numel() // max(1, whole.shape[-1])
    elif isinstance(rows, list | tuple):
        blocks, n_there = map(as_block, rows), sum(as_block(part).shape[:-1].numel() for part in rows)
    elif n_rows is None:
        raise UsageError("an iterator does not say how many rows it has; give n_rows")
    else:
        blocks, n_there = map(as_block, iter(rows)), n_rows
    first = next(blocks, None)
    if first is None:
        raise UsageError("there are no rows")
    about = {"format": "iterator", "name": name, "files": 0}
    source = Source([], first.shape[-1], first.shape[1] if first.ndim == 3 else None, FLOATS[first.dtype], about)

    def all_blocks() -> Iterator[Tensor]:
        yield first
        yield from blocks

    return all_blocks(), source, n_there


def as_block(rows: Any) -> Tensor:
    """A tensor [row, d_model] or [sequence, position, d_model] on the CPU. Raises UsageError for what is none."""
    try:
        block = rows.detach().cpu() if isinstance(rows, Tensor) else torch.from_numpy(np.asarray(rows))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"expected rows as tensors or arrays of floats, found {type(rows).__name__} ({error})"
        ) from error
    block = block[None] if block.ndim == 1 else block
    if block.ndim not in (2, 3) or block.dtype not in FLOATS or 0 in block.shape[1:]:
        found = f"{str(block.dtype).removeprefix('torch.')} {list(block.shape)}"
        raise UsageError(f"expected floats [row, d_model] or [sequence, position, d_model], found {found}")
    return block


def checked(blocks: Iterator[Tensor], source: Source) -> Iterator[Float[Tensor, "row d_model"]]:
    """Blocks as rows. Raises UsageError for one of another shape, DamagedError for a row that is not finite."""
    first = 0
    for block in blocks:
        inner = (block.shape[1] if block.ndim == 3 else None, block.shape[-1])
        if inner != (source.context, source.d_model):
            raise UsageError(
                f"rows {first} and on: expected blocks of {source.context or 'single'} rows of {source.d_model}, found "
                f"{list(block.shape)}"
            )
        rows = block.reshape(-1, source.d_model)
        require_finite(rows, "row", first)
        first += len(rows)
        yield rows


def write(plan: Plan, blocks: Any, *, again: bool) -> Store:
    """Prepare the store, write the shards that are missing and finish it. `again`: all of them, unless it is finished.

    `blocks(first)`: rows from `first` on.
    """
    with locked([plan.store]):
        require_space(plan.store, [plan.store], plan.estimate)
        writer = prepared(plan)
        writer.sweep()
        if again and writer.store.complete:
            raise MismatchError(f"{plan.store}: holds a finished store; delete it, or choose another path")
        if again:
            for split in writer.store.splits:
                for k in range(split.n_shards):
                    writer.give_up(split.name, k)
        if not writer.store.complete:
            write_shards(writer, plan, blocks)
        store = writer.finish()
    kept = store.statistics
    say(
        f"{plan.store}: {kept.n_kept:,} rows to train on ({kept.n_special:,} special, {kept.n_massive:,} massive left out)"
    )
    return store


def prepared(plan: Plan) -> StoreWriter:
    """The writer of the store: there already, or made."""
    if (writer := resume(plan.store, plan.config, plan.n_train, plan.n_eval)) is not None:
        return writer
    context, marked = plan.config["context"], plan.special.any()
    train, evaluation = (
        SplitTokens(None, plan.special[part] if marked else no_rows(int(part.sum()), context))
        for part in (~plan.held_out, plan.held_out)
    )
    return prepare(plan.store, plan.config, train, evaluation, versions())


def write_shards(writer: StoreWriter, plan: Plan, blocks: Any) -> None:
    """Pass over the rows once from the first that a missing shard needs. Raises UsageError when they end too early, and what
    reading them raises, which is none of the store's disk."""
    context, held_out = plan.config["context"], plan.held_out
    sequence_of = {"train": np.flatnonzero(~held_out), "eval": np.flatnonzero(held_out)}
    pending = {name: writer.pending(name) for name in sequence_of}
    first, stop = span_of(writer, pending, sequence_of)
    with others_errors() as others, contextlib.ExitStack() as stack:
        sinks = {
            name: stack.enter_context(Sink(writer, name, pending[name], int((numbers < first).sum()) * context))
            for name, numbers in sequence_of.items()
        }
        bar = stack.enter_context(Progress((stop - first) * context, "import", "row"))
        at = first
        for block in sequences(others(blocks(first * context)), context, stop - first):
            out = torch.from_numpy(held_out[at : at + len(block)])
            sinks["train"].take(block[~out].flatten(0, 1))
            sinks["eval"].take(block[out].flatten(0, 1))
            at += len(block)
            bar.advance(block.shape[0] * context)
        if at < stop:
            raise UsageError(f"the rows ended after {at} of {stop} sequences of {context}; give fewer rows")


class OthersError(Exception):
    """Carries an OSError of where rows are read past what would take it for one of where they are written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


@contextlib.contextmanager
def others_errors() -> Iterator[Callable[[Iterator[Tensor]], Iterator[Tensor]]]:
    """What to pass blocks through so that an OSError of theirs leaves the context as it is."""

    def carried(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        try:
            yield from blocks
        except OSError as error:
            raise OthersError(error) from error

    found: OSError | None = None
    try:
        yield carried
    except OthersError as error:
        found = error.error
    if found is not None:  # not while another is handled, which would become its context
        raise found


def span_of(
    writer: StoreWriter, pending: Mapping[str, list[int]], sequence_of: Mapping[str, npt.NDArray[np.int64]]
) -> tuple[int, int]:
    """Sequences first … stop − 1 of the source that hold every row of a missing shard."""
    needed = []
    for name, shards in pending.items():
        for k in shards:
            a, b = (row // writer.layout.context for row in writer.split(name).shard_rows_range(k))
            needed += [int(sequence_of[name][a]), int(sequence_of[name][b - 1]) + 1]
    return (min(needed), max(needed)) if needed else (0, 0)


def sequences(blocks: Iterator[Tensor], context: int, n: int) -> Iterator[Float[Tensor, "sequence position d_model"]]:
    """The first `n` whole sequences, as they come; what is left over of a block goes with the next."""
    held: list[Tensor] = []
    n_held = 0
    for rows in blocks:
        held.append(rows)
        n_held += len(rows)
        if (take := min(n, n_held // context)) and (n_held >= BLOCK or take == n):
            whole = torch.cat(held)
            yield whole[: take * context].view(take, context, -1)
            held, n_held, n = [whole[take * context :]], n_held - take * context, n - take
        if not n:
            return
    if take := min(n, n_held // context):
        yield torch.cat(held)[: take * context].view(take, context, -1)


class Sink:
    """Takes one split's rows in order, from row `first` on, and writes those of missing shards."""

    def __init__(self, writer: StoreWriter, name: str, pending: list[int], first: int) -> None:
        self.writer, self.name, self.pending, self.row = writer, name, set(pending), first
        self.split = writer.split(name)
        self.open = contextlib.ExitStack()
        self.shard: ShardWriter | None = None

    def take(self, rows: Float[Tensor, "row d_model"]) -> None:
        """The next rows."""
        rows = rows.to(self.writer.layout.torch_dtype).contiguous()
        while len(rows):
            k = self.row // self.split.shard_rows
            start, stop = self.split.shard_rows_range(k)
            now, rows = rows[: stop - self.row], rows[stop - self.row :]
            if self.shard is None and k in self.pending and self.row == start:
                self.shard = self.open.enter_context(self.writer.shard(self.name, k))
            if self.shard is not None:
                self.shard.write(now)
            self.row += len(now)
            if self.row == stop and self.shard is not None:
                self.open.close()
                self.shard = None

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open.__exit__(kind, error, trace)

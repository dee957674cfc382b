"""The harvest stage as a list of steps: plan, check the disk, prepare the tokens, run the shards, finish."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harvest.config import HarvestConfig
from harvest.forward import harvest_shards, pending_shards
from harvest.plan import Plan, beside, make_plan
from harvest.texts import Tokens
from harvest.tokens import Pieces, mark_special, pack, scratch_array, shuffle, tokenized
from pipeline.base.errors import DamagedError, MismatchError, StoreError
from pipeline.base.files import disk_errors, free_bytes, human_bytes, lock_folder, require_free
from pipeline.base.progress import Progress, format_seconds, say
from pipeline.base.runtime import DTYPES, cpu_has_bf16, rank, versions, world_size
from pipeline.model.split_lm import SplitLM, forward_seconds
from pipeline.store.backend import is_url, make_folder
from pipeline.store.prepare import SplitTokens, prepare, resume
from pipeline.store.reader import Split, Store
from pipeline.store.split import Mask
from pipeline.store.writer import StoreWriter

Barrier = Callable[[], None]


def run(config: HarvestConfig, *, repair: bool = False, dry_run: bool = False, quiet: bool = False) -> list[str]:
    """Harvest into one store a layer, or go on with a harvest that was stopped; returns the stores' paths.

    Under torchrun rank 0 prepares and finishes, and every rank makes its own shards. Raises any PipelineError.
    """
    if dry_run:
        return [one["path"] for one in planned(config, repair=repair, quiet=quiet)["stores"]]
    with workers() as barrier:
        plan = make_plan(config, repair=repair)
        if rank() == 0 and not quiet:
            say(describe(plan))
        with locked(plan) if rank() == 0 else contextlib.nullcontext():
            if rank() == 0:
                check_space(plan)
                prepare_stores(plan, repair, quiet)
            barrier()
            harvest(plan, quiet)
            barrier()
            if rank() == 0:
                for path in plan.stores.values():
                    report(StoreWriter.open(path).finish(), quiet)
            barrier()
    return list(plan.stores.values())


@contextlib.contextmanager
def workers() -> Iterator[Barrier]:
    """The processes of torchrun, as a barrier among them; alone it does nothing."""
    if world_size() == 1:
        yield lambda: None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    try:
        yield lambda: dist.barrier() and None
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def locked(plan: Plan) -> Iterator[None]:
    """Hold every local store of the plan against a second harvest. Raises DiskError when another process has one.

    A store's folder is made for this, and taken away again where nothing came into it.
    """
    folders = [Path(path) for path in plan.stores.values() if not is_url(path)]
    with contextlib.ExitStack() as stack:
        for folder in folders:
            with disk_errors(folder):
                make_folder(folder)
                stack.callback(os.close, lock_folder(folder, "harvesting into this store"))
        try:
            yield
        finally:
            for folder in folders:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # refuses unless it is empty


def describe(plan: Plan) -> str:
    """What will be done, in a few lines, with the estimate of its size."""
    c, at_most = plan.config, "" if plan.config.codec == "none" else "at most "
    rows, n_stores = (plan.n_train + plan.n_eval) * c.context, len(plan.stores)
    free = "" if is_url(c.store) else f", {human_bytes(free_bytes(beside(c.store)))} free"
    lines = [
        f"model    {c.model}, layer {', '.join(map(str, c.layers))} of {plan.info.n_layers}, d_model {plan.info.d_model}",
        f"tokens   {plan.n_train * c.context:,} for training, {plan.n_eval * c.context:,} for evaluation, "
        f"in sequences of {c.context}, "
        + (f"BOS {plan.packing.bos} first" if plan.packing.bos is not None else "no BOS"),
        f"compute  {plan.device}, {c.dtype}, {c.attention} attention, {c.batch_size} sequences a batch",
        f"store    {c.store}: {rows:,} rows × {n_stores} stores, {at_most}{human_bytes(plan.estimate)}{free}",
    ]
    if c.dtype == "bf16" and plan.device.type == "cpu" and not cpu_has_bf16():
        lines.append("note     this CPU has no bf16 arithmetic: --dtype float32 is faster here")
    return "\n".join(lines)


def describe_cost(c: Mapping[str, float]) -> str:
    """Time and memory, roughly: products at a rate measured now, the layers that run, and what harvest adds."""
    return (
        f"time     about {format_seconds(c['seconds'])} ({c['flop']:.2g} FLOP, products measured now)\n"
        f"memory   about {human_bytes(c['memory'])}: weights of the layers that run, a batch, two shards"
    )


def cost(plan: Plan) -> dict[str, float]:
    """FLOP, seconds and bytes of memory that all of a harvest takes; and of one token in the layers after the last."""
    c, info = plan.config, plan.info
    assert c.batch_size is not None, "settled by the plan"
    prefix, suffix = info.flop(max(c.layers), trust_remote_code=c.trust_remote_code)
    flop, dtype = prefix * (plan.n_train + plan.n_eval) * c.context, DTYPES[c.dtype]
    rows = (c.batch_size * c.context * 12 + 2 * int(c.shard_rows or 0)) * info.d_model
    embedding = info.vocab * info.d_model
    return {
        "flop": flop,
        "seconds": forward_seconds(flop, dtype, plan.device, info.d_model),
        "memory": dtype.itemsize * (prefix / 2 + embedding + rows),
        "suffix_seconds": forward_seconds(suffix, dtype, plan.device, info.d_model),
    }


def planned(config: HarvestConfig, *, repair: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Say what a harvest would do, and return it as JSON data: `stores` (layer, path, config, n_sequences), `bytes`, `cost`."""
    plan = make_plan(config, repair=repair)
    costs = cost(plan)
    if rank() == 0 and not quiet:
        say(f"{describe(plan)}\n{describe_cost(costs)}")
    n_sequences = {"train": plan.n_train, "eval": plan.n_eval}
    stores = [
        {"layer": layer, "path": path, "config": plan.configs[layer], "n_sequences": n_sequences}
        for layer, path in plan.stores.items()
    ]
    return {"stores": stores, "bytes": plan.estimate, "cost": costs}


def check_space(plan: Plan) -> None:
    """Raise DiskError unless what is still to be written fits on the disk."""
    if is_url(plan.config.store):
        return
    there = sum(p.stat().st_size for path in plan.stores.values() for p in Path(path).rglob("*") if p.is_file())
    require_free(Path(plan.config.store), max(0, plan.estimate - there), "the store")


def prepare_stores(plan: Plan, repair: bool, quiet: bool) -> None:
    """Make every layer's store ready for its shards; tokenises only when a store needs it."""
    made: tuple[SplitTokens, SplitTokens] | None = None
    for layer, path in plan.stores.items():
        writer = None if repair else resume(path, plan.configs[layer], plan.n_train, plan.n_eval)
        if writer is None:
            made = made or (repair and stored_tokens(plan, path)) or make_tokens(plan, quiet)
            writer = prepare(path, plan.configs[layer], *made, versions(), repair=repair)
        writer.sweep()


def stored_tokens(plan: Plan, path: str) -> tuple[SplitTokens, SplitTokens] | None:
    """The tokens that a store holds, when they are whole and as many as asked, so that a repair needs no corpus."""
    try:
        store = Store.load(path)
        store.check_metadata()
    except (StoreError, DamagedError):
        return None
    if (store.train.n_sequences, store.eval.n_sequences) != (plan.n_train, plan.n_eval):
        return None
    train, evaluation = (copied(plan, split) for split in store.splits)
    return train, evaluation


def copied(plan: Plan, split: Split) -> SplitTokens:
    """A split's tokens and special mask, outside the store that is about to be repaired."""
    shape, per_shard = (split.n_sequences, plan.config.context), split.shard_rows // plan.config.context
    tokens = scratch_array(plan.corpora.scratch, shape, np.int32)
    special = scratch_array(plan.corpora.scratch, shape, np.bool_)
    for k in range(split.n_shards):
        part = slice(k * per_shard, (k + 1) * per_shard)
        tokens[part] = split.shard_tokens(k)
        special[part] = ~split.shard_usable(k).reshape(-1, plan.config.context)
    return SplitTokens(tokens, special)


def make_tokens(plan: Plan, quiet: bool) -> tuple[SplitTokens, SplitTokens]:
    """Tokens of both splits: documents split first, then packed, then the sequences of each segment shuffled.

    Without a corpus of its own, evaluation takes the first documents and training goes on with the next one; of a single
    text evaluation takes the beginning, and training goes on one context further.
    """
    training, other = plan.corpora.opened
    stream = tokenized(training.documents(), plan.reader)
    eval_stream = stream if other is None else tokenized(other.documents(), plan.reader)
    with contextlib.closing(stream), contextlib.closing(eval_stream):
        pieces = Pieces(stream)
        eval_rows = pack_split(plan, pieces if other is None else Pieces(eval_stream), plan.n_eval, "evaluation", quiet)
        if other is None and training.is_one_text:
            pieces.skip_tokens(plan.config.context)
        elif other is None:
            pieces.skip_document()
        train_rows = pack_split(plan, pieces, plan.n_train, "training", quiet)
    return finished(plan, train_rows, plan.segments), finished(plan, eval_rows, (plan.n_eval,))


def pack_split(plan: Plan, pieces: Pieces, n_sequences: int, what: str, quiet: bool) -> tuple[Tokens, Mask]:
    """The next rows of a stream of tokenised documents and where they are not to be kept, with progress."""
    shape = (n_sequences, plan.config.context)
    rows = scratch_array(plan.corpora.scratch, shape, np.int32)
    left_out = scratch_array(plan.corpora.scratch, shape, np.bool_)
    with Progress(n_sequences, f"tokenise {what}", "sequence", quiet=quiet) as bar:

        def advance(rows: int, n_documents: int) -> None:
            bar.advance(rows - bar.n, f"{n_documents:,} documents")

        pack(pieces, plan.packing, rows, left_out, what, advance)
    return rows, left_out


def finished(plan: Plan, packed: tuple[Tokens, Mask], segments: Sequence[int]) -> SplitTokens:
    """Rows shuffled within their segments, with their mask of special tokens and of those that are not to be kept."""
    rows, left_out = packed
    tokens = scratch_array(plan.corpora.scratch, rows.shape, np.int32)
    special = scratch_array(plan.corpora.scratch, rows.shape, np.bool_)
    shuffle(rows, segments, plan.config.seed, tokens)
    shuffle(left_out, segments, plan.config.seed, special)
    mark_special(tokens, plan.configs[plan.config.layers[0]]["special_ids"], plan.info.vocab, special)
    return SplitTokens(tokens, special)


def harvest(plan: Plan, quiet: bool) -> None:
    """Make this process's shards. Layers after the last one that still needs a shard are not loaded."""
    writers = {layer: StoreWriter.open(path) for layer, path in plan.stores.items()}
    require_same_tokens(writers)
    shards = pending_shards(writers, rank(), world_size())
    if not shards:
        return
    c = plan.config
    assert c.batch_size is not None, "settled by the plan"
    lm = SplitLM.load(
        str(plan.info.folder),
        dtype=c.dtype,
        device=plan.device,
        part="prefix",
        layers=sorted({layer for shard in shards for layer in shard.layers}),
        attention=c.attention,
        trust_remote_code=c.trust_remote_code,
    )
    if c.compile:
        lm.compile()
    n_rows = sum(shard.n_rows for shard in shards)
    label = "harvest" if world_size() == 1 else f"harvest, worker {rank()}"
    with Progress(n_rows, label, "row", quiet=quiet) as bar:
        harvest_shards(lm, writers, shards, c.batch_size, bar)


def require_same_tokens(writers: Mapping[int, StoreWriter]) -> None:
    """Raise MismatchError unless the stores hold the same tokens, so that one pass serves them all."""
    tokens = {layer: writer.store.attributes["tokens_sha256"] for layer, writer in writers.items()}
    if len({sha["train"] + sha["eval"] for sha in tokens.values()}) > 1:
        raise MismatchError(
            f"{', '.join(writer.store.where for writer in writers.values())}: hold different tokens (one was extended, the "
            f"other not in the same steps); harvest one layer at a time"
        )


def report(store: Store, quiet: bool) -> None:
    """One line about a finished store."""
    s = store.statistics
    if not quiet:
        say(
            f"{store.path}: complete, {s.n_rows:,} training rows ({s.n_special:,} special, {s.n_massive:,} massive), "
            f"{store.eval.n_rows:,} evaluation rows, median norm {s.median_norm:.4g}, id {store.id[:10]}"
        )

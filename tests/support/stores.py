"""Small activation stores made without a language model, through the real writing API.

As a program it starts workers that a test may kill: see `serve`. Rows are a function of the config and their number
alone, so any worker makes the same.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.base.runtime import numpy_rng, rank, world_size
from pipeline.store.groups import delete_groups, unpack
from pipeline.store.layout import Layout
from pipeline.store.prepare import SplitTokens, prepare, resume
from pipeline.store.reader import Store
from pipeline.store.root import write_root
from pipeline.store.writer import StoreWriter

RANK_OF_RESIDUALS = 8
VOCAB = 97


def store_config(
    *,
    d_model: int = 64,
    context: int = 16,
    shard_rows: int = 1024,
    chunk_rows: int = 128,
    seed: int = 0,
    dtype: str = "bf16",
    codec: str = "none",
    hook: str | None = None,
    group_shards: int | None = None,
) -> dict[str, Any]:
    """A config with every field that FORMAT.md lists."""
    chosen = {"hook": hook, "group_shards": group_shards}
    return {name: value for name, value in chosen.items() if value is not None} | {
        "model": "no/model",
        "revision": None,
        "weights_sha256": "0" * 64,
        "tokenizer_sha256": "1" * 64,
        "architecture_sha256": "2" * 64,
        "layer": 3,
        "n_layers": 6,
        "d_model": d_model,
        "vocab": VOCAB,
        "context": context,
        "corpus": {"id": "random"},
        "eval_corpus": None,
        "seed": seed,
        "bos": 0,
        "separator": 0,
        "special_ids": [0],
        "dtype": dtype,
        "attention": "eager",
        "compile": False,
        "batch_size": 8,
        "device_type": "cpu",
        "shard_rows": shard_rows,
        "chunk_rows": chunk_rows,
        "codec": codec,
    }


def make_tokens(seed: int, split: str, n_sequences: int, context: int) -> SplitTokens:
    """Random tokens, BOS (0) first; the first sequences are the same for any number of them."""
    tokens = np.stack(
        [numpy_rng(seed, split, "tokens", i).integers(1, VOCAB, context, dtype=np.int32) for i in range(n_sequences)]
    )
    tokens[:, 0] = 0
    return SplitTokens(tokens, tokens == 0)


def make_rows(config: dict[str, Any], split: str, start: int, stop: int) -> Tensor:
    """Rows [row, d_model] in the store's dtype: a mean, a low rank, noise; BOS rows large, every 97th row massive.

    Row r is the same whatever range it is asked in.
    """
    layout, seed = Layout.from_config(config), config["seed"]
    context = layout.context
    sequences = range(start // context, -(-stop // context))
    drawn = [one_sequence(layout.d_model, context, seed, split, i) for i in sequences]
    rows = np.concatenate([*drawn, np.empty((0, layout.d_model), np.float32)])[start % context :][: stop - start]
    index = np.arange(start, stop)
    rows[index % context == 0] *= 30
    rows[index % 97 == 50] *= 20
    return torch.from_numpy(rows).to(layout.torch_dtype)


@functools.cache
def one_sequence(d_model: int, context: int, seed: int, split: str, i: int) -> npt.NDArray[np.float32]:
    """Rows [context, d_model]; drawn and multiplied one sequence at a time, so that rounding is always the same."""
    basis = numpy_rng(seed, "basis").standard_normal((RANK_OF_RESIDUALS, d_model), np.float32)
    mean = numpy_rng(seed, "mean").standard_normal(d_model, np.float32)
    rng = numpy_rng(seed, split, "rows", i)
    low_rank = rng.standard_normal((context, RANK_OF_RESIDUALS), np.float32)
    return 0.5 * mean + low_rank @ basis + np.float32(0.3) * rng.standard_normal((context, d_model), np.float32)


def lose_shards(path: Path | str, *shards: tuple[str, int]) -> StoreWriter:
    """Make a finished store what it was before it was finished, without some (split, shard)."""
    store = Store.load(path)
    if store.train.packed:
        unpack(store.files, store.attributes["origin"], [split.shape for split in store.splits])
        attributes = {key: value for key, value in store.attributes.items() if key not in ("committed", "statistics")}
        write_root(store.files, attributes | {"state": "prepared"})
        delete_groups(store.files)
        store.files.delete("mean/c/0")
    writer = StoreWriter.open(path)
    for split, k in shards:
        writer.give_up(split, k)
    return writer


def write_shards(writer: StoreWriter, delay: float = 0.0) -> None:
    """Write this worker's pending shards, in blocks that do not fit the chunks, `delay` seconds before each block."""
    for split in ("train", "eval"):
        for k in writer.pending(split):
            if k % world_size() != rank():
                continue
            start, stop = writer.split(split).shard_rows_range(k)
            block = max(1, (stop - start) // 3 + 5)
            with writer.shard(split, k) as shard:
                for a in range(start, stop, block):
                    time.sleep(delay)
                    shard.write(make_rows(writer.store.config, split, a, min(a + block, stop)))


def prepare_store(
    path: Path | str, config: dict[str, Any], n_sequences: int, eval_sequences: int, *, repair: bool = False
) -> StoreWriter:
    """What harvest does before the first shard: go on with the store that is there, or prepare it."""
    writer = None if repair else resume(path, config, n_sequences, eval_sequences)
    if writer is None:
        train, evaluation = (
            make_tokens(config["seed"], split, n, config["context"])
            for split, n in (("train", n_sequences), ("eval", eval_sequences))
        )
        writer = prepare(path, config, train, evaluation, {"numpy": np.__version__}, repair=repair)
    return writer


def make_store(
    path: Path | str, *, n_sequences: int = 152, eval_sequences: int = 32, repair: bool = False, **config: Any
) -> Store:
    """A complete store, written in this process. `config` are the options of `store_config`.

    The default has two whole training shards of 1024 rows and a ragged one of 384, and 512 evaluation rows.
    """
    writer = prepare_store(path, store_config(**config), n_sequences, eval_sequences, repair=repair)
    write_shards(writer)
    return writer.finish()


def harvest(path: str, n_sequences: int, eval_sequences: int, delay: float, **config: Any) -> None:
    """One worker of a small harvest: rank 0 prepares and finishes, every rank writes its own shards."""
    options = store_config(**config)
    if rank() == 0:
        writer = prepare_store(path, options, n_sequences, eval_sequences)
    else:
        while (held := resume(path, options, n_sequences, eval_sequences)) is None:
            time.sleep(0.002)
        writer = held
    write_shards(writer, delay)
    if rank() == 0:
        while any(writer.pending(split) for split in ("train", "eval")):
            time.sleep(0.002)
        writer.finish()


def serve() -> None:
    """Start workers for each line of JSON from stdin, kill -9 each after its time, answer with their exit codes.

    A line holds world_size, kill_after (seconds for each worker; [] kills none) and the arguments of `harvest`. Workers
    are forks, so that a kill can come in their first millisecond.
    """
    torch.set_num_threads(1)
    os.fsync = lambda fd: None  # a kill leaves the page cache alone, and rounds are many
    for line in sys.stdin:
        job = json.loads(line)
        os.environ["WORLD_SIZE"], kill_after = str(job.pop("world_size")), job.pop("kill_after")
        started = time.monotonic()
        workers = [start_worker(k, job) for k in range(world_size())]
        for seconds, pid in sorted(zip(kill_after, workers)):
            time.sleep(max(0.0, started + seconds - time.monotonic()))
            os.kill(pid, signal.SIGKILL)  # not yet waited for, so the number is still its own
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]), flush=True)


def start_worker(k: int, job: dict[str, Any]) -> int:
    """Fork; the child harvests and ends, the parent gets its process id."""
    if pid := os.fork():
        return pid
    os.environ["RANK"] = str(k)
    try:
        harvest(**job)
        os._exit(0)
    except BaseException as error:
        print(f"worker {k}: {error!r}", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    serve()

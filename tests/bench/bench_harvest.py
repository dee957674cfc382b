"""Harvest against the bare forward pass: rows/s of each, in turn, in one run. Last line JSON.

    python tests/bench/bench_harvest.py --d-model 1024 --layers 4 --tokens 100k

Bare: the truncated Hugging Face model over the same token ids in batches of the same size, nothing kept. Harvest: the
whole command from text to a finished store, less the loading of the model, which both do alike and which a real run
pays once. The last column is the memory that harvest takes at its peak beyond the bare loop's, in shards. share_of_products:
of a large product's own rate, by the weights of the layers (2 FLOP each a row). --compile: layers are compiled, in both, and a
harvest that is not measured comes first.

    python tests/bench/bench_harvest.py --rounds 0 --writer-rows 120k --folder /dev/shm      # what writing alone takes
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import harvest.plan
import harvest.run
from bench.options import placed
from harvest.config import HarvestConfig
from harvest.forward import Block, ShardThreads, pending_shards
from pipeline.base.cli import COUNT
from pipeline.base.runtime import DTYPES, product_rate
from pipeline.model.points import Point
from pipeline.model.split_lm import SplitLM, find_layers
from pipeline.store.moments import measure_rows
from pipeline.store.reader import Store
from support import tiny_models
from support.stores import prepare_store, store_config


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """One number, the most bytes this process held beside files that it maps, looked at every 5 ms; set when left."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            status = Path("/proc/self/status").read_text()
            held = int(status.split("RssAnon:")[1].split()[0]) * 1024
            peak[0] = max(peak[0], held)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bare_rows_per_s(lm: SplitLM, tokens: torch.Tensor, batch_size: int) -> float:
    """Rows/s of forward passes over the tokens; their results are dropped."""
    start = time.perf_counter()
    for batch in tokens.split(batch_size):
        lm.prefix(batch.to(lm.device))
    synchronize(lm.device)
    return tokens.numel() / (time.perf_counter() - start)


def harvest_rows_per_s(config: HarvestConfig, lm: SplitLM) -> float:
    """Rows/s of a whole harvest with a model that is loaded already: text, tokens, forward passes, shards, statistics."""
    patched, run = SplitLM, harvest.run
    original, patched.load = patched.load, staticmethod(lambda *_args, **_options: lm)  # type: ignore[method-assign]
    tried, run.try_model = run.try_model, lambda *_args, **_options: True
    try:
        start = time.perf_counter()
        harvest.run.run(config, quiet=True)
        seconds = time.perf_counter() - start
    finally:
        patched.load, run.try_model = original, tried  # type: ignore[method-assign]
    store = Store.open(config.store)
    return (store.train.n_rows + store.eval.n_rows) / seconds


def writer_figures(d_model: int, n_stores: int, n_rows: int, place: Path) -> dict[str, float]:
    """Rows of made-up blocks, measured as a GPU does it, into so many stores at once, a thread each: rows of all stores a second
    of the clock, and seconds of processor a million rows, this program's own and the kernel's (which writes to the disk)."""
    context, batch = 128, 64
    rows = torch.randn(batch * context, d_model, generator=torch.Generator().manual_seed(0)).bfloat16()
    config = store_config(d_model=d_model, context=context, shard_rows=512 * context, chunk_rows=8 * context)
    writers = {
        Point(layer): prepare_store(place / f"writer{layer}.zarr", config, n_rows // context, batch)
        for layer in range(n_stores)
    }
    measured = measure_rows(rows, torch.zeros(len(rows), dtype=torch.bool))
    start, before = time.perf_counter(), os.times()
    with ShardThreads(writers) as threads:
        for shard in pending_shards(writers).values():
            left = shard.n_rows
            while left:
                n = min(left, len(rows))
                left -= n
                some = measured if n == len(rows) else measure_rows(rows[:n], torch.zeros(n, dtype=torch.bool))
                threads.put({point: Block(shard, rows[:n], some, left == 0) for point in writers})
    seconds, after = time.perf_counter() - start, os.times()
    n_all = n_stores * sum(split.n_rows for split in next(iter(writers.values())).store.splits)
    return {
        "writer_rows_per_s": n_all / seconds,
        "writer_own_cpu_s_per_million": (after.user - before.user) / n_all * 1e6,
        "writer_kernel_cpu_s_per_million": (after.system - before.system) / n_all * 1e6,
    }


@click.command(context_settings={"show_default": True})
@click.option("--architecture", type=click.Choice(tiny_models.KINDS), default="gemma2")
@click.option("--d-model", default=1024, help="Width of the residual stream; the MLP is four times as wide.")
@click.option("--layers", default=4, help="Decoder layers that run; the last one is harvested.")
@click.option("--tokens", type=COUNT, default=60_000, help="Training tokens of each harvest.")
@click.option("--context", default=128)
@click.option("--batch-size", type=int, help="Sequences a forward pass. [default: as harvest chooses]")
@placed("the model and its rows")
@click.option("--compile", "compiles", is_flag=True, help="torch.compile the layers first.")
@click.option("--rounds", default=3, help="How often each is measured, in turn; 0: the writer alone.")
@click.option(
    "--writer-rows", type=COUNT, default=0, help="Rows a store for the writer alone, three stores; 0: not measured."
)
@click.option("--writer-d-model", default=2304)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where stores are written. [default: the temporary folder]"
)
def main(
    architecture: str, d_model: int, layers: int, tokens: int, context: int, batch_size: int | None, dtype: str,
    device: torch.device,    compiles: bool, rounds: int, writer_rows: int, writer_d_model: int, folder: Path | None,
) -> None:  # fmt: skip
    """Measure harvest over the bare forward pass with a randomly initialised model."""
    writer = {}
    if writer_rows:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            writer = writer_figures(writer_d_model, 3, writer_rows, Path(place))
    if not rounds:
        print(json.dumps(writer))
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        shape = {"hidden_size": d_model, "intermediate_size": 4 * d_model, "num_hidden_layers": layers}
        shape |= {"num_attention_heads": d_model // 64, "num_key_value_heads": d_model // 128, "head_dim": 64}
        model = tiny_models.make_model(
            Path(place) / "lm", architecture, dtype=torch.bfloat16, max_position_embeddings=context, **shape
        )
        corpus = tiny_models.make_corpus(Path(place) / "corpus.jsonl", n_documents=2000 + tokens // 20)
        config = HarvestConfig(
            store="", model=str(model), corpus=str(corpus), layers=(layers - 1,), tokens=tokens, context=context,
            batch_size=batch_size, dtype=dtype, device=str(device), shard_rows=512 * context, chunk_rows=8 * context,
        )  # fmt: skip
        lm = SplitLM.load(
            str(model),
            dtype=dtype,
            device=device,
            part="prefix",
            layers=[Point(layers - 1, "resid_post")],
        )
        if compiles:
            lm.compile()
        plan = harvest.plan.make_plan(config.replace(store=str(Path(place) / "plan")))
        n_weights = sum(p.numel() for p in find_layers(lm.model, lm.n_layers)[:layers].parameters() if not p.is_meta)
        ids = tiny_models.tokens(plan.n_train + plan.n_eval, context)
        size = int(plan.config.batch_size or 1)
        bare_rows_per_s(lm, ids[: 2 * size], size)  # warm up
        if compiles:
            harvest_rows_per_s(config.replace(store=str(Path(place) / "warm.zarr")), lm)
        bare, whole, extra = [], [], []
        shard_nbytes = plan.config.shard_rows * d_model * (2 if dtype == "bf16" else 4)
        print(
            f"{architecture}, {layers} layers of {d_model}, {dtype} on {lm.device}, {size} × {context} tokens a batch"
        )
        print(f"{'round':>6} {'bare rows/s':>14} {'harvest rows/s':>16} {'harvest/bare':>13} {'extra/shard':>13}")
        for n in range(rounds):
            with peak_memory() as bare_peak:
                bare.append(bare_rows_per_s(lm, ids, size))
            with peak_memory() as peak:
                whole.append(harvest_rows_per_s(config.replace(store=str(Path(place) / f"acts{n}.zarr")), lm))
            extra.append((peak[0] - bare_peak[0]) / shard_nbytes)
            print(f"{n:>6} {bare[-1]:>14,.0f} {whole[-1]:>16,.0f} {whole[-1] / bare[-1]:>13.3f} {extra[-1]:>13.2f}")
    ratio = statistics.median(whole) / statistics.median(bare)
    figures = {"bare_rows_per_s": statistics.median(bare), "harvest_rows_per_s": statistics.median(whole)}
    flop = 2 * n_weights * statistics.median(whole)
    rate = product_rate(DTYPES[dtype], lm.device, 256 if lm.device.type == "cpu" else 8192, d_model, 4 * d_model)
    figures |= {"compiled": compiles, "flop_per_s": flop, "share_of_products": round(flop / rate, 4)}
    figures |= {"harvest_over_bare": round(ratio, 4), "extra_memory_shards": round(max(extra), 2)}
    print(json.dumps(figures | writer | {"device": str(lm.device), "d_model": d_model}))


if __name__ == "__main__":
    main()

"""Shuffled batches from a store: rows/s of both modes on one and two cores, against zarr's fancy indexing and memcpy.

    python tests/bench/bench_store.py [--gb 4] [--store PATH] [--device cuda] [--dtype bf16]

The page cache is warm; each figure is a fresh process, so that the first epoch pays for its page faults. The store is
written first (random rows, those of one sequence correlated as real residuals are) and kept with --store.
Batches are delivered to --device, and where it is a GPU also from rows that lie in its memory: all, and two windows.
Shuffle quality: distinct sequences a batch, and the variance of batch means against an exact permutation's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
import zarr

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.options import placed
from pipeline.base.runtime import DTYPES
from pipeline.store.reader import Store
from support.stores import prepare_store, store_config
from train.feed.bodies import BodyCheck
from train.feed.loader import WINDOW_ROWS, Feed, Loader
from train.feed.order import Order
from train.feed.resident import DeviceRows, place_for

BATCH = 2048
CPU = torch.device("cpu")
RHO = 0.063
"""Share of a row's variance that its sequence has in common: the median over dimensions of a real layer (STORAGE.md)."""


def write_store(path: Path, gb: float, d_model: int, dtype: str) -> None:
    """A store of about `gb` GB: 65,536-row shards of 1024-row chunks of 128-token sequences."""
    shard_rows, context = 65536, 128
    n_shards = max(1, round(gb * 1e9 / (shard_rows * d_model * DTYPES[dtype].itemsize)))
    config = store_config(d_model=d_model, context=context, shard_rows=shard_rows, chunk_rows=1024, dtype=dtype)
    writer = prepare_store(path, config, n_shards * shard_rows // context, shard_rows // context)
    noise = torch.randn(shard_rows, d_model, generator=torch.Generator().manual_seed(0)).mul_((1 - RHO) ** 0.5)
    for split in ("train", "eval"):
        for k in writer.pending(split):
            own = (
                torch.randn(shard_rows // context, 1, d_model, generator=torch.Generator().manual_seed(k + 1))
                * RHO**0.5
            )
            with writer.shard(split, k) as shard:
                for a in range(0, shard_rows, 8192):
                    rows = noise[a : a + 8192].view(-1, context, d_model) + own[a // context : (a + 8192) // context]
                    shard.write(rows.view(8192, d_model).to(DTYPES[dtype]))
    writer.finish()


def make_loader(store: Store, mode: str, threads: int, device: torch.device = CPU) -> Feed:
    """A feed as training makes it; `resident`, `resident window`: from rows in the device's memory."""
    order = Order(store.train.kept_rows(), 0, WINDOW_ROWS if mode.endswith("window") else None)
    if not mode.startswith("resident"):
        return Loader(store.train, order, BATCH, threads=threads, device=device)
    place = place_for(store.train, order, 1 << 62)
    assert place is not None, "there is memory without end"
    return DeviceRows(store.train, order, BATCH, place, threads=threads, device=device)


def measure(path: Path, mode: str, cores: int, device: torch.device, epochs: int = 2) -> dict[str, float]:
    """Seconds to the first batch and rows/s of each epoch, in this process pinned to so many cores."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    torch.set_num_threads(cores)
    start = time.perf_counter()
    store = Store.open(path)
    with BodyCheck(store.train) as check, make_loader(store, mode, cores, device) as loader:
        if mode == "global":
            check.begin()  # as training does in its first epoch; in window mode chunks are checked on load
        loader.next()
        found = {"start_s": time.perf_counter() - start}
        n = int(store.train.kept().sum()) // BATCH
        for epoch in range(epochs):
            begin = time.perf_counter()
            for _ in range(n):
                loader.next()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found[f"epoch_{epoch}"] = n * BATCH / (time.perf_counter() - begin)
    return found


def in_process(path: Path, mode: str, cores: int, device: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    words = [sys.executable, __file__, "--store", str(path), "--child", f"{mode},{cores}", "--device", device]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def naive_rows_per_s(path: Path, n_batches: int) -> float:
    """zarr-python's own orthogonal indexing with sorted random rows."""
    array = zarr.open_group(str(path), mode="r")["train/resid"]
    assert isinstance(array, zarr.Array)
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    for _ in range(n_batches):
        array.oindex[np.sort(rng.choice(array.shape[0], BATCH, replace=False))]
    return n_batches * BATCH / (time.perf_counter() - start)


def memcpy_rows_per_s(d_model: int) -> float:
    """One thread copying batches out of 600 MB of memory."""
    source = torch.zeros(64, BATCH, d_model, dtype=torch.int16)
    out = torch.zeros(BATCH, d_model, dtype=torch.int16)
    start = time.perf_counter()
    for batch in source:
        out.copy_(batch)
    return len(source) * BATCH / (time.perf_counter() - start)


def mixing(store: Store, mode: str, dims: int = 256) -> tuple[float, float]:
    """Mean number of distinct sequences a batch, and the variance of batch means, averaged over some dimensions."""
    with make_loader(store, mode, 1) as loader:
        order = loader.order
        means = torch.stack([loader.next()[:, :dims].float().mean(0) for _ in range(order.n_kept // BATCH)])
        batches = order.batches(0, BATCH)
        windows = {}
        distinct = []
        for batch in (next(batches) for _ in range(min(50, len(means)))):
            for p in batch:
                windows[p.window] = windows.get(p.window) or order.window(p.epoch, p.window)
            rows = np.concatenate([windows[p.window].rows[p.start : p.stop] for p in batch])
            distinct.append(len(np.unique(rows // store.context)))
    return float(np.mean(distinct)), float(means.double().var(0).mean())


def warm(path: Path) -> None:
    """Read every file once."""
    for file in path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                while stream.read(1 << 24):
                    pass


def report(path: Path, naive_batches: int, device: str) -> dict[str, float]:
    """Measure and print all."""
    store = Store.open(path)
    gb = store.train.n_rows * store.d_model * store.train.read(0, 1).itemsize / 1e9
    print(f"store: {store.train.n_rows:,} rows x {store.d_model}, {gb:.1f} GB; batches of {BATCH}; warm page cache")
    modes = ("global", "window", *(("resident", "resident window") if device.startswith("cuda") else ()))
    rates = {(mode, cores): in_process(path, mode, cores, device) for mode in modes for cores in (1, 2)}
    naive, memcpy = naive_rows_per_s(path, naive_batches), memcpy_rows_per_s(store.d_model)
    print(f"{'mode':<16}{'cores':>6}{'start s':>9}{'first epoch':>13}{'second epoch':>14}   rows/s")
    for (mode, cores), r in rates.items():
        print(f"{mode:<16}{cores:>6}{r['start_s']:>9.2f}{r['epoch_0']:>13,.0f}{r['epoch_1']:>14,.0f}")
    print(f"{'zarr oindex':<31}{naive:>13,.0f}\n{'memcpy, 1 thread':<31}{memcpy:>13,.0f}")
    (n_exact, exact), (n_window, window) = mixing(store, "global"), mixing(store, "window")
    print(f"distinct sequences a batch: exact {n_exact:.0f}, window {n_window:.0f}")
    print(f"variance of batch means: window over exact {window / exact:.3f}")
    return {f"rows_per_s_{mode}": round(rates[mode, 2]["epoch_0"]) for mode in modes} | {
        "device": device,
        "times_naive": round(min(rates["global", 2]["epoch_0"], rates["window", 2]["epoch_0"]) / naive, 1),
        "mixing_window_over_exact": round(window / exact, 4),
    }


@click.command()
@click.option("--gb", default=4.0, show_default=True, help="Size of the store that is written.")
@click.option("--d-model", default=2304, show_default=True, help="Numbers a row.")
@click.option("--naive-batches", default=3, show_default=True, help="Batches of zarr's own indexing.")
@click.option("--store", type=click.Path(path_type=Path), help="Use, or write and keep, this store.")
@placed("the rows of the store that is written")
@click.option("--child", hidden=True, help="MODE,CORES: measure one in this process.")
def main(
    gb: float,
    d_model: int,
    naive_batches: int,
    store: Path | None,
    device: torch.device,
    dtype: str,
    child: str | None,
) -> None:
    """Measure shuffled reading of an activation store; the last line is JSON."""
    if child is not None:
        assert store is not None
        mode, cores = child.split(",")
        print(json.dumps(measure(store, mode, int(cores), device)))
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        path = store or Path(folder) / "acts.zarr"
        if not (path / "zarr.json").exists():
            write_store(path, gb, d_model, dtype)
        warm(path)
        print(json.dumps(report(path, naive_batches, str(device))))


if __name__ == "__main__":
    main()

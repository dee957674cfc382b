"""What a store costs that has many shards: files, time to finish, open, verify and have a first batch, memory; and requests.

    python tests/bench/bench_scale.py [--shards 1000] [--delay-ms 30] [--store PATH]

Shards are tiny (a few rows of a few dimensions), so that what is measured is what grows with their number and not with their
bytes; the default of 1000 is what harvest makes of a billion rows. Each figure is a fresh process. With --delay-ms the store is
opened, verified, staged and read from again through a stand-in for object storage: the local files, that many milliseconds added
to every request. The store at a path that is there may be of any version that is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.store import reader
from pipeline.store.backend import LocalFiles
from pipeline.store.reader import Store
from pipeline.store.staging import stage
from pipeline.store.writer import StoreWriter
from support.stores import prepare_store, store_config
from train.feed.loader import Loader
from train.feed.order import Order

ROWS, D_MODEL, CONTEXT = 32, 8, 8
"""Of a shard, which is two chunks; of a row; of a sequence."""
BATCH = 256


class Delayed:
    """A local store's files as they would be on object storage: each read waits, and is counted. Reading alone."""

    def __init__(self, root: Path, seconds: float) -> None:
        self.files, self.seconds, self.n_requests = LocalFiles(root), seconds, 0
        self.lock = threading.Lock()
        self.where, self.write, self.create, self.delete, self.delete_all = (
            getattr(self.files, name) for name in ("where", "write", "create", "delete", "delete_all")
        )

    def wait(self) -> None:
        """One request."""
        with self.lock:
            self.n_requests += 1
        time.sleep(self.seconds)

    def read(self, key: str, most: int) -> bytes:
        """One GET."""
        self.wait()
        return self.files.read(key, most)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """One GET of a range."""
        self.wait()
        self.files.read_into(key, offset, buffers)

    def size(self, key: str) -> int | None:
        """One HEAD."""
        self.wait()
        return self.files.size(key)

    def sizes(self, keys: Sequence[str]) -> dict[str, int | None]:
        """A listing, a request a thousand."""
        self.keys()
        return self.files.sizes(keys)

    def keys(self) -> list[str]:
        """A listing, a request a thousand."""
        found = self.files.keys()
        for _ in range(0, len(found), 1000):
            self.wait()
        return found


def write_store(path: Path, n_shards: int) -> float:
    """A store of so many training shards; seconds that `finish` took."""
    config = store_config(d_model=D_MODEL, context=CONTEXT, shard_rows=ROWS, chunk_rows=ROWS // 2)
    per_shard = ROWS // CONTEXT
    fsync, os.fsync = os.fsync, lambda descriptor: None  # nobody needs this store after a power cut
    try:
        writer = prepare_store(path, config, n_shards * per_shard, max(1, n_shards // 20) * per_shard)
        rows = torch.randn(ROWS, D_MODEL, generator=torch.Generator().manual_seed(0)).bfloat16()
        for split in ("train", "eval"):
            for k in writer.pending(split):
                with writer.shard(split, k) as shard:
                    shard.write(rows)
        started = time.perf_counter()
        StoreWriter.open(path).finish()
        return time.perf_counter() - started
    finally:
        os.fsync = fsync


def measure(path: Path, what: str, delay: float) -> dict[str, float]:
    """Seconds of one thing, and MB of memory that it took beyond what this process had."""
    files = Delayed(path, delay)
    if delay or what == "stage":
        found = reader.open_files
        reader.open_files = lambda at: files if str(at).endswith(str(path)) else found(at)  # type: ignore[assignment, return-value]
    before, started, cpu = peak_mb(), time.perf_counter(), time.process_time()
    if what == "stage":
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            started = time.perf_counter()
            stage("bench://" + str(path), Path(folder) / "staged.zarr", quiet=True)
            return figures(started, cpu, before, files.n_requests)
    store = Store.open(path, check=what != "verify")
    if what == "verify":
        assert store.verify(quiet=True) == []
    if what == "batch":
        order = Order(store.train.kept_rows(), 0, 8192)
        with Loader(store.train, order, BATCH) as loader:
            loader.next()
    return figures(started, cpu, before, files.n_requests)


def figures(started: float, cpu: float, mb: float, n_requests: int) -> dict[str, float]:
    """What was used since then: seconds by the clock and of processors, MB, requests."""
    clock, used = time.perf_counter() - started, time.process_time() - cpu
    return {"s": clock, "cpu_s": used, "mb": peak_mb() - mb, "requests": n_requests}


def peak_mb() -> float:
    """The most memory that this process has had, its parent's not counted (as ru_maxrss would)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3


def in_process(path: Path, what: str, delay: float = 0.0) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--store", str(path), "--child", what, "--delay-ms", str(1e3 * delay)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(path: Path, n_shards: int, finish: float | None, delay: float) -> dict[str, Any]:
    """Measure, print the table, and return what goes into the last line."""
    n_files = sum(len(names) for _, _, names in os.walk(path))
    tasks = ("open", "verify", "batch", "stage")
    found = {one: in_process(path, one) for one in tasks}
    for one in tasks if delay else ():
        found[f"{one}, delayed"] = in_process(path, one, delay)
    print(f"{n_shards:,} training shards, {n_files:,} files; {1e3 * delay:.0f} ms added to a request where delayed")
    if finish is not None:
        print(f"{'finish':<16}{finish:>9.2f} s")
    for what, one in found.items():
        requests = f"{one['requests']:>10,.0f} requests" if one["requests"] else ""
        print(f"{what:<16}{one['s']:>9.2f} s{one['cpu_s']:>9.2f} s of processors{one['mb']:>9.0f} MB{requests}")
    times = {f"{what.replace(', ', '_')}_s": round(one["s"], 3) for what, one in found.items()}
    times |= {f"{what.replace(', ', '_')}_cpu_s": round(one["cpu_s"], 3) for what, one in found.items()}
    memory = {f"{what.replace(', ', '_')}_mb": round(one["mb"], 1) for what, one in found.items()}
    requests = {f"{one}_requests": found[f"{one}, delayed"]["requests"] for one in tasks} if delay else {}
    return {"shards": n_shards, "files": n_files, "finish_s": finish, **times, **memory, **requests}


@click.command()
@click.option("--shards", default=1000, show_default=True, help="Training shards of the store that is written.")
@click.option(
    "--delay-ms", default=30.0, show_default=True, help="Added to each request of the stand-in for a URL; 0: none."
)
@click.option("--store", type=click.Path(path_type=Path), help="Use, or write and keep, this store.")
@click.option("--child", hidden=True, help="Measure one thing in this process.")
def main(shards: int, delay_ms: float, store: Path | None, child: str | None) -> None:
    """Measure what grows with the number of a store's shards; the last line is JSON."""
    if child is not None:
        assert store is not None
        print(json.dumps(measure(store, child, delay_ms / 1e3)))
        return
    with contextlib.ExitStack() as stack:
        path = (
            store or Path(stack.enter_context(tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")))) / "s.zarr"
        )
        finish = None if (path / "zarr.json").exists() else write_store(path, shards)
        print(json.dumps(report(path, Store.load(path).train.n_shards, finish, delay_ms / 1e3)))


if __name__ == "__main__":
    main()

"""What a store costs that has many shards: files, time to finish, open, verify and have a first batch, memory; and requests.

    python tests/bench/bench_scale.py [--shards 15000] [--delay-ms 30] [--store PATH] [--fast]

Shards are tiny (a few rows of a few dimensions), so that what is measured is what grows with their number and not with their
bytes; 1000 is what harvest makes of a billion rows now, 15,000 what it made of them once. Each figure is a fresh process. With
--delay-ms the store is opened, verified, staged and read from again at s3://, from a server on this machine (support/s3.py) that
answers every request so much later, by the driver that is installed (s3fs, or obstore). The first batch is wanted on --device.
The store at a path that is there may be of any version that is read. --fast writes no shard but the first of each split, which
the others are links to.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.options import placed
from pipeline.base.files import sha256
from pipeline.base.runtime import DTYPES
from pipeline.store.layout import COMMITTED, PACKED
from pipeline.store.reader import Store, measure
from pipeline.store.record import commit_tags, read_record
from pipeline.store.root import write_root
from pipeline.store.shards import with_crc
from pipeline.store.split import Split
from pipeline.store.staging import stage
from pipeline.store.writer import StoreWriter
from support.stores import prepare_store, store_config
from train.feed.loader import Loader
from train.feed.order import Order

ROWS, D_MODEL, CONTEXT = 32, 8, 8
"""Of a shard, which is two chunks; of a row; of a sequence."""
BATCH = 256


MOST_LINKS = 50_000
"""To one file; ext4 has 65,000 at most."""
BEFORE = {
    "files": 94_517,
    "finish_s": 137.0,
    "open_s": 4.7,
    "open_cpu_s": 2.6,
    "open_mb": 39.0,
    "open_url_s": 128.3,
    "open_url_requests": 126_018,
    "verify_s": 40.2,
    "verify_cpu_s": 10.6,
    "batch_s": 8.6,
    "batch_cpu_s": 3.8,
}
"""Of 15,000 training shards in the version of before, 3, by commit 19b275e on 28 Nov 2026 on a loaded machine, so that seconds of
processors, requests and files compare and the clock's seconds hardly; at the URL by a stand-in within the process."""
TASKS = ("open", "batch", "verify", "stage")


@contextlib.contextmanager
def served(folder: Path, delay_ms: float) -> Iterator[int]:
    """A server of a folder's files in a process of its own; its port. The environment names it as S3."""
    script = Path(__file__).parents[1] / "support" / "s3.py"
    with subprocess.Popen([sys.executable, str(script), str(folder), str(delay_ms)], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true"}
            os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
            yield port
        finally:
            server.kill()


def n_requests() -> int:
    """How many the server has had."""
    with urllib.request.urlopen(os.environ["AWS_ENDPOINT_URL"] + "/-/requests") as answer:
        return int(answer.read())


def write_store(path: Path, n_shards: int, fast: bool, dtype: str) -> float | None:
    """A store of so many training shards; seconds that `finish` took."""
    config = store_config(d_model=D_MODEL, context=CONTEXT, shard_rows=ROWS, chunk_rows=ROWS // 2, dtype=dtype)
    per_shard = ROWS // CONTEXT
    fsync, os.fsync = os.fsync, lambda descriptor: None  # nobody needs this store after a power cut
    try:
        writer = prepare_store(path, config, n_shards * per_shard, max(1, n_shards // 20) * per_shard)
        rows = torch.randn(ROWS, D_MODEL, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
        for split in ("train", "eval"):
            for k in writer.pending(split)[: 1 if fast else None]:
                with writer.shard(split, k) as shard:
                    shard.write(rows)
        if fast:
            link_shards(writer)
            return None
        started = time.perf_counter()
        StoreWriter.open(path).finish()
        return time.perf_counter() - started
    finally:
        os.fsync = fsync


def link_shards(writer: StoreWriter) -> None:
    """All shards as links to the first, and what vouches for them, as `finish` would write it."""
    committed = {}
    for split in writer.store.splits:
        for k in range(1, split.n_shards):
            path, first = split.shard_path(k), split.shard_path(k - k % MOST_LINKS)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path == first:
                shutil.copyfile(split.shard_path(0), path)
            else:
                path.hardlink_to(first)
        committed[split.name] = {"commit": [write_group(split, g) for g in range(split.shape.n_groups)]}
        writer.files.delete(split.shape.record_key(0))
    attributes = writer.store.attributes | {"committed": committed}
    mean, statistics = measure(Store(writer.files, writer.store.where, attributes), 10.0)
    writer.files.write(writer.layout.mean.key(0), with_crc(mean))
    write_root(writer.files, attributes | {"state": "complete", "statistics": statistics.to_dict()})


def write_group(split: Split, g: int) -> str:
    """A group's files, each shard's part that of shard 0, its record under a tag of its own; SHA-256 of that of `commit`."""
    for name in PACKED:
        array = split.arrays[name]
        data = np.full(array.chunk, array.padding, array.numpy_dtype)
        held = read_record(split.files, split.shape.record_key(0), split.shape.layout, name)
        for slot, k in zip(data.reshape(split.shape.group, -1), split.shape.shards_of(g)):
            slot[:] = held
            if name == "commit":
                tags = np.array(commit_tags(split.origin, split.name, k), np.uint64)
                slot[: len(COMMITTED)] = tags << np.uint64(32) | held[: len(COMMITTED)] & np.uint64(0xFFFFFFFF)
        split.files.write(array.key(g), packed := with_crc(data))
    return sha256(packed)


def measure_one(place: str, what: str, device: torch.device) -> dict[str, float]:
    """Seconds, MB, requests and mappings of one thing, in this process."""
    remote = place.startswith("s3://")
    before, started, cpu = peak_mb(), time.perf_counter(), time.process_time()
    requests = n_requests() if remote else 0
    if what == "stage":
        with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
            started = time.perf_counter()
            stage(place, Path(folder) / "staged.zarr", quiet=True)
            return figures(started, cpu, before, requests, remote)
    store = Store.open(place, check=what != "verify")
    if what == "verify":
        assert store.verify(quiet=True) == []
    if what == "batch":
        order = Order(store.train.kept_rows(), 0, 8192)
        with Loader(store.train, order, BATCH, device=device) as loader:
            loader.next()
            return figures(started, cpu, before, requests, remote)
    return figures(started, cpu, before, requests, remote)


def figures(started: float, cpu: float, mb: float, requests: int, remote: bool) -> dict[str, float]:
    """What was used since then: seconds by the clock and of processors, MB, requests; and mappings now."""
    clock, used = time.perf_counter() - started, time.process_time() - cpu
    found = {
        "s": clock,
        "cpu_s": used,
        "mb": peak_mb() - mb,
        "mappings": float(Path("/proc/self/maps").read_text().count("\n")),
    }
    return found | ({"requests": float(n_requests() - requests)} if remote else {})


def peak_mb() -> float:
    """The most memory that this process has had, its parent's not counted (as ru_maxrss would)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3


def in_process(place: str, what: str, device: torch.device) -> dict[str, float]:
    """`measure_one` in a fresh process."""
    command = [sys.executable, __file__, "--child", what, "--place", place, "--device", str(device)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(
    path: Path, n_shards: int, finish: float | None, delay_ms: float, without: tuple[str, ...], device: torch.device
) -> dict[str, Any]:
    """Measure, print the table, and return what goes into the last line."""
    found: dict[str, Any] = {
        "shards": n_shards,
        "files": sum(len(names) for _, _, names in os.walk(path)),
        "rows_of_a_group": Store.load(path).train.shape.group * ROWS,
    }
    if finish is not None:
        found["finish_s"] = round(finish, 2)
    for what in (one for one in TASKS if one != "stage"):
        found |= {f"{what}_{name}": round(value, 3) for name, value in in_process(str(path), what, device).items()}
    if delay_ms:
        with served(path.parents[1], delay_ms):
            for what in (one for one in TASKS if one not in without):
                taken = in_process(f"s3://{path.parent.name}/{path.name}", what, device)
                found |= {f"{what}_url_{name}": round(value, 3) for name, value in taken.items()}
    before = BEFORE if n_shards == 15_000 else {}
    print(f"{'':<24}{'before (version 3)':>20}{'now':>16}    url: {delay_ms:.0f} ms added to every request")
    for name, value in found.items():
        print(f"{name:<24}{before.get(name, ''):>20}{value:>16,}")
    return found | {f"before_{name}": value for name, value in before.items()}


@click.command()
@click.option("--shards", default=15_000, show_default=True, help="Training shards of the store that is written.")
@click.option("--delay-ms", default=30.0, show_default=True, help="Added to each request at the URL; 0: no URL.")
@click.option("--store", type=click.Path(path_type=Path), help="Use, or write and keep, this store.")
@click.option("--fast", is_flag=True, help="Write the first shard of each split, and the others as links to it.")
@click.option("--without", multiple=True, type=click.Choice(TASKS), help="Leave this out at the URL.")
@placed("the rows of the store that is written")
@click.option("--child", hidden=True, help="Measure one thing in this process.")
@click.option("--place", hidden=True, help="The child's store.")
def main(
    shards: int,
    delay_ms: float,
    store: Path | None,
    fast: bool,
    without: tuple[str, ...],
    device: torch.device,
    dtype: str,
    child: str | None,
    place: str,
) -> None:
    """Measure what grows with the number of a store's shards; the last line is JSON."""
    if child is not None:
        print(json.dumps(measure_one(place, child, device)))
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR"))))
        path = (store or folder / "bucket" / "s.zarr").absolute()
        finish = None if (path / "zarr.json").exists() else write_store(path, shards, fast, dtype)
        print(json.dumps(report(path, Store.load(path).train.n_shards, finish, delay_ms, without, device)))


if __name__ == "__main__":
    main()

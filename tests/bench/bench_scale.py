"""What a store costs that has many rows, and so many shards: the table of ten million rows to ten billion, before and now.

    python tests/bench/bench_scale.py                  # 10M, 1B and 10B rows: shards, files, opening, finishing, memory, mappings
    python tests/bench/bench_scale.py --shards 15000   # so many shards: open, first batch, verify, stage; local and at a URL

Each store has the shards, chunks a shard and shards a group that harvest makes of so many rows (or --shards of two chunks), of
tiny rows, so that what is measured is what grows with their number and not with their bytes. Only the first shards are written,
the others are links to them (--write: all are written). Each figure is of a fresh process and printed when it is there; the last
line is JSON. A URL is s3://, from a server on this machine (support/s3.py) that answers every request --delay-ms later, by the
driver that is installed (s3fs, or obstore). Rows go to --device. --keep FOLDER keeps stores and figures there, and a second run
goes on from them.

What cannot be read off a store of tiny rows is computed and marked so: bytes that opening and finishing read are how often each
array was read here, by its bytes in the real store; memory is the formula of `train --dry-run`.
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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.options import placed
from pipeline.base.cli import COUNT
from pipeline.base.files import human_bytes, sha256
from pipeline.base.runtime import DTYPES
from pipeline.store.backend import LocalFiles
from pipeline.store.layout import CHUNK_ROWS, COMMITTED, EVAL_SHARE, PACKED, Layout, SplitLayout, shard_rows_for
from pipeline.store.reader import Store, measure
from pipeline.store.record import commit_tags, read_record
from pipeline.store.root import write_root
from pipeline.store.shards import index_nbytes, with_crc
from pipeline.store.split import Split
from pipeline.store.staging import stage
from pipeline.store.writer import StoreWriter
from support.stores import prepare_store, store_config
from train.feed.loader import Loader
from train.feed.order import MOST_HELD, Order

REAL_WIDTH, REAL_CONTEXT = 2304, 128
"""Of Gemma-2-2B."""
D_MODEL, CONTEXT = 8, 4
"""Of the rows here; of a sequence, which is a chunk."""
BATCH, WINDOW = 256, 2048
MAPPED_BATCHES = 64
MOST_LINKS = 50_000
"""To one file; ext4 has 65,000 at most."""
Figures = dict[str, float]

BEFORE: dict[str, dict[str, float]] = {
    "10M": {
        "shards": 152, "files": 900, "open_s": 0.2, "open_url_s": 38, "rehashed": 50e6, "finish": 23e9, "memory": 70e6,
    },
    "1B": {
        "shards": 15e3, "files": 92e3, "open_s": 23, "open_url_s": 3600, "rehashed": 5e9, "finish": 2.3e12, "memory": 7e9,
    },
    "10B": {
        "shards": 153e3, "files": 916e3, "open_s": 240, "open_url_s": 36e3, "rehashed": 50e9, "finish": 23e12, "memory": 70e9,
    },
    "15000 shards": {
        "files": 94_517, "open_s": 4.7, "open_cpu_s": 2.6, "open_mb": 39.0, "open_url_s": 128.3, "open_url_requests": 126_018,
        "verify_s": 40.2, "verify_cpu_s": 10.6, "batch_s": 8.6, "batch_cpu_s": 3.8,
    },
}  # fmt: skip
"""Rows: as issue 18 had it on 28 Nov 2026, of version 2 of the format (f86084a): 1.5 ms a shard, 8 requests a shard one after the
other, and as many mappings as shards, of which Linux allows 65,530. 15,000 tiny shards: of version 3 (19b275e) that day, a loaded
machine, at the URL by a stand-in within the process."""
TASKS = ("finish", "open", "map", "batch", "verify", "open_url", "batch_url", "verify_url", "stage_url")
OF_ROWS = ("finish", "open", "map", "open_url")
"""What the table of rows needs."""


@dataclass(frozen=True)
class Size:
    """A store to measure: of so many rows, or (rows 0) of so many shards of two chunks."""

    rows: int
    shards: int = 0

    @property
    def name(self) -> str:
        """10M, 1B, 15000 shards."""
        for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
            if self.rows and self.rows % unit == 0:
                return f"{self.rows // unit}{letter}"
        return str(self.rows) if self.rows else f"{self.shards} shards"

    @property
    def real(self) -> SplitLayout:
        """The training split that harvest makes of so many rows of Gemma-2-2B."""
        layout = Layout.from_config(
            store_config(
                d_model=REAL_WIDTH,
                context=REAL_CONTEXT,
                shard_rows=shard_rows_for(self.rows, CHUNK_ROWS),
                chunk_rows=CHUNK_ROWS,
            )
        )
        return SplitLayout("train", layout, self.rows // REAL_CONTEXT)

    @property
    def n_sequences(self) -> tuple[int, int]:
        """Of the training and evaluation split of the store here, each a chunk of its own."""
        chunks = self.real.layout.chunks_per_shard if self.rows else 2
        n_shards = self.real.n_shards if self.rows else self.shards
        return n_shards * chunks, max(1, n_shards // EVAL_SHARE) * chunks

    def config(self, dtype: str) -> dict[str, Any]:
        """Of the store here."""
        real = self.real.layout if self.rows else None
        chunks, group = (real.chunks_per_shard, real.group_shards) if real else (2, None)
        return store_config(
            d_model=D_MODEL,
            context=CONTEXT,
            shard_rows=chunks * CONTEXT,
            chunk_rows=CONTEXT,
            dtype=dtype,
            group_shards=group,
        )


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


def write_store(path: Path, size: Size, dtype: str, *, write: bool = False) -> None:
    """The store, finished; all shards but one of a split links to it, unless `write`."""
    rows = made_rows(size.config(dtype)["shard_rows"], dtype)
    with no_fsync():
        writer = prepare_store(path, size.config(dtype), *size.n_sequences)
        write_rows(writer, rows, every=write)
        if write:
            StoreWriter.open(path).finish()
        else:
            link_shards(writer)


def made_rows(n_rows: int, dtype: str, *, massive: bool = False) -> torch.Tensor:
    """A shard's rows; every chunk has a massive one, which statistics take out of their sums, or none has."""
    rows = torch.randn(n_rows, D_MODEL, generator=torch.Generator().manual_seed(0))
    rows /= rows.norm(dim=1, keepdim=True)
    rows[1::CONTEXT] *= 30.0 if massive else 1.0
    return rows.to(DTYPES[dtype])


def write_rows(writer: StoreWriter, rows: torch.Tensor, *, every: bool) -> None:
    """The same rows into every shard, or into the first of each split."""
    for split in ("train", "eval"):
        for k in writer.pending(split)[: None if every else 1]:
            with writer.shard(split, k) as shard:
                shard.write(rows)


@contextlib.contextmanager
def no_fsync() -> Iterator[None]:
    """Nobody needs what is written here after a power cut."""
    fsync, os.fsync = os.fsync, lambda descriptor: None
    try:
        yield
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


@contextlib.contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """Bytes read of local files within the block, by array; of beside arrays of a shard by their folder."""
    counts: Counter[str] = Counter()
    read, read_into = LocalFiles.read, LocalFiles.read_into

    def counting_read(files: LocalFiles, key: str, most: int) -> bytes:
        data = read(files, key, most)
        counts[array_of(key)] += len(data)
        return data

    def counting_read_into(files: LocalFiles, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        read_into(files, key, offset, buffers)
        counts[array_of(key)] += sum(buffer.nbytes for buffer in buffers)

    LocalFiles.read, LocalFiles.read_into = counting_read, counting_read_into  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        LocalFiles.read, LocalFiles.read_into = read, read_into  # type: ignore[method-assign]


def array_of(key: str) -> str:
    """tokens, special, resid, norm, moments, commit; record, large of files beside shards; else the file's name."""
    parts = key.split("/")
    if "record" in parts or "large" in parts:
        return parts[2]
    return parts[1] if len(parts) > 3 else key


def measure_one(place: str, what: str, device: torch.device) -> Figures:
    """Seconds, MB, requests and mappings of one thing, in this process."""
    remote = place.startswith("s3://")
    before, started, cpu = peak_mb(), time.perf_counter(), time.process_time()
    requests = n_requests() if remote else 0

    def figures() -> Figures:
        found = {
            "s": time.perf_counter() - started,
            "cpu_s": time.process_time() - cpu,
            "mb": peak_mb() - before,
            "mappings": float(Path("/proc/self/maps").read_text().count("\n")),
        }
        return found | ({"requests": float(n_requests() - requests)} if remote else {})

    if what == "stage":
        with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder, no_fsync():
            stage(place, Path(folder) / "staged.zarr", quiet=True)
            return figures()
    with counted_reads() as read:
        store = Store.open(place, check=what != "verify")
        if what == "verify":
            assert store.verify(quiet=True) == []
        if what in ("batch", "map"):
            order = Order(store.train.kept_rows(), 0, WINDOW if what == "batch" else None)
            with Loader(store.train, order, BATCH, device=device) as loader:
                for _ in range(MAPPED_BATCHES if what == "map" else 1):
                    loader.next()
                return figures()
    return figures() | {f"read_{name}": float(read[name]) for name in ("tokens", "special")}


def finish_one(folder: Path, size: Size, dtype: str) -> Figures:
    """Bytes that `finish` reads of each array, over the array's bytes; of a store whose shards are all written."""
    path = folder / "finish.zarr"
    with no_fsync():
        writer = prepare_store(path, size.config(dtype), *size.n_sequences)
        write_rows(writer, made_rows(writer.layout.shard_rows, dtype, massive=True), every=True)
        started = time.perf_counter()
        with counted_reads() as read:
            store = StoreWriter.open(path).finish()
    held = {key: store.files.size(key) or 0 for key in store.files.keys()}  # noqa: SIM118 (not a dict)
    found = {"s": time.perf_counter() - started, "massive_share": store.statistics.n_massive / store.statistics.n_rows}
    size_of = {name: sum(n for key, n in held.items() if f"/{name}/c/" in key) for name in store.train.arrays}
    index = index_nbytes(store.layout.chunks_per_shard) * sum(split.n_shards for split in store.splits)
    read["resid"] -= index  # read once while it is opened; what is left is rows
    size_of["record"] = sum(size_of[name] for name in PACKED)
    found |= {name: read[name] / n for name, n in size_of.items()}
    shutil.rmtree(path)
    return found


def peak_mb() -> float:
    """The most memory that this process has had, its parent's not counted (as ru_maxrss would)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3


def in_process(place: str, what: str, device: torch.device) -> Figures:
    """`measure_one` in a fresh process."""
    command = [sys.executable, __file__, "--child", what, "--place", place, "--device", str(device)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


class Book:
    """What was measured so far, of size and task, on disk where the stores are kept; printed as it comes."""

    def __init__(self, path: Path) -> None:
        self.path, self.figures = path, dict[str, Figures]()
        for line in path.read_text().splitlines() if path.exists() else ():
            self.figures |= json.loads(line)

    def take(self, size: Size, task: str, work: Callable[[], Figures]) -> None:
        """Measure, print and keep, unless it was."""
        name = f"{size.name} {task}"
        if name not in self.figures:
            self.figures[name] = {key: round(value, 4) for key, value in work().items()}
            with open(self.path, "a") as file:
                file.write(json.dumps({name: self.figures[name]}) + "\n")
        said = ", ".join(f"{key} {value:,g}" for key, value in self.figures[name].items())
        print(f"{name:<24}{said}", flush=True)

    def of(self, size: Size, task: str, name: str) -> float | None:
        """One figure, where there is one."""
        return self.figures.get(f"{size.name} {task}", {}).get(name)


def measure_size(
    size: Size,
    folder: Path,
    tasks: Sequence[str],
    delay_ms: float,
    device: torch.device,
    dtype: str,
    write: bool,
    book: Book,
) -> None:
    """Every task of one size."""
    path = folder / "bucket" / f"{size.name.replace(' ', '_')}.zarr"
    if not (path / "zarr.json").exists() or not Store.load(path).complete:
        shutil.rmtree(path, ignore_errors=True)
        write_store(path, size, dtype, write=write)
    store = Store.load(path)
    n_files = sum(len(names) for _, _, names in os.walk(path))
    book.take(size, "store", lambda: {"shards": sum(split.n_shards for split in store.splits), "files": n_files})
    if "finish" in tasks and size.rows and size.rows <= 10**7:
        book.take(size, "finish", lambda: finish_one(folder, size, dtype))
    with served(folder, delay_ms) if delay_ms else contextlib.nullcontext():
        for task in tasks:
            if task == "finish" or (task.endswith("_url") and not delay_ms):
                continue
            place = f"s3://bucket/{path.name}" if task.endswith("_url") else str(path)
            book.take(size, task, lambda: in_process(place, task.removesuffix("_url"), device))  # noqa: B023 (called at once)


def rows_table(sizes: Sequence[Size], book: Book) -> dict[str, dict[str, dict[str, float | None]]]:
    """The issue's table, printed; returns it: size → before and now → figure."""
    found = {}
    finished = next((size for size in sizes if book.of(size, "finish", "s") is not None), None)
    for size in sizes:
        real = size.real
        real_bytes = {name: array.n_files * array.file_nbytes for name, array in real.arrays.items()}
        real_bytes["record"] = sum(real_bytes[name] for name in PACKED)
        again = small = None
        if finished is not None:
            read_by = {name: (book.of(finished, "finish", name) or 0.0) * n for name, n in real_bytes.items()}
            again, small = read_by.pop("resid"), sum(read_by.values())
        read = [book.of(size, "open", f"read_{name}") for name in ("tokens", "special")]
        now = {
            "shards": book.of(size, "store", "shards"),
            "files": book.of(size, "store", "files"),
            "open_s": book.of(size, "open", "s"),
            "open_url_s": book.of(size, "open_url", "s"),
            "open_url_requests": book.of(size, "open_url", "requests"),
            "rehashed": None if None in read else sum(n or 0.0 for n in read),
            "finish": again,
            "finish_small": small,
            "memory": float(Order.n_bytes(real.n_rows, CHUNK_ROWS, None, real.n_rows > MOST_HELD)),
            "mappings": book.of(size, "map", "mappings"),
        }
        found[size.name] = {"before": dict[str, float | None](BEFORE.get(size.name, {})), "now": now}
    print("\n" + f"{'':<44}" + "".join(f"{size.name:>14}{'now':>14}" for size in sizes))
    for name, label, shown in LINES:
        cells = [said(found[size.name][when].get(name), shown) for size in sizes for when in ("before", "now")]
        print(f"{label:<44}" + "".join(f"{cell:>14}" for cell in cells))
    return found


LINES = (
    ("shards", "shards (evaluation's too)", "n"),
    ("files", "files", "n"),
    ("open_s", "opening a local store, s", "s"),
    ("open_url_s", "opening at a URL, s", "s"),
    ("open_url_requests", "  its requests", "n"),
    ("rehashed", "tokens and masks read by opening", "b"),
    ("finish", "rows that finish reads again (computed)", "b"),
    ("finish_small", "  tokens, masks, norms, records (computed)", "b"),
    ("memory", "a training's order of rows (computed)", "b"),
    ("mappings", "mappings (362 after imports)", "n"),
)


def said(value: float | None, shown: str) -> str:
    """A cell."""
    if value is None:
        return ""
    return {"b": human_bytes(int(value)), "s": f"{value:,.2f}", "n": f"{value:,.0f}"}[shown]


def shards_table(size: Size, tasks: Sequence[str], book: Book) -> dict[str, Any]:
    """Every figure of a store of so many shards, before and now, printed; returned too."""
    before = BEFORE.get(size.name, {})
    now = {
        f"{task}_{name}": value
        for task in tasks
        for name, value in book.figures.get(f"{size.name} {task}", {}).items()
        if not name.startswith("read_")
    } | book.figures[f"{size.name} store"]
    print(f"\n{'':<24}{'before':>16}{'now':>16}")
    for name, value in now.items():
        print(f"{name:<24}{before.get(name, ''):>16}{value:>16,g}")
    return {"before": before, "now": now}


@click.command()
@click.option(
    "--rows", type=COUNT, multiple=True, default=("10M", "1B", "10B"), show_default=True, help="Stores of so many rows."
)
@click.option("--shards", type=COUNT, multiple=True, help="Instead: stores of so many tiny shards.")
@click.option("--only", multiple=True, type=click.Choice(TASKS), help="Measure this alone.")
@click.option("--delay-ms", default=30.0, show_default=True, help="Added to each request at the URL; 0: no URL.")
@click.option(
    "--keep", type=click.Path(path_type=Path), help="Folder that keeps stores and figures; a second run goes on."
)
@click.option(
    "--write", is_flag=True, help="Write every shard, where only the first would be and the others links to it."
)
@placed("the rows of the store that is written")
@click.option("--child", hidden=True, help="Measure one thing in this process.")
@click.option("--place", hidden=True, help="The child's store.")
def main(
    rows: tuple[int, ...],
    shards: tuple[int, ...],
    only: tuple[str, ...],
    delay_ms: float,
    keep: Path | None,
    write: bool,
    device: torch.device,
    dtype: str,
    child: str | None,
    place: str,
) -> None:
    """Measure what grows with the number of a store's rows and shards; the last line is JSON."""
    if child is not None:
        print(json.dumps(measure_one(place, child, device)))
        return
    sizes = [Size(0, n) for n in shards] or [Size(n) for n in rows]
    tasks = only or (TASKS[1:] if shards else OF_ROWS)
    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR"))))
        folder = folder.absolute()
        (folder / "bucket").mkdir(parents=True, exist_ok=True)
        book = Book(folder / "figures.jsonl")
        for size in sizes:
            measure_size(size, folder, tasks, delay_ms, device, dtype, write, book)
        found = {size.name: shards_table(size, tasks, book) for size in sizes} if shards else rows_table(sizes, book)
        print(json.dumps(found))


if __name__ == "__main__":
    main()

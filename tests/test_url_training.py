"""Training and evaluation straight from object storage: the local store's batches, fetched, checked, kept, asked again."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluate.run import EvaluateConfig
from evaluate.run import run as evaluate
from pipeline.base.errors import DamagedError, DiskError, MismatchError, UsageError
from pipeline.store import requests
from pipeline.store.cache import Cache, open_cache
from pipeline.store.objects import RemoteFiles
from pipeline.store.reader import Split, Store
from pipeline.store.staging import open_cached
from support import lm_stores
from support.stores import make_store
from support.train_crasher import small
from test_train import assert_same, lines, train
from train.feed.loader import Loader, resolve_mode
from train.feed.order import Order

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW = {"mode": "window", "window_rows": 256}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between two tries."""
    monkeypatch.setattr(requests, "WAITS", (0.0, 0.0, 0.0, 0.0))


@pytest.fixture
def at_url(tiny_store: Path, url: str) -> str:
    """The tiny store at a URL."""
    files = RemoteFiles(url)
    for path in sorted(tiny_store.rglob("*")):
        if path.is_file():
            files.write(path.relative_to(tiny_store).as_posix(), path.read_bytes())
    return url


def failing(monkeypatch: pytest.MonkeyPatch, files: RemoteFiles, errors: dict[int, Exception]) -> list[str]:
    """Have the n-th GETs of a kind of file system fail; the paths of all."""
    asked, fetch, lock = list[str](), type(files.fs).cat_file, threading.Lock()

    def cat_file(fs: Any, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        with lock:
            asked.append(path)
            n = len(asked)
        if n in errors:
            raise errors[n]
        return fetch(fs, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(type(files.fs), "cat_file", cat_file)
    return asked


def take(split: Split, order: Order, size: int, n: int) -> list[Tensor]:
    """Copies of some batches."""
    with Loader(split, order, size) as loader:
        return [loader.next().clone() for _ in range(n)]


def test_url_batches_are_the_local_ones(tiny_store: Path, at_url: str, tmp_path: Path) -> None:
    """Weights, metrics and order of a training from a URL are bit for bit those of one from the local store."""
    pytest.importorskip("fsspec")
    (local,) = train(tiny_store, tmp_path / "local", small(alpha=0.25), **WINDOW)
    (remote,) = train(at_url, tmp_path / "url", small(alpha=0.25), window_rows=256)  # type: ignore[arg-type]
    assert_same(local, remote)
    assert (local.folder / "config.json").read_bytes() == (remote.folder / "config.json").read_bytes()


def test_url_traffic_is_logged(at_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line of timings has the bytes and requests since the last; the sum is said at the end."""
    (one,) = train(at_url, tmp_path / "url", small(), window_rows=256)  # type: ignore[arg-type]
    timings = lines(one.folder, "timings.jsonl")
    assert all(line.keys() >= {"wait", "bytes_per_s", "requests", "retries"} for line in timings)
    assert sum(line["requests"] for line in timings) > 0
    assert "object storage: " in (said := capsys.readouterr().err)
    assert "requests" in said


def test_global_order_needs_local_rows(at_url: str, tiny_store: Path, tmp_path: Path) -> None:
    """A global order is refused at a URL, also of a member that began in one; `auto` is a windowed one there."""
    shape = Store.open(tiny_store).train.shape
    assert resolve_mode("auto", shape, is_remote=True) == "window"
    with pytest.raises(UsageError, match="needs a local store"):
        train(at_url, tmp_path / "url", small(), mode="global")  # type: ignore[arg-type]
    train(tiny_store, tmp_path / "local", small())
    with pytest.raises(MismatchError, match="trained in global order"):
        train(at_url, tmp_path / "local", small())  # type: ignore[arg-type]


def test_chunks_are_asked_side_by_side(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of a window are on their way at a time: all of these wait for one another."""
    split = Store.open("file://" + str(tiny_store)).train
    for k in range(split.n_shards):
        split.checksums(k)
    together, read = threading.Barrier(4, timeout=120), type(split.files).read_into

    def meeting(files: Any, key: str, offset: int, buffers: Any) -> None:
        together.wait()
        read(files, key, offset, buffers)

    order = Order(split.kept_rows(), 0, 4 * split.chunk_rows)
    monkeypatch.setattr(
        order, "chunks", lambda epoch: np.split(np.arange(split.n_chunks // 4 * 4), split.n_chunks // 4)
    )
    monkeypatch.setattr(RemoteFiles, "read_into", meeting)
    assert len(take(split, order, 8, 2)) == 2


def test_changed_chunk_is_not_trained_on(at_url: str, tmp_path: Path) -> None:
    """A byte that changed at the URL ends the training with the object's name."""
    files = RemoteFiles(at_url)
    body = files.read("train/resid/c/1/0", most=1 << 30)
    files.write("train/resid/c/1/0", body[:9] + bytes([body[9] ^ 1]) + body[10:])
    with pytest.raises(DamagedError, match=rf"{at_url}/train/resid/c/1/0: bytes"):
        train(at_url, tmp_path / "url", small(), window_rows=256)  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick")
def test_lost_requests_are_asked_again(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Requests that fail now and then change no batch; each failure is a line."""
    url = "file://" + str(tiny_store)
    (local,) = train(tiny_store, tmp_path / "local", small(), **WINDOW)
    errors: dict[int, Exception] = {n: ConnectionResetError("reset by peer") for n in range(20, 400, 37)}
    failing(monkeypatch, RemoteFiles(url), errors)
    (remote,) = train(url, tmp_path / "url", small(), window_rows=256)  # type: ignore[arg-type]
    assert_same(local, remote)
    assert "reset by peer; trying again in" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_dead_storage_is_one_line(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that answers no more ends in one line, after five tries; a wrong address after three; a refusal at once."""
    files = RemoteFiles("file://" + str(tiny_store))
    asked = failing(monkeypatch, files, {n: TimeoutError("timed out\nsecond line") for n in range(1, 100)})
    with pytest.raises(DiskError, match=r"zarr\.json: TimeoutError: timed out; check the URL .*, then run again$"):
        files.read("zarr.json", most=1 << 20)
    assert len(asked) == 3
    files.traffic.n_answered = 1
    with pytest.raises(DiskError):
        files.read("zarr.json", most=1 << 20)
    assert len(asked) == 3 + 5
    asked = failing(monkeypatch, files, {1: PermissionError("403"), 2: RefusedError()})
    for says in ("no permission", "400 Bad Request"):
        with pytest.raises(DiskError, match=says):
            files.read("zarr.json", most=1 << 20)
    assert len(asked) == 2


class RefusedError(OSError):
    """What a server answers to a request that it will never like."""

    status = 400

    def __str__(self) -> str:
        return "400 Bad Request"


def test_our_own_bugs_are_not_retried(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is of no network passes as it is, at once."""
    files = RemoteFiles("file://" + str(tiny_store))
    asked = failing(monkeypatch, files, {1: ZeroDivisionError()})
    with pytest.raises(ZeroDivisionError):
        files.read("zarr.json", most=1 << 20)
    assert len(asked) == 1


def cached(store: Path, folder: Path, most: int = 1 << 30) -> tuple[Store, Cache]:
    """A store at a URL behind a cache."""
    cache = open_cache(folder, most)
    return open_cached("file://" + str(store), cache), cache


def test_cached_chunks_are_not_asked_again(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second training asks for no chunk that the first one kept, and has the same batches."""
    (first,) = train("file://" + str(tiny_store), tmp_path / "a", small(), window_rows=256, cache=tmp_path / "c")  # type: ignore[arg-type]
    asked = failing(monkeypatch, RemoteFiles("file://" + str(tiny_store)), {})
    read: list[int] = []
    into = RemoteFiles.read_into
    monkeypatch.setattr(
        RemoteFiles, "read_into", lambda s, k, o, b: (read.append(sum(map(len, b))), into(s, k, o, b))[1]
    )
    (again,) = train("file://" + str(tiny_store), tmp_path / "b", small(), window_rows=256, cache=tmp_path / "c")  # type: ignore[arg-type]
    assert_same(first, again)
    assert asked
    assert max(read) < 4096


def test_damaged_cache_is_fetched_again(tiny_store: Path, tmp_path: Path) -> None:
    """Kept bytes that changed, were cut short or are a folder are fetched again, and rows are those of the store."""
    store, cache = cached(tiny_store, tmp_path / "c")
    rows = store.train.read(0, 2000)
    kept = [path for path in (tmp_path / "c").rglob("*") if path.is_file() and len(path.name) == 64]
    assert len(kept) > 5
    kept[0].write_bytes(b"\1" + kept[0].read_bytes()[1:])
    kept[1].write_bytes(kept[1].read_bytes()[:-1])
    kept[2].write_bytes(b"")
    cache.n_hits = cache.n_misses = 0
    assert torch.equal(store.train.read(0, 2000), rows)
    assert (cache.n_hits, cache.n_misses) == (len(kept) - 3, 3)


def test_least_recently_used_goes(tiny_store: Path, tmp_path: Path) -> None:
    """The folder stays within its size, and what was read last stays."""
    store, cache = cached(tiny_store, tmp_path / "c")
    chunk = store.train.chunk_rows
    for k in range(8):
        store.train.read(k * chunk, (k + 1) * chunk)
    paths = {path: path.stat().st_size for path, _ in cache.entries()}
    assert len(paths) == 8
    for age, path in enumerate(sorted(paths)):
        os.utime(path, (1000 + age, 1000 + age))
    store.train.read(0, chunk)  # this one is used again
    (used,) = [path for path in paths if path.stat().st_mtime > 10_000]
    cache.most = sum(paths.values()) * 5 // 8
    cache.make_room()
    left = {path for path, _ in cache.entries()}
    assert sum(paths[path] for path in left) <= cache.most
    assert len(left) == 4
    assert left == {used, *[path for path in sorted(paths) if path != used][-3:]}


def test_cache_keeps_its_size_while_filled(tiny_store: Path, tmp_path: Path) -> None:
    """Read through a small cache, all rows are right and the folder never holds more than its size and a little."""
    store, cache = cached(tiny_store, tmp_path / "c", most=200_000)
    assert torch.equal(
        store.train.read(0, store.train.n_rows), Store.open(tiny_store).train.read(0, store.train.n_rows)
    )
    assert 0 < sum(found.st_size for _, found in cache.entries()) <= 200_000 * 33 // 32 + 20_000


def test_processes_share_a_cache(tiny_store: Path, tmp_path: Path) -> None:
    """Three processes read all rows through one cache that is too small for them, over and over: each has the store's rows."""
    code = """
import sys, torch
from pathlib import Path
from pipeline.store.cache import open_cache
from pipeline.store.reader import Store
from pipeline.store.staging import open_cached
path, folder = sys.argv[1:]
local = Store.open(path).train
rows = local.read(0, local.n_rows)
for _ in range(6):
    split = open_cached("file://" + path, open_cache(Path(folder), 150_000)).train
    assert torch.equal(split.read(0, split.n_rows), rows)
"""
    words = [sys.executable, "-c", code, str(tiny_store), str(tmp_path / "c")]
    root = Path(__file__).parents[1]
    running = [subprocess.Popen(words, cwd=root, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[1] for process in running]
    assert said == ["", "", ""]
    assert [process.returncode for process in running] == [0, 0, 0]


def test_cleared_cache_goes_on(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A range whose file another process deletes before it has its name is not kept, without a word; later ones are."""
    store, cache = cached(tiny_store, tmp_path / "c")
    rename, deleted = os.replace, []

    def delete_first(source: Path, target: Path) -> None:
        if not deleted:
            deleted.append(source)
            os.unlink(source)
        rename(source, target)

    monkeypatch.setattr("pipeline.store.cache.os.replace", delete_first)
    assert torch.equal(store.train.read(0, 500), Store.open(tiny_store).train.read(0, 500))
    assert deleted
    assert "nothing more is kept" not in capsys.readouterr().err
    assert list(cache.entries())


def test_planted_links_stay_in_a_cache(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link where the cache will write its temporary file is not followed, and a pipe where a chunk will be is not replaced."""
    cache = cached(tiny_store, tmp_path / "c")[1]
    (tmp_path / "secret").write_text("keep")
    path = cache.path("x")
    path.parent.mkdir(parents=True)
    partial = f"{path}.{os.getpid()}.{threading.get_ident()}.partial"
    Path(partial).symlink_to(tmp_path / "secret")
    cache.put("x", [memoryview(b"abcd")])
    assert ((tmp_path / "secret").read_text(), path.read_bytes()[:4], path.is_symlink()) == ("keep", b"abcd", False)
    path.unlink()
    os.mkfifo(path)
    cache.put("x", [memoryview(b"abcd")])
    assert (path.is_fifo(), cache.full) == (True, True)


def test_full_disk_ends_the_cache_alone(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the cache's disk is full, it is said once, and rows come from the network."""
    store, _ = cached(tiny_store, tmp_path / "c")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.store.cache.os.replace", full)
    assert torch.equal(store.train.read(0, 500), Store.open(tiny_store).train.read(0, 500))
    assert capsys.readouterr().err.count("nothing more is kept here (No space left on device)") == 1
    assert not [path for path in (tmp_path / "c").rglob("*.partial")]


def test_cache_folders_are_looked_at(tiny_store: Path, tmp_path: Path) -> None:
    """A folder that holds something else, and a cache of a local store, are refused."""
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DiskError, match="holds something else"):
        open_cache(tmp_path, 1000)
    with pytest.raises(UsageError, match="--cache is for stores at a URL"):
        train(tiny_store, tmp_path / "a", small(), cache=tmp_path / "c")


def test_another_store_has_its_own_chunks(tiny_store: Path, tmp_path: Path) -> None:
    """Another store at the same URL is not given what was kept of the first."""
    place = tmp_path / "s.zarr"
    shutil.copytree(tiny_store, place)
    cached(place, tmp_path / "c")[0].train.read(0, 1000)
    shutil.rmtree(place)
    other = make_store(place, seed=1)
    assert torch.equal(cached(place, tmp_path / "c")[0].train.read(0, 1000), other.train.read(0, 1000))


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_read_their_own_chunks(tiny_store: Path, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """Each of several processes reads other chunks; together they deliver every kept row once an epoch."""
    local = Store.open(tiny_store).train
    rows: list[int] = []
    for part in range(parts):
        order = Order(local.kept_rows(), 0, 256, (part, parts))
        chunks = np.concatenate(order.chunks(1))
        assert set(chunks % parts) == {part}
        pieces = [next(order.batches(order.n_kept, order.n_kept))][0]
        rows += [int(row) for p in pieces for row in order.window(p.epoch, p.window).rows[p.start : p.stop]]
    assert sorted(rows) == local.kept_rows().rows(np.arange(local.n_chunks)).tolist()


def test_url_evaluation_is_the_local_one(tmp_path: Path) -> None:
    """Scores from a URL, through a cache or not, are those of the local store."""
    store = lm_stores.make_lm_store(tmp_path, eval_sequences=4)
    lm_stores.save_member(tmp_path / "runs", store, lm_stores.make_sae(store, seed=0), seed=0)
    found: list[Any] = []
    for n, place in enumerate((store.path, "file://" + str(store.path), "file://" + str(store.path))):
        cache = tmp_path / "c" if n == 2 else None
        config = EvaluateConfig(store=place, out=tmp_path / f"r{n}", scores=("ev", "l0"), device="cpu", cache=cache)
        assert not evaluate(config, [tmp_path / "runs"]).failed
        (path,) = (tmp_path / f"r{n}").glob("*.json")
        found.append(json.loads(path.read_text())["levels"])
    assert found[0] == found[1] == found[2]
    assert any((tmp_path / "c").rglob("*"))


def together(store: str, out: Path) -> None:
    """One member trained by two processes as torchrun starts them."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from test_train import train, small\n"
        "train(sys.argv[1], Path(sys.argv[2]), small(), data_parallel=True, mode='window', window_rows=256)"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words, root = [sys.executable, "-c", code, store, str(out)], Path(__file__).parents[1]
    running = [subprocess.Popen(words, cwd=root, env=environment | {"RANK": str(r)}) for r in range(2)]
    assert [process.wait(timeout=600) for process in running] == [0, 0]


@pytest.mark.slow
def test_processes_read_their_share(tiny_store: Path, tmp_path: Path) -> None:
    """Two processes that train together from a URL, each on its own chunks, end as two do on the local store in that order; one
    process alone does not go on with it."""
    url = "file://" + str(tiny_store)
    together(url, tmp_path / "url")
    (remote,) = (tmp_path / "url").iterdir()
    assert json.loads((remote / "config.json").read_text())["order"] == WINDOW | {"parts": 2}
    local = tmp_path / "local" / remote.name
    (local / "checkpoints").mkdir(parents=True)
    shutil.copy(remote / "config.json", local)
    together(str(tiny_store), tmp_path / "local")
    for name in ("metrics.jsonl", "complete.json"):
        assert (local / name).read_bytes() == (remote / name).read_bytes()
    with pytest.raises(MismatchError, match="trained by 2 processes together"):
        train(tiny_store, tmp_path / "local", small(), **WINDOW)

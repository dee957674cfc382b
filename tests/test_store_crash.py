"""Killed, or stopped by the disk, at any moment: the same steps again give the bytes of a store never interrupted."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from pipeline.base.errors import DiskError, PipelineError, StoreError
from pipeline.base.runtime import numpy_rng
from pipeline.store.reader import Store
from pipeline.store.shards import ShardStream
from pipeline.store.writer import StoreWriter
from support.stores import harvest, lose_shards, make_rows, make_store, prepare_store, store_config
from test_store import SMALL, tree

SIZES: dict[str, Any] = {"n_sequences": 11, "eval_sequences": 3, **SMALL}
JOB: dict[str, Any] = {"n_sequences": 60, "eval_sequences": 11, **SMALL}


Begin = Callable[[Path], None]


class Stopped(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


def stop_at(patch: pytest.MonkeyPatch, n: int) -> None:
    """Raise Stopped instead of the n-th change to a store's folder, a rename or a deletion, counted from now."""
    left = [n]

    def counted(method: Any) -> Any:
        def call(*args: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped
            return method(*args)

        return call

    patch.setattr(Path, "unlink", counted(Path.unlink))
    patch.setattr(os, "replace", counted(os.replace))


def begin_nothing(path: Path) -> None:
    """The start of a new store: no store."""


def begin_extension(path: Path) -> None:
    """The start of an extension: a smaller store, its last shard ragged."""
    make_store(path, **(SIZES | {"n_sequences": 9}))


def begin_repair(path: Path) -> None:
    """The start of a repair: a store with a flipped body, a shard gone and tokens cut short."""
    make_store(path, **SIZES)
    body = path / "train/resid/c/0/0"
    body.write_bytes(bytes([body.read_bytes()[0] ^ 1]) + body.read_bytes()[1:])
    (path / "eval/norm/c/0").unlink()
    (path / "train/tokens/c/0/0").write_bytes(b"cut")


@pytest.mark.parametrize("begin", [begin_nothing, begin_extension, begin_repair])
def test_stop_before_any_change_is_harmless(tmp_path: Path, begin: Begin) -> None:
    """Stopped before any change and run again gives the same bytes."""
    repair = begin is begin_repair
    begin(tmp_path / "whole.zarr")
    before = tree(tmp_path / "whole.zarr")
    make_store(tmp_path / "whole.zarr", repair=repair, **SIZES)
    expected = tree(tmp_path / "whole.zarr")
    for n in range(1000):
        path = tmp_path / f"stopped{n}.zarr"
        begin(path)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
            stop_at(patch, n)
            make_store(path, repair=repair, **SIZES)
            break
        if opens(path):
            assert without_leftovers(tree(path)) in (before, expected), n
        make_store(path, repair=repair, **SIZES)
        assert tree(path) == expected, n
    assert 10 < n < 150


def without_leftovers(files: dict[str, bytes]) -> dict[str, bytes]:
    """What counts of a finished store: not what lay beside its shards until then, or will, nor what is half-written."""
    beside = ("/resid/record/", "/resid/large/", ".partial")
    return {key: data for key, data in files.items() if not any(part in key for part in beside)}


def opens(path: Path) -> bool:
    """Whether a store can be opened for training."""
    try:
        return Store.open(path) is not None
    except PipelineError:
        return False


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    """A process that starts workers to be killed: stores.serve."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(root / "tests" / "support" / "stores.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=root) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def run_round(server: subprocess.Popen[str], job: dict[str, Any], kill_after: list[float]) -> list[int]:
    """Let the server start workers and kill -9 each after its time (seconds); their exit codes: 0 done, −9 killed."""
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(job | {"kill_after": kill_after}), file=server.stdin, flush=True)
    codes: list[int] = json.loads(server.stdout.readline())
    return codes


def committed(path: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the rows of every committed shard."""
    shards = {record.name for record in path.glob("train/resid/record/*") if record.suffix != ".partial"}
    files = [path / f"train/resid/c/{k}/0" for k in shards]
    if (path / "train/commit/c/0/0").exists():  # being finished, or finished
        files += path.glob("train/resid/c/*/0")
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def kill_until_done(server: subprocess.Popen[str], path: Path, job: dict[str, Any], seed: int, span: float) -> int:
    """Rounds of kill -9 at random moments within `span` seconds, then one to the end; returns how many were killed."""
    rng, killed, held = numpy_rng("kills", seed), 0, committed(path)
    for _ in range(12):
        times = rng.uniform(0, span, job["world_size"]).tolist()
        codes = run_round(server, job, times)
        assert set(codes) <= {0, -9}, codes
        now = committed(path)
        assert held.items() <= now.items(), "a committed shard was written again"
        held, killed = now, killed + codes.count(-9)
        if not any(codes):
            break
    assert run_round(server, job, []) == [0] * job["world_size"]
    assert held.items() <= committed(path).items()
    return killed


@pytest.mark.parametrize(
    ("world_size", "n_stores"),
    [(1, 3), (2, 3), pytest.param(1, 30, marks=pytest.mark.slow), pytest.param(2, 30, marks=pytest.mark.slow)],
)
def test_random_kills_give_equal_bytes(
    server: subprocess.Popen[str], tmp_path: Path, world_size: int, n_stores: int
) -> None:
    """Kill -9 at random moments and run again gives the same bytes."""
    make_store(tmp_path / "whole.zarr", **JOB)
    expected, killed = tree(tmp_path / "whole.zarr"), 0
    for seed in range(n_stores):
        path = tmp_path / f"killed{seed}.zarr"
        job = {"world_size": world_size, "path": str(path), "delay": 0.004, **JOB}
        killed += kill_until_done(server, path, job, seed, span=0.25)
        assert tree(path) == expected
    assert killed > n_stores


def test_killed_extension_gives_equal_bytes(server: subprocess.Popen[str], tmp_path: Path) -> None:
    """An extension killed at random moments gives the same bytes."""
    for path in (tmp_path / "whole.zarr", tmp_path / "killed.zarr"):
        make_store(path, **(JOB | {"n_sequences": 21}))
    ragged = {key for key in committed(tmp_path / "killed.zarr") if "/c/2" in key and "/train/" in key}
    kept = committed(tmp_path / "killed.zarr")
    make_store(tmp_path / "whole.zarr", **JOB)
    job = {"world_size": 2, "path": str(tmp_path / "killed.zarr"), "delay": 0.004, **JOB}
    for seed in range(6):
        run_round(server, job, numpy_rng("extension", seed).uniform(0, 0.2, 2).tolist())
    assert run_round(server, job, []) == [0, 0]
    assert tree(tmp_path / "killed.zarr") == tree(tmp_path / "whole.zarr")
    after = committed(tmp_path / "killed.zarr")
    assert {key for key, stamp in kept.items() if after[key] != stamp} == ragged


@pytest.mark.parametrize("n", [1, 2])
def test_stopped_giving_up_no_longer_counts(tmp_path: Path, n: int) -> None:
    """A shard whose giving up is stopped no longer counts."""
    writer = lose_shards(make_store(tmp_path / "s.zarr", **SIZES).path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, n)
        writer.give_up("train", 0)
    assert writer.pending("train") == [0]


def test_finished_meanwhile_is_not_written_again(tmp_path: Path) -> None:
    """A writer opened before another process finished the store writes no shard again.
    The records that it looks for lie in their groups by then."""
    make_store(tmp_path / "s.zarr", **SIZES)
    writer = lose_shards(tmp_path / "s.zarr")
    slow, other = StoreWriter.open(writer.store.where), StoreWriter.open(writer.store.where)
    writer.finish()
    with pytest.raises(StoreError, match="is committed"), slow.shard("train", 0):
        pass
    assert [other.pending(split) for split in ("train", "eval")] == [[], []]


def test_finishing_sweeps_leftovers(tmp_path: Path) -> None:
    """What a killed writer left is swept when the store is finished."""
    writer = prepare_store(tmp_path / "s.zarr", store_config(**SMALL), 19, 5)
    left = tmp_path / "s.zarr" / "train/resid/c/1/0.4711.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a shard")
    harvest(str(tmp_path / "s.zarr"), 19, 5, 0.0, **SMALL)
    assert not left.exists()
    assert Store.open(writer.store.where).verify() == []


def fill_after(patch: pytest.MonkeyPatch, n: int) -> None:
    """Let the disk be full after n chunks."""
    append, left = ShardStream.append, [n]

    def full(self: ShardStream, chunk: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        append(self, chunk)

    patch.setattr(ShardStream, "append", full)


@pytest.mark.parametrize(("n_chunks", "n_committed"), [(0, 0), (3, 0), (4, 1), (6, 2)])
def test_full_disk_leaves_nothing_half(tmp_path: Path, n_chunks: int, n_committed: int) -> None:
    """A full disk is one error and nothing half written counts."""
    with pytest.MonkeyPatch.context() as patch:
        fill_after(patch, n_chunks)
        with pytest.raises(DiskError, match="the disk is full"):
            make_store(tmp_path / "s.zarr", **SIZES)
    assert not list((tmp_path / "s.zarr").rglob("*.partial"))
    assert len(list((tmp_path / "s.zarr").glob("train/resid/record/*"))) == n_committed
    make_store(tmp_path / "whole.zarr", **SIZES)
    make_store(tmp_path / "s.zarr", **SIZES)
    assert tree(tmp_path / "s.zarr") == tree(tmp_path / "whole.zarr")


def test_truly_full_disk_can_go_on(tmp_path: Path) -> None:
    """A disk that is really full is one error and harvest goes on with more room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs of 300 kB cannot be mounted here (needs root)")
    try:
        with pytest.raises(DiskError, match="the disk is full"):
            make_store(folder / "s.zarr")
        with pytest.raises(StoreError, match="shards are committed"):
            Store.open(folder / "s.zarr")
        subprocess.run(["mount", "-o", "remount,size=2m", str(folder)], check=True)
        make_store(tmp_path / "whole.zarr")
        make_store(folder / "s.zarr")
        assert tree(folder / "s.zarr") == tree(tmp_path / "whole.zarr")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def folder_of_others() -> Iterator[Path]:
    """A folder in which this process may not write, also when the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        user = os.geteuid()
        folder.chmod(0o555)
        os.seteuid(65534 if user == 0 else user)
        yield folder
        os.seteuid(user)
        folder.chmod(0o755)


def test_readonly_folder_is_named(folder_of_others: Path) -> None:
    """A read-only folder is one error that names it."""
    with pytest.raises(DiskError, match=f"{folder_of_others}.*cannot write here"):
        make_store(folder_of_others / "s.zarr", **SIZES)


def test_exception_in_shard_leaves_nothing(tmp_path: Path) -> None:
    """A shard stopped by an exception leaves nothing."""
    writer = prepare_store(tmp_path / "s.zarr", store_config(**SMALL), 19, 5)
    before = tree(tmp_path / "s.zarr")
    with pytest.raises(KeyboardInterrupt), writer.shard("train", 0) as shard:
        shard.write(make_rows(writer.store.config, "train", 0, 20))
        raise KeyboardInterrupt
    assert tree(tmp_path / "s.zarr") == before


def test_shard_file_grows_by_chunks(tmp_path: Path) -> None:
    """The file of a shard grows chunk by chunk.
    No second copy of a shard is held: a chunk is handed to the file as soon as it is full."""
    writer = prepare_store(tmp_path / "s.zarr", store_config(**SMALL), 19, 5)
    with writer.shard("train", 0) as shard:
        file: BinaryIO = shard.stream.file
        for n in range(4):
            shard.write(make_rows(writer.store.config, "train", 8 * n, 8 * n + 8))
            assert file.tell() == (n + 1) * (8 * 6 * 2 + 4)

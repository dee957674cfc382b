"""Killed at any moment, alone or with another worker, the same command makes the same bytes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.process
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from harvest.config import HarvestConfig
from harvest.run import run
from pipeline.base.errors import DamagedError, StoreError
from pipeline.store.reader import Store
from support import tiny_models
from support.harvests import Slow, harvest_config, harvest_process, n_committed, noted, store_bytes

Start = Callable[..., list[multiprocessing.process.BaseProcess]]
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts harvests in processes forked from one that has imported everything already, so that a kill is cheap."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.harvests", "harvest.run"])
    running: list[Any] = []

    def start(
        config: HarvestConfig, n_workers: int = 1, slow: Sequence[Slow] = ()
    ) -> list[multiprocessing.process.BaseProcess]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"WORLD_SIZE": str(n_workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        workers: list[Any] = [
            context.Process(
                target=harvest_process,
                args=(
                    config,
                    shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    False,
                    dict(enumerate(slow)).get(rank),
                ),
            )
            for rank in range(n_workers)
        ]
        for worker in workers:
            worker.start()
        running.extend(workers)
        return workers

    yield start
    for worker in running:
        worker.kill()
        worker.join()


def finish(workers: list[multiprocessing.process.BaseProcess]) -> list[int | None]:
    """Exit codes of processes that are left alone."""
    for worker in workers:
        worker.join(300)
    return [worker.exitcode for worker in workers]


@pytest.fixture(scope="module")
def configs(
    lm_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], HarvestConfig]:
    """The config of a harvest under a name; `expected` is done already, never interrupted, in this process."""
    folder = tmp_path_factory.mktemp("crash")
    corpus = tiny_models.make_corpus(folder / "corpus.jsonl")

    def config(name: str) -> HarvestConfig:
        return harvest_config(lm_folder("gemma2"), corpus, folder / f"{name}.zarr", batch_size=2, layers=(2,))

    run(config("expected"), quiet=True)
    return config


def wait(until: Callable[[], bool]) -> None:
    """For a state, which must come."""
    deadline = time.monotonic() + 600
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_rounds(start: Start, config: HarvestConfig, n_rounds: int, n_workers: int, seed: int) -> set[str]:
    """Start, wait until a random number of new files is there and a moment more, kill -9 all workers, again.

    Returns the states in which the store was left. After each kill, what says that it is committed must be right.
    """
    draw, states = random.Random(seed), set()
    for _ in range(n_rounds):
        wanted, deadline = n_files(config) + draw.randrange(30), time.monotonic() + 600
        workers = start(config, n_workers)
        while n_files(config) < wanted and all(worker.exitcode is None for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        for worker in workers:
            worker.kill()
        finish(workers)
        states.add(state(Path(config.store)))
    return states


def n_files(config: HarvestConfig) -> int:
    """Files of a store, half-written ones included."""
    return sum(len(files) for _, _, files in os.walk(config.store))


def state(path: Path) -> str:
    """How far a killed harvest came. Raises DamagedError when a committed shard is not right."""
    try:
        store = Store.open(path, complete=False)
    except StoreError:
        return "none"
    except DamagedError:
        assert Store.load(path).attributes["state"] == "preparing"
        return "preparing"
    committed = 0
    for split in store.splits:
        for k in range(split.n_shards):
            if split.commit(k) is not None:
                split.check_shard(k)
                committed += 1
    return "complete" if store.complete else f"{committed} shards"


@pytest.mark.parametrize("n_workers", [1, 2])
def test_killed_harvest_gives_equal_bytes(
    start: Start, configs: Callable[[str], HarvestConfig], n_workers: int
) -> None:
    """Killed and started again, the bytes are those of a harvest never stopped."""
    config = configs(f"few-{n_workers}")
    kill_rounds(start, config, 3, n_workers, seed=n_workers)
    assert finish(start(config, n_workers)) == [0] * n_workers
    assert store_bytes(Path(config.store)) == store_bytes(Path(configs("expected").store))


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_many_kills_give_equal_bytes(
    start: Start, configs: Callable[[str], HarvestConfig], n_workers: int, seed: int
) -> None:
    """Many kills at random moments leave the same bytes."""
    config = configs(f"many-{n_workers}-{seed}")
    states = kill_rounds(start, config, 8, n_workers, seed=100 * n_workers + seed)
    print(n_workers, seed, sorted(states))
    assert finish(start(config, n_workers)) == [0] * n_workers
    assert store_bytes(Path(config.store)) == store_bytes(Path(configs("expected").store))


@pytest.mark.slow
def test_killed_extension_gives_equal_bytes(start: Start, configs: Callable[[str], HarvestConfig]) -> None:
    """An extension that is killed makes the same bytes as one that is not."""
    for name in ("extended", "extended-killed"):
        run(configs(name), quiet=True)
    whole, killed = configs("extended").replace(tokens=2400), configs("extended-killed").replace(tokens=2400)
    run(whole, quiet=True)
    kill_rounds(start, killed, 8, 1, seed=7)
    assert finish(start(killed)) == [0]
    assert store_bytes(Path(killed.store)) == store_bytes(Path(whole.store))


def test_committed_shards_are_not_made_again(start: Start, configs: Callable[[str], HarvestConfig]) -> None:
    """Committed shards are not made again."""
    config = configs("kept")
    (worker,) = start(config)
    shard = Path(config.store) / "train/resid/record/1"
    deadline = time.monotonic() + 600
    while not shard.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    worker.kill()
    finish([worker])
    body = Path(config.store) / "train/resid/c/1/0"
    before = body.stat().st_mtime_ns, body.stat().st_ino
    assert finish(start(config)) == [0]
    assert (body.stat().st_mtime_ns, body.stat().st_ino) == before
    assert not list(Path(config.store).rglob("*.partial"))


def test_two_workers_make_equal_bytes(start: Start, configs: Callable[[str], HarvestConfig]) -> None:
    """Two workers make the bytes of one."""
    config = configs("two")
    assert finish(start(config, 2)) == [0, 0]
    assert store_bytes(Path(config.store)) == store_bytes(Path(configs("expected").store))


@pytest.mark.parametrize("n_workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_slow_worker_holds_nobody_up(start: Start, configs: Callable[[str], HarvestConfig], n_workers: int) -> None:
    """Of two and four workers one makes a shard while each other makes three, and all are killed and started again, as torchrun
    does when one is lost: shards go to who asks next, each is begun once, and the bytes are those of one worker."""
    config, most = configs(f"slow-{n_workers}"), 3 * (n_workers - 1)
    slow = [Slow(str(rank), n_workers - 1, most * (rank == 1)) for rank in range(n_workers)]
    workers = start(config, n_workers, [dataclasses.replace(one, others=n_workers, last=2) for one in slow])
    wait(lambda: n_committed(config) >= 2)
    for worker in workers:  # the first is lost, and torchrun ends the others
        worker.kill()
    finish(workers)
    there = n_committed(config)
    shutil.rmtree(f"{config.store}.noted")
    assert finish(start(config, n_workers, slow)) == [0] * n_workers
    begun = [noted(config, path.name) for path in Path(f"{config.store}.noted").glob("*-*")]
    assert len(begun) == 9 - there
    assert all(len(who) == 1 for who in begun)
    assert sum(who == ["1"] for who in begun) <= 1 + (len(begun) - 1) // (most + 1)
    assert store_bytes(Path(config.store)) == store_bytes(Path(configs("expected").store))


@pytest.mark.slow
def test_torchrun_makes_equal_bytes(configs: Callable[[str], HarvestConfig]) -> None:
    """Torchrun with two processes makes the bytes of one."""
    config = configs("torchrun")
    arguments = f"--model {config.model} --layer 2 --corpus {config.corpus} --store {config.store} --tokens 1600"
    arguments += " --eval-tokens 320 --context 16 --batch-size 2 --chunk-rows 64 --shard-rows 256 --device cpu"
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "harvest", *arguments.split()],
        check=True, cwd=ROOT, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert store_bytes(Path(config.store)) == store_bytes(Path(configs("expected").store))


@pytest.mark.slow
def test_ctrl_c_exits_130_with_advice(configs: Callable[[str], HarvestConfig]) -> None:
    """Ctrl-C says how to go on and exits 130."""
    config = configs("ctrl-c")
    arguments = f"--model {config.model} --layer 2 --corpus {config.corpus} --store {config.store} --tokens 1600"
    arguments += (
        " --eval-tokens 320 --context 16 --batch-size 1 --chunk-rows 16 --shard-rows 16 --device cpu"  # 120 shards
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "harvest", *arguments.split()], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not (Path(config.store) / "train/resid/record/0").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(2)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "run the same command again to go on" in said
    assert "Traceback" not in said

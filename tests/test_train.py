"""The training run: members side by side equal members alone, each resumes, fails and finishes on its own."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.base.errors import (
    CheckpointError,
    DamagedError,
    DiskError,
    MismatchError,
    PipelineError,
    StoreError,
    UsageError,
)
from pipeline.base.runtime import resolve_device, tf32
from pipeline.experiment.verify import verify
from pipeline.sae.checkpoint import load_checkpoint, read_header
from pipeline.store.reader import Store
from support.stores import make_store
from support.train_crasher import small
from train import plan
from train.config import TrainConfig
from train.feed.bodies import BodyCheck
from train.feed.order import Order
from train.feed.resident import Place, place_for
from train.folder import Folder, Keep, member_name
from train.log import scalars
from train.parallel import Processes
from train.plan import RunConfig, make_order
from train.run import make_plan, run
from train.step.member import Member
from train.stores import Stores
from train.trainee import Outcome, Trainee

pytestmark = pytest.mark.usefixtures("one_thread")


def train(store: Path, out: Path, *members: TrainConfig, **options: Any) -> list[Outcome]:
    """One run on the CPU."""
    return run(RunConfig(store, out, members, device="cpu", threads=1, **options))


def weights(outcome: Outcome) -> dict[str, Tensor]:
    """The final SAE's tensors."""
    assert outcome.final is not None
    return load_checkpoint(outcome.final)[0].state_dict()


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of metrics or timings."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def assert_same(a: Outcome, b: Outcome) -> None:
    """Two members ended with the same weights and the same metrics, bit for bit."""
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    assert all(torch.equal(x[name], y[name]) for name in x)
    assert (a.folder / "metrics.jsonl").read_bytes() == (b.folder / "metrics.jsonl").read_bytes()


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process SIGINT when a member reaches the step."""
    after_step = Trainee.after_step

    def after(self: Trainee, clock: Any) -> None:
        after_step(self, clock)
        if self.member.n_steps == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainee, "after_step", after)


GRID = (small(alpha=0.0), small(alpha=0.25, seed=1), small("batchtopk"), small("jumprelu", steps=17), small("topk"))


@pytest.fixture(scope="module")
def alone(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Every member of GRID trained in a run of its own."""
    out = tmp_path_factory.mktemp("alone")
    return [outcome for member in GRID for outcome in train(tiny_store, out, member)]


def test_checkpoint_says_what_is_dead(tiny_store: Path, tmp_path: Path) -> None:
    """A checkpoint between lines says the share of dead latents of its own step."""
    config = small(
        steps=6, log_every=4, checkpoint_every=3, lr_warmup_steps=0, sparsity_warmup_steps=0, dead_after_rows=64
    )
    found: list[float] = []
    member_sae = Member.sae_of_state

    def noting(self: Member) -> Any:
        found.append(float((self.rows_since_fired >= 64).double().mean()))
        return member_sae(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Member, "sae_of_state", noting)
        outcome = train(tiny_store, tmp_path, config, keep="all")[0]
    told = [read_header(path).provenance for path in sorted(outcome.folder.glob("checkpoints/*"))]
    assert [one["dead"] for one in told] == found
    assert [one["fired_rows"] for one in told] == [64, 64]


def test_grid_members_equal_single_ones(tiny_store: Path, tmp_path: Path, alone: list[Outcome]) -> None:
    """Members of a grid are bit identical to the same SAEs alone."""
    for side_by_side, by_itself in zip(train(tiny_store, tmp_path / "out", *GRID), alone):
        assert_same(side_by_side, by_itself)


def test_crowded_members_take_further_passes(
    tiny_store: Path, tmp_path: Path, alone: list[Outcome], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Members that do not fit side by side are trained in further passes."""
    monkeypatch.setattr("train.plan.free_memory", lambda device: 5_700_000)
    outcomes = train(tiny_store, tmp_path / "out", *GRID)
    assert "5 members, 0 finished, 1 passes" not in capsys.readouterr().err
    for a, b in zip(outcomes, alone):
        assert_same(a, b)


def test_oversized_member_is_refused_first(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that does not fit is refused before the first step."""
    monkeypatch.setattr("train.plan.free_memory", lambda device: 10_000)
    with pytest.raises(PipelineError, match=r"needs .* of memory, 10.0 kB are free on cpu"):
        train(tiny_store, tmp_path / "out", GRID[0])
    assert not (tmp_path / "out").exists()


def test_ctrl_c_resumes_bit_identically(
    tiny_store: Path, tmp_path: Path, alone: list[Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C writes the state and the same command goes on bit identically."""
    for step in (3, 13):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train(tiny_store, tmp_path / "out", *GRID[:3])
    for a, b in zip(train(tiny_store, tmp_path / "out", *GRID[:3]), alone):
        assert_same(a, b)


def test_members_at_different_steps_finish(
    tiny_store: Path, tmp_path: Path, alone: list[Outcome], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Members that stand at different steps are brought to the end together."""
    for member, step in ((GRID[0], 11), (GRID[1], 4)):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train(tiny_store, tmp_path / "out", member)
    outcomes = train(tiny_store, tmp_path / "out", *GRID)
    assert "5 members, 0 finished, 1 passes" in capsys.readouterr().err
    for a, b in zip(outcomes, alone):
        assert_same(a, b)


def test_finished_members_skip_grid_grows(tiny_store: Path, tmp_path: Path) -> None:
    """Finished members are skipped and the grid may grow."""
    first = train(tiny_store, tmp_path / "out", GRID[0])[0]
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    again, new = train(tiny_store, tmp_path / "out", GRID[0], GRID[1])
    assert again.final == first.final
    assert new.step == 23
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before


def test_diverging_member_spares_the_others(
    tiny_store: Path, tmp_path: Path, alone: list[Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member that diverges keeps its last good checkpoint and the others go on."""
    step_of = Trainee.advance

    def poisoned(self: Trainee, batch: Any, clock: Any) -> None:
        if self.folder.name == member_name(GRID[1]) and self.member.n_steps == 13:
            self.member.weights["b_dec"][0] = float("nan")
        step_of(self, batch, clock)

    monkeypatch.setattr(Trainee, "advance", poisoned)
    good, bad = train(tiny_store, tmp_path / "out", GRID[0], GRID[1])
    assert_same(good, alone[0])
    assert bad.final is None
    assert "not finite between steps 13 and 16" in bad.problem
    assert "last good state is that of step 10" in bad.problem
    monkeypatch.undo()
    assert_same(train(tiny_store, tmp_path / "out", GRID[1])[0], alone[1])


def test_divergence_between_lines_is_unwritten(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be written between lines, after a loss that was not finite, is not, though the member ends at its line only."""
    config = small(steps=12, log_every=6, checkpoint_every=4, lr_warmup_steps=0, sparsity_warmup_steps=0)
    step_of = Trainee.advance

    def poisoned(self: Trainee, batch: Any, clock: Any) -> None:
        if self.member.n_steps == 6:
            self.member.weights["b_dec"][0] = float("nan")
        step_of(self, batch, clock)

    monkeypatch.setattr(Trainee, "advance", poisoned)
    (bad,) = train(tiny_store, tmp_path, config)
    assert "not finite between steps 7 and 12; the last good state is that of step 4" in bad.problem
    assert [path.stem for path in bad.folder.glob("checkpoints/*")] == ["step_000004"]
    assert Folder(tmp_path, config, {}).step() == 4


def test_too_high_rate_is_no_crash(tiny_store: Path, tmp_path: Path) -> None:
    """A learning rate that is too high is a problem with a name and not a crash."""
    (outcome,) = train(tiny_store, tmp_path / "out", small(lr=1e38, clip_norm=0.0))
    assert "lower --lr" in outcome.problem
    assert not list(outcome.folder.glob("checkpoints/*"))
    assert not (outcome.folder / "complete.json").exists()


def test_full_disk_keeps_last_checkpoint(
    tiny_store: Path, tmp_path: Path, alone: list[Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk stops with the last checkpoint intact and the run goes on when there is room."""
    n_left, fsync = [9], os.fsync

    def full(descriptor: int) -> None:
        n_left[0] -= 1
        if n_left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskError, match="the disk is full"):
            train(tiny_store, tmp_path / "out", GRID[0])
    assert load_checkpoint(next(tmp_path.glob("out/*/checkpoints/step_*5.safetensors")))[1].step == 5
    assert not list(tmp_path.rglob("*.partial"))
    assert_same(train(tiny_store, tmp_path / "out", GRID[0])[0], alone[0])


def test_damaged_store_writes_nothing(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written of a training on a damaged store."""
    check = BodyCheck._run

    def slowly(self: BodyCheck) -> None:  # so that training is at its end before the damage is found
        time.sleep(0 if self.stop else 1.0)
        check(self)

    monkeypatch.setattr(BodyCheck, "_run", slowly)
    store = tmp_path / "damaged.zarr"
    shutil.copytree(tiny_store, store)
    shard = Store.open(store).train.shard_path(1)
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    for options in ({}, {"verify_first": True}):
        out = tmp_path / f"out{len(options)}"
        with pytest.raises(DamagedError, match="harvest --repair"):
            train(store, out, GRID[0], **options)
        assert not list(out.glob("*/checkpoints/*"))
        assert not list(out.glob("*/state.safetensors"))


def test_window_training_stops_before_damage(tiny_store: Path, tmp_path: Path) -> None:
    """In windows a training gets no further than the chunks before a damaged one.
    What was written before that came from chunks that were checked."""
    store, config = tmp_path / "damaged.zarr", small(steps=40, checkpoint_every=1, log_every=1)
    shutil.copytree(tiny_store, store)
    split = Store.open(store).train
    chunks = Order(split.kept_rows(), config.data_seed, 10**6).chunks(0)
    good = sum(int(split.kept()[slice(*split.chunk_rows_range(c))].sum()) for c in chunks[0].tolist())
    bad, nbytes = int(chunks[1][0]), split.shape.layout.chunk_nbytes + 4
    shard, within = divmod(bad, split.shard_rows // split.chunk_rows)
    data = bytearray(split.shard_path(shard).read_bytes())
    data[within * nbytes + 10] ^= 1
    split.shard_path(shard).write_bytes(data)
    with pytest.raises(DamagedError, match="harvest --repair"):
        train(store, tmp_path / "out", config, mode="window", window_rows=10**6)
    steps = [int(path.stem.removeprefix("step_")) for path in tmp_path.glob("out/*/checkpoints/*")]
    assert max(steps, default=0) * config.batch_size <= good


@pytest.mark.parametrize("room", ["all", "two windows"])
def test_rows_on_the_device_train_alike(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, room: str
) -> None:
    """Members fed from the device's memory, a CPU's here, end with the bits of those that the loader feeds."""
    options: dict[str, Any] = {"mode": "window", "window_rows": 512}
    expected = train(tiny_store, tmp_path / "loader", *GRID[:3], **options)

    def place(store: Store, tasks: list[Any], *_: Any) -> Place | None:
        order = make_order(store, tasks[0])
        layout = store.train.shape.layout
        return place_for(store.train, order, 1 << 40 if room == "all" else 2 * order.most_chunks * layout.chunk_nbytes)

    monkeypatch.setattr("train.plan.place_on_device", place)
    found = train(tiny_store, tmp_path / "device", *GRID[:3], **options)
    for a, b in zip(expected, found, strict=True):
        assert_same(a, b)
    assert "lie in the memory of cpu" in capsys.readouterr().err


def test_auto_order_follows_the_gpu(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA `auto` is a global order where all rows fit into what members leave of its memory, else windows where two do, else
    the order that the host can gather; a member that is there goes on in its own."""
    monkeypatch.setattr(plan, "WINDOW_ROWS", 512)
    stores, cuda = Stores.open(tiny_store, None), torch.device("cuda", 0)
    job = RunConfig(tiny_store, tmp_path, GRID[:1], device="cpu")
    chunk, split = stores.train.shape.layout.chunk_nbytes, stores.train
    (whole,) = plan.make_tasks(job, stores, GRID[:1], cuda, 1 << 40)
    members = sum(plan.on_device(plan.pass_memory(split.shape, [whole], cuda), cuda).values())

    def order_with(n_chunks: int, device: torch.device = cuda) -> Any:
        free = math.ceil((members + n_chunks * chunk) / (1 - plan.RESERVE)) + 1
        return plan.make_tasks(job, stores, GRID[:1], device, free)[0].order

    windows = 2 * Order(stores.kept("train", GRID[0].max_norm), 0, 512).most_chunks
    assert windows < split.n_chunks
    assert whole.order == order_with(split.n_chunks) == {"mode": "global"}
    assert order_with(split.n_chunks - 1) == order_with(windows) == {"mode": "window", "window_rows": 512}
    assert order_with(windows - 1) == {"mode": "global"}
    assert order_with(windows, torch.device("cpu")) == {"mode": "global"}
    train(tiny_store, tmp_path, GRID[0])
    assert order_with(windows) == {"mode": "global"}


def test_gpu_members_wait_less_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a GPU a quarter of the host's free memory may hold what is still to be written, and no less than beside a CPU."""
    for free, expected in ((100 * 10**9, 25 * 10**9), (10**9, 2 * 10**9)):
        monkeypatch.setattr(plan, "available_memory", lambda free=free: free)
        assert plan.pending_bytes(torch.device("cuda", 0)) == expected
        assert plan.pending_bytes(torch.device("cpu")) == 2 * 10**9


def test_rows_on_the_device_are_checked(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exact order on the device needs no check beside the training: a flipped byte is found before its first step."""
    damaged = tmp_path / "s.zarr"
    shutil.copytree(tiny_store, damaged)
    shard = Store.open(damaged).train.shard_path(1)
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    monkeypatch.setattr(
        "train.plan.place_on_device",
        lambda store, tasks, *_: place_for(store.train, make_order(store, tasks[0]), 1 << 40),
    )
    with pytest.raises(DamagedError, match="harvest --repair"):
        train(damaged, tmp_path / "out", GRID[0], mode="global")
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert all(not path.read_text() for path in (tmp_path / "out").rglob("metrics.jsonl"))


def test_device_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, a device on CUDA is numbered and made the current one; without a number, by the rank."""
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [str(resolve_device(name)) for name in ("cuda", "auto", "cuda:1", "cpu")] == [
        "cuda:3",
        "cuda:3",
        "cuda:1",
        "cpu",
    ]
    assert list(map(str, made)) == ["cuda:3", "cuda:3", "cuda:1"]


def test_products_may_be_tf32_on_cuda(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of a training on CUDA runs where float32 products may be TF32, and nothing does before, behind or on a CPU."""
    seen, step = set[str](), Member.step

    def noted(self: Member, batch: Any) -> None:
        seen.add(torch.get_float32_matmul_precision())
        step(self, batch)

    monkeypatch.setattr(Member, "step", noted)
    train(tiny_store, tmp_path / "cpu", small(steps=8))
    assert seen == {"highest"}
    monkeypatch.setattr("train.run.tf32", lambda device: tf32(torch.device("cuda")))
    train(tiny_store, tmp_path / "cuda", small(steps=8))
    assert seen == {"highest", "high"}
    assert torch.get_float32_matmul_precision() == "highest"


def group_of_two(monkeypatch: pytest.MonkeyPatch) -> tuple[Processes, Processes]:
    """Two processes of a group in one: what the first, asked first, broadcasts comes to the second."""
    group, sent = torch.distributed.ProcessGroup(0, 2), list[Tensor]()
    first, second = (Processes(rank, 2, torch.device("cpu"), group) for rank in range(2))
    told = Processes.told

    def broadcast(tensor: Tensor, source: int, group: Any) -> None:
        assert source == 0
        if asked[0] is first:
            sent.append(tensor.clone())
        else:
            tensor.copy_(sent.pop(0))

    asked: list[Processes | None] = [None]

    def noted(self: Processes, make: Any) -> Any:
        asked[0] = self
        return told(self, make)

    monkeypatch.setattr(Processes, "told", noted)
    monkeypatch.setattr(Processes, "least", lambda self, number: number)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    return first, second


def test_first_process_plans_for_all(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processes that train together all follow the first one's plan, whatever memory they see themselves."""
    first, second = group_of_two(monkeypatch)
    job = RunConfig(tiny_store, tmp_path / "out", GRID, device="cpu")
    stores = Stores.open(tiny_store, None)
    monkeypatch.setattr("train.plan.free_memory", lambda device: 5_700_000)
    tasks, passes = make_plan(job, stores, GRID, first)
    monkeypatch.setattr("train.plan.free_memory", lambda device: 10_000)  # not even one would fit
    monkeypatch.setattr("train.feed.loader.available_memory", lambda: 0)  # a window would be its own order
    assert make_plan(job, stores, GRID, second) == (tasks, passes)
    assert len(passes) > 1
    assert {task.order["mode"] for task in tasks} == {"global"}


def test_failed_plan_fails_in_all(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first process cannot plan, none waits for it."""
    first, second = group_of_two(monkeypatch)
    job, stores = RunConfig(tiny_store, tmp_path / "out", GRID, device="cpu"), Stores.open(tiny_store, None)
    monkeypatch.setattr("train.plan.free_memory", lambda device: 10_000)
    with pytest.raises(PipelineError, match="needs"):
        make_plan(job, stores, GRID, first)
    with pytest.raises(PipelineError, match="the first process made no plan"):
        make_plan(job, stores, GRID, second)


def test_unusable_store_is_refused(tmp_path: Path) -> None:
    """An unfinished store and a path without a store are refused."""
    with pytest.raises(StoreError, match="no activation store"):
        train(tmp_path / "nothing", tmp_path / "out", GRID[0])
    assert not (tmp_path / "out").exists()


def test_computed_order_is_resumed(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond so many rows a new member's global order is computed; it is recorded and gone on with, and a member that began in
    one that is held goes on in that."""
    steps = 2 * Store.open(tiny_store).train.n_rows // 512  # over the end of an epoch
    config, stop = small(batch_size=512, steps=steps, checkpoint_every=steps, log_every=steps), steps - 2
    (held,) = train(tiny_store, tmp_path / "held", config)
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_store, tmp_path / "old", config)
    monkeypatch.setattr(plan, "MOST_HELD", 1000)
    (old,) = train(tiny_store, tmp_path / "old", config, mode="global")
    assert_same(old, held)
    (whole,) = train(tiny_store, tmp_path / "whole", config, mode="global")
    assert json.loads((whole.folder / "config.json").read_text())["order"] == {"mode": "computed"}
    assert (whole.folder / "metrics.jsonl").read_bytes() != (held.folder / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_store, tmp_path / "out", config)
    monkeypatch.setattr(plan, "MOST_HELD", 1 << 24)
    with pytest.raises(MismatchError, match="trained in order"):
        train(tiny_store, tmp_path / "out", config, mode="window")
    (outcome,) = train(tiny_store, tmp_path / "out", config, mode="global")
    assert_same(outcome, whole)


def test_window_order_is_resumed(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window order is recorded and gone on with."""
    options = {"mode": "window", "window_rows": 512}
    (whole,) = train(tiny_store, tmp_path / "whole", GRID[0], **options)
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_store, tmp_path / "out", GRID[0], **options)
    with pytest.raises(MismatchError, match="trained in order"):
        train(tiny_store, tmp_path / "out", GRID[0], mode="global")
    (outcome,) = train(tiny_store, tmp_path / "out", GRID[0])  # auto would be global for a new member
    assert_same(outcome, whole)


def test_folder_of_another_store_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    """A folder of another store is refused, naming the field."""
    train(tiny_store, tmp_path / "out", GRID[3])
    make_store(tmp_path / "other.zarr", seed=7)
    with pytest.raises(MismatchError, match=r"store\.id"):
        train(tmp_path / "other.zarr", tmp_path / "out", GRID[3])


def test_member_without_config_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    """Where a member's config.json is gone nobody knows its store and order, so it is not gone on with."""
    folder = train(tiny_store, tmp_path, GRID[0])[0].folder
    (folder / "config.json").unlink()
    with pytest.raises(DamagedError, match=r"config\.json: gone; put it back"):
        train(tiny_store, tmp_path, GRID[0])
    assert not (folder / "config.json").exists()


def test_foreign_out_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    """An out that holds something else is refused."""
    (tmp_path / "out" / "photos").mkdir(parents=True)
    with pytest.raises(DiskError, match="holds something else \\(photos\\)"):
        train(tiny_store, tmp_path / "out", GRID[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="is a file"):
        train(tiny_store, tmp_path / "file", GRID[0])


def test_second_process_is_locked_out(tiny_store: Path, tmp_path: Path) -> None:
    """Two processes do not train one member at once."""
    folder = tmp_path / "out" / member_name(GRID[0])
    folder.mkdir(parents=True)
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(DiskError, match="another process is training this member"):
        train(tiny_store, tmp_path / "out", GRID[0])
    os.close(other)


def test_flipped_state_byte_is_refused(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped byte in the state is refused."""
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_store, tmp_path / "out", GRID[0])
    path = next(tmp_path.glob("out/*/state.safetensors"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"state\.safetensors to train this member from the start"):
        train(tiny_store, tmp_path / "out", GRID[0])


def stopped(store: Path, out: Path, monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> Path:
    """The folder of a member that was stopped at step 11."""
    before = set(out.glob("*"))
    with monkeypatch.context() as patch:
        stop_at(patch, 11)
        with pytest.raises(KeyboardInterrupt):
            train(store, out, config)
    (folder,) = set(out.glob("*")) - before
    return folder


def test_state_of_another_member_is_refused(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rolling state of another member, of the same shape, is refused."""
    one, other = small(alpha=0.0), small(alpha=0.0, seed=1)
    folders = [stopped(tiny_store, tmp_path / "out", monkeypatch, config) for config in (one, other)]
    (folders[1] / "state.safetensors").write_bytes((folders[0] / "state.safetensors").read_bytes())
    with pytest.raises(MismatchError, match="found that of 'alpha0-seed0"):
        train(tiny_store, tmp_path / "out", other)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("seed", "is of member 'alpha0.25-seed0.*lies in the folder of alpha0.25-seed1"),
        ("store", "on store '.*lies in the folder of .* on store"),
        ("step", "its name says step 23, it holds step 20"),
    ],
)
def test_final_of_another_is_refused(tiny_store: Path, tmp_path: Path, change: str, says: str) -> None:
    """A finished member whose final checkpoint is another seed's, another store's or another step's is not called finished."""
    store, out = tiny_store, tmp_path / "other"
    (outcome,) = train(tiny_store, tmp_path / "out", GRID[1])
    assert outcome.final is not None
    exchanged = outcome.final.with_name("step_000020.safetensors")
    if change != "step":
        if change == "store":
            store = tmp_path / "other.zarr"
            make_store(store, seed=5)
        (other,) = train(store, out, dataclasses.replace(GRID[1], seed=0) if change == "seed" else GRID[1])
        assert other.final is not None
        exchanged = other.final
    shutil.copy(exchanged, outcome.final)
    with pytest.raises(CheckpointError, match=says):
        train(tiny_store, tmp_path / "out", GRID[1])
    assert any(re.search(says, problem) for problem in verify(str(tmp_path / "out")).problems)


@pytest.mark.parametrize("change", ["lose", "alter", "delete", "\x0b", "\r", "\u2028"])
def test_lost_metrics_are_noticed(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Lines of metrics that were lost or changed are noticed when training goes on, and by verify: other ends of lines too."""
    path = stopped(tiny_store, tmp_path / "out", monkeypatch, GRID[0]) / "metrics.jsonl"
    text = path.read_text()
    changed = text.replace('"loss":', '"loss":1', 1)
    if len(change) == 1:
        changed = text.replace("\n", change, 1)
    path.write_text(text.split("\n", 1)[1] if change == "lose" else changed, newline="")
    assert path.read_bytes() != text.encode()
    if change == "delete":
        path.unlink()
    with pytest.raises(DamagedError, match="lost or changed"):
        train(tiny_store, tmp_path / "out", GRID[0])
    assert any("metrics.jsonl" in problem for problem in verify(str(path.parent)).problems)


def test_checkpoint_of_another_step_is_refused(tmp_path: Path, alone: list[Outcome]) -> None:
    """A checkpoint under the name of another step is refused."""
    final = alone[0].final
    assert final is not None
    (tmp_path / "step_000011.safetensors").write_bytes(final.read_bytes())
    for read in (load_checkpoint, read_header):
        with pytest.raises(CheckpointError, match="its name says step 11, it holds step 23"):
            read(tmp_path / "step_000011.safetensors")


def test_checkpoints_say_where_they_come_from(tiny_store: Path, alone: list[Outcome]) -> None:
    """Checkpoints say where they come from."""
    assert alone[1].final is not None
    header, store = read_header(alone[1].final), Store.open(tiny_store)
    p = header.provenance
    assert (header.step, p["member"], p["rows_seen"]) == (23, member_name(GRID[1]), 23 * 64)
    assert TrainConfig.from_dict(p["train"]) == GRID[1]
    assert (p["store"]["id"], p["store"]["layer"], p["store"]["max_norm"]) == (store.id, 3, 3.0)
    assert p["fired_rows"] == 500  # dead_after_rows, of the 1472 that there were
    assert 0 <= p["dead"] <= 1
    assert p["versions"]["torch"] == importlib.metadata.version("torch")  # without the build: 2.13.0, not 2.13.0+cu130
    assert p["git"]


def test_metrics_and_timings_stand_apart(tiny_store: Path, alone: list[Outcome]) -> None:
    """Metrics have their fields and timings are apart."""
    metrics, timings = lines(alone[1].folder), lines(alone[1].folder, "timings.jsonl")
    assert [line["step"] for line in metrics] == [4, 8, 12, 16, 20, 23] == [line["step"] for line in timings]
    fields = {"step", "rows", "epoch", "loss", "recon", "l1_shared", "l1_specialised", "aux", "ev", "l0", "dead"}
    fields |= {"grad_norm", "clipped", "lr", "lambda"}
    assert fields <= metrics[0].keys()
    assert timings[0].keys() == {"step", "rows_per_s", "wait", "seconds"}
    assert metrics[-1]["epoch"] == 23 * 64 / Store.open(tiny_store).statistics.n_kept
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_second_epoch_is_said_once(tiny_store: Path, tmp_path: Path, capsys: Any) -> None:
    """The second epoch is said once."""
    train(tiny_store, tmp_path / "out", small(steps=80, checkpoint_every=100))
    assert capsys.readouterr().err.count("the second epoch begins") == 1


def test_member_starts_from_its_checkpoint(tiny_store: Path, tmp_path: Path, alone: list[Outcome]) -> None:
    """A member starts from the checkpoint that it names."""
    start = tmp_path / "start.safetensors"
    start.write_bytes(alone[0].final.read_bytes())
    config = small(alpha=0.0, seed=5, init_from=str(start))
    (warm,) = train(tiny_store, tmp_path / "out", config)
    cold = lines(alone[0].folder)
    assert lines(warm.folder)[0]["recon"][-1] == pytest.approx(cold[-1]["recon"][-1], rel=0.05)
    assert lines(warm.folder)[0]["recon"][-1] < 0.95 * cold[0]["recon"][-1]
    start.write_bytes(alone[1].final.read_bytes())
    (other,) = train(tiny_store, tmp_path / "out", config)
    assert other.folder != warm.folder  # another SAE under the same path makes another member
    start.unlink()
    with pytest.raises(CheckpointError, match=r"start\.safetensors: no such file"):
        train(tiny_store, tmp_path / "out", config)


def test_massive_rows_are_left_out(tiny_store: Path, tmp_path: Path, capsys: Any) -> None:
    """Massive rows are left out unless all are asked for."""
    train(tiny_store, tmp_path / "out", small(steps=6))
    assert "left out: 24 massive and 152 special" in capsys.readouterr().err
    (outcome,) = train(tiny_store, tmp_path / "out", small(steps=6, max_norm=0.0))
    assert "left out: 0 massive and 152 special" in capsys.readouterr().err
    assert outcome.final is not None
    assert read_header(outcome.final).provenance["store"]["max_norm"] is None
    assert float(weights(outcome)["scale"]) < float(Store.open(tiny_store).scale)


@given(st.sets(st.integers(1, 5000), max_size=60), st.integers(1, 5), st.integers(0, 1000))
def test_retention_keeps_last_and_multiples(steps: set[int], last: int, every: int) -> None:
    """Retention keeps the last and the multiples and deletes the rest."""
    kept = Keep(last, every).kept(steps)
    assert kept <= steps
    assert set(sorted(steps)[-last:]) <= kept
    assert all(step in kept for step in steps if every and step % every == 0)
    assert len(kept) <= last + sum(1 for step in steps if every and step % every == 0)


@given(st.integers(1, 9), st.integers(1, 60), st.integers(1, 5), st.integers(0, 20))
def test_retained_checkpoints_are_counted(every: int, steps: int, last: int, kept_every: int) -> None:
    """Without a list of a training's checkpoints, which may have more steps than a memory holds."""
    keep = Keep(last, kept_every)
    assert keep.n_kept(every, steps) == len(keep.kept({*range(every, steps, every), steps}))
    assert keep.n_kept(1, 10**30) > 0


@pytest.mark.parametrize(
    ("text", "keep"),
    [("last:3,every:1000", Keep(3, 1000)), ("every:50", Keep(1, 50)), ("last:2", Keep(2, 0)), ("all", Keep(1, 1))],
)
def test_rule_of_retention_is_read(text: str, keep: Keep) -> None:
    """A rule of retention is read."""
    assert Keep.parse(text) == keep


@pytest.mark.parametrize("text", ["", "last:0", "first:3", "last:3;every:2", "last:-1"])
def test_unknown_retention_is_refused(text: str) -> None:
    """A rule of retention that is none is refused."""
    with pytest.raises(UsageError, match="--keep"):
        Keep.parse(text)


def test_retention_never_deletes_the_final(tiny_store: Path, tmp_path: Path) -> None:
    """Retention deletes checkpoints and never the final one."""
    (outcome,) = train(tiny_store, tmp_path / "out", small(checkpoint_every=2), keep="last:2,every:8")
    assert sorted(path.name for path in outcome.folder.glob("checkpoints/*")) == [
        f"step_{step:06d}.safetensors" for step in (8, 16, 22, 23)
    ]


def clocked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock on which every step takes a minute; the steps whose training state is written, as they are."""
    minutes, written = [0], list[int]()
    step, write_state = Member.step, Folder.write_state

    def one_minute(self: Member, batch: Any) -> None:
        step(self, batch)
        minutes[0] += 1

    def noted(self: Folder, state: Any, step: int, metrics_sha256: str) -> None:
        written.append(step)
        write_state(self, state, step, metrics_sha256)

    monkeypatch.setattr(Member, "step", one_minute)
    monkeypatch.setattr(Folder, "write_state", noted)
    clock = types.SimpleNamespace(monotonic=lambda: 60.0 * minutes[0], perf_counter=time.perf_counter)
    monkeypatch.setattr("train.trainee.time", clock)
    return written


def test_states_are_written_by_the_clock(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --checkpoint-minutes the training state follows the clock, and SAEs their steps as ever."""
    written = clocked(monkeypatch)
    (outcome,) = train(tiny_store, tmp_path / "out", small(), keep="all", checkpoint_minutes=3)
    assert written == [3, 6, 9, 12, 16, 19, 22, 23]  # at 15 there is a checkpoint: the state a step later
    assert [int(path.stem[-6:]) for path in sorted(outcome.folder.glob("checkpoints/*"))] == [5, 10, 15, 20, 23]


def test_run_goes_on_from_clocked_state(
    tiny_store: Path, tmp_path: Path, alone: list[Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends between two of them goes on from the first, behind the last checkpoint, with the same bits."""
    with monkeypatch.context() as patch:
        written = clocked(patch)
        after_step = Trainee.after_step

        def crash(self: Trainee, clock: Any) -> None:
            after_step(self, clock)
            if self.member.n_steps == 16:
                self.writer.finish()
                raise MemoryError

        patch.setattr(Trainee, "after_step", crash)
        with pytest.raises(MemoryError):
            train(tiny_store, tmp_path / "out", GRID[2], checkpoint_minutes=7)
        assert written == [7, 14]
    (outcome,) = train(tiny_store, tmp_path / "out", GRID[2], checkpoint_minutes=1000)
    assert_same(outcome, alone[2])


@pytest.mark.parametrize("minutes", [0.0, -1.0, math.inf, math.nan])
def test_impossible_minutes_are_refused(tmp_path: Path, minutes: float) -> None:
    """A time that never comes, or always has, is refused."""
    with pytest.raises(UsageError, match="--checkpoint-minutes"):
        RunConfig(tmp_path, tmp_path, (small(),), checkpoint_minutes=minutes)


def test_folder_name_follows_config_content() -> None:
    """A folder is named by what is in the config and not by how it was written."""
    assert member_name(small(alpha=0)) == member_name(small(alpha=0.0))  # type: ignore[arg-type]
    assert member_name(small(alpha=0.25)) != member_name(small(alpha=0.25, lr=1e-3))
    assert member_name(small(alpha=0.25, seed=3)).startswith("alpha0.25-seed3-")
    assert member_name(small(levels=(0.5, 1.0))).startswith("levels2-seed0-")


def test_list_scalars_are_named_by_level() -> None:
    """Scalars of lists are named by level."""
    assert dict(scalars({"step": 3, "ev": [0.5, 0.7], "loss": 1})) == {
        "ev/level_1": 0.5,
        "ev/level_2": 0.7,
        "loss": 1.0,
    }


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_missing_log_package_is_named(
    tiny_store: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log whose package is missing is refused with what to install, before a folder is made."""
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[kind], None)
    with pytest.raises(UsageError, match="pip install"):
        train(tiny_store, tmp_path / "out", small(steps=6), log=(kind,))
    assert not (tmp_path / "out").exists()


def test_wandb_without_login_trains_on(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """wandb without a login is said once, and every member is trained."""

    class NoLogin(Exception):
        """What wandb raises."""

    def init(**_: Any) -> None:
        raise NoLogin("api_key not configured\n(no-tty)")

    fake = types.SimpleNamespace(Error=NoLogin, init=init, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    outcomes = train(tiny_store, tmp_path / "out", small(steps=6), small(steps=6, seed=1), log=("jsonl", "wandb"))
    assert all(outcome.final for outcome in outcomes)
    assert capsys.readouterr().err.count("wandb: api_key not configured (no-tty); training goes on") == 1


@pytest.mark.parametrize(
    ("environment", "options", "said"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, {}, "RANK=2 and WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, {}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2"}, {"data_parallel": True}, "no MASTER_ADDR"),
    ],
)
def test_impossible_rank_is_named(
    tiny_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    options: dict[str, Any],
    said: str,
) -> None:
    """A rank or world that cannot be is refused by the variable's name."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said):
        train(tiny_store, tmp_path / "out", small(steps=6), **options)


def test_stray_world_is_said(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A world that no torchrun set is named, with what it makes this process do."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert len(train(tiny_store, tmp_path / "out", small(steps=6), small(steps=6, seed=1))) == 1
    assert (
        "process 0 of 2: 1 of 2 members, as RANK and WORLD_SIZE in the environment say but" in capsys.readouterr().err
    )


def two_processes(store: Path, out: Path, options: str = "") -> list[int]:
    """GRID trained by two processes as torchrun starts them; how many members each had."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        f"from test_train import GRID, train; print(len(train(Path(sys.argv[1]), Path(sys.argv[2]), *GRID{options})))"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(store), str(out)],
            cwd=Path(__file__).parents[1], env=environment | {"RANK": str(r)}, stdout=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    return [int(process.communicate(timeout=600)[0]) for process in processes]


def test_spread_members_are_the_same(
    tiny_store: Path, tmp_path: Path, alone: list[Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members spread over two processes are the same members."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    names = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        names.append([outcome.folder.name for outcome in train(tiny_store, tmp_path / "out", *GRID)])
    assert [len(own) for own in names] == [3, 2]
    monkeypatch.undo()
    for outcome, by_itself in zip(train(tiny_store, tmp_path / "out", *GRID), alone):
        assert_same(outcome, by_itself)


def test_data_parallel_equals_one_process(tiny_store: Path, tmp_path: Path, alone: list[Outcome]) -> None:
    """Two data-parallel processes equal one within rounding."""
    assert two_processes(tiny_store, tmp_path / "out", ", data_parallel=True") == [5, 5]
    for outcome, by_itself in zip(train(tiny_store, tmp_path / "out", *GRID), alone):
        for name, tensor in weights(outcome).items():
            torch.testing.assert_close(tensor, weights(by_itself)[name], rtol=2e-3, atol=2e-4, msg=name)
        for a, b in zip(lines(outcome.folder), lines(by_itself.folder)):
            assert (a["step"], a["rows"]) == (b["step"], b["rows"])
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a["l0"] == pytest.approx(b["l0"], rel=1e-2)


def test_finished_member_drops_leftover_state(tiny_store: Path, tmp_path: Path) -> None:
    """A state that a kill left in a finished member is dropped."""
    (outcome,) = train(tiny_store, tmp_path / "out", small(steps=6))
    left = outcome.folder / "state.safetensors"
    left.write_bytes(b"written before complete.json, not deleted after it")
    train(tiny_store, tmp_path / "out", small(steps=6))
    assert not left.exists()


def test_anothers_completion_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    """A finished member's complete.json that is its neighbour's: training the same again says so."""
    mine, other = train(tiny_store, tmp_path / "out", small(steps=6), small(steps=6, seed=1))
    (mine.folder / "complete.json").write_bytes((other.folder / "complete.json").read_bytes())
    with pytest.raises(DamagedError, match=r"config\.json: not the config that was recorded"):
        train(tiny_store, tmp_path / "out", small(steps=6))


def test_kill_before_retention_leaves_no_extra(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill before the last retention leaves no checkpoint more."""
    config = small(steps=16, checkpoint_every=5)
    (whole,) = train(tiny_store, tmp_path / "whole", config, keep="last:1")
    monkeypatch.setattr(Folder, "finish", lambda *_: None)
    monkeypatch.setattr(Folder, "retain", lambda *_: None)
    train(tiny_store, tmp_path / "out", config, keep="last:1")
    monkeypatch.undo()
    (again,) = train(tiny_store, tmp_path / "out", config, keep="last:1")
    names = [sorted(p.name for p in one.folder.rglob("*")) for one in (whole, again)]
    assert names[0] == names[1]

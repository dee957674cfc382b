"""When another process extends, repairs or finishes the store that is read or written: no wrong rows, one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train.run
from pipeline.base.errors import DamagedError, StoreError
from pipeline.store import staging, writer
from pipeline.store.reader import Store
from pipeline.store.writer import StoreWriter
from support.stores import make_rows, make_store, prepare_store, store_config, write_shards
from test_store import SMALL, tree
from train.config import TrainConfig
from train.plan import RunConfig

SIZES: dict[str, Any] = {"n_sequences": 19, "eval_sequences": 5, **SMALL}
"""Its last training shard is ragged, so that an extension gives it up."""


def begin_extension(place: Path | str) -> StoreWriter:
    """What an extension does before its first shard."""
    return prepare_store(place, store_config(**SMALL), 30, 5)


READERS: dict[str, Callable[[Store], Any]] = {
    "norms": lambda store: store.train.kept_rows(),
    "evaluation": lambda store: store.eval.kept(),
    "the last shard": lambda store: store.train.read(store.train.n_rows - 1, store.train.n_rows),
    "other massive rows": lambda store: store.mean_and_scale(2.0),
}


@pytest.mark.parametrize("what", READERS)
def test_reading_what_is_extended(url: str, what: str) -> None:
    """A reader that comes upon what an extension took away says so, before the extension ends and after it, and not that the
    store is damaged; whole shards are read as before."""
    make_store(url, **SIZES)
    early, late = Store.open(url), Store.open(url)
    extension = begin_extension(url)
    with (
        pytest.raises(StoreError, match="another process extends or repairs it; run the same command again when"),
        early.steady(),
    ):
        READERS[what](early)
    write_shards(extension)
    extension.finish()
    if what == "the last shard":
        with pytest.raises(StoreError, match="another process extended, repaired or finished it while"), late.steady():
            READERS[what](late)
    assert torch.equal(late.train.read(3, 9), make_rows(late.config, "train", 3, 9))


def test_damage_stays_damage(url: str) -> None:
    """Where nobody works on the store, what is gone is gone."""
    store = make_store(url, **SIZES)
    store.files.delete("train/norm/c/0")
    with pytest.raises(DamagedError, match="gone"), store.steady():
        store.train.kept_rows()


def test_verify_and_stage_of_what_changes(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifying and staging say that the store is being extended, in one line; the staged folder is no store, and staging goes on
    when the extension is finished."""
    make_store(url, **SIZES)
    store, copy = Store.open(url), staging.copy_shard
    begun: list[StoreWriter] = []

    def copying(*args: Any) -> None:
        begun.extend([] if begun else [begin_extension(url)])
        copy(*args)

    with monkeypatch.context() as patch:
        patch.setattr(staging, "copy_shard", copying)
        with pytest.raises(StoreError, match="another process extends or repairs it"):
            staging.stage(url, tmp_path / "staged.zarr", quiet=True)
    [said] = store.verify(quiet=True)
    assert said.startswith(f"{url}: another process extends or repairs it")
    with pytest.raises(StoreError):
        Store.open(tmp_path / "staged.zarr")


def test_training_on_what_is_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training whose store is extended ends in one line, whatever the order it reads in."""
    make_store(tmp_path / "acts.zarr", **SIZES)
    make = train.run.make_plan

    def planned(*args: Any) -> Any:
        found = make(*args)
        begin_extension(tmp_path / "acts.zarr")
        return found

    monkeypatch.setattr(train.run, "make_plan", planned)
    member = TrainConfig(width=8, k=2, batch_size=16, steps=20, lr_warmup_steps=0, sparsity_warmup_steps=0)
    with pytest.raises(StoreError, match="another process extends or repairs it"):
        train.run.run(RunConfig(store=tmp_path / "acts.zarr", out=tmp_path / "out", members=(member,), device="cpu"))


def test_two_finish_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that finish a store, the one whose records the other takes away ends well, with the same bytes."""
    prepared = prepare_store(url, store_config(**SMALL), 19, 5)
    write_shards(prepared)
    first, second, pack = StoreWriter.open(url), StoreWriter.open(url), writer.pack
    stopped: list[str] = []

    def packing(split: Any) -> list[str]:
        if not stopped:
            stopped.append(split.name)
            first.finish()
        return pack(split)

    monkeypatch.setattr(writer, "pack", packing)
    assert second.finish().complete
    assert stopped == ["train"]
    assert Store.open(url).verify(quiet=True) == []


@pytest.mark.parametrize("finished", [False, True])
def test_a_part_taken_twice(url: str, tmp_path: Path, finished: bool) -> None:
    """A shard that another process committed while it was written here, and perhaps finished the store with, stays that one's,
    and nothing is left beside it."""
    expected = make_store(tmp_path / "expected.zarr", **SIZES)
    late = prepare_store(url, store_config(**SMALL), 19, 5)
    start, stop = late.split("train").shard_rows_range(0)
    with late.shard("train", 0) as shard:
        shard.write(make_rows(late.store.config, "train", start, stop) * 2)  # other bytes, as another GPU might make
        other = StoreWriter.open(url)
        write_shards(other)
        if finished:
            other.finish()
    StoreWriter.open(url).finish()
    files = StoreWriter.open(url).files
    assert {key: files.read(key, most=1 << 30) for key in files.keys()} == tree(expected.path)  # noqa: SIM118

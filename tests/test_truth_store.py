"""A store of known features: written, resumed, extended and repaired like any other, with its truth inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner

from harvest.__main__ import command
from harvest.truth.rows import Rows
from harvest.truth.run import TruthConfig, planned_truth, run_truth
from harvest.truth.spec import Spec, load_spec
from pipeline.base.errors import DamagedError, MismatchError, StoreError, UsageError
from pipeline.experiment.describe import describe
from pipeline.experiment.verify import verify
from pipeline.store.layout import Layout
from pipeline.store.reader import Store
from pipeline.store.staging import stage
from support.stores import lose_shards

SIZES: dict[str, Any] = {"tokens": 9600, "eval_tokens": 1280, "context": 16, "chunk_rows": 512, "shard_rows": 4096}


def write(path: Path, **changes: Any) -> Store:
    run_truth(TruthConfig(truth="tree", store=str(path), **{**SIZES, **changes}), quiet=True)
    return Store.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write(tmp_path_factory.mktemp("truth") / "tree.zarr")


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_disk_rows_follow_the_spec(store: Store) -> None:
    """Across shards, in bf16, without a special row."""
    spec = Spec.from_dict(store.config["truth"])
    assert spec == load_spec("tree")
    expected = Rows(spec, store.extra("truth/directions"), 0).rows("train", 0, store.train.n_rows)
    assert torch.equal(store.train.read(0, store.train.n_rows), expected.bfloat16())
    assert not store.train.special.any()
    assert store.statistics.n_special == 0


def test_the_store_carries_its_truth(store: Store) -> None:
    """Features, and what fired on the evaluation rows: summed up they are the rows."""
    assert store.extra("truth/parent").tolist() == [-1] * 11 + [0] * 3 + [1] * 3 + [2] * 3
    assert store.extra("truth/depth").tolist() == [0] * 11 + [1] * 9
    np.testing.assert_allclose(store.extra("truth/probability")[[0, 3, 11]], [0.15, 0.05, 0.045])
    start, feature, strength = (store.extra(f"eval/truth/{name}") for name in ("start", "feature", "strength"))
    rows = np.zeros((store.eval.n_rows, store.d_model))
    np.add.at(
        rows,
        np.repeat(np.arange(store.eval.n_rows), np.diff(start)),
        strength[:, None] * store.extra("truth/directions")[feature],
    )
    np.testing.assert_allclose(store.eval.read(0, store.eval.n_rows).float().numpy(), rows, atol=0.02)


def test_any_zarr_reader_sees_the_truth(store: Store) -> None:
    """Plain zarr-python reads rows and truth."""
    group = zarr.open_group(str(store.path), mode="r")
    np.testing.assert_array_equal(group["truth/directions"][:], store.extra("truth/directions"))
    assert group["eval/truth/start"].metadata.dimension_names == ("row_and_one",)


def test_tokens_are_said_to_be_missing(store: Store) -> None:
    """One typed error, whoever asks."""
    with pytest.raises(StoreError, match="its rows are of no text, so it has no tokens"):
        _ = store.train.tokens
    with pytest.raises(StoreError, match="its rows are of no text"):
        store.eval.shard_tokens(0)
    with pytest.raises(StoreError, match="has no array truth/colour"):
        store.extra("truth/colour")


def test_killed_harvest_gives_same_bytes(store: Store, tmp_path: Path) -> None:
    """Without one shard's record the same command makes just that shard again."""
    copy = write(tmp_path / "tree.zarr")
    lose_shards(copy.path, ("train", 1))
    assert contents(copy.path) != contents(store.path)
    write(copy.path)
    assert contents(copy.path) == contents(store.path)


def test_extension_keeps_whole_shards_and_truth(store: Store, tmp_path: Path) -> None:
    """More rows by the same command: first shards and truth byte for byte, and the rows those of the spec."""
    longer = write(tmp_path / "tree.zarr", eval_tokens=1280)
    before = contents(longer.path)
    longer = write(longer.path, tokens=16000, eval_tokens=None)
    after = contents(longer.path)
    kept = [key for key in before if "truth/" in key or key.endswith(("resid/c/0/0", "resid/c/1/0"))]
    assert len(kept) > 12
    assert all(before[key] == after[key] for key in kept)
    assert longer.eval.n_rows == 1280
    assert longer.id != store.id
    expected = Rows(load_spec("tree"), longer.extra("truth/directions"), 0).rows("train", 9000, 16000)
    assert torch.equal(longer.train.read(9000, 16000), expected.bfloat16())


def test_another_spec_is_refused_naming_it(store: Store) -> None:
    """The path of a store of one spec is not for another."""
    with pytest.raises(MismatchError, match=r"truth\.n_features: there 20, asked 1000"):
        run_truth(TruthConfig(truth="forest", store=str(store.path), **SIZES), quiet=True)


@pytest.mark.parametrize("key", ["truth/parent/c/0", "eval/truth/feature/c/0", "truth/probability/zarr.json"])
def test_flipped_truth_byte_is_found(tmp_path: Path, key: str) -> None:
    """Opening and verify name the file; --repair writes it again."""
    path = write(tmp_path / "tree.zarr").path
    whole = contents(path)
    data = bytearray((path / key).read_bytes())
    data[5] ^= 1
    (path / key).write_bytes(data)
    with pytest.raises(DamagedError, match=key.rpartition("/c")[0] or key):
        Store.open(path)
    assert any("truth" in problem for problem in verify(str(path)).problems)
    run_truth(TruthConfig(truth="tree", store=str(path), **SIZES), quiet=True, repair=True)
    assert contents(path) == whole


def test_describe_and_verify_know_the_truth(store: Store) -> None:
    """Kind, spec and arrays are named; nothing is wrong."""
    said = describe(str(store.path))
    assert said["version"] == 4
    assert said["config"]["kind"] == "truth"
    assert said["config"]["truth"]["n_features"] == 20
    assert set(said["extras"]) == set(store.extras)
    assert verify(str(store.path)).problems == []


def test_staging_takes_the_truth_along(store: Store, tmp_path: Path) -> None:
    """A copy is the store byte for byte."""
    stage(str(store.path), tmp_path / "copy.zarr", quiet=True)
    assert contents(tmp_path / "copy.zarr") == contents(store.path)


def test_the_plan_tells_the_size(store: Store) -> None:
    """Within five percent of what is there."""
    size = sum(len(data) for data in contents(store.path).values())
    plan = planned_truth(TruthConfig(truth="tree", store=str(store.path), **SIZES))
    assert plan["bytes"] == pytest.approx(size, rel=0.05)
    assert plan["stores"][0]["config"] == store.config


def test_an_unknown_kind_is_refused() -> None:
    """A store of a kind that a later release made."""
    sizes = {"d_model": 4, "context": 2, "dtype": "bf16", "shard_rows": 4, "chunk_rows": 4, "codec": "none"}
    with pytest.raises(UsageError, match="kind model or truth or rows, not 'dream'"):
        Layout.from_config({**sizes, "kind": "dream"})


@pytest.mark.parametrize("words", [["--corpus", "x"], ["--layer", "3"], ["--model", "gpt2"]])
def test_options_of_a_model_are_refused(tmp_path: Path, words: list[str]) -> None:
    """--truth runs no model over no text, and says which option is of one."""
    result = CliRunner().invoke(command, ["--truth", "tree", "--store", str(tmp_path / "s.zarr"), *words])
    assert isinstance(result.exception, UsageError)
    assert str(result.exception).startswith(f"{words[0]}: --truth runs no model")
    assert not (tmp_path / "s.zarr").exists()

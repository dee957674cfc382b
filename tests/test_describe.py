import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.__main__ import cli
from pipeline.base.digests import sealed
from pipeline.base.errors import PipelineError
from pipeline.base.files import hash_config, hash_file, write_json
from pipeline.experiment.describe import describe
from pipeline.experiment.verify import verify
from pipeline.sae.checkpoint import save_checkpoint
from support.results_files import write_results
from test_checkpoint import KINDS, random_sae


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_store, tmp_path / "acts.zarr"))


MEMBER = f"alpha0.2-seed0-{hash_config({'alpha': 0.2})[:10]}"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_store_is_described(store: Path) -> None:
    """A store is described with all that made it and its scale."""
    data = describe(str(store))
    assert data["kind"] == "store"
    assert data["config"]["d_model"] == len(data["mean"])
    assert {"model", "weights_sha256", "tokenizer_sha256", "corpus", "seed", "context", "attention"} <= data[
        "config"
    ].keys()
    assert data["statistics"]["scale"] > 0
    assert data["bytes"] > 0


def test_verify_finds_a_flipped_byte(store: Path) -> None:
    """A whole store verifies and a flipped byte exits with one."""
    runner = CliRunner()
    whole = runner.invoke(cli, ["verify", str(store), "--json"], standalone_mode=False)
    assert json.loads(whole.stdout)["whole"] is True
    flip(store / "train/resid/c/0/0")
    broken = runner.invoke(cli, ["verify", str(store), "--json"], standalone_mode=False)
    assert isinstance(broken.exception, PipelineError)
    assert "train/resid/c/0/0" in json.loads(broken.stdout)["problems"][0]


def test_damaged_root_is_no_crash(store: Path) -> None:
    """A damaged root is a problem and not a crash."""
    flip(store / "zarr.json")
    assert len(verify(str(store)).problems) == 1


def member(folder: Path) -> Path:
    path = folder / "checkpoints" / "step_000005.safetensors"
    path.parent.mkdir(parents=True)
    save_checkpoint(path, random_sae(KINDS["relu"]), 5, {"member": folder.name, "train": {"alpha": 0.2}})
    config = {"alpha": 0.2}
    write_json(
        folder / "config.json", sealed({"format": "nested-sae-member", "version": 1, "config": config, "store": {}})
    )
    write_json(folder / "complete.json", {"final": "checkpoints/step_000005.safetensors", "sha256": hash_file(path)})
    return path


def test_checkpoints_and_members_are_described(tmp_path: Path) -> None:
    """Checkpoints, members and training folders are described."""
    path = member(tmp_path / "runs" / MEMBER)
    about = describe(str(path))
    assert (about["step"], about["levels"], about["shared"], about["train"]) == (5, [16, 64], 16, {"alpha": 0.2})
    assert describe(str(path.parents[1]))["checkpoints"] == [path.name]
    assert MEMBER in describe(str(tmp_path / "runs"))


def test_member_without_checkpoint_is_a_problem(tmp_path: Path) -> None:
    """A member whose final checkpoint was changed or lost is a problem."""
    path = member(tmp_path / "runs" / MEMBER)
    assert verify(str(tmp_path / "runs")).problems == []
    flip(path)
    assert any("bytes changed" in problem for problem in verify(str(tmp_path / "runs")).problems)
    path.unlink()
    assert any("gone" in problem for problem in verify(str(tmp_path / "runs")).problems)


def test_changed_metrics_are_a_problem(tmp_path: Path) -> None:
    """Metrics that are not those of the finished training are a problem."""
    folder = tmp_path / "runs" / MEMBER
    final = member(folder)
    metrics = folder / "metrics.jsonl"
    metrics.write_text('{"step":5}\n')
    record = {"final": str(final.relative_to(folder)), "sha256": hash_file(final), "metrics_sha256": hash_file(metrics)}
    write_json(folder / "complete.json", record)
    assert verify(str(folder)).problems == []
    metrics.write_text('{"step":6}\n')
    assert ["metrics.jsonl: not the lines" in problem for problem in verify(str(folder)).problems] == [True]
    metrics.unlink()
    assert len(verify(str(folder)).problems) == 1


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_foreign_path_is_told_so(tmp_path: Path, make: object) -> None:
    """What is none of ours is told so."""
    make(tmp_path / "thing")  # type: ignore[operator]
    with pytest.raises(PipelineError, match="expected a store"):
        describe(str(tmp_path / "thing"))


def test_changed_results_are_not_described(tmp_path: Path) -> None:
    """Results that say what they did not say when they were written, and JSON that is no results, are refused by name."""
    path = write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))[0]
    assert describe(str(path))["kind"] == "results"
    path.write_text(json.dumps(sealed(json.loads(path.read_text())) | {"git": "0123456"}))
    with pytest.raises(PipelineError, match="what it says changed since it was written"):
        describe(str(path))
    path.write_text('{"a": 1}')
    with pytest.raises(PipelineError, match="expected nested-sae-results"):
        describe(str(path))


def test_people_get_indented_lines(store: Path) -> None:
    """People get indented lines and short lists."""
    shown = CliRunner().invoke(cli, ["describe", str(store)], standalone_mode=False).stdout
    assert "\nstatistics:\n  " in shown
    assert "  massive_multiple: 3.0\n" in shown
    assert "64 in all]" in shown

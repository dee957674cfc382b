"""A longer training from a shorter one's state: bit for bit what it would have been, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline.base.errors import MismatchError, UsageError
from pipeline.sae.checkpoint import load_checkpoint
from support.stores import make_store
from support.train_crasher import small
from train.config import TrainConfig
from train.folder import Folder
from train.log import PACKAGES, open_logs
from train.plan import RunConfig
from train.run import run
from train.trainee import Outcome

pytestmark = pytest.mark.usefixtures("one_thread")

KEEP: dict[str, Any] = {"keep_state": True}


def trained(store: Path, out: Path, config: TrainConfig, **options: Any) -> Outcome:
    (outcome,) = run(RunConfig(store, out, (config,), device="cpu", threads=1, **options))
    return outcome


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "batchtopk", "lr_warmup_steps": 3, "lr_decay_steps": 0, "k": 6, "aux_k": 8, "batch_size": 1024},
        {"lr_warmup_steps": 4, "sparsity_warmup_steps": 5},
        {"recipe": "topk", "lr_warmup_steps": 3, "lr_decay_steps": 0, "sparsity_warmup_steps": 8, "k": 4, "aux_k": 0},
    ],
)
def test_extended_training_is_the_long(tiny_store: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Weights and metrics of 24 steps and then 40 are those of 40 asked for at first."""
    changes |= {"eval_every": 10, "log_every": 4}
    trained(tiny_store, tmp_path / "out", small(steps=24, **changes), **KEEP)
    longer = trained(tiny_store, tmp_path / "out", small(steps=40, **changes), extend=True)
    whole = trained(tiny_store, tmp_path / "whole", small(steps=40, **changes))
    assert longer.final is not None
    assert whole.final is not None
    assert longer.final.read_bytes() == whole.final.read_bytes()
    assert (longer.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


def test_it_does_not_begin_anew(tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run reads 16 steps of rows; the shorter member stays as it was."""
    short = trained(tiny_store, tmp_path, small(steps=24), **KEEP)
    before = {path: path.read_bytes() for path in short.folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    trained(tiny_store, tmp_path, small(steps=40), extend=True)
    assert "goes on from step 24 of" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in short.folder.rglob("*") if path.is_file()}
    assert load_checkpoint(tmp_path / short.folder.name / "checkpoints" / "step_000024.safetensors")


@pytest.mark.parametrize(
    ("first", "then", "keep", "said"),
    [
        ({}, {}, {}, "its state was not kept"),
        ({"lr_decay_steps": 8}, {"lr_decay_steps": 8}, KEEP, "from step 17 on its schedules are others"),
        ({"lr_decay_steps": 8}, {"lr_decay_steps": 0}, KEEP, "lr_decay_steps was 8, now 0"),
        ({"seed": 1}, {}, KEEP, "holds no shorter training"),
        ({"steps": 26}, {}, KEEP, "its last line of metrics, of step 26"),
        ({"target_l0": 5.0}, {"target_l0": 5.0}, KEEP, "how fast --target-l0 is followed"),
        (
            {"recipe": "batchtopk", "lr_decay_steps": 0, "k": 6, "aux_k": 8},
            {"recipe": "batchtopk", "lr_decay_steps": 0, "k": 6, "aux_k": 8},
            KEEP,
            "too short to hold all rows",
        ),
    ],
)
def test_other_schedules_are_not_extended(
    tiny_store: Path, tmp_path: Path, first: dict[str, Any], then: dict[str, Any], keep: dict[str, Any], said: str
) -> None:
    """In one line, before anything of the longer one is written."""
    trained(tiny_store, tmp_path, small(**{"steps": 24, "log_every": 4} | first), **keep)
    with pytest.raises(UsageError, match=said):
        trained(tiny_store, tmp_path, small(**{"steps": 1000, "log_every": 4} | then), extend=True)
    assert len(list(tmp_path.glob("*/config.json"))) == 1


def test_other_stores_are_not_extended(tiny_store: Path, tmp_path: Path) -> None:
    """The same config on other rows."""
    make_store(tmp_path / "other.zarr", seed=3)
    trained(tmp_path / "other.zarr", tmp_path / "out", small(steps=24), **KEEP)
    with pytest.raises(MismatchError, match="id"):
        trained(tiny_store, tmp_path / "out", small(steps=40), extend=True)


def test_kept_state_stays_when_asked(tiny_store: Path, tmp_path: Path) -> None:
    """The same command again keeps it; without the option it goes, as nothing needs it."""
    short = trained(tiny_store, tmp_path, small(steps=8), **KEEP)
    trained(tiny_store, tmp_path, small(steps=8), **KEEP)
    assert (short.folder / "state.safetensors").exists()
    trained(tiny_store, tmp_path, small(steps=8))
    assert not (short.folder / "state.safetensors").exists()


def test_folders_without_state_are_passed_over(tiny_store: Path, tmp_path: Path) -> None:
    """A longer training that never came to a state is not what is gone on with; alone, it is said to have none yet."""
    trained(tiny_store, tmp_path, small(steps=24), **KEEP)
    stopped = trained(tiny_store, tmp_path, small(steps=32)).folder
    for path in (stopped / "complete.json", *(stopped / "checkpoints").iterdir()):
        path.unlink()
    trained(tiny_store, tmp_path, small(steps=40), extend=True)
    (tmp_path / "alone").mkdir()
    stopped.rename(tmp_path / "alone" / stopped.name)
    with pytest.raises(UsageError, match="of 32 steps, cannot be gone on with: it was begun and has no state yet"):
        trained(tiny_store, tmp_path / "alone", small(steps=40), extend=True)


class Recorded:
    """A log that keeps what it is given, by folder."""

    seen: ClassVar[dict[str, list[Any]]] = {}
    folder: ClassVar[Folder]

    def __init__(self, folder: Folder, step: int) -> None:
        Recorded.folder = folder
        self.begun = folder.name in self.seen
        self.lines = self.seen.setdefault(folder.name, [])

    def write(self, metrics: Any) -> None:
        """One line."""
        self.lines.append(dict(metrics))

    def close(self) -> None:
        """Nothing."""


def test_logs_of_extended_trainings_are_whole(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard and the like get the shorter training's lines too, and none of them twice."""
    monkeypatch.setattr("train.log.TensorBoard", Recorded)
    monkeypatch.setitem(PACKAGES, "tensorboard", "json")
    monkeypatch.setattr(Recorded, "seen", {})
    for steps in (24, 40):
        options = KEEP | {"log": ("tensorboard",), "extend": steps == 40}
        folder = trained(tiny_store, tmp_path, small(steps=steps, log_every=4), **options).folder
        written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert json.loads(json.dumps(Recorded.seen[folder.name])) == written
    open_logs(("tensorboard",), Recorded.folder, 40)
    assert len(Recorded.seen[folder.name]) == len(written)

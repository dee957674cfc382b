"""Held-out rows while training: the numbers of the saved SAE, at the right lines, the same after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipeline.base.errors import UsageError
from pipeline.sae.checkpoint import load_checkpoint
from pipeline.store.kept import KeptRows
from pipeline.store.reader import Store
from support.train_crasher import small
from train import held_out
from train.__main__ import command
from train.config import RECIPES, TrainConfig
from train.held_out import HeldOut, is_due
from train.log import scalars
from train.options import make_grid
from train.plan import RunConfig
from train.run import Pass, run
from train.stop import Stopped
from train.trainee import Outcome

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(store: Path, out: Path, config: TrainConfig) -> Outcome:
    (outcome,) = run(RunConfig(store, out, (config,), device="cpu", threads=1))
    return outcome


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_last_line_scores_the_saved_sae(recipe: str, tiny_store: Path, tmp_path: Path) -> None:
    """ev and L0 of every level are those of the final checkpoint on the kept evaluation rows, in float64."""
    config = RECIPES[recipe](width=48, steps=12, batch_size=64, levels=(0.25, 0.5, 1.0))
    outcome = trained(tiny_store, tmp_path, config)
    assert outcome.final is not None
    sae = load_checkpoint(outcome.final)[0].double()
    split = Store.open(tiny_store).eval
    x = split.read(0, split.n_rows)[torch.from_numpy(split.kept())].double()
    line = lines(outcome.folder)[-1]
    with torch.inference_mode():
        z = sae.encode(x.float())
        for level, (ev, l0) in enumerate(zip(line["eval_ev"], line["eval_l0"], strict=True)):
            error = (x - sae.decode_level(z, level)).square().sum()
            assert ev == pytest.approx(1 - float(error / (x - x.mean(0)).square().sum()), abs=1e-5)
            assert l0 == pytest.approx(float((z[:, : sae.config.levels[level]] != 0).sum()) / len(x), rel=1e-3)


def test_lines_after_every_interval_carry_them(tiny_store: Path, tmp_path: Path) -> None:
    """The first line after 10, 20 and 30 steps where lines come every 4 steps, and the last."""
    outcome = trained(tiny_store, tmp_path, small(steps=33, eval_every=10, log_every=4))
    assert [line["step"] for line in lines(outcome.folder) if "eval_ev" in line] == [12, 20, 32, 33]


def test_none_are_made_without_interval(tiny_store: Path, tmp_path: Path) -> None:
    """--eval-every 0 changes nothing else: lines and weights are those of a run that scores."""
    with_them, without = (trained(tiny_store, tmp_path, small(steps=9, eval_every=n)) for n in (3, 0))
    assert all("eval_ev" not in line for line in lines(without.folder))
    rest = [{k: v for k, v in line.items() if not k.startswith("eval_")} for line in lines(with_them.folder)]
    assert rest == lines(without.folder)


def test_a_resumed_training_scores_the_same(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between two lines, and gone on with, it writes the same lines."""
    config = small(steps=30, eval_every=10, log_every=4, checkpoint_every=5)
    whole = trained(tiny_store, tmp_path / "whole", config)

    def stop(self: Pass, step: int) -> None:
        if step == 18:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Pass, "raise_if_stopped", stop)
        with pytest.raises(KeyboardInterrupt):
            trained(tiny_store, tmp_path / "stopped", config)
    stopped = trained(tiny_store, tmp_path / "stopped", config)
    assert stopped.step == 30
    assert (stopped.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("step", "due"), [(10, False), (500, True), (510, False), (1000, True), (1003, True)])
def test_due_depends_on_step_alone(step: int, due: bool) -> None:
    """So that a resume knows it too."""
    assert is_due(TrainConfig(steps=1003), step) is due


def test_the_sample_is_spread_and_bounded(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most ROWS kept rows, of chunks from the first to the last."""
    monkeypatch.setattr(held_out, "ROWS", 50)
    monkeypatch.setattr(held_out, "CHUNKS", 2)
    split = Store.open(tiny_store).eval
    found = HeldOut.read(split, split.kept_rows(5.0), torch.device("cpu"))
    assert found is not None
    assert found.x.shape == (50, 64)
    kept = split.kept(5.0)
    first, last = (split.chunk_rows_range(c) for c in (0, split.n_chunks - 1))
    allowed = torch.cat([split.read(a, b)[torch.from_numpy(kept[a:b])] for a, b in (first, last)])
    assert torch.equal(found.x[0], allowed[0])
    assert torch.equal(found.x[-1], allowed[-1])


def test_constant_rows_are_not_scored(tiny_store: Path) -> None:
    """Nothing of them can be explained: no division by zero."""
    split = Store.open(tiny_store).eval
    one = KeptRows.of(iter([np.arange(split.n_rows) == 3]), split.chunk_rows)
    assert HeldOut.read(split, one, torch.device("cpu")) is None


def test_logs_get_them_by_level() -> None:
    """TensorBoard and Weights & Biases see eval_ev/level_1 and so on."""
    assert dict(scalars({"step": 3, "eval_ev": [0.5, 0.75]})) == {"eval_ev/level_1": 0.5, "eval_ev/level_2": 0.75}


def test_wandb_ids_contain_the_store(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stores' members of one config are two runs."""
    import sys
    import types

    seen: list[str] = []
    fake = types.SimpleNamespace(
        init=lambda **options: (
            seen.extend((options["id"], options["name"]))
            or types.SimpleNamespace(log=lambda *a, **k: 0, finish=lambda: 0)
        ),
        Settings=lambda **options: None,
        Error=RuntimeError,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(RunConfig(tiny_store, tmp_path, (small(steps=6),), device="cpu", log=("wandb",)))
    assert seen[0] == seen[1]
    assert seen[0].endswith(f"-{Store.load(tiny_store).id[:10]}")


def test_tensorboard_folders_contain_the_store(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member of one config that is trained on another store, in the same folder, goes on with no log of the first."""
    import sys
    import types

    class Writer:
        """What TensorBoard is opened with."""

        def __init__(self, place: str, purge_step: int) -> None:
            seen.append(place)

        def __getattr__(self, _name: str) -> Any:
            return lambda *_args: None

    seen: list[str] = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    run(RunConfig(tiny_store, tmp_path, (small(steps=6),), device="cpu", log=("tensorboard",)))
    member = next(path for path in tmp_path.iterdir() if (path / "config.json").is_file())
    assert seen == [str(tmp_path / "tensorboard" / f"{member.name}-{Store.load(tiny_store).id[:10]}")]


def test_tokens_and_epochs_become_steps() -> None:
    """Whole steps, no row more than asked, of each member's batch."""
    grid = make_grid({"tokens": (10_000_000,), "batch_size": (2048, 1000)})
    assert [config.steps for config in grid] == [4882, 10_000]
    grid = make_grid(
        {"epochs": (2.5,), "batch_size": (100,), "max_norm": (None, 3.0)}, lambda norm: 1000 if norm else 998
    )
    assert [config.steps for config in grid] == [24, 25]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tokens": (5,), "steps": (5,)}, "--steps and --tokens both say how long"),
        ({"tokens": (5,), "epochs": (1.0,)}, "--tokens and --epochs both say how long"),
        ({"epochs": (1.0,)}, "--epochs needs a store that is there"),
    ],
)
def test_contradicting_lengths_are_refused(given: dict[str, Any], said: str) -> None:
    """In one line."""
    with pytest.raises(UsageError, match=said):
        make_grid(given)


def test_epochs_count_kept_rows(tiny_store: Path, tmp_path: Path) -> None:
    """An epoch is what training uses: neither special nor massive rows."""
    split = Store.open(tiny_store).train
    words = [
        "--store",
        str(tiny_store),
        "--out",
        str(tmp_path),
        "--epochs",
        "2",
        "--batch-size",
        "100",
        "--width",
        "32",
    ]
    result = CliRunner().invoke(command, [*words, "--k", "4", "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0
    config = json.loads(next(tmp_path.glob("*/config.json")).read_text())["config"]
    assert config["steps"] == 2 * int(split.kept().sum()) // 100

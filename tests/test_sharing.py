"""A sharing ratio that adapts: the rule, what training makes of it, and what is saved and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from evaluate.report.runs import read_results, sharing_label
from evaluate.report.scored import AUTO
from pipeline.base.errors import UsageError
from pipeline.base.files import write_json
from pipeline.sae.checkpoint import load_checkpoint
from pipeline.sae.config import level_size
from support.results_files import write_results
from support.stores import make_store
from test_step import assert_same_state, batch_for, config_of, member_of, train
from train.__main__ import command
from train.config import RECIPES
from train.folder import member_name
from train.step.member import Member
from train.step.schedules import adapted, adapts

pytestmark = pytest.mark.usefixtures("one_thread")


def shared_of_whole(member: Member, step: int) -> float:
    """What the shared level explains of what the whole does, on rows that training has not seen."""
    sae, x = member.sae(), batch_for(member, step).x
    with torch.no_grad():
        decoded = list(sae.decode_normalized_levels(sae.encode_normalized(x)))
    errors = [float((x - x_hat).square().sum() / x.square().sum()) for x_hat in decoded]
    return (1 - errors[0]) / (1 - errors[1])


def test_ratio_changes_fifty_times() -> None:
    """The ratio changes fifty times over the first four fifths."""
    config = config_of("paper", alpha="auto", steps=5000)
    times = [step for step in range(1, 5001) if adapts(config, step)]
    assert (len(times), times[0], times[-1]) == (50, 80, 4000)
    assert not any(adapts(config_of("paper", alpha=0.2, steps=5000), step) for step in times)
    short = [step for step in range(1, 11) if adapts(config_of("paper", alpha="auto", steps=20), step)]
    assert short == list(range(1, 11))


@given(st.integers(2, 10_000), st.data())
def test_shared_level_moves_by_a_hundredth(width: int, data: Any) -> None:
    """The shared level moves by a hundredth towards its target and stays inside."""
    n_shared = data.draw(st.integers(1, width - 1))
    change = max(1, level_size(0.01, width))
    more = adapted(n_shared, width, (60.0, 20.0), 100.0, target=0.9)  # explains 0.4 of 0.8: half
    less = adapted(n_shared, width, (22.0, 20.0), 100.0, target=0.9)
    assert more == min(max(n_shared + change, change), width - change)
    assert less == min(max(n_shared - change, change), width - change)
    assert 0 < less < width
    assert 0 < more < width
    assert adapted(n_shared, width, (120.0, 101.0), 100.0, target=0.9) == n_shared


@pytest.mark.parametrize("recipe", ["paper", "batchtopk", "jumprelu"])
def test_shared_part_reaches_its_target(recipe: str) -> None:
    """Training brings the shared part to its target."""
    changes = {"layernorm": "none", "steps": 400, "lambda_shared": 0.01, "lambda_specialised": 0.01}
    changes = {"k": 6, "steps": 800} if recipe == "batchtopk" else changes
    changes |= {"initial_l0": 32.0} if recipe == "jumprelu" else {}
    shares, sizes = [], []
    for target in (0.5, 0.9):
        member = member_of(config_of(recipe, alpha="auto", shared_target=target, **changes))
        train(member, 0, int(changes["steps"]))
        shares.append(shared_of_whole(member, 1000))
        sizes.append(member.shape.n_shared)
        assert member.sae().config.levels == (member.shape.n_shared, 64)
        assert member.metrics()["n_shared"] == member.shape.n_shared
    assert shares == pytest.approx([0.5, 0.9], abs=0.1)
    assert sizes[0] < sizes[1]


def test_last_fifth_keeps_the_ratio() -> None:
    """The last fifth trains with the ratio that was reached."""
    member = member_of(config_of("paper", alpha="auto", steps=60))
    train(member, 0, 48)
    reached = member.shape.n_shared
    assert reached != round(0.2 * 64)
    train(member, 48, 60)
    assert member.shape.n_shared == reached


def test_resumed_member_is_bit_equal() -> None:
    """A resumed member goes on bit for bit."""
    config = config_of("paper", alpha="auto", lambda_shared=0.1, steps=40)
    whole = member_of(config)
    train(whole, 0, 40)
    first = member_of(config)
    train(first, 0, 17)
    again = member_of(config)
    again.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    train(again, 17, 40)
    assert again.shape == whole.shape
    assert_same_state(again, whole)


def test_auto_alpha_reaches_command_and_checkpoint(tmp_path: Path) -> None:
    """It is an alpha among others on the command line and in a checkpoint."""
    store = make_store(tmp_path / "s.zarr", n_sequences=64, eval_sequences=4)
    words = ["--store", str(store.path), "--out", str(tmp_path / "out"), "--alpha", "0.2", "--alpha", "auto"]
    words += ["--width", "64", "--steps", "10", "--batch-size", "32", "--lr-warmup-steps", "2"]
    words += ["--sparsity-warmup-steps", "2", "--dtype", "float32"]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    (folder,) = (tmp_path / "out").glob("alphaauto-seed0-*")
    sae, header = load_checkpoint(folder / "checkpoints" / "step_000010.safetensors")
    assert header.provenance["train"]["alpha"] == "auto"
    assert sae.config.levels[0] != round(0.2 * 64)
    assert len(list((tmp_path / "out").glob("alpha*"))) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha": "auto", "level_weighting": "random"}, "random prefixes have none"),
        ({"alpha": "auto", "shared_target": 1.0}, "shared_target must be between 0 and 1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    """What makes no sense is refused."""
    with pytest.raises(UsageError, match=said):
        RECIPES["paper"](**changes)


def test_report_has_its_row(tmp_path: Path) -> None:
    """The report has a row for it."""
    _, auto = write_results(tmp_path, alphas=(0.2, 0.3), seeds=(0,), steps=(100,))
    data = json.loads(auto.read_text())
    data["checkpoint"]["provenance"]["train"]["alpha"] = "auto"
    write_json(auto, data)
    results = read_results([tmp_path])
    assert [sharing_label(sharing) for sharing in results.sharings] == ["α = 0.2", "α auto"]
    assert results.sharings[-1] == AUTO


def test_its_members_have_a_name() -> None:
    """Its members have a name."""
    assert member_name(config_of("paper", alpha="auto")).startswith("alphaauto-seed0-")

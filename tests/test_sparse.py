"""Products over active latents alone, in plain PyTorch: the numbers of the dense step, what they apply to, a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.base.errors import UsageError
from pipeline.sae.checkpoint import load_checkpoint
from test_step import CPU, D_MODEL, RECIPE_CHANGES, ROWS, assert_same_state, config_of, raw_rows, sums_of_two, train
from train.config import TrainConfig
from train.plan import SHARED_PARTS, RunConfig, memory_bytes
from train.run import run
from train.step.member import Member, normalise_batch
from train.step.scratch import Scratch
from train.step.sparse import is_sparse

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS: dict[int, dict[str, Any]] = {
    1: {"alpha": 0.0},
    2: {"alpha": 0.2},
    5: {"levels": (0.125, 0.25, 0.5, 0.75, 1.0), "alpha": None},
}


def form_of(recipe: str, **changes: Any) -> TrainConfig:
    """A recipe with dead latents, whose k falls for four steps."""
    dying = {"dead_after_rows": ROWS, "sparsity_warmup_steps": 4, "levels": (), "alpha": 0.2}
    return config_of(recipe, **RECIPE_CHANGES[recipe] | dying | {"dtype": "float64"} | changes)


def member_of(config: TrainConfig, sparse: bool, d_model: int = D_MODEL, group: Any = None) -> Member:
    wide = torch.float64 if config.dtype == "float64" else torch.float32
    center = torch.full((d_model,), 0.3, dtype=wide)
    return Member(config, d_model, center, 1.7, CPU, Scratch(CPU), group, is_sparse=sparse)


@pytest.mark.parametrize("n_levels", LEVELS)
@pytest.mark.parametrize("recipe", ["topk", "batchtopk"])
def test_sparse_step_equals_dense_step(recipe: str, n_levels: int) -> None:
    """Steps with sparse products, dense ones while k falls, are dense steps within rounding: weights, moments, metrics, the
    auxiliary loss at work."""
    config = form_of(recipe, **LEVELS[n_levels])
    dense, sparse = (member_of(config, sparse) for sparse in (False, True))
    for member in (dense, sparse):
        train(member, 0, 10)
    for name, tensor in dense.state().items():
        torch.testing.assert_close(sparse.state()[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
    found, expected = sparse.metrics(), dense.metrics()
    assert expected == {name: pytest.approx(value, rel=1e-9, abs=1e-12) for name, value in found.items()}
    assert expected["aux"] > 0


def test_sparse_bf16_step_nears_dense() -> None:
    """In bf16 both ways differ by the rounding of products."""
    dense, sparse = (member_of(form_of("topk", dtype="bf16"), sparse) for sparse in (False, True))
    for member in (dense, sparse):
        train(member, 0, 8)
    found, expected = sparse.metrics(), dense.metrics()
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.01)
    torch.testing.assert_close(sparse.weights["W_dec"], dense.weights["W_dec"], rtol=0.1, atol=0.02)


def test_encoder_lies_by_latents() -> None:
    """A sparse member's encoder, moments and copy are a latent a row in memory, and stay so."""
    member = member_of(form_of("topk", dtype="bf16"), sparse=True)
    train(member, 0, 6)
    adam = member.adam
    for weight in (member.weights["W_enc"], adam.first["W_enc"], adam.second["W_enc"], adam.low["W_enc"]):
        assert weight.shape == (D_MODEL, 64)
        assert weight.T.is_contiguous()
    assert member.sae().W_enc.is_contiguous()


@pytest.mark.parametrize("before", [False, True])
def test_sparse_member_resumes_either_way(before: bool) -> None:
    """A state is gone on from bit for bit with the same products, within rounding with the others."""
    config = form_of("batchtopk")
    whole, first = member_of(config, sparse=True), member_of(config, sparse=before)
    train(whole, 0, 9)
    train(first, 0, 6)
    second = member_of(config, sparse=True)
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    train(second, 6, 9)
    if before:
        assert_same_state(whole, second)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(second.weights[name], weight, rtol=1e-9, atol=1e-12, msg=name)


def test_step_without_active_latents() -> None:
    """Rows on which nothing is active give gradients of b_dec alone, as in the dense step."""
    members = [member_of(form_of("topk", sparsity_warmup_steps=0, aux_k=0), sparse) for sparse in (False, True)]
    for member in members:
        member.weights["b_enc"].fill_(-100.0)
        train(member, 0, 2)
    for name, tensor in members[0].state().items():
        torch.testing.assert_close(members[1].state()[name], tensor, rtol=1e-12, atol=1e-15, msg=name)
    assert members[1].metrics()["l0"] == 0.0


def test_sparse_processes_of_equal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process beside another of equal rows, gradients summed in buckets, steps as one alone."""
    config = form_of("topk", sparsity_warmup_steps=0)
    alone = member_of(config, sparse=True)
    train(alone, 0, 3)
    with monkeypatch.context() as patch:
        group = sums_of_two(patch, [])
        member = member_of(config, sparse=True, group=group)
        for step in range(3):
            member.step(normalise_batch(raw_rows(step), member.center, member.scale))
    for name, weight in alone.weights.items():
        torch.testing.assert_close(member.weights[name], weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recipe", ["topk", "batchtopk"])
def test_sparse_member_fits_announced_memory(recipe: str) -> None:
    """What sparse products take beside a member is announced."""
    config = form_of(recipe, dtype="bf16", width=2048, batch_size=1024, sparsity_warmup_steps=0)
    plain, sparse = (memory_bytes(config, 64, CPU, is_sparse=sparse) for sparse in (False, True))
    member = member_of(config, sparse=True, d_model=64)
    member.step(normalise_batch(raw_rows(0, 1024, 64), member.center, member.scale))
    assert member.scratch.n_bytes() <= sum(plain[name] for name in SHARED_PARTS)
    added = sum(sparse.values()) - sum(plain.values())
    assert added == 2048 * 64 * 2 + 4 * 1024 * 64
    cuda = torch.device("cuda")
    lists = sum(memory_bytes(config, 64, cuda, is_sparse=True).values()) - sum(memory_bytes(config, 64, cuda).values())
    assert lists == 2 * 4 * 1024 * 2048


@pytest.mark.parametrize(
    ("config", "is_transcoder", "why"),
    [
        (config_of("paper"), False, "relu has dense steps"),
        (config_of("topk", layernorm="pre"), False, "LayerNorm"),
        (config_of("topk", level_weighting="random"), False, "random prefixes"),
        (config_of("topk"), True, "transcoders"),
    ],
    ids=["relu", "LayerNorm", "random", "transcoder"],
)
def test_what_stays_dense_is_said(config: TrainConfig, is_transcoder: bool, why: str) -> None:
    """Sparse products are refused where they do not apply, by name; auto passes over them."""
    with pytest.raises(UsageError, match=f"--sparse on: .*{why}"):
        is_sparse("on", config, CPU, is_transcoder=is_transcoder)
    assert not is_sparse("auto", config, CPU, is_transcoder=is_transcoder)


def test_auto_waits_for_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto is dense on every device until one was shown to be faster; there from a width on, up to a k."""
    cuda = torch.device("cuda", 0)
    wide = config_of("topk", width=65_536, k=64)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert not is_sparse("auto", wide, cuda)
    monkeypatch.setattr("train.step.sparse.SHOWN", {"NVIDIA H100": 64})
    assert is_sparse("auto", wide, cuda)
    assert not is_sparse("auto", wide, CPU)
    assert not is_sparse("auto", config_of("topk", width=65_536, k=65), cuda)
    assert not is_sparse("auto", config_of("topk", width=65_535, k=64), cuda)
    assert not is_sparse("off", wide, cuda)


def test_sparse_run_equals_dense_run(tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with --sparse on ends where one without it does, within rounding, in a folder of the same name."""
    fixed = {"width": 128, "steps": 6, "batch_size": 64, "lr_warmup_steps": 0, "lr_decay_steps": 2, "eval_every": 0}
    member = config_of("batchtopk", **fixed | {"k": 8, "sparsity_warmup_steps": 2, "checkpoint_every": 3})
    outcomes = {}
    for choice in ("off", "on"):
        job = RunConfig(
            tiny_store, tmp_path / choice, (member,), device="cpu", sparse="on" if choice == "on" else "off"
        )
        outcomes[choice] = run(job)[0]
    assert "1 of them with products over active latents alone" in capsys.readouterr().err
    assert outcomes["on"].folder.name == outcomes["off"].folder.name
    saes = [load_checkpoint(outcome.final)[0].state_dict() for outcome in outcomes.values() if outcome.final]
    assert len(saes) == 2
    for name, tensor in saes[0].items():
        torch.testing.assert_close(saes[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)

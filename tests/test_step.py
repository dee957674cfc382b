"""A whole training step: against torch's own optimiser in float64, resumed, repeated, in bf16, in two processes."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.base.errors import CheckpointError
from pipeline.base.runtime import process_group
from pipeline.sae.nested import NestedSAE
from support.reference import reference_objective, reference_update
from train.config import RECIPES, TrainConfig, paper
from train.plan import SHARED_PARTS, memory_bytes
from train.step.fused.choice import member_kind
from train.step.graphs import cuda_capture
from train.step.member import Batch, Member, dead_share, normalise_batch, product_dtype
from train.step.schedules import learning_rate, level_rates, sparsity_ramp
from train.step.scratch import Scratch, row_chunks
from train.step.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

D_MODEL, WIDTH, ROWS = 16, 64, 48
CPU = torch.device("cpu")
RECIPE_CHANGES: dict[str, dict[str, Any]] = {
    "paper": {"level_weighting": "random", "target_l0": 9.0},
    "batchtopk": {"k": 4, "aux_k": 4, "dead_after_rows": ROWS, "levels": (0.125, 0.25, 0.5, 0.75, 1.0)},
    "topk": {"k": 4, "aux_k": 4, "dead_after_rows": ROWS},
    "jumprelu": {"initial_l0": 12.0, "dead_after_rows": ROWS},
}


def config_of(recipe: str, **changes: Any) -> TrainConfig:
    """A recipe at the size of these tests."""
    schedule = {"steps": 40, "lr": 3e-3, "lr_warmup_steps": 5, "sparsity_warmup_steps": 0, "lr_decay_steps": 8}
    return RECIPES[recipe](**({"width": WIDTH, "batch_size": ROWS, "dtype": "float32"} | schedule | changes))


def member_of(config: TrainConfig, d_model: int = D_MODEL, *, is_sparse: bool = False) -> Member:
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    center = torch.full((d_model,), 0.3, dtype=dtype)
    return Member(config, d_model, center, 1.7, CPU, Scratch(CPU), is_sparse=is_sparse)


def raw_rows(step: int, n: int = ROWS, d_model: int = D_MODEL) -> Tensor:
    """Raw rows in bf16: sparse mixtures of fixed directions, centred away from 0."""
    generator = torch.Generator().manual_seed(step)
    directions = torch.randn(4 * d_model, d_model, generator=torch.Generator().manual_seed(99))
    chosen = torch.rand(n, 4 * d_model, generator=generator) < 0.05
    x = chosen * torch.rand(n, 4 * d_model, generator=generator) @ directions
    return (0.35 * x / d_model**0.5 + 0.3).bfloat16()


def batch_for(member: Member, step: int) -> Batch:
    return normalise_batch(raw_rows(step, d_model=member.shape.d_model), member.center, member.scale)


def train(member: Member, start: int, stop: int) -> None:
    for step in range(start, stop):
        member.step(batch_for(member, step))


def assert_same_state(a: Member, b: Member) -> None:
    for name, tensor in a.state().items():
        assert torch.equal(tensor, b.state()[name]), f"{name} differs"


@pytest.mark.parametrize("changes", [{}, {"clip_norm": 0.1}, {"normalize_gradients": True}, {"level_lr": 0.5}], ids=str)
@pytest.mark.parametrize("layernorm", ["none", "pre"])
def test_step_equals_autograd_reference(layernorm: str, changes: dict[str, Any]) -> None:
    """Steps equal autograd, clip, projection, Adam and renormalisation."""
    config = config_of("paper", dtype="float64", layernorm=layernorm, sparsity_warmup_steps=4, **changes)
    member = member_of(config)
    weights = {name: weight.clone().requires_grad_() for name, weight in member.weights.items()}
    adam = torch.optim.Adam(list(weights.values()), betas=(config.beta1, config.beta2), eps=config.eps)
    norms = []
    for step in range(6):
        batch = batch_for(member, step)
        loss = reference_objective(weights, config, batch.x, factor=sparsity_ramp(config, step))
        rates = level_rates(config, config.level_sizes())
        norms.append(reference_update(weights, adam, config, learning_rate(config, step), loss, rates))
        member.step(batch)
    for name, weight in weights.items():
        torch.testing.assert_close(member.weights[name], weight.detach(), rtol=1e-6, atol=1e-9)
    assert member.metrics()["grad_norm"] == pytest.approx(sum(norms) / 6, rel=1e-6)


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("shape", [{"alpha": 0.0}, {"alpha": 0.25}, {"levels": (0.125, 0.5, 1.0)}], ids=str)
def test_small_levels_learn_faster(shape: dict[str, Any], is_sparse: bool) -> None:
    """A level moves at (its size / width) to −level_lr, with mean 1 over latents, of what it moves at one rate."""
    moved = []
    for power in (0.0, 0.5):
        config = config_of("batchtopk", dtype="float64", level_lr=power, **shape)
        member = member_of(config, is_sparse=is_sparse)
        before = {name: member.weights[name].clone() for name in ("W_enc", "b_enc")}
        member.step(batch_for(member, 0))
        moved.append({name: member.weights[name] - old for name, old in before.items()})
    ends = config.level_sizes()
    wanted = torch.cat(
        [torch.full((stop - start,), stop**-0.5, dtype=torch.float64) for start, stop in zip((0, *ends), ends)]
    )
    wanted /= wanted.mean()
    for name, even in moved[0].items():
        torch.testing.assert_close(moved[1][name], even * wanted, rtol=1e-9, atol=1e-12)


def test_adapting_level_takes_its_rate() -> None:
    """Where alpha adapts, latents learn at the rates of the levels as they are now."""
    member = member_of(config_of("batchtopk", alpha="auto", level_lr=0.5))
    member._share(3)
    torch.testing.assert_close(
        member.adam.rates["W_dec"].double(), level_rates(member.config, (3, member.config.width)), rtol=1e-6, atol=0
    )


def test_dead_thresholds_fall_at_their_rate() -> None:
    """Where no row comes near them, jumprelu's log-thresholds fall by `threshold_pull` of their learning rate a step once the
    latent is dead, as far as a quarter of those that fire; before that, and without the pull, they stay."""
    for pull in (0.0, 0.25, 1e4):
        config = config_of("jumprelu", dtype="float64", dead_after_rows=2 * ROWS, threshold_pull=pull)
        member = member_of(config)
        member.before_first.clear()
        before = torch.tensor([5.0, 5.0, 4.0, -6.0], dtype=torch.float64)
        log_threshold = member.weights["log_threshold"].fill_(-2.0)
        log_threshold[:4] = before
        member.weights["b_enc"][3] = -10.0
        member.rows_since_fired[:4] = torch.tensor([0, ROWS, 10 * ROWS, 10 * ROWS])
        train(member, 0, 1)
        fall = pull * learning_rate(config, 0) * config.threshold_lr
        fires = member.rows_since_fired < config.dead_after_rows
        least = float(log_threshold[fires].mean()) - math.log(4)
        wanted = [5.0, max(5.0 - fall, least), max(4.0 - fall, least), -6.0]
        assert log_threshold[:4].tolist() == pytest.approx(wanted, rel=1e-6)


def test_dead_thresholds_come_back() -> None:
    """Latents of jumprelu that never fired for their thresholds fire again, with the pull, and only with it."""
    for pull in (0.0, 2.0):
        config = config_of("jumprelu", steps=200, lr_decay_steps=0, dead_after_rows=2 * ROWS, threshold_pull=pull)
        member = member_of(config)
        train(member, 0, 1)
        member.weights["log_threshold"][:8] = 1.0
        train(member, 1, 150)
        fired = member.rows_since_fired[:8] < 140 * ROWS
        assert bool(fired.all() if pull else not fired.any())


@pytest.mark.parametrize("recipe", ["topk", "batchtopk"])
def test_kept_count_falls_to_k(recipe: str) -> None:
    """What is kept falls to k over the sparsity warmup."""
    member, l0 = member_of(config_of(recipe, k=3, sparsity_warmup_steps=4)), []
    for step in range(6):
        member.step(batch_for(member, step))
        l0.append(member.metrics()["l0"])
    assert l0 == pytest.approx([24, 14, 8, 5, 3, 3], abs=0.5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_resumed_member_is_bit_equal(recipe: str) -> None:
    """A resumed member goes on bit for bit."""
    config = config_of(recipe, dtype="bf16", **RECIPE_CHANGES[recipe])
    whole, first = member_of(config), member_of(config)
    train(whole, 0, 20)
    train(first, 0, 9)
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    second = member_of(config)
    second.load_state(saved)
    train(second, 9, 20)
    assert_same_state(whole, second)
    for name, tensor in whole.sae().state_dict().items():
        assert torch.equal(tensor, second.sae().state_dict()[name]), f"{name} differs"
    said = whole.metrics()
    assert said == second.metrics()
    assert said["aux"] > 0 or recipe in ("paper", "jumprelu")


@pytest.mark.parametrize("recipe", RECIPES)
def test_member_in_grid_is_bit_equal(recipe: str) -> None:
    """A member beside others is bit identical to one alone."""
    config = config_of(recipe, dtype="bf16", **RECIPE_CHANGES[recipe])
    alone = member_of(config)
    train(alone, 0, 12)
    scratch = Scratch(CPU)
    others = [config_of("paper", width=96, seed=5, dtype="bf16"), config, config_of("topk", k=3, width=32, aux_k=0)]
    members = [Member(c, D_MODEL, alone.center, alone.scale, CPU, scratch) for c in others]
    for step in range(12):
        for member in members:
            member.step(batch_for(member, step))
    assert_same_state(alone, members[1])


def test_step_leaves_the_batch() -> None:
    """A step leaves the batch as it was."""
    member = member_of(config_of("batchtopk", k=4))
    batch = batch_for(member, 0)
    before = [tensor.clone() for tensor in (batch.x, batch.norm, batch.total, batch.square)]
    member.step(batch)
    for kept, tensor in zip(before, (batch.x, batch.norm, batch.total, batch.square)):
        assert torch.equal(kept, tensor)


def test_another_seed_is_another_member() -> None:
    """Another seed is another member."""
    a, b = member_of(config_of("paper", seed=0)), member_of(config_of("paper", seed=1))
    assert not torch.equal(a.weights["W_dec"], b.weights["W_dec"])


def test_new_member_starts_tied_and_unit() -> None:
    """A new member has unit decoder rows, its encoder is their transpose, and b_dec is zero."""
    member = member_of(config_of("paper"))
    torch.testing.assert_close(member.weights["W_dec"].norm(dim=1), torch.ones(WIDTH))
    assert torch.equal(member.weights["W_enc"], member.weights["W_dec"].T)
    assert not member.weights["b_dec"].any()


@pytest.mark.parametrize("recipe", ["paper", "jumprelu", "batchtopk"])
def test_sae_encodes_as_in_training(recipe: str) -> None:
    """The SAE encodes raw rows to the latents of training."""
    config = config_of(recipe, **RECIPE_CHANGES[recipe])
    member = member_of(config)
    train(member, 0, 15)
    member._forward(batch_for(member, 15))
    expected = member.latents.z.clone()
    threshold = float(member.latents.threshold) if recipe == "batchtopk" else 0.0
    sae = member.sae()
    if recipe == "batchtopk":
        sae.threshold.data.fill_(threshold * (1 - 1e-5))  # that batch's own, which is inclusive
    with torch.no_grad():
        z = sae.encode(raw_rows(15))
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)


def test_trained_levels_are_saes() -> None:
    """Every level of a trained SAE is itself an SAE."""
    member = member_of(config_of("paper", levels=(0.25, 0.5, 1.0)))
    train(member, 0, 10)
    sae, x = member.sae(), raw_rows(11)
    with torch.no_grad():
        z = sae.encode(x)
        for level, m in enumerate(sae.config.levels):
            torch.testing.assert_close(sae.prefix(level).encode(x), z[:, :m], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(sae.prefix(level)(x), sae.decode_level(z, level), rtol=1e-5, atol=1e-5)


def test_inference_threshold_keeps_about_k() -> None:
    """The inference threshold keeps about k latents a row."""
    member = member_of(config_of("batchtopk", k=4, steps=80, dtype="bf16"))
    train(member, 0, 80)
    with torch.no_grad():
        l0 = (member.sae().encode(raw_rows(1000, n=500)) > 0).sum(1).float().mean()
    assert 3.2 < float(l0) < 4.8


def test_threshold_is_found_once_a_step() -> None:
    """A line and a checkpoint of one step share the threshold; another step, or another state, has its own."""
    member, other = (member_of(config_of("batchtopk", k=4, steps=40, seed=seed)) for seed in (0, 1))
    for one in (member, other):
        train(one, 0, 10)
    first = member.sae().threshold
    with patch.object(Member, "_calibrate", side_effect=AssertionError("found again")):
        assert torch.equal(member.sae().threshold, first)
    member.load_state({name: tensor.clone() for name, tensor in other.state().items()})
    assert torch.equal(member.sae().threshold, other.sae().threshold)
    train(member, 10, 11)
    assert not torch.equal(member.sae().threshold, other.sae().threshold)


def test_metrics_describe_their_rows() -> None:
    """Metrics are what the SAE does to those rows."""
    config = config_of("paper", layernorm="none", steps=40)
    member = member_of(config)
    train(member, 0, 20)
    member.metrics()
    sae, batch = member.sae(), batch_for(member, 20)
    member.step(batch)
    said = member.metrics()
    with torch.no_grad():
        z = sae.encode_normalized(batch.x)
        errors = [float((batch.x - x_hat).square().sum(1).mean()) for x_hat in sae.decode_normalized_levels(z)]
    variance = float((batch.x - batch.x.mean(0)).square().sum(1).mean())
    assert said["recon"] == pytest.approx(errors, rel=1e-4)
    assert said["ev"] == pytest.approx([1 - error / variance for error in errors], rel=1e-4)
    assert said["l0"] == pytest.approx(float((z > 0).sum(1).float().mean()), rel=1e-4)
    n_shared = sae.config.n_shared
    assert said["l1_shared"] == pytest.approx(float(z[:, :n_shared].sum(1).mean()), rel=1e-4)
    assert said["l1_specialised"] == pytest.approx(float(z[:, n_shared:].sum(1).mean()), rel=1e-4)
    penalty = 0.04 * (said["l1_shared"] + said["l1_specialised"])
    assert said["loss"] == pytest.approx(sum(errors) + penalty, rel=1e-4)
    assert (said["step"], said["rows"]) == (21, 21 * ROWS)


def test_metrics_begin_anew_after_each_call() -> None:
    """Metrics begin anew after each call."""
    member = member_of(config_of("paper"))
    train(member, 0, 5)
    member.metrics()
    train(member, 5, 6)
    once = member.metrics()["loss"]
    again = member_of(config_of("paper"))
    train(again, 0, 6)
    assert again.metrics()["loss"] != once


def test_metrics_take_one_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of metrics takes one transfer from the device."""
    member, fetches = member_of(config_of("paper", target_l0=9.0)), []
    train(member, 0, 3)
    for name in ("tolist", "item", "__float__", "__bool__", "__int__", "cpu"):
        fetch = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda *a, name=name, fetch=fetch: fetches.append(name) or fetch(*a))
    member.metrics()
    assert fetches == ["tolist"]


def test_never_fired_latents_are_dead() -> None:
    """Latents that never fired are dead and the rows counted are said."""
    member = member_of(config_of("paper", layernorm="none", dead_after_rows=100))
    member.weights["b_enc"][:16] = -10.0
    member.step(batch_for(member, 0))
    assert member.dead_rows == ROWS
    assert dead_share(member.rows_since_fired, ROWS) >= 0.25
    assert (member.rows_since_fired[:16] == ROWS).all()
    train(member, 1, 5)
    assert member.dead_rows == 100


def test_infinite_loss_is_seen() -> None:
    """A loss that is not finite is seen."""
    member = member_of(config_of("paper"))
    train(member, 0, 2)
    assert member.was_finite(member.counters())
    member.weights["b_dec"][0] = float("nan")
    train(member, 2, 3)
    assert not member.was_finite(member.counters())


@pytest.mark.slow
def test_controller_reaches_wanted_l0() -> None:
    """The controller brings L0 to the wanted number."""
    config = config_of("paper", layernorm="none", steps=1500, lr_decay_steps=0, target_l0=6.0, lr=2e-3)
    member = member_of(config)
    train(member, 0, 1400)
    member.metrics()
    train(member, 1400, 1500)
    assert member.metrics()["l0"] == pytest.approx(6.0, rel=0.1)


def test_rows_centre_scale_in_float32() -> None:
    """Rows are centred and scaled in float32 before any cast."""
    raw = (1000 + torch.randn(32, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    center = raw.float().mean(0)
    batch = normalise_batch(raw, center, 0.5)
    torch.testing.assert_close(batch.x, (raw.float() - center) * 0.5, rtol=0, atol=0)
    torch.testing.assert_close(batch.norm, batch.x.norm(dim=1))
    torch.testing.assert_close(batch.total, batch.x.double().sum(0), rtol=1e-4, atol=1e-4)


def test_batch_buffers_are_reusable() -> None:
    """A batch can be written again into its own buffers."""
    member = member_of(config_of("paper"))
    first = batch_for(member, 0)
    address = first.x.data_ptr()
    again = normalise_batch(raw_rows(1), member.center, member.scale, out=first)
    fresh = batch_for(member, 1)
    assert again.x.data_ptr() == address
    for name in ("x", "norm", "total", "square"):
        assert torch.equal(getattr(again, name), getattr(fresh, name))


def test_state_of_another_shape_is_refused() -> None:
    """A state of another shape is refused."""
    state = member_of(config_of("paper")).state()
    with pytest.raises(CheckpointError, match="W_enc"):
        member_of(config_of("paper", width=32)).load_state(state)
    with pytest.raises(CheckpointError, match="log_threshold"):
        member_of(config_of("jumprelu")).load_state(state)


@pytest.mark.parametrize("recipe", ["paper", "jumprelu"])
def test_warm_start_computes_its_source(recipe: str) -> None:
    """A warm start computes what its source did in another space."""
    config = config_of(recipe, layernorm="none", **({} if recipe == "paper" else RECIPE_CHANGES[recipe]))
    source = member_of(config)
    train(source, 0, 10)
    target = Member(config, D_MODEL, torch.full((D_MODEL,), 0.25), 1.1, CPU, Scratch(CPU))
    target.load_weights(source.sae())
    x = raw_rows(20)
    with torch.no_grad():
        torch.testing.assert_close(target.sae()(x), source.sae()(x), rtol=1e-4, atol=1e-5)


def test_layernorm_warm_start_keeps_scale() -> None:
    """A warm start with LayerNorm keeps another scale and refuses another centre."""
    config = config_of("paper")
    source = member_of(config)
    train(source, 0, 10)
    target = Member(config, D_MODEL, source.center, 1.1, CPU, Scratch(CPU))
    target.load_weights(source.sae())
    with torch.no_grad():
        torch.testing.assert_close(target.sae()(raw_rows(20)), source.sae()(raw_rows(20)), rtol=1e-4, atol=1e-4)
    elsewhere = Member(config, D_MODEL, source.center + 1, 1.7, CPU, Scratch(CPU))
    with pytest.raises(CheckpointError, match="centre"):
        elsewhere.load_weights(source.sae())


def test_warm_start_of_other_width_refused() -> None:
    """A warm start from another width is refused."""
    sae = NestedSAE(config_of("paper", width=32).sae_config(D_MODEL))
    with pytest.raises(CheckpointError, match="width 32"):
        member_of(config_of("paper")).load_weights(sae)


@pytest.mark.parametrize("recipe", RECIPES)
def test_member_fits_announced_memory(recipe: str) -> None:
    """A member needs no more memory than announced."""
    config = config_of(recipe, dtype="bf16", width=2048, batch_size=1024, **RECIPE_CHANGES[recipe])
    member = member_of(config, d_model=64)
    member.n_rows = 10**6
    member.rows_since_fired.fill_(10**6)
    member.step(normalise_batch(raw_rows(0, 1024, 64), member.center, member.scale))
    parts = memory_bytes(config, 64, CPU)
    shared = sum(parts[name] for name in SHARED_PARTS)
    assert 0.5 * shared < member.scratch.n_bytes() <= shared
    held = member.state() | {f"low.{name}": low for name, low in member.adam.low.items()}
    own = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    assert own <= sum(parts.values()) - shared < 1.2 * own


def test_scratch_grows_and_is_reused() -> None:
    """Scratch grows and hands out the same memory."""
    scratch = Scratch(CPU)
    small = scratch.take("a", (2, 3), torch.float32)
    large = scratch.take("a", (10, 3), torch.float32)
    assert scratch.take("a", (2, 3), torch.float32).data_ptr() == large.data_ptr() != small.data_ptr()
    assert scratch.take("b", (2, 3), torch.float32).data_ptr() != large.data_ptr()
    assert scratch.n_bytes() == 30 * 4 + 6 * 4


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n_rows=st.integers(1, 3000), width=st.integers(1, 10**6))
def test_row_chunks_cover_rows_once(n_rows: int, width: int) -> None:
    """Row chunks cover every row once in order."""
    rows = [r for chunk in row_chunks(n_rows, width, CPU) for r in range(chunk.start, chunk.stop)]
    assert rows == list(range(n_rows))


def test_unresolved_dtype_is_our_mistake() -> None:
    """An unresolved dtype is our own mistake."""
    with pytest.raises(ValueError, match="resolve_dtype"):
        product_dtype("auto")


def test_batch_of_zeros_is_harmless() -> None:
    """A batch of zeros does no harm."""
    for recipe in RECIPES:
        member = member_of(config_of(recipe, **RECIPE_CHANGES[recipe]))
        zeros = torch.zeros(ROWS, D_MODEL)
        member.step(normalise_batch(zeros, zeros[0], 1.0))
        assert member.was_finite(member.counters())
        assert all(torch.isfinite(weight).all() for weight in member.weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["paper", "batchtopk"])
def test_bf16_products_train_as_float32_ones(recipe: str) -> None:
    """Bf16 products train as float32 ones."""
    evs = []
    for dtype in ("bf16", "float32"):
        changes = {"layernorm": "none"} if recipe == "paper" else {"k": 8}
        config = config_of(recipe, dtype=dtype, width=256, steps=600, lr=1e-3, **changes)
        member = member_of(config, d_model=64)
        for step in range(600):
            member.step(normalise_batch(raw_rows(step, 512, 64), member.center, member.scale))
            if step == 549:
                member.metrics()
        evs.append(member.metrics()["ev"])
    assert evs[0] == pytest.approx(evs[1], abs=0.004)
    assert evs[1][-1] > 0.5


def test_idle_fields_change_nothing() -> None:
    """Fields that do not shape the arithmetic do not change it."""
    config = config_of("paper")
    a, b = member_of(config), member_of(dataclasses.replace(config, checkpoint_every=7, log_every=3))
    train(a, 0, 5)
    train(b, 0, 5)
    assert_same_state(a, b)


def test_paper_is_the_default_recipe() -> None:
    """Paper is the default recipe."""
    assert TrainConfig() == paper()


def train_one_of_two(rank: int, folder: str) -> None:
    """A process of two that steps every recipe on its half of each batch; the first saves the states."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    with process_group("gloo", store=store, rank=rank, world_size=2) as group:
        for recipe in RECIPES:
            config = config_of(recipe, dtype="float64", **RECIPE_CHANGES[recipe])
            scratch, center = Scratch(CPU), torch.full((D_MODEL,), 0.3, dtype=torch.float64)
            member = Member(config, D_MODEL, center, 1.7, CPU, scratch, group)
            for step in range(8):
                half = raw_rows(step)[rank * ROWS // 2 : (rank + 1) * ROWS // 2]
                member.step(normalise_batch(half, member.center, member.scale))
            save_file(member.state(), f"{folder}/{recipe}{rank}.safetensors")
        torch.distributed.barrier()  # as `parallel.join` does


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Two processes train as one does on the global batch, and have one another's bits."""
    torch.multiprocessing.spawn(train_one_of_two, args=(str(tmp_path),), nprocs=2)
    for recipe in RECIPES:
        alone = member_of(config_of(recipe, dtype="float64", **RECIPE_CHANGES[recipe]))
        train(alone, 0, 8)
        together, other = (load_file(tmp_path / f"{recipe}{rank}.safetensors") for rank in range(2))
        for name, tensor in alone.state().items():
            assert torch.equal(together[name], other[name]), name
            torch.testing.assert_close(together[name], tensor, rtol=1e-6, atol=1e-8)


END_OF_A_GROUP = """
import atexit, pathlib, sys
import torch
from pipeline.base.runtime import process_group

def gloo() -> int:
    return sum("gloo" in path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm"))

atexit.register(lambda: print(gloo()))  # the last to be called
with process_group("gloo", store=torch.distributed.FileStore(sys.argv[1], 1), rank=0, world_size=1) as group:
    cycle = [group]
    cycle.append(cycle)
    group.allreduce([torch.zeros(3)]).wait()
del cycle, group
print(gloo())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads' names are read from /proc")
def test_group_threads_end_first(tmp_path: Path) -> None:
    """Gloo's threads, which a cycle kept after the group's end, are gone before the interpreter is."""
    words = [sys.executable, "-c", END_OF_A_GROUP, str(tmp_path / "store")]
    told = subprocess.run(
        words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    ).stdout.split()
    assert int(told[0]) > 0
    assert told[1] == "0"


GRADIENTS = {"W_dec": (WIDTH, D_MODEL), "W_enc": (D_MODEL, WIDTH), "dz": (ROWS, WIDTH)}


class Sent:
    """A sum over two processes that have equal rows, which is done when it is waited for and not before."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.then = tensor, tensor.clone()

    def wait(self) -> None:
        assert torch.equal(self.tensor, self.then), "changed on its way"
        self.tensor.mul_(2)


def sums_of_two(monkeypatch: pytest.MonkeyPatch, events: list[Any]) -> Any:
    """A group that stands for two processes with equal rows; sums and products are noted, in their order."""
    group, mm = torch.distributed.ProcessGroup(0, 2), torch.mm

    def all_reduce(tensor: Tensor, *, group: Any, async_op: bool = False) -> Sent | None:
        if not async_op:
            tensor.mul_(2)
            return None
        events.append(("sum", tensor.data_ptr(), tensor.nbytes))
        return Sent(tensor)

    def noted(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        events.append(("product", out.data_ptr(), out.nbytes))
        return mm(a, b, out=out)

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)

    def all_gather(parts: list[Tensor], own: Tensor, *, group: Any) -> None:
        for part in parts:
            part.copy_(own)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    monkeypatch.setattr(torch, "mm", noted)
    monkeypatch.setattr("train.step.reduce.BUCKET_BYTES", 1000)
    return group


def test_gradients_overlap_with_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's gradient is on its way before that of latents is computed, the encoder's goes bucket by bucket behind each
    product; every number is summed once, untouched meanwhile, and two processes of equal rows do what one does."""
    config = config_of("paper", dtype="float64", **RECIPE_CHANGES["paper"] | {"target_l0": 0.0})
    alone = member_of(config)
    train(alone, 0, 3)
    events: list[Any] = []
    with monkeypatch.context() as patch:
        group = sums_of_two(patch, events)
        member = Member(config, D_MODEL, alone.center, alone.scale, CPU, Scratch(CPU), group)
        for step in range(3):
            events.clear()
            member.step(normalise_batch(raw_rows(step), member.center, member.scale))
    for name, weight in alone.weights.items():
        torch.testing.assert_close(member.weights[name], weight, rtol=1e-12, atol=1e-12)
    taken = {name: member._take(name, *shape) for name, shape in GRADIENTS.items()}
    spans = {name: (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for name, tensor in taken.items()}
    where = {
        (kind, name): [
            i for i, (what, at, _) in enumerate(events) if what == kind and spans[name][0] <= at < spans[name][1]
        ]
        for kind in ("sum", "product")
        for name in GRADIENTS
    }
    assert len(where["sum", "W_dec"]) > 3
    assert max(where["product", "W_dec"]) < where["sum", "W_dec"][0]
    assert where["sum", "W_dec"][-1] < min(where["product", "dz"])
    assert where["sum", "W_enc"] == [i + 1 for i in where["product", "W_enc"]]
    assert len(where["sum", "W_enc"]) > 3
    for name in ("W_enc", "W_dec"):
        assert sum(events[i][2] for i in where["sum", name]) == taken[name].nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", RECIPES)
def test_cuda_trains_as_cpu(recipe: str) -> None:
    """A CUDA device trains as the CPU does."""
    config = config_of(recipe, dtype="float64", **RECIPE_CHANGES[recipe])
    cuda, cpu = torch.device("cuda"), member_of(config)
    member = Member(config, D_MODEL, cpu.center.to(cuda), cpu.scale, cuda, Scratch(cuda))
    train(cpu, 0, 8)
    for step in range(8):
        member.step(normalise_batch(raw_rows(step).to(cuda), member.center, member.scale))
    for name, tensor in cpu.state().items():
        torch.testing.assert_close(member.state()[name].cpu(), tensor, rtol=1e-6, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", RECIPES)
def test_cuda_step_fetches_nothing(recipe: str) -> None:
    """A step on a CUDA device fetches nothing from it."""
    config = config_of(recipe, dtype="bf16", **RECIPE_CHANGES[recipe])
    cuda = torch.device("cuda")
    center = torch.full((D_MODEL,), 0.3, device=cuda)
    member = Member(config, D_MODEL, center, 1.7, cuda, Scratch(cuda))
    batch = normalise_batch(raw_rows(0).to(cuda), center, 1.7)
    for _ in range(5):
        member.step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        member.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recipe", RECIPES)
def test_snapshot_is_of_its_moment(recipe: str) -> None:
    """A snapshot, and the SAE that is made of it later, are those of the moment when it was taken."""
    member = member_of(config_of(recipe, **RECIPE_CHANGES[recipe]))
    train(member, 0, 5)
    snapshot, make_sae = Snapshot(member.state()), member.sae_of_state()
    state, sae = {name: tensor.clone() for name, tensor in member.state().items()}, member.sae()
    train(member, 5, 9)
    assert snapshot.n_bytes == sum(tensor.nbytes for tensor in state.values())
    for name, tensor in snapshot.tensors().items():
        assert torch.equal(tensor, state[name]), name
    for name, tensor in make_sae(snapshot.tensors()).state_dict().items():
        assert torch.equal(tensor, sae.state_dict()[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_snapshot_is_of_its_moment() -> None:
    """On CUDA a snapshot is copied while later steps change the weights, which it does not see."""
    cuda = torch.device("cuda")
    tensors = {"a": torch.zeros(1 << 24, device=cuda), "n": torch.tensor(7)}
    for turn in range(4):
        tensors["a"].fill_(turn)
        snapshot = Snapshot(tensors)
        tensors["a"].fill_(-1)
        found = snapshot.tensors()
        assert bool((found["a"] == turn).all())
        assert int(found["n"]) == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_cuda_graph_is_the_step(recipe: str, fused: bool) -> None:
    """Recorded steps on a CUDA device, plain and fused, end with the bits of steps that are not."""
    config = config_of(recipe, dtype="bf16", **RECIPE_CHANGES[recipe] | {"level_weighting": "equal"})
    cuda = torch.device("cuda", torch.cuda.current_device())
    center = torch.full((D_MODEL,), 0.3, device=cuda)
    kind = member_kind(config, cuda) if fused else Member
    plain = kind(config, D_MODEL, center, 1.7, cuda, Scratch(cuda))
    recorded = kind(config, D_MODEL, center, 1.7, cuda, Scratch(cuda), None, cuda_capture(cuda))
    batch = None
    for step in range(12):
        batch = normalise_batch(raw_rows(step).to(cuda), center, 1.7, out=batch)
        plain.step(batch)
        recorded.step(batch)
    assert recorded.recorded.is_trusted
    assert_same_state(plain, recorded)

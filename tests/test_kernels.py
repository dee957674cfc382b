"""The fused step: its kernels, in Triton's interpreter or on a GPU, against the plain step in float64, every recipe and form."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.interpreter import DEVICE, put_right

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from pipeline.base.runtime import has_triton, process_group
from pipeline.sae.checkpoint import load_checkpoint
from support.moved import count_step
from test_graphs import Tape
from test_step import sums_of_two
from train.config import RECIPES, TrainConfig, batchtopk, topk
from train.feed.resident import place_for
from train.plan import RunConfig, make_order
from train.run import run
from train.step import traffic
from train.step.fused import auxiliary, latents, thresholds
from train.step.fused.batch import FusedBatches
from train.step.fused.choice import fuses, make_normalise, member_kind, say_plain
from train.step.fused.context import Step
from train.step.fused.step import FusedMember, forward
from train.step.member import Batch, Member, normalise_batch
from train.step.objectives import auxiliary_pool
from train.step.scratch import Scratch
from train.step.traffic import Launch
from train.trainee import Trainee

pytestmark = [pytest.mark.triton, pytest.mark.gpu] if DEVICE.type == "cuda" else pytest.mark.triton
CPU = torch.device("cpu")
D_MODEL, WIDTH, ROWS = 12, 40, 24
LEVELS: dict[int, dict[str, Any]] = {
    1: {"alpha": 0.0},
    2: {"alpha": 0.2},
    5: {"levels": (0.1, 0.2, 0.375, 0.5, 1.0)},
}
AUXILIARY: dict[str, Any] = {"k": 5, "aux_k": 6, "dead_after_rows": 100}
RECIPE_FORMS: dict[str, dict[str, Any]] = {
    "paper": {"recipe": "paper", "lambda_shared": 0.03, "lambda_specialised": 0.05},
    "batchtopk": {"recipe": "batchtopk", **AUXILIARY},
    "topk": {"recipe": "topk", **AUXILIARY},
    "jumprelu": {"recipe": "jumprelu", "bandwidth": 1.0, "lambda_shared": 0.02, "dead_after_rows": 100},
}
OTHER_FORMS: dict[str, dict[str, Any]] = {
    "no LayerNorm": {"recipe": "paper", "layernorm": "none", "lambda_shared": 0.01, "clip_norm": 0.05},
    "LayerNorm after": {"recipe": "paper", "layernorm": "post", "normalize_gradients": True},
    "scale not restored": {"recipe": "paper", "layernorm_rescale": False, "clip_norm": 0.0},
    "additive": {"recipe": "paper", "objective": "additive", "target_l0": 9.0},
    "levels by size": {"recipe": "paper", "level_weighting": "size", "alpha": "auto"},
    "random prefixes": {"recipe": "paper", "level_weighting": "random", "alpha": 0.2},
    "batchtopk, LayerNorm": {"recipe": "batchtopk", **AUXILIARY, "layernorm": "pre"},
    "jumprelu, L1, LayerNorm": {"recipe": "jumprelu", "penalty": "l1", "layernorm": "pre"},
}


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    """The interpreter put right, one program along the rows of these small batches where there would be six (those of odd sizes
    have several), and one thread: steps this small only wait for a second."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            put_right(patch)
            patch.setattr("train.step.fused.tiles.TALL", 32)
        yield
    torch.set_num_threads(n_threads)


def config_of(dtype: str = "float32", **changes: Any) -> TrainConfig:
    """A recipe at the size of these tests."""
    fixed = {"width": WIDTH, "batch_size": ROWS, "steps": 20, "lr": 3e-3, "lr_warmup_steps": 0, "lr_decay_steps": 8}
    changes = fixed | {"sparsity_warmup_steps": 0, "dtype": dtype, "eps": 1e-5} | changes
    return RECIPES[changes.pop("recipe", "paper")](**changes)


def make(
    kind: type[Member], config: TrainConfig, d_model: int = D_MODEL, device: torch.device = CPU, sparse: bool = False
) -> Member:
    """A member whose weights are all away from their first zeros and ones, the same in every kind and dtype."""
    wide = torch.float64 if config.dtype == "float64" else torch.float32
    center = torch.full((d_model,), 0.1, dtype=wide, device=device)
    member = kind(config, d_model, center, 1.3, device, Scratch(device), is_sparse=sparse)
    generator = torch.Generator().manual_seed(1)
    member.before_first.clear()
    if "log_threshold" in member.weights:
        member.weights["log_threshold"].fill_(math.log(0.1))
    for name in sorted(member.weights):
        if name != "W_dec":
            noise = torch.randn(member.weights[name].shape, generator=generator)
            member.weights[name].add_(0.1 * noise.to(device))
    member.adam.refresh_low()
    return member


def fused(config: TrainConfig, d_model: int = D_MODEL, sparse: bool = False) -> FusedMember:
    member = make(FusedMember, config, d_model, DEVICE, sparse)
    assert isinstance(member, FusedMember)
    return member


def raw_rows(step: int = 0, n: int = ROWS, d_model: int = D_MODEL) -> Tensor:
    """Rows of very different norms."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n, d_model, generator=generator) / d_model**0.5
    return x * (0.5 + torch.rand(n, 1, generator=generator)) + 0.1


def batch_of(member: Member, raw: Tensor) -> Batch:
    return normalise_batch(raw.to(member.device), member.center, member.scale)


def let_latents_die(member: Member) -> None:
    """Fewer dead latents than 2 · aux_k, more than aux_k; those of thresholds, behind ones that no row comes near."""
    member.n_rows = 200
    if "log_threshold" in member.weights:
        member.weights["log_threshold"][3:14] = 2.0
    member.rows_since_fired[3:14] = torch.arange(101, 112, device=member.device)


def assert_close(found: Member, expected: Member, tolerance: float = 3e-5) -> None:
    """Everything that a resumed training would read, as a part of the largest number of each tensor."""
    theirs = found.state()
    for name, tensor in expected.state().items():
        size = max(float(tensor.double().abs().max()), 1e-9)
        off = float((theirs[name].cpu().double() - tensor.double()).abs().max())
        assert off <= tolerance * size, f"{name} is off by {off / size:.1e} of its largest"


def step_both(
    form: dict[str, Any], n_steps: int = 2, *, n: int = ROWS, d_model: int = D_MODEL, sparse: bool = False
) -> None:
    """The fused step in float32 and the plain one in float64 from the same weights on the same rows, compared."""
    ours = fused(config_of(**form), d_model, sparse)
    plain = make(Member, config_of(**form | {"dtype": "float64"}), d_model)
    for step in range(n_steps):
        raw = raw_rows(step, n, d_model)
        for member in (ours, plain):
            if step == 1 and (member.config.aux_k or member.config.threshold_pull):
                let_latents_die(member)
            member.step(batch_of(member, raw))
    assert_close(ours, plain)
    said, expected = ours.metrics(), plain.metrics()
    assert {name: pytest.approx(value, rel=2e-4, abs=1e-7) for name, value in expected.items()} == said
    assert said["aux"] > 0 or not ours.config.aux_k


@pytest.mark.parametrize("n_levels", LEVELS)
@pytest.mark.parametrize("recipe", RECIPE_FORMS)
def test_recipe_equals_float64_step(recipe: str, n_levels: int) -> None:
    """A fused step is the plain one: weights, moments, counters, metrics; every recipe and number of levels."""
    step_both(RECIPE_FORMS[recipe] | LEVELS[n_levels])


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_form_equals_float64_step(form: str) -> None:
    """LayerNorm's forms, objectives, penalties, prefixes, clipping, controllers: a fused step is the plain one."""
    step_both(OTHER_FORMS[form])


@pytest.mark.parametrize("n_levels", LEVELS)
@pytest.mark.parametrize("recipe", ["topk", "batchtopk"])
def test_sparse_step_equals_float64_step(recipe: str, n_levels: int) -> None:
    """A fused step with products over active latents alone is the plain dense one."""
    step_both(RECIPE_FORMS[recipe] | LEVELS[n_levels], sparse=True)


def test_sparse_member_warms_up_densely() -> None:
    """While k falls a sparse member's fused products are dense, its encoder by latents all the same, and then sparse."""
    step_both(RECIPE_FORMS["batchtopk"] | {"sparsity_warmup_steps": 1, "alpha": 0.2}, sparse=True)


@pytest.mark.parametrize("recipe", ["topk", "batchtopk"])
def test_sparse_odd_sizes_over_programs(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged ends, several programs along each side, latents that are active on all rows, rows with more entries than a tile."""
    monkeypatch.setattr("train.step.fused.tiles.ROWS", 16)
    monkeypatch.setattr("train.step.fused.sparse.DIMS", 32)
    monkeypatch.setattr("train.step.fused.sparse.PART", 32)
    form = RECIPE_FORMS[recipe] | {"width": 70, "batch_size": 37, "levels": (0.3, 1.0), "alpha": None, "k": 20}
    step_both(form, 2, n=37, d_model=69, sparse=True)


@pytest.mark.parametrize("what", ["nothing active", "all equal"])
def test_sparse_lists_never_overflow(what: str) -> None:
    """Rows on which nothing is active, and ties without end, where every latent is: still the plain dense step."""
    form = RECIPE_FORMS["batchtopk"] | {"aux_k": 0, "alpha": 0.2}
    ours, plain = fused(config_of(**form), sparse=True), make(Member, config_of(**form | {"dtype": "float64"}))
    for member in (ours, plain):
        member.weights["W_enc"].zero_()
        member.weights["b_enc"].fill_(-1.0 if what == "nothing active" else 0.01)
        member.adam.refresh_low()
        member.step(batch_of(member, raw_rows()))
    assert_close(ours, plain)
    assert ours.metrics()["l0"] == (0 if what == "nothing active" else WIDTH)


@pytest.mark.parametrize(("recipe", "n", "n_steps"), [("batchtopk", 69, 2), ("paper", 69, 1), ("topk", 13, 1)])
def test_odd_sizes_over_several_programs(recipe: str, n: int, n_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged ends of rows, latents and dimensions, more than one program along each."""
    monkeypatch.setattr("train.step.fused.tiles.TALL", 4)
    monkeypatch.setattr("train.step.fused.tiles.ROWS", 32)
    form = RECIPE_FORMS[recipe] | {"width": 149, "batch_size": n, "levels": (0.3, 1.0), "alpha": None}
    step_both(form | ({"aux_k": 0} if recipe == "topk" else {}), n_steps, n=n, d_model=133)


@pytest.mark.parametrize("recipe", ["batchtopk", "topk", "paper", "jumprelu"])
def test_bf16_latents_are_bit_equal(recipe: str) -> None:
    """In bf16, where values are equal by the dozen, a fused forward without LayerNorm has the very latents of the plain one."""
    form = RECIPE_FORMS[recipe] | {"layernorm": "none", "aux_k": 0}
    ours, plain = fused(config_of("bf16", **form)), make(Member, config_of("bf16", **form), device=DEVICE)
    for seed in range(3):
        batch = batch_of(plain, raw_rows(seed))
        expected = plain._forward(batch)
        step = Step(ours, ours.kept, batch)
        forward(step)
        assert torch.equal(step.z, plain.latents.z)
        assert torch.equal(step.counts.sum(0), expected.fired.counts)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("recipe", ["batchtopk", "topk"])
def test_ties_are_kept(recipe: str, dtype: str) -> None:
    """All latents equal to the last that is kept stay."""
    ours = fused(config_of(dtype, recipe=recipe, k=3, aux_k=0))
    step = Step(ours, ours.kept, batch_of(ours, raw_rows()))
    ours.weights["b_enc"].zero_()
    forward(step)
    values = torch.tensor([4.0, 3.0, 2.0, 2.0, 2.0, 1.0] + [-1.0] * (WIDTH - 6))
    step.a = values.expand(ROWS, WIDTH).to(DEVICE, step.a.dtype).contiguous()
    latents.select(step)
    assert step.z[:, :6].tolist() == [[4.0, 3.0, 2.0, 2.0, 2.0, 0.0]] * ROWS
    assert not step.z[:, 6:].any()


@pytest.mark.parametrize(("dtype", "layernorm"), [("float32", "none"), ("bf16", "none"), ("float32", "pre")])
@pytest.mark.parametrize("guess", [0.0, 0.5, 0.97, 1.0, 1.01, 1e9])
def test_any_guess_selects_the_same(guess: float, dtype: str, layernorm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guess, a multiple of the threshold here, changes neither threshold nor latents, counts and sums: 0, too low, the very
    value, a little and far too high; afterwards it is a little below what was found. Several programs along each side."""
    monkeypatch.setattr("train.step.fused.tiles.ROWS", 16)
    ours = fused(config_of(dtype, recipe="batchtopk", k=5, aux_k=0, width=149, layernorm=layernorm))
    step = Step(ours, ours.kept, batch_of(ours, raw_rows()))
    forward(step)
    found = [tensor.clone() for tensor in (step.z, step.counts, step.sizes)]
    threshold = float(ours.kept.search[1])
    assert threshold > 0
    if layernorm == "none":
        before = (step.x_low @ ours.adam.low["W_enc"]).float() + ours.weights["b_enc"]
        before = before.to(step.z.dtype).relu()
        assert threshold == float(before.flatten().topk(5 * ROWS).values.amin())
        assert torch.equal(step.z, torch.where(before < threshold, 0.0, before))
    assert int((step.z != 0).sum()) >= 5 * ROWS
    assert torch.equal(step.counts.sum(0), (step.z != 0).sum(0))
    sums = [part.double().sum() for part in (step.z[:, : ours.shape.n_shared], step.z[:, ours.shape.n_shared :])]
    torch.testing.assert_close(step.sizes.double().sum((1, 2)), torch.stack(sums), rtol=1e-6, atol=0)
    ours.kept.search[0] = guess * threshold
    ours.kept.search[1:] = -1
    step = Step(ours, ours.kept, step.batch)
    forward(step)
    assert float(ours.kept.search[1]) == threshold
    assert float(ours.kept.search[0]) == pytest.approx(0.97 * threshold, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(found, (step.z, step.counts, step.sizes)))
    assert not any(bins.any() for bins in ours.kept.bins)  # empty again for the next step


@pytest.mark.parametrize(("dtype", "layernorm"), [("bf16", "none"), ("float32", "none"), ("float32", "pre")])
def test_calibrated_threshold_is_the_plain_one(dtype: str, layernorm: str) -> None:
    """batchtopk's threshold of inference is found in passes over the rows held, and is what the search of all says."""
    ours = fused(config_of(dtype, **RECIPE_FORMS["batchtopk"] | {"layernorm": layernorm}))
    for step in range(3):
        ours.step(batch_of(ours, raw_rows(step)))
    search = ours.kept.search.clone()
    ours._calibrate()
    found = float(ours.threshold)
    assert torch.equal(ours.kept.search, search)  # the next step guesses as it would have
    assert not any(bins.any() for bins in ours.kept.bins)
    Member._calibrate(ours)
    assert found == pytest.approx(float(ours.threshold), rel=0 if layernorm == "none" else 1e-5)
    assert found > 0


def test_checkpoint_fetches_nothing() -> None:
    """Neither a fused step nor what a checkpoint asks of a member waits for the device: on tensors without values that would be
    an error."""
    meta, config = torch.device("meta"), config_of("bf16", **RECIPE_FORMS["batchtopk"])
    member = FusedMember(config, D_MODEL, torch.zeros(D_MODEL, device=meta), 1.0, meta, Scratch(meta))
    member.step(normalise_batch(torch.zeros(ROWS, D_MODEL, device=meta), member.center, 1.0))
    member.sae_of_state()
    Member._calibrate(member)


@pytest.mark.parametrize("recipe", RECIPE_FORMS)
def test_rows_of_zeros_are_harmless(recipe: str) -> None:
    """Rows that are all 0 after centring, and latents of which fewer are positive than are to be kept."""
    form = RECIPE_FORMS[recipe] | {"aux_k": 0}
    ours = fused(config_of(**form))
    plain = make(Member, config_of(**form | {"dtype": "float64"}))
    for member in (ours, plain):
        member.weights["b_enc"].fill_(-0.2)
        member.weights["b_dec"].zero_()
        raw = torch.where(torch.arange(ROWS)[:, None] < 3, raw_rows(), torch.full((ROWS, D_MODEL), 0.1))
        member.step(batch_of(member, raw.to(member.center.dtype)))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in ours.state().values())
    assert_close(ours, plain)


@pytest.mark.parametrize("n_dead", [0, 1, 7, 12, 13, 30])
def test_pool_is_that_of_the_objectives(n_dead: int) -> None:
    """The dead that have gone longest without firing, the first of equals."""
    ours = fused(config_of(**RECIPE_FORMS["batchtopk"]))
    ages = torch.randint(0, 99, (WIDTH,), generator=torch.Generator().manual_seed(n_dead))
    ages[torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))[:n_dead]] = 100
    ages[ages == 100] += torch.randint(0, 4, (n_dead,), generator=torch.Generator().manual_seed(2))
    ours.rows_since_fired.copy_(ages)
    ours.n_rows = 200
    step = Step(ours, ours.kept, batch_of(ours, raw_rows()))
    auxiliary.find_pool(step)
    expected = auxiliary_pool(ours.config, ages)
    wanted = [] if expected is None else sorted(expected.tolist())
    assert int(step.n_dead) == len(wanted)
    assert step.pool[: len(wanted)].tolist() == wanted
    slots = {latent: slot for slot, latent in enumerate(wanted)}
    assert step.slots.tolist() == [slots.get(latent, -1) for latent in range(WIDTH)]


def test_no_dead_latent_costs_nothing() -> None:
    """While no latent is dead the auxiliary loss reads nothing: what lies in its buffers does not matter."""
    with_it, without = (fused(config_of(**RECIPE_FORMS["batchtopk"] | {"aux_k": aux_k})) for aux_k in (6, 0))
    for member in (with_it, without):
        member.n_rows = 200
        for name in ("pool_z", "pool_gradient", "slope", "remainder"):
            member._take(name, ROWS, max(D_MODEL, 12)).fill_(math.nan)
        member.step(batch_of(member, raw_rows()))
    assert int(with_it.scratch.take("n_dead", (1,), torch.int32)) == 0
    for name, tensor in without.state().items():
        assert torch.equal(tensor, with_it.state()[name]), name


@pytest.mark.parametrize("where", ["row", "encoder"])
@pytest.mark.parametrize("recipe", RECIPE_FORMS)
def test_divergence_is_seen(recipe: str, where: str) -> None:
    """A row or a weight that is not finite makes the loss so, whatever is selected."""
    ours = fused(config_of(**RECIPE_FORMS[recipe]))
    raw = raw_rows()
    if where == "row":
        raw[5, 3] = math.nan
    else:
        ours.weights["W_enc"][:, 3] = math.nan
        ours.adam.refresh_low()
    ours.step(batch_of(ours, raw))
    assert not ours.was_finite(ours.counters())


def test_resumed_fused_member_is_bit_equal() -> None:
    """A fused member goes on from its state bit for bit, whatever threshold it guesses first."""
    config = config_of("bf16", **RECIPE_FORMS["batchtopk"])
    whole, second = fused(config), fused(config)
    for step in range(2):
        whole.step(batch_of(whole, raw_rows(step)))
    second.load_state({name: tensor.clone() for name, tensor in whole.state().items()})
    for member in (whole, second):
        member.step(batch_of(member, raw_rows(2)))
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_batch_is_the_plain_one(dtype: torch.dtype) -> None:
    """Rows normalised in one pass: x bit for bit, sums within rounding, into the buffers given."""
    center = torch.linspace(-1, 1, 133, device=DEVICE)
    batches = FusedBatches(Scratch(DEVICE))
    out = None
    for seed in range(2):
        raw = raw_rows(seed, 37, 133).to(DEVICE, dtype)
        expected = normalise_batch(raw, center, 1.7)
        found = batches.normalise(raw, center, 1.7, out=out)
        assert out is None or found is out
        out = found
        assert torch.equal(found.x, expected.x)
        torch.testing.assert_close(found.norm, expected.norm)
        torch.testing.assert_close(found.total, expected.total, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.square, expected.square, rtol=1e-6, atol=0)


# ---- recorded, launched, moved ----


class LaunchTape(Tape):
    """A tape that notes launches of kernels too, and not what the interpreter does to run them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = sys._getframe()
        while frame is not None and not frame.f_code.co_filename.endswith("triton/runtime/interpreter.py"):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def note(self, launch: Launch) -> None:
        self.notes.append((replay_launch, (launch,), {}, None))

    def replay(self) -> None:
        for func, args, kwargs, out in self.notes:
            if func is replay_launch:
                func(*args)
                continue
            one = Tape()
            one.notes = [(func, args, kwargs, out)]
            one.replay()


def replay_launch(launch: Launch) -> None:
    launch.kernel[launch.grid](*launch.arguments, **launch.options)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a tape stands in for CUDA's graphs where there are none")
@pytest.mark.parametrize(
    ("recipe", "sparse"),
    [("batchtopk", False), ("batchtopk", True), pytest.param("paper", False, marks=pytest.mark.slow)],
)
def test_recorded_fused_step_is_bit_equal(recipe: str, sparse: bool) -> None:
    """A fused step replayed on other rows is the step: nothing of it is decided in Python."""
    config = config_of("bf16", **RECIPE_FORMS[recipe])
    plain, taped = fused(config, sparse=sparse), fused(config, sparse=sparse)
    batch = batch_of(plain, raw_rows())
    for member in (plain, taped):
        member.n_rows = 200
        member.step(batch)
    tape, state = LaunchTape(), {name: tensor.clone() for name, tensor in taped.state().items()}
    low = {name: tensor.clone() for name, tensor in taped.adam.low.items()}
    traffic.observers.append(tape.note)
    try:
        with tape:
            taped._step(batch)
    finally:
        traffic.observers.clear()
    for tensors, kept in ((taped.state(), state), (taped.adam.low, low)):
        for name, tensor in tensors.items():
            tensor.copy_(kept[name])
    taped.kept.search.copy_(plain.kept.search)
    for seed in (1, 2):
        normalise_batch(raw_rows(seed), plain.center, plain.scale, out=batch)
        let_latents_die(plain)
        let_latents_die(taped)
        plain._step(batch)
        tape.replay()
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            assert torch.equal(plain.weights[name], taped.weights[name]), name
        assert torch.equal(plain.sums.flat, taped.sums.flat)


class Touched:
    """Addresses that kernels read and wrote, a launch at a time, in the interpreter."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from triton.runtime import interpreter

        self.read: list[Any] = []
        self.written: list[Any] = []
        self.launches: list[tuple[Launch, int]] = []
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def create_masked_load(this: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self.read.append(self.bytes_of(ptrs, mask))
            return load(this, ptrs, mask, *rest)

        def create_masked_store(this: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.written.append(self.bytes_of(ptrs, mask))
            return store(this, ptrs, value, mask, *rest)

        patch.setattr(builder, "create_masked_load", create_masked_load)
        patch.setattr(builder, "create_masked_store", create_masked_store)

    @staticmethod
    def bytes_of(ptrs: Any, mask: Any) -> Any:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        first = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data.astype(bool)].astype(np.uint64)
        return (first[:, None] + np.arange(size, dtype=np.uint64)).reshape(-1)

    def run(self, launch: Launch) -> int:
        """Bytes that a launch reads and bytes that it writes, each address once."""
        self.read, self.written = [], []
        replay_launch(launch)
        return sum(len(np.unique(np.concatenate(parts))) for parts in (self.read, self.written) if parts)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="addresses are seen in the interpreter only")
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("batchtopk", "bf16"),
        ("batchtopk", "float32"),
        ("paper", "bf16"),
        *(pytest.param(name, "bf16", marks=pytest.mark.slow) for name in ("topk", "jumprelu")),
    ],
)
def test_launches_move_what_they_say(form: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch says of its bytes is what it touches: no less, and hardly more."""
    config = config_of(dtype, **RECIPE_FORMS[form] | LEVELS[2])
    member = fused(config)
    batches = FusedBatches(member.scratch)
    raw = raw_rows().bfloat16()
    batch = batches.normalise(raw, member.center, 1.3)
    member.n_rows = 200
    member.step(batch)
    touched, off = Touched(monkeypatch), {}

    def observe(launch: Launch) -> None:
        """Each launch here runs twice; twice is harmless but to the sums, which nobody reads."""
        found, said = touched.run(launch), launch.n_bytes - launch.gathered
        most = 2 * sum(t.numel() * t.element_size() for t in launch.touched.values()) if launch.gathered else 0
        if not said * 0.93 - 64 <= found <= said + most + 8:  # in batches this small any row may be read again
            off[launch.kernel.__name__] = (found, said)

    traffic.observers.append(observe)
    try:
        batches.normalise(raw, member.center, 1.3, out=batch)
        member.step(batch)
    finally:
        traffic.observers.clear()
    assert off == {}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="addresses are seen in the interpreter only")
@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_right_guess_reads_latents_once(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the guess leaves nothing to take out, latents are read by the pass that makes them and by no other; in float32 those
    of the threshold's bin again, in the rows that have any."""
    member = fused(config_of(dtype, **RECIPE_FORMS["batchtopk"]))
    batch = batch_of(member, raw_rows())
    forward(Step(member, member.kept, batch))
    member.kept.search[0] = member.kept.search[1] * 0.9999
    touched, moved, again = Touched(monkeypatch), list[int](), list[int]()

    def observe(launch: Launch) -> None:
        if launch.kernel is latents.settle_kernel:
            moved.append(touched.run(launch) - launch.n_bytes + launch.gathered)
        if launch.kernel is thresholds.histogram_kernel and launch.options["PASS"] == 2:
            bins = launch.touched["bins"].clone()
            again.append(touched.run(launch) - launch.n_bytes + launch.gathered)
            launch.touched["bins"].copy_(bins)

    traffic.observers.append(observe)
    step = Step(member, member.kept, batch)
    try:
        forward(step)
    finally:
        traffic.observers.clear()
    assert moved[0] <= 8
    if dtype == "float32":
        end = torch.tensor(((int(member.kept.search[1].view(torch.int32)) >> 16) + 1) << 16, dtype=torch.int32)
        rows = ((step.z > 0) & (step.z < end.view(torch.float32).to(DEVICE))).any(1)
        assert 0 < int(rows.sum()) < ROWS
        assert again[0] <= int(rows.sum()) * WIDTH * 4 + 64


@pytest.mark.skipif(DEVICE.type == "cuda", reason="addresses are seen in the interpreter only")
def test_sparse_launches_gather_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes at places that lists tell are what is read there, entry by entry: hardly more (lists and values come again with
    every block of dimensions), and no less."""
    member = fused(config_of("float32", **RECIPE_FORMS["topk"] | LEVELS[2] | {"k": 7}), d_model=64, sparse=True)
    batch = batch_of(member, raw_rows(d_model=64))
    member.step(batch)
    touched, off, seen = Touched(monkeypatch), {}, set[str]()

    def observe(launch: Launch) -> None:
        if not launch.gathered:
            return
        seen.add(launch.kernel.__name__)
        touched.run(launch)
        found = sum(len(part) for part in (*touched.read, *touched.written))
        if not launch.n_bytes * 0.97 <= found <= launch.n_bytes * 1.1 + 64:
            off[launch.kernel.__name__] = (found, launch.n_bytes)

    traffic.observers.append(observe)
    try:
        member.step(batch)
    finally:
        traffic.observers.clear()
    assert off == {}
    assert len(seen) == 5


def test_sparse_step_has_one_product() -> None:
    """A sparse step at width 65536 does no product over all latents but the encoder's, in no more than 40 launches."""
    config = topk(width=65536, alpha=0.2, dtype="bf16")
    dense, sparse = (count_step(config, 64, 2048, fused=True, sparse=sparse) for sparse in (False, True))
    assert sparse["products"].launches == 1 < dense["products"].launches
    assert sum(part.launches for part in sparse.values()) <= 40


def test_fused_step_moves_half() -> None:
    """batchtopk with two levels at d 2304, width 16384, 2048 rows: at most 3.8 GB and 40 launches."""
    config = batchtopk(width=16384, alpha=0.2, dtype="bf16")
    plain, ours = (count_step(config, 2304, 2048, fused=fused).values() for fused in (False, True))
    assert sum(part.n_bytes for part in ours) <= 3.8e9 < sum(part.n_bytes for part in plain) / 2
    assert sum(part.launches for part in ours) <= 40 < sum(part.launches for part in plain) / 3


def test_plain_step_where_triton_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Members step in fused passes on CUDA alone; without Triton plainly, which is said once."""
    cuda = torch.device("cuda")
    config = config_of("bf16")
    assert fuses(config, cuda)
    assert not fuses(config_of("float64"), cuda)
    assert not fuses(config, CPU)
    assert member_kind(config, cuda) is FusedMember
    assert member_kind(config, cuda, is_transcoder=True) is Member
    assert member_kind(config, CPU) is Member
    assert make_normalise(config, CPU, Scratch(CPU)) is normalise_batch
    monkeypatch.setattr("train.step.fused.choice.has_triton", lambda: False)
    say_plain.cache_clear()
    assert not any(fuses(config, cuda) for _ in range(3))
    assert capsys.readouterr().err.count("Triton is not installed") == 1


def test_old_triton_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.2, which torch 2.6 brings, takes no bundles of arguments: steps are plain there, and do not end in a traceback."""
    for version, expected in (
        ("3.2.0", False),
        ("2.3.1", False),
        ("3.3.0", True),
        ("3.10.1+git12ab", True),
        ("4.0", True),
    ):
        monkeypatch.setattr("triton.__version__", version)
        assert has_triton() is expected


def compile_for(*arguments: str) -> dict[str, dict[str, dict[str, int]]]:
    """What kernels take on GPUs that are not here."""
    script = Path(__file__).parent / "support" / "compile_kernels.py"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    table: dict[str, dict[str, dict[str, int]]] = json.loads(done.stdout)
    return table


def assert_no_spills(table: dict[str, dict[str, dict[str, int]]], n_kernels: int) -> None:
    for where, kernels in table.items():
        assert len(kernels) == n_kernels, where
        spilling = {name: taken for name, taken in kernels.items() if taken["spills"] or taken["shared"] > 96 * 1024}
        assert not spilling, where


def test_default_recipe_compiles_for_hopper() -> None:
    """The kernels of a batchtopk step compile for sm_90, and none spills."""
    table = compile_for("--target", "90", "--config", "batchtopk, 2 levels", "--shape", "2304x16384")
    assert len(table) == 1
    assert_no_spills(table, 22)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target() -> None:
    """All kernels of all recipes compile for sm_80, sm_90 and sm_100 at three sizes, and none spills."""
    table = compile_for()
    assert len(table) == 9
    assert_no_spills(table, 34)


def test_tests_see_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests run kernels, and not stand-ins: a broken one fails them."""
    from train.step.fused import backward, optimiser

    launched: list[Callable[..., Any]] = []
    traffic.observers.append(lambda launch: launched.append(launch.kernel))
    try:
        ours = fused(config_of("bf16", **RECIPE_FORMS["batchtopk"]))
        ours.step(batch_of(ours, raw_rows()))
    finally:
        traffic.observers.clear()
    assert backward.backward_kernel in launched
    assert optimiser.adam_rows_kernel in launched


# ---- a whole run ----


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on CUDA the real thing is fused anyway")
def test_fused_run_resumes_near_plain(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run as on CUDA, fused members beside each other on fused batches of rows on the device: stopped and resumed it ends with
    the same bits, and near where plain steps end."""
    fixed = {"steps": 3, "checkpoint_every": 2, "log_every": 2, "lr_decay_steps": 1, "eval_every": 0}
    members = tuple(config_of(recipe=recipe, k=k, **fixed) for recipe, k in (("batchtopk", 5), ("jumprelu", 0)))

    def outcomes(out: Path) -> list[dict[str, Tensor]]:
        done = run(RunConfig(tiny_store, out, members, device="cpu", threads=1, keep="last:9"))
        return [load_checkpoint(outcome.final)[0].state_dict() for outcome in done if outcome.final is not None]

    plain = outcomes(tmp_path / "plain")
    monkeypatch.setattr("train.step.fused.choice.fuses", lambda config, device: True)
    monkeypatch.setattr(
        "train.plan.place_on_device",
        lambda store, tasks, *_: place_for(store.train, make_order(store, tasks[0]), 1 << 40),
    )
    whole = outcomes(tmp_path / "whole")
    after_step = Trainee.after_step

    def stop_after_two(self: Trainee, clock: Any) -> None:
        after_step(self, clock)
        if self.member.n_steps == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainee, "after_step", stop_after_two)
        outcomes(tmp_path / "resumed")
    resumed = outcomes(tmp_path / "resumed")
    assert len(whole) == len(resumed) == len(plain) == 2
    for a, b, c in zip(whole, resumed, plain, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
        for name in a:
            torch.testing.assert_close(a[name], c[name], rtol=1e-3, atol=1e-4, msg=name)


# ---- two processes ----


@pytest.mark.parametrize(("recipe", "sparse"), [("batchtopk", False), ("batchtopk", True), ("paper", False)])
def test_fused_processes_of_equal_rows(recipe: str, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process beside another of equal rows, each summing gradients and histograms with it, steps as one alone: sums are done
    when they are waited for and not before."""
    config = config_of(**RECIPE_FORMS[recipe])
    alone = fused(config, sparse=sparse)
    alone.step(batch_of(alone, raw_rows()))
    group = sums_of_two(monkeypatch, [])
    scratch = Scratch(DEVICE)
    member = FusedMember(config, D_MODEL, alone.center, 1.3, DEVICE, scratch, group, is_sparse=sparse)
    member.load_state({name: tensor.clone() for name, tensor in fused(config).state().items()})
    member.step(batch_of(member, raw_rows()))
    for name, weight in alone.weights.items():
        torch.testing.assert_close(member.weights[name], weight, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_processes_find_what_guesses_miss(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess that is too high for processes that train together: the second histogram adds to what each has counted itself, not
    to what all have."""
    config = config_of(dtype, **RECIPE_FORMS["batchtopk"] | {"aux_k": 0})
    alone = fused(config)
    forward(Step(alone, alone.kept, batch_of(alone, raw_rows())))
    group = sums_of_two(monkeypatch, [])
    member = FusedMember(config, D_MODEL, alone.center, 1.3, DEVICE, Scratch(DEVICE), group)
    member.load_state({name: tensor.clone() for name, tensor in fused(config).state().items()})
    member.kept.search[0] = 1.2 * alone.kept.search[1]  # some are above it, too few
    forward(Step(member, member.kept, batch_of(member, raw_rows())))
    assert torch.equal(member.kept.search[:2], alone.kept.search[:2])
    assert not any(bins.any() for bins in member.kept.bins)


def train_half(rank: int, folder: str) -> None:
    """One of two processes, each on its half of every batch, in fused passes."""
    torch.set_num_threads(1)
    with (
        process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2) as group,
        pytest.MonkeyPatch.context() as patch,
    ):
        put_right(patch)
        for recipe in ("batchtopk", "paper"):
            config = config_of(**RECIPE_FORMS[recipe])
            center = torch.full((D_MODEL,), 0.1)
            member = FusedMember(config, D_MODEL, center, 1.3, CPU, Scratch(CPU), group)
            like = fused(config)
            member.load_state({name: tensor.clone() for name, tensor in like.state().items()})
            for step in range(2):
                if step == 1 and config.aux_k:
                    let_latents_die(member)
                half = raw_rows(step)[rank * ROWS // 2 : (rank + 1) * ROWS // 2]
                member.step(normalise_batch(half, center, 1.3))
            save_file({n: t.contiguous() for n, t in member.state().items()}, f"{folder}/{recipe}{rank}.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="two processes need two GPUs")
def test_two_fused_processes_train_as_one(tmp_path: Path) -> None:
    """Two processes in fused passes have one another's bits, and train as one does on whole batches: the threshold is that of
    both, found from the sum of their histograms."""
    torch.multiprocessing.spawn(train_half, args=(str(tmp_path),), nprocs=2)
    for recipe in ("batchtopk", "paper"):
        first, second = (load_file(tmp_path / f"{recipe}{rank}.safetensors") for rank in range(2))
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name
        alone = fused(config_of(**RECIPE_FORMS[recipe]))
        for step in range(2):
            if step == 1 and alone.config.aux_k:
                let_latents_die(alone)
            alone.step(batch_of(alone, raw_rows(step)))
        for name, tensor in alone.state().items():
            torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-6, msg=name)

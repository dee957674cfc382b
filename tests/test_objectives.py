"""The hand-written gradients against autograd of the formulas, in float64, for every recipe and number of levels."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.base.errors import UsageError
from support.reference import away_from_start, reference_latents, reference_objective
from train.config import RECIPES, TrainConfig, batchtopk
from train.step.member import Member, normalise_batch
from train.step.objectives import auxiliary_pool, random_prefixes, reconstruction_terms
from train.step.schedules import Controller, kept_a_row, sparsity_ramp
from train.step.scratch import Scratch
from train.step.selection import batch_threshold, nth_largest_over, row_thresholds

pytestmark = pytest.mark.usefixtures("one_thread")

D_MODEL, WIDTH, ROWS = 12, 40, 24
CPU = torch.device("cpu")
LEVELS: dict[int, dict[str, Any]] = {
    1: {"alpha": 0.0},
    2: {"alpha": 0.2},
    5: {"levels": (0.1, 0.2, 0.375, 0.5, 1.0)},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"recipe": "paper", "lambda_shared": 0.03, "lambda_specialised": 0.05},
    "paper, no LayerNorm": {"recipe": "paper", "layernorm": "none", "lambda_shared": 0.01},
    "paper, LayerNorm after": {"recipe": "paper", "layernorm": "post"},
    "paper, scale not restored": {"recipe": "paper", "layernorm_rescale": False},
    "paper, additive": {"recipe": "paper", "objective": "additive"},
    "paper, levels by size": {"recipe": "paper", "level_weighting": "size"},
    "paper, random prefixes": {"recipe": "paper", "level_weighting": "random"},
    "batchtopk": {"recipe": "batchtopk", "k": 5, "aux_k": 6, "dead_after_rows": 100},
    "batchtopk, LayerNorm": {"recipe": "batchtopk", "k": 5, "aux_k": 6, "dead_after_rows": 100, "layernorm": "pre"},
    "topk": {"recipe": "topk", "k": 5, "aux_k": 6, "dead_after_rows": 100},
    "topk, no auxiliary loss": {"recipe": "topk", "k": 5, "aux_k": 0},
    "jumprelu": {"recipe": "jumprelu", "bandwidth": 1.0, "lambda_shared": 0.02},
    "jumprelu, L1": {"recipe": "jumprelu", "bandwidth": 1.0, "penalty": "l1"},
    "jumprelu, LayerNorm": {"recipe": "jumprelu", "bandwidth": 0.5, "layernorm": "pre"},
}


def tiny(**changes: Any) -> TrainConfig:
    """A recipe at the size of these tests, with no schedule."""
    schedule = {"steps": 20, "lr_warmup_steps": 0, "lr_decay_steps": 0, "sparsity_warmup_steps": 0}
    fixed = {
        "width": WIDTH,
        "batch_size": ROWS,
        "dtype": "float64",
        "encoder_scale": 1.0,
        "layernorm_bias": 0.0,
    } | schedule
    changes = fixed | changes
    return RECIPES[changes.pop("recipe", "paper")](**changes)


def tiny_member(config: TrainConfig, d_model: int = D_MODEL, *, seed: int = 1) -> Member:
    """A member whose weights are all away from their initial zeros and ones."""
    member = Member(config, d_model, torch.zeros(d_model, dtype=torch.float64), 1.0, CPU, Scratch(CPU))
    return away_from_start(member, seed)


def tiny_rows(n: int = ROWS, d_model: int = D_MODEL, seed: int = 0) -> Tensor:
    """Rows with a mean square norm of about 1 and norms that differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_model, generator=generator, dtype=torch.float64) / d_model**0.5
    return x * (0.5 + torch.rand(n, 1, generator=generator, dtype=torch.float64))


def leaves(member: Member) -> dict[str, Tensor]:
    """Copies of the weights that autograd follows."""
    return {name: weight.clone().requires_grad_() for name, weight in member.weights.items()}


@pytest.mark.parametrize("n_levels", LEVELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gradient_equals_autograd(variant: str, n_levels: int) -> None:
    """Every gradient equals autograd."""
    config = tiny(**VARIANTS[variant], **LEVELS[n_levels])
    member, x = tiny_member(config), tiny_rows()
    dead = None
    if config.aux_k:
        member.n_rows = 200
        member.rows_since_fired[3:14] = torch.arange(101, 112)  # fewer dead than 2 · aux_k, more than aux_k
        dead = (member.rows_since_fired >= config.dead_after_rows).double()
    terms = reconstruction_terms(config, member.shape.levels, member.n_steps)
    weights = leaves(member)
    loss = reference_objective(weights, config, x, prefixes=terms.sizes, prefix_weights=terms.weights, dead=dead)
    loss.backward()

    batch = normalise_batch(x, member.center, 1.0)
    forward = member._forward(batch)
    gradients, aux = member._backward(forward)
    found = member._loss(forward, member._sums_of(batch, forward, aux))
    torch.testing.assert_close(found, loss.detach(), rtol=1e-10, atol=1e-12)
    assert gradients.keys() == weights.keys()
    for name, weight in weights.items():
        assert weight.grad.abs().max() > 0, f"the reference says nothing about {name}"
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-8, atol=1e-11)


def test_additive_objective_ignores_alpha() -> None:
    """The additive objective does not depend on alpha without LayerNorm."""
    x, results = tiny_rows(), []
    for alpha in (0.0, 0.1, 0.2, 0.5):
        config = tiny(objective="additive", layernorm="none", alpha=alpha)
        member = Member(config, D_MODEL, torch.zeros(D_MODEL, dtype=torch.float64), 1.0, CPU, Scratch(CPU))
        for _ in range(10):
            member.step(normalise_batch(x, member.center, 1.0))
        results.append((member.metrics()["loss"], member.weights["W_dec"].clone()))
    for loss, w_dec in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12)
        torch.testing.assert_close(w_dec, results[0][1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [{"objective": "nested"}, {"layernorm": "pre"}, {"lambda_shared": 0.01}],
    ids=["nested", "LayerNorm", "lambda"],
)
def test_other_settings_depend_on_alpha(changes: dict[str, Any]) -> None:
    """Anything else makes the loss depend on alpha."""
    losses = []
    for alpha in (0.1, 0.5):
        config = tiny(**({"objective": "additive", "layernorm": "none", "alpha": alpha} | changes))
        member = tiny_member(config)
        member.step(normalise_batch(tiny_rows(), member.center, 1.0))
        losses.append(member.metrics()["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("guess", [0.0, 0.5, 1e9], ids=["none", "good", "too high"])
def test_batch_threshold_equals_torch_topk(dtype: torch.dtype, guess: float) -> None:
    """The batch threshold is the last value of torch.topk whatever the guess."""
    z = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).relu().to(dtype)
    for n in (1, 7, 500, 64 * 50):
        assert batch_threshold(z, n, guess) == z.flatten().topk(n).values[-1]
        assert nth_largest_over(torch.split(z, 3), n) == batch_threshold(z, n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_row_thresholds_equal_torch_topk(dtype: torch.dtype) -> None:
    """Row thresholds are the last values of torch.topk."""
    z = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).relu().to(dtype)
    for k in (1, 5, 50):
        assert torch.equal(row_thresholds(z, k), z.topk(k, dim=1).values[:, -1:])


def test_batchtopk_keeps_what_torch_topk_keeps() -> None:
    """BatchTopK keeps what torch.topk keeps."""
    config = tiny(recipe="batchtopk", k=5, aux_k=0)
    member, x = tiny_member(config), tiny_rows()
    member._forward(normalise_batch(x, member.center, 1.0))
    before = reference_latents(member.weights, config, x)[0].flatten()
    top = before.topk(5 * ROWS)
    expected = torch.zeros_like(before).scatter(0, top.indices, top.values).view(ROWS, WIDTH)
    torch.testing.assert_close(member.latents.z, expected)
    assert torch.equal(member.latents.z > 0, expected > 0)


def test_batchtopk_keeps_all_of_a_tie() -> None:
    """BatchTopK keeps all of a tie."""
    z = torch.tensor([[3.0, 1.0, 1.0], [1.0, 0.5, 0.0]])
    assert int((z >= batch_threshold(z, 2)).sum()) == 4


def test_batchtopk_keeps_no_zero() -> None:
    """BatchTopK keeps no zero when fewer latents are positive than asked."""
    config = tiny(recipe="batchtopk", k=30, aux_k=0)
    member = tiny_member(config)
    member.weights["b_enc"].sub_(1.0)
    forward = member._forward(normalise_batch(tiny_rows(), member.center, 1.0))
    assert float(member.latents.threshold) == 0.0
    assert 0 < float(forward.fired.counts.sum()) < 30 * ROWS


def test_size_weights_average_one_and_grow() -> None:
    """Size weights have mean one and grow with the level."""
    terms = reconstruction_terms(tiny(level_weighting="size", alpha=0.25), (10, 40), 0)
    assert terms.weights == (0.4, 1.6)


def test_inner_weight_spares_the_last() -> None:
    """inner:0.75 weighs each level but the whole by so much; a flat dictionary's one term is 1."""
    nested = tiny(level_weighting="inner:0.75", levels=(0.25, 0.5, 1.0), alpha=None)
    assert reconstruction_terms(nested, (10, 20, 40), 0).weights == (0.75, 0.75, 1.0)
    assert reconstruction_terms(tiny(level_weighting="inner:0.75", alpha=0.0), (40,), 0).weights == (1.0,)


@pytest.mark.parametrize(
    "text", ["inner", "inner:", "inner:0", "inner:-1", "inner:nan", "inner:inf", "outer:1", "sizes", ""]
)
def test_odd_level_weightings_are_refused(text: str) -> None:
    """A weighting that is none, or a weight that is no weight, is refused by name."""
    with pytest.raises(UsageError, match="level_weighting"):
        tiny(level_weighting=text)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(levels=st.sets(st.integers(1, 60), min_size=2, max_size=12), seed=st.integers(0, 5), step=st.integers(0, 100))
def test_random_prefixes_end_with_the_whole(levels: set[int], seed: int, step: int) -> None:
    """Random prefixes are as many as levels and end with the whole."""
    sizes = tuple(sorted(levels))
    drawn = random_prefixes(sizes, seed, step)
    assert len(set(drawn)) == len(sizes)
    assert list(drawn) == sorted(drawn)
    assert drawn[0] >= sizes[0]
    assert drawn[-1] == sizes[-1]


def test_random_prefixes_follow_seed_and_step() -> None:
    """Random prefixes are a function of seed and step."""
    drawn = [random_prefixes((2, 4, 8, 16), seed=0, step=step) for step in range(50)]
    assert drawn == [random_prefixes((2, 4, 8, 16), seed=0, step=step) for step in range(50)]
    assert len(set(drawn)) > 10


def test_penalty_warms_up_from_zero() -> None:
    """The penalty starts at zero and is whole after its warmup."""
    config = tiny(sparsity_warmup_steps=10)
    falling = batchtopk(k=4, width=64, sparsity_warmup_steps=10)
    assert [kept_a_row(falling, step) for step in (0, 5, 9, 10, 99)] == [32, 11, 5, 4, 4]
    assert kept_a_row(batchtopk(k=16, width=64, sparsity_warmup_steps=10), 0) == 64
    assert [kept_a_row(batchtopk(k=4, width=64), step) for step in (0, 9)] == [4, 4]
    assert [sparsity_ramp(config, step) for step in (0, 5, 10, 15)] == [0.0, 0.5, 1.0, 1.0]


def test_controller_moves_against_l0_error() -> None:
    """The controller raises the penalty above the wanted L0 and lowers it below."""
    for l0, raised in ((20.0, True), (5.0, False), (0.0, False)):
        controller = Controller(10.0, 4000, torch.device("cpu"))
        controller.see(torch.tensor(l0, dtype=torch.float64), first=True, acts=False)
        assert float(controller.factor) == 1.0
        controller.see(torch.tensor(l0, dtype=torch.float64), first=False, acts=True)
        assert (float(controller.factor) > 1.0) == raised
        assert torch.isfinite(controller.state).all()


@pytest.mark.parametrize("delay", [1, 30, 150])
def test_controller_does_not_overshoot(delay: int) -> None:
    """The controller does not overshoot where L0 answers late.
    L0 follows the penalty λ with a lag of `delay` steps: d log L0 = (log(40/λ) − log L0) / delay."""
    controller, log_l0, seen = Controller(10.0, 4000, torch.device("cpu")), math.log(400.0), []
    for step in range(4000):
        log_l0 += (math.log(40.0) - math.log(float(controller.factor)) - log_l0) / delay
        controller.see(torch.tensor(math.exp(log_l0), dtype=torch.float64), first=step == 0, acts=True)
        seen.append(math.exp(log_l0))
    assert seen[-1] == pytest.approx(10.0, rel=0.02)
    assert min(seen) > 8.5


def test_auxiliary_pool_holds_only_the_dead() -> None:
    """On a CPU the auxiliary loss's pool holds dead latents only, the longest dead first, at most 2 · aux_k; none: no pool."""
    config = tiny(recipe="batchtopk", k=5, aux_k=2, dead_after_rows=100)
    rows = torch.zeros(WIDTH, dtype=torch.int64)
    for dead, expected in ([], None), ([7, 3], [3, 7]), ([1, 2, 3, 4, 5], [5, 4, 3, 2]):
        for rank, latent in enumerate(dead):
            rows[latent] = 100 + rank
        pool = auxiliary_pool(config, rows)
        assert (pool if pool is None else pool.tolist()) == expected
        rows.zero_()


def test_auxiliary_gradients_reach_only_dead_latents() -> None:
    """Auxiliary gradients reach only dead latents."""
    config = tiny(recipe="batchtopk", k=2, aux_k=4, dead_after_rows=100)
    plain, member, x = tiny_member(dataclasses.replace(config, aux_k=0)), tiny_member(config), tiny_rows()
    member.n_rows = 200
    member.rows_since_fired[5:8] = 150
    batch = normalise_batch(x, member.center, 1.0)
    with_aux = {name: g.clone() for name, g in member._backward(member._forward(batch))[0].items()}
    without = plain._backward(plain._forward(batch))[0]
    changed = (with_aux["W_dec"] != without["W_dec"]).any(1).nonzero().flatten().tolist()
    assert changed == [5, 6, 7]

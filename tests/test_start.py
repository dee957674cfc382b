"""How training begins and what it holds: the first error, thresholds that do not lag, thresholds that can move, a wanted L0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from train.config import RECIPES, TrainConfig, batchtopk
from train.step.member import Batch, Member, normalise_batch
from train.step.objectives import random_prefixes
from train.step.sample import Sample, n_held
from train.step.scratch import Scratch
from train.step.weights import best_scale

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
D_MODEL = 32
FIVE = (0.0625, 0.125, 0.25, 0.5, 1.0)


def rows(seed: int, n: int = 512, d_model: int = D_MODEL) -> Tensor:
    """Sparse sums of fixed directions: centred, mean ‖x‖² near 1, norms that differ from row to row."""
    directions = torch.randn(6 * d_model, d_model, generator=torch.Generator().manual_seed(7))
    directions /= directions.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(n, 6 * d_model, generator=generator) < 0.04
    x = (fires * torch.rand(n, 6 * d_model, generator=generator)) @ directions
    return (x - 0.02 * directions.sum(0)) / 1.55


def batch_of(seed: int, **options: Any) -> Batch:
    """A normalised batch."""
    return normalise_batch(rows(seed, **options), torch.zeros(D_MODEL), 1.0)


def member_of(recipe: str, **changes: Any) -> Member:
    """A member of a recipe, at a size of seconds."""
    fixed: dict[str, Any] = {"width": 256, "batch_size": 512, "steps": 600, "dtype": "float32", "lr": 1e-2}
    config = RECIPES[recipe](**(fixed | changes))
    return Member(config, D_MODEL, torch.zeros(D_MODEL), 1.0, CPU, Scratch(CPU))


def l0_at_inference(member: Member) -> float:
    """Latents a row of rows that were not trained on, as the saved SAE selects them."""
    with torch.no_grad():
        return float((member.sae().encode(rows(10**6, 32768)) != 0).sum(1).float().mean())


SHAPES = [{"alpha": 0.0}, {"alpha": 0.2}, {"levels": FIVE, "alpha": None}]
VARIANTS = [
    ("paper", {}),
    ("paper", {"layernorm_bias": 0.0}),
    ("paper", {"layernorm_bias": -2.0}),
    ("paper", {"layernorm": "none"}),
    ("paper", {"layernorm": "post"}),
    ("paper", {"layernorm_rescale": False}),
    ("batchtopk", {}),
    ("topk", {}),
    ("jumprelu", {}),
]


@pytest.mark.parametrize("times", [4, 8, 32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("recipe", "changes"), VARIANTS)
def test_first_error_is_below_one(recipe: str, changes: dict[str, Any], shape: dict[str, Any], times: int) -> None:
    """Before any update every level explains more than zero would, whatever the recipe, width and number of levels."""
    member = member_of(recipe, width=times * D_MODEL, **changes, **shape)
    member.step(batch_of(0))
    recon = member.metrics()["recon"]
    assert isinstance(recon, list)
    assert max(recon) < float(rows(0).square().sum(1).mean())


@pytest.mark.parametrize("layernorm", ["none", "pre"])
@pytest.mark.parametrize("times", [8, 32])
def test_uneven_rows_start_below_one(times: int, layernorm: str) -> None:
    """Rows whose norms differ get unequal shares of a batch's latents: many levels of a wide dictionary begin below 1 too."""
    x = rows(0) * torch.randn(512, 1, generator=torch.Generator().manual_seed(1)).mul(0.6).exp()
    x /= x.square().sum(1).mean().sqrt()
    member = member_of("batchtopk", width=times * D_MODEL, levels=FIVE, alpha=None, k=8, layernorm=layernorm)
    member.step(normalise_batch(x, torch.zeros(D_MODEL), 1.0))
    recon = member.metrics()["recon"]
    assert isinstance(recon, list)
    assert max(recon) < 1


@pytest.mark.parametrize("layernorm_bias", [0.0, -1.0, -2.0])
def test_scale_is_the_best_one(layernorm_bias: float) -> None:
    """Half or twice the chosen scale has a larger first error, with LayerNorm and without."""
    for recipe, changes in (("paper", {"layernorm_bias": layernorm_bias}), ("batchtopk", {"k": 12})):
        errors = []
        for factor in (0.5, 1.0, 2.0):
            chosen = best_scale(member_of(recipe, alpha=0.0, **changes).config, D_MODEL)
            member = member_of(recipe, alpha=0.0, encoder_scale=factor * chosen, **changes)
            member.step(batch_of(0))
            errors.append(member.metrics()["recon"][0])  # type: ignore[index]
        assert errors[1] == min(errors)


def test_threshold_does_not_lag() -> None:
    """L0 at inference is within 2 % of k after 10 and 30 steps, then within 1 %, also at the end of a decayed run."""
    member = member_of("batchtopk", k=12, steps=400)
    for step in range(400):
        member.step(batch_of(step))
        if step + 1 in (10, 30, 60, 100, 200, 300, 400):
            assert l0_at_inference(member) == pytest.approx(12, rel=0.02 if step < 50 else 0.01)


def test_sample_holds_the_first_rows() -> None:
    """The sample holds the rows of the first batches, evenly spaced ones of a larger batch; other recipes hold none."""
    sample = Sample(batchtopk(width=64, batch_size=2048), 1, torch.float32, CPU, None)
    for step in range(10):
        sample.see(torch.arange(2048.0)[:, None] + 2048 * step, step)
        assert len(sample.pieces(step + 1)) == min(step + 1, 8)
    assert torch.equal(torch.cat(sample.pieces(10))[:, 0], torch.arange(16384.0))
    large = Sample(batchtopk(width=64, batch_size=65536), 1, torch.float32, CPU, None)
    large.see(torch.arange(65536.0)[:, None], 0)
    assert torch.equal(torch.cat(large.pieces(1))[:, 0], torch.arange(0.0, 65536.0, 4))
    assert n_held(RECIPES["paper"](width=64)) == 0


def test_resumed_threshold_is_the_same() -> None:
    """A resumed member's threshold is that of one that was never stopped, to the bit."""
    whole, first = member_of("batchtopk", k=12), member_of("batchtopk", k=12)
    for step in range(20):
        whole.step(batch_of(step))
        if step < 11:
            first.step(batch_of(step))
    resumed = member_of("batchtopk", k=12)
    resumed.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    for step in range(11, 20):
        resumed.step(batch_of(step))
    assert torch.equal(resumed.sae().threshold, whole.sae().threshold)


def test_first_thresholds_pass_wanted_share() -> None:
    """jumprelu begins with as many latents a row as it was asked for, with LayerNorm too."""
    for changes in ({"initial_l0": 20.0}, {"target_l0": 9.0}, {"initial_l0": 20.0, "layernorm": "pre"}):
        member = member_of("jumprelu", **changes)
        member.step(batch_of(0))
        expected = changes.get("target_l0", changes.get("initial_l0"))
        assert member.metrics()["l0"] == pytest.approx(expected, rel=0.01)


def test_warm_start_without_thresholds_finds_them() -> None:
    """jumprelu that begins from a ReLU SAE lets the wanted number of latents through at first."""
    source, member = member_of("paper", layernorm="none"), member_of("jumprelu", initial_l0=20.0)
    for step in range(20):
        source.step(batch_of(step))
    member.load_weights(source.sae())
    member.step(batch_of(20))
    assert member.metrics()["l0"] == pytest.approx(20.0, rel=0.01)


WANTED: list[tuple[str, dict[str, Any], int]] = [
    ("jumprelu", {}, 600),
    ("paper", {}, 300),
    ("paper", {}, 600),
    ("paper", {"layernorm": "none"}, 300),
    ("paper", {"layernorm": "none"}, 600),
]


@pytest.mark.parametrize(("recipe", "changes", "steps"), WANTED)
def test_wanted_l0_is_reached(recipe: str, changes: dict[str, Any], steps: int) -> None:
    """Every recipe with a penalty ends within 5 % of the wanted L0, in short runs too."""
    member = member_of(recipe, target_l0=12.0, steps=steps, **changes)
    for step in range(steps):
        member.step(batch_of(step))
        if step == steps - 31:
            member.metrics()
    assert member.metrics()["l0"] == pytest.approx(12.0, rel=0.05)


def test_random_prefixes_are_aligned() -> None:
    """In wide dictionaries random prefixes end at multiples of 8, in small ones anywhere."""
    for step in range(50):
        assert all(size % 8 == 0 for size in random_prefixes((3280, 16384), 0, step))
        assert all(size % 8 == 0 for size in random_prefixes((64, 128, 256, 512, 1024), 0, step))
    assert any(size % 8 for step in range(50) for size in random_prefixes((13, 64), 0, step))


def test_old_configs_are_refused_by_name() -> None:
    """A config of a version with other fields is refused, naming them."""
    old = batchtopk().to_dict() | {"threshold_decay": 0.99}
    with pytest.raises(Exception, match="unknown training fields: threshold_decay"):
        TrainConfig.from_dict(old)

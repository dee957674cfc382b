"""Meta-dictionary and hierarchy: against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluate.scores import structure
from evaluate.scores.sample import Batch
from evaluate.scores.structure import Hierarchy, adam, batch_top_k, meta_dictionary, meta_seconds, n_meta_steps
from pipeline.sae.config import SAEConfig

CONTEXT = 8


def batch_of(first: int, z: Tensor) -> Batch:
    """Sequences whose rows are all kept."""
    kept = torch.ones(len(z) // CONTEXT, CONTEXT, dtype=torch.bool)
    nothing, index = torch.zeros(len(z), dtype=torch.int64), torch.arange(len(z))
    weights = torch.ones(2, len(z), dtype=torch.float64)
    return Batch(
        first,
        torch.zeros(*kept.shape, 1),
        nothing.view_as(kept),
        kept,
        z[:, :1],
        weights,
        nothing,
        nothing,
        index,
    )


def hierarchy(z: Tensor, levels: tuple[int, ...]) -> Hierarchy:
    found = Hierarchy(SAEConfig(d_model=4, width=z.shape[1], levels=levels), CONTEXT, 0)
    for first in range(0, len(z), 4 * CONTEXT):
        found.update(z[first : first + 4 * CONTEXT], batch_of(first // CONTEXT, z[first : first + 4 * CONTEXT]))
    return found


def firing(*shares: float, n: int = 4000) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.rand(n, len(shares), generator=g) < torch.tensor(shares)).float()


def test_containment_leads_whatever_the_lift() -> None:
    """A specialised latent wholly inside a frequent shared one: containment 1, though its lift is at most 1/P."""
    z = firing(0.6, 0.05, 0.4, 0.3)
    z[:, 2] *= z[:, 0]
    found = hierarchy(z, (2, 4)).features()["level"]
    inside = float((z[:, 3] * z[:, 0]).sum() / z[:, 3].sum())
    assert found["n"] == 2
    assert found["containment"] == pytest.approx((1 + inside) / 2)
    assert found["lift"] < 1.7
    assert found["low"] < found["excess"] < found["high"]


def test_independent_latents_have_no_excess() -> None:
    """Firings drawn apart: containment is high where shared latents are dense, and its null is as high."""
    found = hierarchy(firing(0.8, 0.7, *[0.1] * 200), (2, 202)).features()["level"]
    assert found["containment"] > 0.75
    assert found["low"] < 0 < found["high"]


def test_the_null_is_the_sequence_before() -> None:
    """Against a slow count: P(s | c) with c's firings moved on by one sequence, cyclically."""
    z = firing(0.5, 0.3, 0.2, 0.2, n=320)
    z[:, 3] *= z[:, 1]
    found = hierarchy(z, (2, 4)).features()["level"]
    moved = torch.roll(z, CONTEXT, 0)
    slow = [max(float((moved[:, c] * z[:, s]).sum() / z[:, c].sum()) for s in (0, 1)) for c in (2, 3)]
    assert found["null"] == pytest.approx(np.mean(slow))


def test_flat_controls_are_sets_by_density() -> None:
    """Without levels only controls are there: sets of each size, from the densest on, with their mean density."""
    z = firing(0.05, 0.5, *[0.1] * 8)
    found = hierarchy(z, (10,)).features()
    assert "level" not in found
    first, second = (row for row in found["controls"][:2])
    assert (first["share"], first["rank"], first["n_shared"], first["n"]) == (0.1, 0, 1, 9)
    assert first["containment"] == pytest.approx(0.5, abs=0.05)
    assert first["density"] == pytest.approx(0.5, abs=0.05)
    assert second["rank"] == 1
    assert second["density"] == pytest.approx(0.1, abs=0.02)
    assert {row["n_shared"] for row in found["controls"]} == {1, 2, 3, 5}


def test_controls_are_as_large() -> None:
    """A nested dictionary's controls have the size of its level; the set that is the level says the same as the level."""
    z = firing(0.5, 0.4, *[0.1] * 18)
    found = hierarchy(z, (2, 20)).features()
    assert {row["n_shared"] for row in found["controls"]} == {2}
    assert found["controls"][0] == {"share": 0.1, "rank": 0} | found["level"]
    density = z.mean(0)[:2].double().log().mean().exp()
    assert found["level"]["density"] == pytest.approx(float(density))


def test_silent_latents_are_left_out() -> None:
    """Fewer rows than MIN_COUNT: no containment, not zero."""
    z = firing(0.5, 0.001)
    found = hierarchy(z, (1, 2)).features()["level"]
    assert found["n"] == 0
    assert found["excess"] is None


def test_firings_beyond_limit_counted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows stop being kept once there are enough, and the number of rows says so."""
    monkeypatch.setattr(structure, "MAX_FIRINGS", 10)
    found = hierarchy(firing(0.5, 0.5, n=160), (1, 2)).features()
    assert found["n_rows"] == 4 * CONTEXT


def test_batchtopk_keeps_largest_of_all() -> None:
    """Two a row on average, wherever they are; nothing negative."""
    a = torch.tensor([[5.0, 4.0, 3.0], [1.0, -2.0, 0.5]])
    assert batch_top_k(a, 1).tolist() == [[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    assert batch_top_k(a, 3).tolist() == [[5.0, 4.0, 3.0], [1.0, 0.0, 0.5]]


def test_meta_dictionary_finds_shared_parts() -> None:
    """Rows that are sums of two of eight directions are explained; random ones much less."""
    g = torch.Generator().manual_seed(0)
    parts = torch.linalg.qr(torch.randn(64, 64, generator=g))[0][:8]
    sums = torch.stack([parts[i] + parts[j] for i in range(8) for j in range(i)] * 4)
    made = meta_dictionary(sums, 0)
    random = meta_dictionary(torch.randn(112, 64, generator=g), 0)
    assert (made["n_latents"], made["k"], made["seeds"]) == (28, 4, 3)
    assert made["value"] is not None
    assert random["value"] is not None
    assert made["value"] > 0.95
    assert random["value"] < 0.75
    assert made["low"] <= made["value"] <= made["high"]  # type: ignore[operator]


def test_meta_dictionary_ignores_row_length() -> None:
    """Rows are made unit first."""
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert meta_dictionary(rows, 0)["value"] == pytest.approx(meta_dictionary(7 * rows, 0)["value"], abs=1e-3)


def test_too_few_latents_are_undefined() -> None:
    """Seven latents leave one meta-latent: no figure."""
    assert meta_dictionary(torch.randn(7, 6), 0)["value"] is None


def test_meta_steps_are_told_and_counted() -> None:
    """Each step of each fit is told; as many are promised; of too few latents none; the time is that of so many steps."""
    told: list[None] = []
    meta_dictionary(torch.randn(12, 4), 0, lambda: told.append(None))
    assert len(told) == n_meta_steps(12) == 900
    assert (n_meta_steps(7), meta_seconds(7, 4, torch.device("cpu"))) == (0, 0.0)
    assert meta_seconds(12, 4, torch.device("cpu")) > 0


def test_adam_is_torch_s() -> None:
    """Five steps from the same weights with the same gradients."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=g, dtype=torch.float64)
    theirs = weight.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([theirs], 0.01)
    moments = (torch.zeros_like(weight), torch.zeros_like(weight))
    for step in range(1, 6):
        gradient = torch.randn(3, 4, generator=g, dtype=torch.float64)
        adam(weight, gradient, moments, 0.01, step)
        theirs.grad = gradient
        optimiser.step()
    assert torch.allclose(weight, theirs.detach(), rtol=1e-12, atol=0)

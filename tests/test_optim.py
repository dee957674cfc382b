"""One update of the weights: order, projection, renormalisation, schedules, the low-precision copy."""

from typing import Any

import pytest
import torch
from torch import Tensor

from train.config import TrainConfig, paper
from train.step import optim
from train.step.optim import Adam, clip_factor, gradient_norm, remove_along_rows, weight_chunks
from train.step.schedules import learning_rate


def unit_rows(n: int, d: int) -> Tensor:
    w = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return w / w.norm(dim=1, keepdim=True)


def weights() -> dict[str, Tensor]:
    w_dec = unit_rows(20, 8)
    return {"W_enc": w_dec.T.contiguous(), "b_enc": torch.zeros(20), "W_dec": w_dec, "b_dec": torch.zeros(8)}


def gradients(scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: scale * torch.randn(w.shape, generator=generator) for name, w in weights().items()}


def config(**changes: Any) -> TrainConfig:
    return paper(**{"width": 20, "steps": 100, "lr_warmup_steps": 10, "sparsity_warmup_steps": 0} | changes)


def test_projected_gradient_is_orthogonal() -> None:
    """What is left of a gradient is orthogonal to its row."""
    w = unit_rows(20, 8)
    g = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
    before = g.clone()
    remove_along_rows(g, w)
    assert (g * w).sum(1).abs().max() < 1e-6
    torch.testing.assert_close(before - g, (before * w).sum(1, keepdim=True) * w)


def test_norm_is_global_before_clipping() -> None:
    """The norm is over all gradients together and before clipping."""
    g = gradients(scale=30.0)
    expected = torch.cat([part.flatten() for part in g.values()]).norm()
    adam = Adam(weights(), torch.float32, config(), torch.ones(20))
    assert float(adam.update(g, torch.tensor(1e-3))) == pytest.approx(float(expected), rel=1e-6)


def test_bf16_norm_sums_in_float32() -> None:
    """The norm of bf16 gradients is summed in float32."""
    g = {"W_dec": torch.full((4096, 64), 0.01, dtype=torch.bfloat16)}
    assert float(gradient_norm(g)) == pytest.approx(float(g["W_dec"].double().norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "norm", "expected"),
    [
        ({}, 0.5, 1.0),
        ({}, 4.0, 0.25),
        ({"clip_norm": 2.0}, 4.0, 0.5),
        ({"clip_norm": 0.0}, 4.0, 1.0),
        ({"normalize_gradients": True}, 0.5, 2.0),
        ({}, 0.0, 1.0),
    ],
)
def test_gradients_are_clipped_or_normalised(changes: dict[str, Any], norm: float, expected: float) -> None:
    """Gradients are clipped or normalised."""
    assert float(clip_factor(torch.tensor(norm), config(**changes))) == pytest.approx(expected)


def test_clip_precedes_projection() -> None:
    """The clip sees the gradient before its projection."""
    w = weights()
    g = {name: torch.zeros_like(part) for name, part in w.items()}
    g["W_dec"] = 100 * w["W_dec"].clone()  # all of it along the rows: nothing is left after the projection
    g["b_dec"][0] = 1.0
    adam = Adam(w, torch.float32, config(eps=1.0), torch.ones(20))
    adam.update(g, torch.tensor(1.0))
    shrunk = 1 / (100**2 * 20 + 1) ** 0.5  # the only number that moves, clipped by a norm the decoder dominates
    assert float(w["b_dec"][0]) == pytest.approx(-shrunk / (shrunk + 1), rel=1e-3)


def test_decoder_rows_keep_unit_norm() -> None:
    """Decoder rows have unit norm after an update."""
    adam = Adam(weights(), torch.float32, config(), torch.ones(20))
    adam.update(gradients(), torch.tensor(0.1))
    torch.testing.assert_close(adam.weights["W_dec"].norm(dim=1), torch.ones(20))


def test_product_copy_follows_the_weights() -> None:
    """The copy that products read follows the weights."""
    adam = Adam(weights(), torch.bfloat16, config(), torch.ones(20))
    adam.update(gradients(), torch.tensor(0.1))
    for name, low in adam.low.items():
        assert torch.equal(low, adam.weights[name].bfloat16())


def test_equal_dtype_needs_no_copy() -> None:
    """Products in the dtype of the weights read the weights themselves."""
    adam = Adam(weights(), torch.float32, config(), torch.ones(20))
    assert adam.low["W_enc"] is adam.weights["W_enc"]


def test_chunk_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on the size of chunks."""
    results = []
    for size in (16, 1 << 18):
        monkeypatch.setattr(optim, "CHUNK_NUMBERS", size)
        adam = Adam(weights(), torch.float32, config(clip_norm=0.0), torch.ones(20))
        for _ in range(3):
            adam.update(gradients(), torch.tensor(0.01))
        results.append(adam.weights)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-6, atol=1e-7)


def test_chunks_cover_every_row_once() -> None:
    """Chunks cover every row once."""
    w = torch.empty(1001, 700)
    rows = [r for chunk in weight_chunks(w) for r in range(chunk.start, chunk.stop)]
    assert rows == list(range(1001))


def test_learning_rate_warms_stays_decays() -> None:
    """The learning rate warms up, stays and decays."""
    c = config(lr=1.0, lr_warmup_steps=10, lr_decay_steps=20)
    rates = [learning_rate(c, step) for step in (0, 4, 9, 50, 80, 90, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.05])

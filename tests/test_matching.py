"""The best one-to-one matching is exact, whatever the shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from evaluate.scores import matching
from evaluate.scores.matching import best_matching


def test_greedy_choice_is_not_best() -> None:
    """Hand case: .9 + .1 < .8 + .7."""
    rows, columns = best_matching(torch.tensor([[0.9, 0.8], [0.7, 0.1]]))
    assert (rows.tolist(), columns.tolist()) == ([0, 1], [1, 0])


def test_one_row_takes_its_largest() -> None:
    """One against many, and many against one."""
    weight = torch.tensor([[0.1, 0.5, 0.2]])
    assert best_matching(weight)[1].tolist() == [1]
    assert best_matching(weight.T)[0].tolist() == [1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(40, 40), (12, 90), (90, 12), (200, 130)])
@pytest.mark.parametrize("kind", ["uniform", "ties", "near"])
def test_the_sum_is_scipy_s(seed: int, shape: tuple[int, int], kind: str) -> None:
    """Against the dense Hungarian method of scipy in float64; each index is used once."""
    rng = np.random.default_rng(seed)
    weight = rng.random(shape).astype(np.float32)
    if kind == "ties":
        weight = np.round(weight, 1)
    if kind == "near":
        weight = (0.5 + 1e-3 * weight).astype(np.float32)
    rows, columns = best_matching(torch.from_numpy(weight))
    expected = linear_sum_assignment(weight, maximize=True)
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == min(shape)
    found = weight.astype(np.float64)[rows, columns].sum()
    assert found == pytest.approx(weight.astype(np.float64)[expected].sum(), abs=1e-5)


def test_few_candidates_still_give_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """With almost no candidates the prices must call for the others."""
    monkeypatch.setattr(matching, "N_CANDIDATES", 0)
    weight = torch.rand(60, 60, generator=torch.Generator().manual_seed(0))
    expected = linear_sum_assignment(weight.numpy(), maximize=True)
    assert float(weight[best_matching(weight)].sum()) == pytest.approx(float(weight.numpy()[expected].sum()), abs=1e-4)

"""k-sparse probing: which latents are looked at, what the classifier then gets right, the baseline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from evaluate.probing.sparse_probing import fitted_accuracy, k_sparse_scores, residual_accuracy
from evaluate.probing.tasks import Contrast
from evaluate.probing.texts import PooledLatents
from support.probing_cases import random_draw


def latents_with_one_informative(
    width: int = 8, informative: int = 6
) -> tuple[PooledLatents, dict[str, tuple[Contrast, Contrast]]]:
    """80 texts whose class one latent tells apart and the others do not; the first 40 train, the rest test."""
    rng = torch.Generator().manual_seed(0)
    label = torch.arange(80) % 2
    mean = torch.rand(80, width, generator=rng)
    mean[:, informative] += 5.0 * label
    rows = np.arange(80)
    train, test = (Contrast(part[part % 2 == 1], part[part % 2 == 0]) for part in (rows[:40], rows[40:]))
    return PooledLatents(mean, torch.zeros(width), torch.zeros(80)), {"c": (train, test)}


def test_informative_latent_is_found() -> None:
    """The informative latent is found where the level has it."""
    latents, draw = latents_with_one_informative()
    scores = k_sparse_scores([draw], latents, {0: 4, 1: 8}, (1, 2, 5), 1.0)
    assert set(scores) == {("k_sparse_probe", *key) for key in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 5))}
    assert scores["k_sparse_probe", 1, 1] == [1.0]
    assert scores["k_sparse_probe", 0, 1][0] < 0.8  # the inner level does not have it


def test_scores_equal_scikit_learn() -> None:
    """Scores equal scikit-learn on the columns of largest mean difference."""
    rng = torch.Generator().manual_seed(3)
    latents = PooledLatents(torch.randn(200, 12, generator=rng), torch.zeros(12), torch.zeros(200))
    draw = random_draw(("a", "b"), 120, 80)
    found = k_sparse_scores([draw], latents, {0: 12}, (1, 3), 1.0)
    x = latents.mean.numpy()
    for k in (1, 3):
        expected = []
        for train, test in draw.values():
            difference = np.abs(
                x[train.positive].mean(0, dtype=np.float64) - x[train.negative].mean(0, dtype=np.float64)
            )
            columns = np.argsort(-difference)[:k]
            fit = LogisticRegression(max_iter=1000).fit(x[train.rows][:, columns], train.labels)
            expected.append(fit.score(x[test.rows][:, columns], test.labels))
        assert found["k_sparse_probe", 0, k] == [pytest.approx(np.mean(expected))]


def test_units_of_training_change_nothing() -> None:
    """The same SAE in other units, its latents and its scale c times as large, has the same scores."""
    rng = torch.Generator().manual_seed(3)
    mean = 0.02 * torch.randn(200, 12, generator=rng)  # small enough for the L2 penalty to matter
    draw = random_draw(("a", "b"), 120, 80)
    found = []
    for c in (1.0, 0.01, 50.0):
        latents = PooledLatents(c * mean, torch.zeros(12), torch.zeros(200))
        found.append(k_sparse_scores([draw], latents, {0: 12}, (1, 2, 5), 0.3 * c))
    assert found[0] == found[1] == found[2]
    wrong = k_sparse_scores(
        [draw], PooledLatents(50 * mean, torch.zeros(12), torch.zeros(200)), {0: 12}, (1, 2, 5), 0.3
    )
    assert wrong != found[0]


def test_baseline_sees_the_whole_residual() -> None:
    """The baseline looks at the whole residual."""
    latents, draw = latents_with_one_informative()
    assert residual_accuracy(latents.mean, draw) == 1.0


def test_iteration_limit_counts_without_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier that meets the iteration limit counts without a warning."""
    monkeypatch.setattr("evaluate.probing.sparse_probing.MAX_ITERATIONS", 1)
    latents, draw = latents_with_one_informative()
    assert 0 <= fitted_accuracy(latents.mean, *draw["c"]) <= 1

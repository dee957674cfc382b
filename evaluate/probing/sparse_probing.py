"""k-sparse probing: how well a classifier does that may look at k latents only. The score its critics trust most.

The k latents with the largest |mean over positives − mean over negatives| of the training texts (pooled over real
positions, in units of the rows that are rebuilt); scikit-learn's LogisticRegression (L2, C = 1, at most 1000 iterations) on them;
accuracy on the test texts, averaged over classes. The same classifier on the whole pooled rows that are encoded is the baseline
(EVALUATION.md 3).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from evaluate.probing.ablation import contrast_means
from evaluate.probing.series import Scores
from evaluate.probing.tasks import Contrast, Draw
from evaluate.probing.texts import PooledLatents

MAX_ITERATIONS = 1000


def k_sparse_scores(
    draws: Sequence[Draw], latents: PooledLatents, levels: Mapping[int, int], k_values: Sequence[int], scale: float
) -> Scores:
    """k_sparse_probe for each level and each k up to its number of latents, by seed.

    The classifier sees latents divided by `scale`, that of the rows that the SAE makes, in their units: its L2 penalty would
    otherwise depend on the units that the SAE was trained in.
    """
    pooled = latents.mean / scale
    scores: Scores = {}
    for draw in draws:
        contrasts = contrast_means(latents, [train for train, _ in draw.values()])
        for level, n_latents in levels.items():
            for k in (k for k in k_values if k <= n_latents):
                best = contrasts[:, :n_latents].abs().topk(k).indices  # [class, k]
                accuracies = [
                    fitted_accuracy(pooled[:, columns].cpu(), *pair) for columns, pair in zip(best, draw.values())
                ]
                scores.setdefault(("k_sparse_probe", level, k), []).append(mean(accuracies))
    return scores


def residual_accuracy(mean_x: Float[Tensor, "text d_model"], draw: Draw) -> float:
    """The baseline of one seed: the classifier on all d_model dimensions of the pooled residual, mean over classes."""
    return mean(fitted_accuracy(mean_x, train, test) for train, test in draw.values())


def fitted_accuracy(features: Float[Tensor, "text feature"], train: Contrast, test: Contrast) -> float:
    """Test accuracy of a logistic regression; one that met the iteration limit counts as it stands (as in SAEBench)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    values: Any = features.to(torch.float32).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier = LogisticRegression(C=1.0, max_iter=MAX_ITERATIONS).fit(values[train.rows], train.labels)
    return float((classifier.predict(values[test.rows]) == test.labels).mean())

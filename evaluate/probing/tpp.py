"""Targeted probe perturbation, to SAEBench 0.6's protocol (EVALUATION.md 2.4, 2.6).

Ablating the latents that matter most to one class's probe should hurt that probe and leave those of other classes alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from evaluate.probing.ablation import Ablation, level_scores
from evaluate.probing.series import Scores


def tpp_scores(seeds: Sequence[Ablation], levels: Mapping[int, int], n_values: Sequence[int]) -> Scores:
    """tpp, tpp_intended and tpp_unintended for each level and each n up to its number of latents, by seed."""
    return level_scores(one_seed, seeds, levels, n_values)


def one_seed(seed: Ablation, n_latents: int, ns: Sequence[int]) -> dict[str, npt.NDArray[np.float64]]:
    """Means over classes for each n, ablating among the first n_latents latents.

    Intended: the fall in accuracy of the class whose latents are ablated. Unintended: that of the other classes, averaged.
    """
    names = list(seed.texts.draw)
    clean = np.array([seed.texts.accuracy(name, name) for name in names])
    drop = np.empty((len(names), len(names), len(ns)))  # [ablated class, tested class, n]
    for i, ablated in enumerate(names if ns else []):
        effects = seed.effects(ablated, signed=True)[:n_latents]
        for j, tested in enumerate(names):
            drop[i, j] = clean[j] - seed.accuracy_ablated(tested, tested, effects, ns)
    own = np.eye(len(names), dtype=bool)
    intended, unintended = drop[own].mean(0), drop[~own].mean(0)
    return {"tpp": intended - unintended, "tpp_intended": intended, "tpp_unintended": unintended}

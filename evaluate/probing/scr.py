"""Spurious correlation removal, to SAEBench 0.6's protocol (EVALUATION.md 2.6).

A probe trained where two attributes always agree ("both") leans on the spurious one. Ablating the latents that matter
most to an unbiased probe of one attribute should make it rely on the other:
direction 1 ablates the second attribute's latents and tests "both" on the first attribute; direction 2 the other way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evaluate.probing.ablation import Ablation, level_scores
from evaluate.probing.series import Scores

DIRECTIONS = (("scr_dir1", "second", "first"), ("scr_dir2", "first", "second"))
"""(metric, whose latents are ablated, whose test rows the "both" probe is tested on)."""
MIN_GAP = 0.001
"""With less between the biased and the clean accuracy the score is 0: there is nothing to remove."""


def scr_scores(seeds: Sequence[Ablation], levels: Mapping[int, int], n_values: Sequence[int]) -> Scores:
    """scr_dir1, scr_dir2 and the reported `scr` for each level and each n up to its number of latents, by seed."""
    return level_scores(one_seed, seeds, levels, n_values)


def one_seed(seed: Ablation, n_latents: int, ns: Sequence[int]) -> dict[str, list[float | None]]:
    """Both directions and the reported one for each n, ablating among the first n_latents latents."""
    before, scores = [], []
    for _, ablated, tested in DIRECTIONS:
        before.append(seed.texts.accuracy("both", tested))
        clean = seed.texts.accuracy(tested, tested)
        effects = seed.effects(ablated, signed=False)[:n_latents]
        after = seed.accuracy_ablated("both", tested, effects, ns) if ns else []
        scores.append([removed_share(before[-1], value, clean) for value in after])
    return {"scr_dir1": [*scores[0]], "scr_dir2": [*scores[1]], "scr": reported(before, scores)}


def removed_share(before: float, after: float, clean: float) -> float:
    """(after − before) / (clean − before); 0 where clean − before < MIN_GAP. May be negative or above 1."""
    return 0.0 if clean - before < MIN_GAP else (after - before) / (clean - before)


def reported(before: Sequence[float], scores: Sequence[Sequence[float]]) -> list[float | None]:
    """SAEBench's scr_metric_threshold_n: the direction whose biased accuracy is lower; None where they are equal."""
    if before[0] == before[1]:
        return [None] * len(scores[0])
    return [*scores[0 if before[0] < before[1] else 1]]

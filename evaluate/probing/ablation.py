"""What zero-ablating the latents that matter most to one probe does to another: the core of SCR and TPP.

Ablating latents S at every position changes a text's pooled residual to x̄ − F̄_S W_dec,S (decode is linear and the SAE's
error is kept), so a probe's logit changes by −Σ_{i∈S} F̄_i (W_dec,i · w). One encode of the texts serves every n, every
direction, level and seed: latents are ranked once and the sum runs along the ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from evaluate.probing.probes import ProbedTexts, accuracy, contrast_rows
from evaluate.probing.series import Scores
from evaluate.probing.tasks import Contrast
from evaluate.probing.texts import PooledLatents


@dataclass(frozen=True)
class Ablation:
    """One SAE, one task, one seed: all that the scores look at.

    texts: the task's probes and residuals. latents: the SAE's pooled latents. contrast: probe name → [latent], mean pooled
    latent over positives minus over negatives of the training rows. gain: probe name → [latent], W_dec,i · w in raw space.
    """

    texts: ProbedTexts
    latents: PooledLatents
    contrast: dict[str, Float[Tensor, " latent"]]
    gain: dict[str, Float[Tensor, " latent"]]

    def effects(self, name: str, *, signed: bool) -> Float[Tensor, " latent"]:
        """How much each latent moves a probe's classes apart: contrast · gain. SCR takes its absolute value; TPP (signed)
        the value itself, for latents whose contrast is positive. Source: EVALUATION.md 2.4."""
        if signed:
            return self.contrast[name].clamp(min=0) * self.gain[name]
        return (self.contrast[name] * self.gain[name]).abs()

    def accuracy_ablated(
        self, probe: str, data: str, effects: Float[Tensor, " latent"], n_values: Sequence[int]
    ) -> list[float]:
        """Accuracy of `probe` on `data`'s test rows for each n, with the n latents of the largest effects ablated."""
        rows, labels = contrast_rows(self.texts.draw[data][1])
        ranked = ranking(effects, max(n_values))
        removed = self.latents.over_all_positions(rows.to(ranked.device), ranked) * self.gain[probe][ranked]
        running = removed.double().cumsum(1).cpu()  # [row, rank]
        running = torch.cat([torch.zeros(len(rows), 1, dtype=torch.float64), running], 1)
        counts = [min(n, int(effects.count_nonzero())) for n in n_values]
        logits = self.texts.logits(probe, rows)[:, None] - running[:, counts]  # [row, n]
        return accuracy(logits.T, labels).tolist()


def ranking(effects: Float[Tensor, " latent"], n: int) -> Int[Tensor, " rank"]:
    """The latents of the n largest effects, largest first, the lower index first where equal; fewer where there are fewer.

    SAEBench takes min(n, number of non-zero effects) of these, so with signed effects it may reach latents of effect 0, in
    an order that torch.topk leaves open; the stable order makes ours a function of the effects.
    """
    return effects.argsort(descending=True, stable=True)[:n]


def ablations(
    seeds: Sequence[ProbedTexts], latents: PooledLatents, decoder: Float[Tensor, "latent d_model"]
) -> list[Ablation]:
    """One Ablation a seed. All contrasts are one product over the texts, all gains one product over d_model."""
    names = list(seeds[0].draw)
    contrast = contrast_means(latents, [texts.draw[name][0] for texts in seeds for name in names])
    gain = torch.stack([texts.probes[name][0] for texts in seeds for name in names]).to(decoder.device) @ decoder.T
    blocks = zip(seeds, torch.split(contrast, len(names)), torch.split(gain, len(names)))
    return [Ablation(texts, latents, dict(zip(names, c)), dict(zip(names, g))) for texts, c, g in blocks]


def contrast_means(latents: PooledLatents, contrasts: Sequence[Contrast]) -> Float[Tensor, "contrast latent"]:
    """Mean pooled latent (real positions) over each contrast's positives minus over its negatives; float32."""
    weights = torch.zeros(len(contrasts), len(latents.mean))
    for row, contrast in zip(weights, contrasts):
        row[contrast.positive] += 1 / len(contrast.positive)
        row[contrast.negative] -= 1 / len(contrast.negative)
    return weights.to(latents.mean.device) @ latents.mean


OneSeed = Callable[[Ablation, int, Sequence[int]], Mapping[str, Iterable[float | None]]]
"""(one seed, latents of the level, ns) → metric → a value an n."""


def level_scores(
    one_seed: OneSeed, seeds: Sequence[Ablation], levels: Mapping[int, int], n_values: Sequence[int]
) -> Scores:
    """The scores of each level (index → number of latents) and each n up to that number, by seed."""
    scores: Scores = {}
    for level, n_latents in levels.items():
        ns = [n for n in n_values if n <= n_latents]
        for seed in seeds:
            for metric, values in one_seed(seed, n_latents, ns).items():
                for n, value in zip(ns, values):
                    scores.setdefault((metric, level, n), []).append(None if value is None else float(value))
    return scores

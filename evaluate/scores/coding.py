"""Sparse coding: how much the n most important latents of a row explain, absolutely and as a share of all of them.

The share alone is confounded with L0: an SAE of three latents a row explains with ten what it explains with all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from evaluate.scores.sample import Batch, Survey
from pipeline.sae.metrics import explained_variance, row_squares
from pipeline.sae.nested import NestedSAE

N_VALUES = (2, 5, 10, 20, 50, 100)


class SparseCoding:
    """Streaming Σ‖x − x̂_n‖² for each level and n, float64, where x̂_n keeps the n latents largest by |z_j|·‖W_dec,j‖.

    An n above a level's number of latents is left out. Extra memory: a batch's rows × (largest n) × 12 bytes.
    """

    def __init__(self, sae: NestedSAE, survey: Survey, n_values: Sequence[int] = N_VALUES) -> None:
        self.sae, self.survey = sae, survey
        self.n_values = [[n for n in sorted(n_values) if n <= m] for m in sae.config.levels]
        self.decoder_norms = sae.W_dec.norm(dim=1)
        self.error = survey.group_n.new_zeros(2, sae.config.n_levels, len(n_values))

    def update(self, z: Float[Tensor, "row latent"], batch: Batch, levels: Sequence[int]) -> None:
        """Add a batch's kept rows for some levels."""
        importance = z.abs() * self.decoder_norms
        for level in levels:
            m, ns = self.sae.config.levels[level], self.n_values[level]
            if not ns:
                continue
            top = importance[:, :m].topk(ns[-1], dim=1).indices
            kept = z.gather(1, top)
            x_hat = self.sae.base(batch.encoded).expand(len(z), -1)
            for i, (a, b) in enumerate(zip([0, *ns], ns)):
                x_hat = x_hat + decode_some(self.sae.W_dec, top[:, a:b], kept[:, a:b])
                error = row_squares(batch.x - self.sae.denormalize(x_hat, batch.encoded)).double()
                self.error[:, level, i] += batch.weights @ error

    def explained(self, level: int, k: int) -> list[tuple[int, float]]:
        """(n, ev with n latents) for weighting k; NaN where no row counts."""
        ev = explained_variance(self.error[k, level], self.survey.moments[k]).tolist()
        return list(zip(self.n_values[level], ev))

    def rates(self, level: int, full: float | None, k: int = 0) -> list[tuple[int, float | None]]:
        """(n, ev with n latents / `full`) for weighting k; None where the level's own ev, `full`, is not positive."""
        whole = full if full is not None and full > 0 else math.nan
        rates = [(n, ev / whole) for n, ev in self.explained(level, k)]
        return [(n, rate if math.isfinite(rate) else None) for n, rate in rates]


def decode_some(
    W_dec: Float[Tensor, "latent d_model"], indices: Tensor, values: Float[Tensor, "row n"]
) -> Float[Tensor, "row d_model"]:
    """Σ over some latents of each row of value · decoder row, without a dense matrix of latents."""
    return torch.nn.functional.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")

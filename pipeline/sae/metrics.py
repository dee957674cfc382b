"""Explained variance and the streaming sums behind it: the one definition that train logs and evaluate reports."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class Moments:
    """Count, Σx and Σ‖x‖² of the rows seen so far, in float64 on their device; equal for any split into batches.

    `moments.update(x)` adds rows; with `weights` [row] of 0 and 1 some are left out.
    """

    n: Float[Tensor, ""]
    sum_x: Float[Tensor, " d_model"]
    sum_sq: Float[Tensor, ""]

    @staticmethod
    def zeros(d_model: int, device: torch.device | str = "cpu") -> Moments:
        """Moments of no rows."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return Moments(zero, torch.zeros(d_model, dtype=torch.float64, device=device), zero.clone())

    def update(self, x: Float[Tensor, "row d_model"], weights: Float[Tensor, " row"] | None = None) -> None:
        """Add rows of any dtype; all arithmetic is float64."""
        w = torch.ones(len(x), dtype=torch.float64, device=x.device) if weights is None else weights.double()
        x = x.double()
        self.n = self.n + w.sum()
        self.sum_x = self.sum_x + w @ x
        self.sum_sq = self.sum_sq + w @ x.square().sum(-1)

    @property
    def centred_sum_sq(self) -> Float[Tensor, ""]:
        """Σ‖x − mean‖² = Σ‖x‖² − ‖Σx‖² / n; 0 of no rows."""
        return self.sum_sq - self.sum_x.square().sum() / self.n.clamp(min=1)


def row_squares(x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
    """‖x‖² of each row in float32, whatever the dtype of x."""
    return x.float().square().sum(-1)


def explained_variance(residual_sum_sq: Float[Tensor, "*levels"], moments: Moments) -> Float[Tensor, "*levels"]:
    """Centred explained variance, 1 − Σ‖x − x̂‖² / Σ‖x − mean‖²; the sums run over the same rows.

    1 is perfect, 0 is no better than the mean; NaN where the rows do not vary beyond float64 rounding. Invariant to a
    shift and a scale of x.
    """
    total = moments.centred_sum_sq
    return torch.where(total > 1e-12 * moments.sum_sq, 1 - residual_sum_sq.double() / total, torch.nan)

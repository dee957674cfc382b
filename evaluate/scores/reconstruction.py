"""How well a level rebuilds the residual: explained variance in three definitions, error, direction, length.

Per-row numbers are float32 on raw residuals; every sum over rows is float64, over all kept rows and again without the
massive ones. Definitions: pipeline/definitions.py; where the three explained variances come from: EVALUATION.md 1.2.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from evaluate.scores.sample import GROUP_SEQUENCES, Batch, Survey
from pipeline.sae.metrics import explained_variance, row_squares

COLUMNS = ("error", "length", "dot", "cosine", "l2_ratio", "legacy")


def row_numbers(
    x: Float[Tensor, "row d_model"], x_hat: Float[Tensor, "row d_model"]
) -> dict[str, Float[Tensor, " row"]]:
    """‖x − x̂‖², ‖x̂‖², x·x̂, cos(x, x̂) and ‖x̂‖/‖x‖ of each row (divisor 1 where ‖x‖ < 1e-4, as SAEBench has it)."""
    length, dot = row_squares(x_hat), torch.linalg.vecdot(x, x_hat)
    norm, norm_hat = row_squares(x).sqrt(), length.sqrt()
    return {
        "error": row_squares(x - x_hat),
        "length": length,
        "dot": dot,
        "cosine": dot / (norm * norm_hat).clamp(min=1e-8),
        "l2_ratio": norm_hat / torch.where(norm < 1e-4, 1.0, norm),
    }


class Reconstruction:
    """Streaming sums of one level's reconstructions; `scores` at the end."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.sums = survey.group_n.new_zeros(2, len(COLUMNS))
        self.group_error = torch.zeros_like(survey.group_n)

    @staticmethod
    def n_bytes(n_groups: int) -> int:
        """Bytes that it takes beside the survey."""
        return 2 * 8 * (len(COLUMNS) + n_groups)

    def update(self, batch: Batch, x_hat: Float[Tensor, "row d_model"], spread: Float[Tensor, "2 row"]) -> None:
        """Add the kept rows of a batch; `spread` is `spread_in_group` of it."""
        numbers = row_numbers(batch.x, x_hat)
        error = numbers["error"].double()
        plain = torch.stack(list(numbers.values()), 1).double()
        self.sums[:, : plain.shape[1]] += batch.weights @ plain
        self.sums[:, -1] += torch.where(batch.weights > 0, 1 - error / spread, 0.0).sum(1)
        self.group_error.index_add_(1, batch.group, batch.weights * error)

    def scores(self) -> list[dict[str, float | None]]:
        """Scores for both weightings. None where a score is not defined, NaN where the reconstruction was not finite."""
        return [self._scores(k) for k in range(2)]

    def _scores(self, k: int) -> dict[str, float | None]:
        moments = self.survey.moments[k]
        n, d_model = float(moments.n), len(moments.sum_x)
        if n == 0:
            return dict.fromkeys(SCORES)
        total = dict(zip(COLUMNS, self.sums[k].tolist()))
        mse = total["error"] / n
        if not math.isfinite(mse):
            return dict.fromkeys(SCORES, math.nan)
        ev = float(explained_variance(self.sums[k, 0], moments))
        legacy = total["legacy"] / n
        return {
            "ev": ev if math.isfinite(ev) else None,
            "ev_legacy": legacy if math.isfinite(legacy) else None,
            "ev_saebench": ev_saebench(
                self.group_error[k], self.survey.group_sum_sq[k], self.survey.group_n[k], d_model
            ),
            "mse": mse,
            "mse_per_dim": mse / d_model,
            "cosine": total["cosine"] / n,
            "l2_ratio": total["l2_ratio"] / n,
            "relative_reconstruction_bias": total["length"] / total["dot"] if total["dot"] else None,
        }


SCORES = (
    "ev",
    "ev_legacy",
    "ev_saebench",
    "mse",
    "mse_per_dim",
    "cosine",
    "l2_ratio",
    "relative_reconstruction_bias",
)


def spread_in_group(batch: Batch, means: Float[Tensor, "2 group d_model"]) -> Float[Tensor, "2 row"]:
    """‖x − mean of its group‖² of each kept row, float32, by the means (`GroupMeans`) of the rows of each weighting."""
    group = batch.group - batch.first // GROUP_SEQUENCES
    return torch.stack([row_squares(batch.x - mean.float()[group]).double() for mean in means])


def ev_saebench(
    error: Float[Tensor, " group"], sum_sq: Float[Tensor, " group"], n: Float[Tensor, " group"], d_model: int
) -> float | None:
    """sae-bench 0.6.0's explained variance: 1 − R / (S − q²), S and R unweighted means over groups, q = S / d_model.

    Its q² stands where the squared norm of the mean should: not centred, depends on the scale of x, may exceed 1.
    """
    some = n > 0
    s, r = (float((part[some] / n[some]).mean()) for part in (sum_sq, error))
    denominator = s - (s / d_model) ** 2
    return 1 - r / denominator if denominator else None

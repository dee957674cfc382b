"""The newest rows that a member has seen, from which batchtopk's inference threshold is taken.

A running mean of the batches' own thresholds lags behind the weights: after 100 steps it let through half of what it should.
The n-th largest latent of the newest rows under the weights of the moment does not lag, and 4096 rows fix L0 to half a per cent.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from train.config import TrainConfig

ROWS, PER_STEP = 4096, 256
"""Rows to hold, and the most that one batch gives."""


class Recent:
    """A ring of rows on the device, of the first ones of each batch; empty for recipes other than batchtopk."""

    def __init__(
        self, config: TrainConfig, d_model: int, dtype: torch.dtype, device: torch.device, n_processes: int
    ) -> None:
        self.per_step = min(PER_STEP, config.batch_size // n_processes)
        self.n_batches = -(-ROWS // self.per_step) if config.activation == "batchtopk" else 0
        self.ring = torch.zeros(self.n_batches * self.per_step, d_model, dtype=dtype, device=device)

    def see(self, x: Float[Tensor, "row d_model"], step: int) -> None:
        """Take in the batch of the step that follows `step` finished ones, instead of the oldest."""
        if self.n_batches:
            start = step % self.n_batches * self.per_step
            self.ring[start : start + self.per_step].copy_(x[: self.per_step])

    def rows(self, n_steps: int) -> Float[Tensor, "row d_model"]:
        """The newest rows after so many steps, in no order."""
        return self.ring[: min(n_steps, self.n_batches) * self.per_step]

    def state(self) -> dict[str, Tensor]:
        """What a resumed member needs of it."""
        return {"recent": self.ring} if self.n_batches else {}

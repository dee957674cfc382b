"""The first rows that a member saw, from which batchtopk's inference threshold is taken whenever it is asked for.

A running mean of the batches' own thresholds lags behind the weights: after 100 steps it let through half of what it should.
The n-th largest latent of some rows under the weights of the moment does not lag. Which rows, and how many, is measured: under
rows of the last 32 steps, which the weights have just been fitted to, L0 on others came out 1 to 2 % too large, under those of
long ago half of that; and early in a training L0 varies from row to row by as much as its mean, so that 4096 rows fix it to 2 %
and 16384 to 1 % (one standard deviation).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from train.config import TrainConfig

ROWS = 16_384
"""Rows to hold, those of all processes together."""


def n_held(config: TrainConfig) -> int:
    """Rows that the processes hold together."""
    n_batches = min(-(-ROWS // config.batch_size), config.steps)
    return n_batches * min(ROWS, config.batch_size) if config.activation == "batchtopk" else 0


class Sample:
    """Rows of the first batches, on the device; none for recipes other than batchtopk.

    A batch larger than the sample gives evenly spaced rows, as its rows stand in the order of the store.
    """

    def __init__(
        self, config: TrainConfig, d_model: int, dtype: torch.dtype, device: torch.device, n_processes: int
    ) -> None:
        self.per_step = min(ROWS, config.batch_size) // n_processes
        self.n_batches = n_held(config) // min(ROWS, config.batch_size)
        self.held = torch.zeros(self.n_batches * self.per_step, d_model, dtype=dtype, device=device)

    def see(self, x: Float[Tensor, "row d_model"], step: int) -> None:
        """Take in the batch of the step that follows `step` finished ones, while there is room."""
        if step < self.n_batches:
            start = step * self.per_step
            self.held[start : start + self.per_step].copy_(x[:: len(x) // self.per_step][: self.per_step])

    def rows(self, n_steps: int) -> Float[Tensor, "row d_model"]:
        """The rows held after so many steps."""
        return self.held[: n_steps * self.per_step]

    def state(self) -> dict[str, Tensor]:
        """What a resumed member needs of it."""
        return {"sample": self.held} if self.n_batches else {}

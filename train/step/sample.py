"""The first rows that a member saw, from which batchtopk's inference threshold is taken whenever it is asked for.

A running mean of the batches' own thresholds lags behind the weights: after 100 steps it let through half of what it should.
The n-th largest latent of some rows under the weights of the moment does not lag. Which rows, and how many, is measured: under
rows of the last 32 steps, which the weights have just been fitted to, L0 on others came out 1 to 2 % too large, under those of
long ago half of that; and early in a training L0 varies from row to row by as much as its mean, so that 4096 rows fix it to 2 %
and 16384 to 1 % (one standard deviation).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from train.config import TrainConfig

ROWS = 16_384
"""Rows to hold."""


def n_held(config: TrainConfig) -> int:
    """Rows that a member ends up with; 0 for recipes other than batchtopk."""
    n_batches = min(-(-ROWS // config.batch_size), config.steps)
    return n_batches * min(ROWS, config.batch_size) if config.activation == "batchtopk" else 0


class Sample:
    """Rows of the first batches, on the device: the same in every process of a group, however many they are.

    A batch larger than the sample gives evenly spaced rows, as its rows stand in the order of the store.
    """

    def __init__(
        self,
        config: TrainConfig,
        d_model: int,
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.group = group
        self.per_step = min(ROWS, config.batch_size)
        self.n_own = -(-self.per_step // dist.get_world_size(group)) if group else self.per_step
        self.n_batches = n_held(config) // self.per_step
        self.held = torch.zeros(n_held(config), d_model, dtype=dtype, device=device)

    def see(self, x: Float[Tensor, "row d_model"], step: int) -> None:
        """Take in this process's part of the batch of the step that follows `step` finished ones, while there is room.

        All processes of a group call it.
        """
        if step >= self.n_batches:
            return
        own = x[:: len(x) // self.n_own][: self.n_own]
        rows = own if self.group is None else gathered(own, self.group)
        self.held[step * self.per_step : (step + 1) * self.per_step].copy_(rows[: self.per_step])

    def pieces(self, n_steps: int) -> tuple[Float[Tensor, "row d_model"], ...]:
        """The rows held after so many steps, in pieces no larger than this process's part of a batch."""
        return torch.split(self.held[: n_steps * self.per_step], self.n_own)

    def state(self) -> dict[str, Tensor]:
        """What a resumed member needs of it."""
        return {"sample": self.held} if self.n_batches else {}


def gathered(own: Float[Tensor, "row d_model"], group: dist.ProcessGroup) -> Float[Tensor, "all_rows d_model"]:
    """The rows of all processes, rank by rank."""
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.cat(parts)

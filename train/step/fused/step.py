"""The order of a fused step, and the member that steps so."""

from __future__ import annotations

import torch
from torch import Tensor

from train.step.fused import account, auxiliary, dense, latents, optimiser, residuals, sparse, thresholds
from train.step.fused.context import Kept, Step
from train.step.member import Batch, Member


class FusedMember(Member):
    """A `Member` whose steps run in fused passes; its state, files and numbers are those of any member."""

    counts_active = False

    def _prepare(self) -> None:
        self.kept = Kept(self)

    def _changed(self) -> dict[str, Tensor]:
        return super()._changed() | self.kept.changed()

    def _calibrate(self) -> None:
        """As in `Member`, the same number, but nothing is fetched."""
        if self.config.activation != "batchtopk" or not self.n_steps:
            return
        pieces = self.sample.pieces(self.n_steps)
        found = thresholds.find_over(
            lambda: map(self._encoded, pieces), self.kept, self.config.k * sum(map(len, pieces))
        )
        self.threshold = found.to(self.wide)

    def _encoded(self, x: Tensor) -> Step:
        """Normalised rows, up to the encoder's product."""
        norm = torch.linalg.vector_norm(x, dim=1, dtype=self.wide)
        step = Step(self, self.kept, Batch(x, norm, norm, norm))
        latents.encode(step)
        latents.normalise(step)
        return step

    def _step(self, batch: Batch) -> None:
        step = Step(self, self.kept, batch)
        forward(step)
        (sparse if step.is_sparse else dense).backward(step)
        update(step)


def forward(step: Step) -> None:
    """Latents, reconstructions of all prefixes and what they leave over."""
    latents.encode(step)
    latents.normalise(step)
    auxiliary.find_pool(step)
    latents.select(step)
    (sparse if step.is_sparse else dense).decode(step)
    residuals.measure(step)
    auxiliary.forward(step)


def update(step: Step) -> None:
    """Sums over processes, the optimiser, counters."""
    reducer = step.member.reducer
    now = account.collect(step)
    reducer.add(step.vectors)
    reducer.add(now.flat)
    reducer.wait()
    optimiser.update(step)
    account.account(step, now)

"""How often and how strongly latents fire: L0, L1, dead latents, densities. Streaming, never rows × latents at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from evaluate.scores.sample import Batch

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Firing:
    """Counts of one SAE over the kept rows of the sample, float64; `levels` are its cumulative sizes.

    Memory: (2 + levels) · width · 8 bytes.
    """

    def __init__(self, levels: Sequence[int], device: torch.device | str) -> None:
        self.levels, width = tuple(levels), levels[-1]
        self.rows = torch.zeros(2, dtype=torch.float64, device=device)
        self.l0, self.l1 = torch.zeros(2, 2, len(levels), dtype=torch.float64, device=device)
        self.fired = torch.zeros(2, width, dtype=torch.float64, device=device)
        self.l0_counts = torch.zeros(len(levels), width + 1, dtype=torch.int64, device=device)

    def update(self, z: Float[Tensor, "row latent"], batch: Batch) -> None:
        """Add the latents of a batch's kept rows. A latent fires where it is not zero."""
        active = (z != 0).float()
        counts = self._cumulative(active)
        self.rows += batch.weights.sum(1)
        self.l0 += batch.weights @ counts.double()
        self.l1 += batch.weights @ self._cumulative(z.abs()).double()
        self.fired += (batch.weights.float() @ active).double()  # exact: counts of a batch are below 2^24
        for level, count in enumerate(counts.T.long()):
            self.l0_counts[level].index_add_(0, count, torch.ones_like(count))

    def _cumulative(self, values: Float[Tensor, "row latent"]) -> Float[Tensor, "row level"]:
        """Sums over the latents of each level, float32."""
        blocks = [values[:, a:b].sum(1) for a, b in zip((0, *self.levels), self.levels)]
        cumulative: Tensor = torch.cumsum(torch.stack(blocks, 1), 1)
        return cumulative

    def scores(self, level: int) -> list[dict[str, float | None]]:
        """l0, sparsity, l1, dead and alive of one level for both weightings; None when no row counts."""
        m, found = self.levels[level], []
        for k in range(2):
            n = float(self.rows[k])
            if n == 0:
                found.append(dict.fromkeys(("l0", "sparsity", "l1", "dead", "alive")))
                continue
            l0 = float(self.l0[k, level]) / n
            dead = float((self.fired[k, :m] == 0).double().mean())
            l1 = float(self.l1[k, level]) / n
            found.append({"l0": l0, "sparsity": 1 - l0 / m, "l1": l1, "dead": dead, "alive": 1 - dead})
        return found

    def l0_quantiles(self, level: int) -> dict[str, int]:
        """The distribution of L0 over all kept rows: the smallest count that so large a share of rows does not exceed."""
        cumulative = self.l0_counts[level].cumsum(0).double()
        total = float(cumulative[-1])
        return {f"{q:g}": int((cumulative < max(q * total, 1)).sum()) for q in QUANTILES} if total else {}

    def density(self) -> Float[Tensor, " latent"]:
        """Share of all kept rows on which each latent fires, float64."""
        return self.fired[0] / self.rows[0].clamp(min=1)

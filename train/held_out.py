"""How a member does on rows that it is not trained on, by the rule of inference: a fixed sample of the store's eval split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.sae.nested import NestedSAE
from pipeline.store.kept import KeptRows
from pipeline.store.split import Split
from train.config import TrainConfig

ROWS, CHUNKS = 4096, 8
"""Rows to hold, evenly spread over those of so many chunks, which are evenly spread over the split."""
BLOCK = 1024
"""Rows encoded at a time."""


@dataclass(frozen=True)
class HeldOut:
    """Raw rows on the device: those to be encoded [row, d_model] and those to be made [row, d_made], of an SAE the same; and
    Σ‖y − mean‖² over the latter."""

    x: Tensor
    y: Tensor
    variance: float

    @staticmethod
    def read(split: Split, kept: KeptRows, device: torch.device, target: Split | None = None) -> HeldOut | None:
        """The sample of a split's kept rows, for transcoders with the same rows of `target`; None where what is to be made
        does not vary, so that nothing can be explained. Raises DamagedError."""
        x = sampled(split, kept)
        y = x if target is None else sampled(target, kept)
        wide = y.double()
        variance = float((wide - wide.mean(0)).square().sum()) if len(y) else 0.0
        x = x.to(device)
        return HeldOut(x, x if target is None else y.to(device), variance) if variance > 0 else None

    @torch.inference_mode()
    def scores(self, sae: NestedSAE) -> dict[str, Float[Tensor, " level"]]:
        """eval_ev, 1 − Σ‖y − ŷ‖² / Σ‖y − mean‖², and eval_l0, mean latents a row, of every level, innermost first, on the device,
        where the SAE is."""
        levels = sae.config.levels
        errors, fired = (torch.zeros(len(levels), dtype=torch.float64, device=self.x.device) for _ in range(2))
        for x, y in zip(torch.split(self.x, BLOCK), torch.split(self.y, BLOCK)):
            z = sae.encode(x)
            fired += torch.stack([(z[:, :m] != 0).sum() for m in levels])
            errors += torch.stack([squared(y.float() - made) for made in sae.decode_levels(z, x)])
        return {"eval_ev": 1 - errors / self.variance, "eval_l0": fired / len(self.x)}


def sampled(split: Split, kept: KeptRows) -> Tensor:
    """Some kept rows of a split, evenly spread."""
    chunks = np.unique(np.linspace(0, split.n_chunks - 1, CHUNKS).round().astype(int))
    blocks = []
    for chunk, mask in zip(chunks.tolist(), kept.mask(chunks)):
        first, stop = split.chunk_rows_range(chunk)
        blocks.append(split.read(first, stop)[torch.from_numpy(mask[: stop - first])])
    x = torch.cat(blocks)
    return x[np.unique(np.linspace(0, max(len(x) - 1, 0), min(ROWS, len(x))).round().astype(int))]


def squared(difference: Float[Tensor, "row d_model"]) -> Float[Tensor, ""]:
    """Sum of squares, in float64."""
    return difference.double().square().sum()


def is_due(config: TrainConfig, step: int) -> bool:
    """Whether the line of metrics of a step has held-out scores: the first after every `eval_every` steps, and the last."""
    if not config.eval_every:
        return False
    return step == config.steps or step // config.eval_every > (step - config.log_every) // config.eval_every


def memory_bytes(config: TrainConfig, d_model: int, d_out: int | None = None) -> int:
    """Bytes that scoring takes where the member lives: the rows, latents of a block, and where training is in float64 a float32
    copy of the SAE."""
    if not config.eval_every:
        return 0
    made = d_out or d_model
    n_weights = (d_model + made + 6) * config.width + d_model * made * config.skip
    rows = ROWS * (d_model + (d_out or 0)) + 4 * BLOCK * (config.width + made)
    return 4 * (rows + (n_weights if config.dtype == "float64" else 0))

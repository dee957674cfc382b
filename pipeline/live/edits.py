"""Ready edits of latents for `attach(…, edit=…)`: each returns a function of z that leaves its argument as it was.

Strengths and values are in the units of z, those of the SAE's training space: the residual moves by strength / scale along
the latent's unit decoder row, times its own deviation where the SAE normalises each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Edit = Callable[[Float[Tensor, "row latent"]], Float[Tensor, "row latent"]]
"""From the latents of the rows that are spliced to those that are decoded instead, same shape."""


def steer(latent: int, strength: float) -> Edit:
    """Add `strength` to one latent on every row, whether it fires there or not."""
    return lambda z: z.index_add(-1, _index([latent], z), z.new_full((len(z), 1), strength))


def ablate(latents: Sequence[int]) -> Edit:
    """Set latents to zero."""
    return lambda z: z.index_fill(-1, _index(latents, z), 0.0)


def clamp(latent: int, value: float) -> Edit:
    """Set one latent to a value on every row."""
    return lambda z: z.index_fill(-1, _index([latent], z), value)


def _index(latents: Sequence[int], z: Tensor) -> Tensor:
    """Indices on z's device. Raises IndexError naming the latent that is outside."""
    outside = [latent for latent in latents if not 0 <= latent < z.shape[-1]]
    if outside:
        raise IndexError(f"latent {outside[0]} is outside this level's 0 to {z.shape[-1] - 1}")
    return torch.tensor(list(latents), device=z.device)

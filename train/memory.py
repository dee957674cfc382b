"""How much memory a member needs, by part, before it is made."""

from __future__ import annotations

import torch

from train.config import TrainConfig
from train.step.member import product_dtype
from train.step.scratch import CACHE_NUMBERS
from train.step.weights import initial_shapes

SHARED_PARTS = ("activations", "gradients")
"""Parts that all members on a device share: count the largest member's once, not the sum."""


def memory_bytes(config: TrainConfig, d_model: int, device: torch.device) -> dict[str, int]:
    """Bytes of one member by part: weights (with the products' copy), optimiser, counters; activations and gradients are
    those of the member that is stepping (SHARED_PARTS). `config.dtype` is resolved."""
    low = product_dtype(config.dtype).itemsize
    wide = max(low, 4)
    n_rows, width, shape = config.batch_size, config.width, config.sae_config(d_model)
    n_weights = sum(torch.Size(size).numel() for size in initial_shapes(config, d_model).values())
    matrices = 2 * d_model * width
    n_latent_arrays = 2 + (shape.layernorm != "none" or shape.activation == "jumprelu")
    chunk = min(CACHE_NUMBERS, n_rows * width) if device.type == "cpu" else n_rows * width
    n_chunks = 6 if shape.layernorm != "none" else 3
    rows = n_rows * d_model * (low * (1 + shape.n_levels + bool(config.aux_k)) + 3 * wide)
    pool = min(2 * config.aux_k, width) * (n_rows * 3 + d_model) * low
    return {
        "weights": n_weights * wide + (matrices * low if low != wide else 0),
        "optimiser": 2 * n_weights * wide,
        "counters": width * (8 + 2 * wide) + 8 * d_model,
        "activations": n_latent_arrays * n_rows * width * low + n_chunks * chunk * wide + rows + pool,
        "gradients": matrices * low,
    }

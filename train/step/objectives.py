"""What is minimised. With n rows, x̂_m the decode of the first m latents, w_m a weight and c(t) the warm-up's factor:

    nested     Σ_m w_m ‖x − x̂_m‖² / n  +  c(t) (λ_s S_shared + λ_f S_specialised)  +  auxiliary
    additive   the same with one reconstruction term, m = width (the paper's Eq. 5)

S is E Σ|z| (l1) or E ‖z‖₀ (l0) over the shared or the specialised latents. Dimensions are summed, rows averaged; a flat
SAE has only specialised latents. Every level is decoded from the one before it, and the gradient that reaches level m's
own block is the suffix sum Σ_{m' ≥ m} 2 w_m' (x̂_m' − x) / n, so that levels cost no further products.

    auxiliary  coefficient · E ‖(x − x̂) − ẑ W_dec‖², x − x̂ a constant: what the dictionary leaves over, explained by the
               largest `aux_k` latents of each row among dead ones, before selection (Gao et al. 2024, A.2). Candidates
               are the 2 · aux_k latents that have gone longest without firing, so that its cost is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.base.runtime import numpy_rng
from pipeline.sae.config import ALIGNED_FROM, ALIGNMENT
from train.config import TrainConfig, inner_weight
from train.step.latents import PoolGradient
from train.step.scratch import Scratch, row_chunks
from train.step.selection import row_thresholds


@dataclass(frozen=True)
class Terms:
    """The reconstruction terms of one step: prefixes of the dictionary, increasing to the width, and their weights."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def blocks(self) -> tuple[slice, ...]:
        """Latents that each prefix adds to the one before."""
        return tuple(slice(a, b) for a, b in zip((0, *self.sizes), self.sizes))


def reconstruction_terms(config: TrainConfig, levels: tuple[int, ...], step: int) -> Terms:
    """The terms of the update that follows `step` finished ones; random prefixes are a function of seed and step."""
    n = len(levels)
    if config.objective == "additive":
        return Terms(levels, (0.0,) * (n - 1) + (1.0,))
    if config.level_weighting == "size":
        return Terms(levels, tuple(n * size / sum(levels) for size in levels))
    if config.level_weighting == "random" and n > 1:
        return Terms(random_prefixes(levels, config.seed, step), (1.0,) * n)
    if (inner := inner_weight(config.level_weighting)) is not None:
        return Terms(levels, (inner,) * (n - 1) + (1.0,))
    return Terms(levels, (1.0,) * n)


def random_prefixes(levels: tuple[int, ...], seed: int, step: int) -> tuple[int, ...]:
    """As many distinct prefixes as levels: log-uniform from the first level to the width, aligned as levels are, and the
    whole."""
    rng = numpy_rng("prefixes", seed, step)
    first, width = levels[0], levels[-1]
    unit = ALIGNMENT if width >= ALIGNED_FROM else 1
    sizes: set[int] = set()
    n_inner = min(len(levels) - 1, (width - first) // unit)
    while len(sizes) < n_inner:
        drawn = first * math.exp(rng.random() * math.log(width / first))
        sizes.add(min(width - unit, int(drawn / unit) * unit))
    return (*sorted(sizes), width)


def penalty_weights(config: TrainConfig, n_shared: int) -> Float[Tensor, " latent"]:
    """λ_s on shared and λ_f on specialised latents, float64."""
    weights = torch.full((config.width,), config.lambda_specialised, dtype=torch.float64)
    weights[:n_shared] = config.lambda_shared
    return weights


@dataclass
class Reconstruction:
    """Every prefix's error and the gradients it sends back."""

    errors: Tensor  # [level] float64 Σ ‖x − x̂‖² over rows
    gradients: list[Tensor]  # a [row, d_model] in the products' dtype a level: ∂loss/∂(what its own block adds to x̂)
    b_dec: Tensor  # [d_model] ∂(reconstruction terms)/∂b_dec, but not through the encoder
    remainder: Tensor | None  # [row, d_model] x̂ − x of the whole dictionary, when asked for


def decode(
    z: Float[Tensor, "row latent"],
    w_dec: Float[Tensor, "latent d_model"],
    terms: Terms,
    out: Sequence[Float[Tensor, "row d_model"]],
) -> None:
    """Decode every prefix from the one before it; all in the products' dtype."""
    for i, block in enumerate(terms.blocks):
        if i == 0:
            torch.mm(z[:, block], w_dec[block], out=out[0])
        else:
            torch.addmm(out[i - 1], z[:, block], w_dec[block], out=out[i])


def reconstruct(
    decoded: list[Float[Tensor, "row d_model"]],
    b_dec: Float[Tensor, " d_model"],
    x: Float[Tensor, "row d_model"],
    terms: Terms,
    n_rows: int,
    scratch: Scratch,
    keep_remainder: bool,
) -> Reconstruction:
    """Errors of the decodes of all prefixes, which are turned in place into the suffix sums of the backward.

    decoded is in the products' dtype, x and b_dec in the weights'; n_rows is what losses are averaged over.
    """
    errors = torch.zeros(len(terms.sizes), dtype=torch.float64, device=x.device)
    b_dec_gradient = torch.zeros_like(b_dec)
    remainder = scratch.take("remainder", tuple(x.shape), decoded[0].dtype) if keep_remainder else None
    for rows in row_chunks(len(x), x.shape[1], x.device):
        target = x[rows] - b_dec
        suffix = torch.zeros_like(target)
        for i in reversed(range(len(terms.sizes))):
            error = decoded[i][rows] - target
            errors[i] += torch.dot(error.view(-1), error.view(-1))
            if remainder is not None and i == len(terms.sizes) - 1:
                remainder[rows] = error
            suffix.add_(error, alpha=2 * terms.weights[i] / n_rows)
            decoded[i][rows] = suffix
        b_dec_gradient += suffix.sum(0)
    return Reconstruction(errors, decoded, b_dec_gradient, remainder)


def auxiliary_pool(config: TrainConfig, rows_since_fired: Int[Tensor, " latent"]) -> Tensor | None:
    """Latents the auxiliary loss may use: those longest without firing, [pool] int64; None without that loss.

    On a CPU only dead ones, and None when there are none, which changes no number; on an accelerator asking would stall it.
    """
    if not config.aux_k:
        return None
    size = 2 * config.aux_k
    if rows_since_fired.device.type == "cpu":
        size = min(size, int((rows_since_fired >= config.dead_after_rows).sum()))
    if not size:
        return None
    return torch.sort(rows_since_fired, descending=True, stable=True).indices[:size]


def auxiliary_loss(
    config: TrainConfig,
    pool: Int[Tensor, " pool"],
    is_dead: Float[Tensor, " pool"],
    pool_z: Float[Tensor, "row pool"],
    w_dec: Float[Tensor, "latent d_model"],
    remainder: Float[Tensor, "row d_model"],
    n_rows: int,
    decoder_gradient: Float[Tensor, "latent d_model"],
) -> tuple[Tensor, PoolGradient]:
    """Loss (float64) and gradient for the pool's latents; the decoder's share is added to `decoder_gradient`.

    `pool_z` holds latents before selection and is overwritten; `remainder` is x̂ − x; `is_dead` 1 or 0 in z's dtype.
    """
    pool_z.mul_(is_dead)
    if len(pool) > config.aux_k:
        pool_z.mul_(pool_z >= row_thresholds(pool_z, config.aux_k))
    rows = w_dec[pool]
    error = (pool_z @ rows).to(torch.float64 if pool_z.dtype == torch.float64 else torch.float32) + remainder
    loss = config.aux_coefficient * error.square().sum().double() / n_rows
    slope = (error * (2 * config.aux_coefficient / n_rows)).to(pool_z.dtype)
    decoder_gradient.index_add_(0, pool, pool_z.T @ slope)
    return loss, PoolGradient(pool, (slope @ rows.T).mul_(pool_z > 0))

"""What the parts of a fused step share: the member, what it keeps from step to step, and the arrays of the step at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from train.step import objectives
from train.step.fused import tiles
from train.step.fused.activation import Made
from train.step.fused.tiles import ceil_div
from train.step.member import Batch, Member

VECTORS = ("b_enc", "ln_gain", "ln_bias", "b_dec", "log_threshold")
"""Weights that one launch updates, in the order in which they lie in memory."""

NORMS = {"none": 0, "pre": 1, "post": 2}


class Kept:
    """What a member that steps in fused passes keeps beside its state.

    `search` guides batchtopk's threshold (`thresholds.py`), `bins` are its histograms, empty between steps; `control`, `norm`
    and `l0` are this step's, on the device; `vectors` are all vectors of weights in one, and their moments, `rates` their parts
    of the learning rate; `flags` are what kernels of this config are compiled for.
    """

    def __init__(self, member: Member) -> None:
        config, self.device = member.config, member.device
        names = [name for name in VECTORS if name in member.weights]
        kinds = (member.weights, member.adam.first, member.adam.second, member.adam.rates)
        *self.vectors, self.rates = [join(weights, names) for weights in kinds]
        self.search = torch.zeros(4, dtype=torch.float32, device=self.device)
        self.control = torch.zeros(3, dtype=torch.float32, device=self.device)
        self.norm = torch.zeros((), dtype=torch.float64, device=self.device)
        self.l0 = torch.zeros((), dtype=torch.float64, device=self.device)
        self.bins = [torch.zeros(1 << bits, dtype=torch.int32, device=self.device) for bits in bins_bits(member)]
        self.tables: dict[tuple[Any, ...], Tensor] = {}
        layernorm = member.shape.layernorm
        self.flags: dict[str, Any] = {
            "NORM": NORMS[layernorm],
            "RESCALE": layernorm != "none" and member.shape.layernorm_rescale,
        }
        self.kind = int(config.activation == "jumprelu")

    def table(self, numbers: Sequence[float] | Sequence[int], dtype: torch.dtype) -> Tensor:
        """Numbers of the config as a tensor on the device, made once."""
        key = (tuple(numbers), dtype)
        if key not in self.tables:
            self.tables[key] = torch.tensor(numbers, dtype=dtype, device=self.device)
        return self.tables[key]

    def changed(self) -> dict[str, Tensor]:
        """All tensors of it that a step changes and a later one reads."""
        return {f"bins{n}": bins for n, bins in enumerate(self.bins)} | {"search": self.search}


def bins_bits(member: Member) -> list[int]:
    """Histograms that batchtopk's threshold is found by: the upper bits, and where products are not bf16 the others."""
    if member.config.activation != "batchtopk":
        return []
    return [15] if member.dtype == torch.bfloat16 else [15, 16]


def join(parts: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """The named tensors in one, of which they are views from now on."""
    joined = torch.cat([parts[name] for name in names])
    for name, view in zip(names, torch.split(joined, [len(parts[name]) for name in names])):
        parts[name] = view
    return joined


class Step:
    """One step of a member on a batch. Its arrays are set one after another by the functions that make them; those of dead
    latents (slots, pool, pool_z, pool_gradient, n_dead) are `none` where no latent can be dead yet."""

    x_low: Tensor  # [row, d_model] x − b_dec in the products' dtype
    a: Tensor  # [row, latent] the encoder's product, overwritten by ∂loss/∂z where the backward does not need it
    z: Tensor  # [row, latent] latents
    ratios: Tensor  # [row] ‖x‖/√d_model, which LayerNorm's latents are multiplied by
    moments: Tensor  # [2, level, row] LayerNorm's means and 1/σ
    counts: Tensor  # [part, latent] rows on which each is not 0
    sizes: Tensor  # [2, part, block] Σ|z| shared, specialised
    decoded: Tensor  # [term, row, d_model] reconstructions, then what the loss sends back to each term's own block
    row_lists: Tensor  # [row, latent] of sparse products: each row's latents that are not 0
    stops: Tensor  # [term, row] how many of them are in each prefix
    latent_lists: Tensor  # [latent, row] each latent's rows on which it is not 0
    remainder: Tensor  # [row, d_model] x̂ − x
    errors: Tensor  # [term, part, block] Σ ‖x − x̂‖²
    b_dec_parts: Tensor  # [part, d_model] ∂loss/∂b_dec through the decoder
    slots: Tensor  # [latent] a dead latent's place in the pool, or −1
    pool: Tensor  # [pool] dead latents
    n_dead: Tensor  # [1] how many there are in it
    pool_z: Tensor  # [row, pool] their latents before selection
    pool_gradient: Tensor  # [row, pool] ∂(auxiliary loss)/∂(pool_z)
    slope: Tensor  # [row, d_model] what the auxiliary loss sends back
    losses: Tensor  # parts of the auxiliary loss
    gradients: Tensor  # [2, width · d_model] of W_dec and W_enc in the products' dtype
    w_dec: Tensor  # [latent, d_model] the first of them
    w_enc: Tensor  # the second, as W_enc lies in memory
    vectors: Tensor  # gradients of all vectors, float32, in the order of VECTORS
    factor: Tensor  # [] of the penalty

    def __init__(self, member: Member, kept: Kept, batch: Batch) -> None:
        self.member, self.kept, self.batch = member, kept, batch
        config, shape = member.config, member.shape
        self.config = config
        self.n_rows, self.d_model = batch.x.shape
        self.width = config.width
        self.n_rows_all = member._n_rows(batch)
        self.is_sparse = member._is_sparse_now
        self.ends = kept.table(shape.levels, torch.int32)
        self.n_levels = shape.n_levels
        self.terms = objectives.reconstruction_terms(config, shape.levels, member.n_steps)
        self.slopes = kept.table([2 * weight / self.n_rows_all for weight in self.terms.weights], torch.float32)
        self.n_parts = ceil_div(self.n_rows, tiles.ROWS)
        self.tiles = (self.n_parts, ceil_div(self.width, tiles.LATENTS))
        self.tiling: dict[str, Any] = {"PART_ROWS": tiles.ROWS, "TILE_R": tiles.TILE_ROWS, "TILE_F": tiles.LATENTS}
        self.pool_size = min(2 * config.aux_k, self.width) if member._may_have_dead else 0
        self.none = member.weights["b_enc"]  # stands where a kernel of this config reads nothing

    @property
    def first_bit(self) -> int:
        """The lowest bit of a float32 that products may have."""
        return 16 if self.member.dtype == torch.bfloat16 else 0

    def take(self, name: str, *shape: int) -> Tensor:
        """Scratch memory in the products' dtype."""
        return self.member.scratch.take(name, shape, self.member.dtype)

    def wide(self, name: str, *shape: int) -> Tensor:
        """Scratch memory in float32."""
        return self.member.scratch.take(name, shape, torch.float32)

    def take_dz(self) -> Tensor:
        """Memory of ∂loss/∂z [row, latent]: that of the encoder's product, which only LayerNorm and thresholds need again."""
        if self.kept.flags["NORM"] or self.kept.kind:
            return self.take("dz", self.n_rows, self.width)
        return self.a

    def columns(self, *names: str) -> list[Tensor]:
        """Vectors of weights over latents; where there is none, one that is not read."""
        return [self.member.weights.get(name, self.none) for name in names]

    def read(self, *tensors: Tensor) -> list[Tensor]:
        """What a pass over latents reads: the tensors, each once, the ends of levels and the slots of the pool."""
        return unique((*tensors, self.ends, self.slots))

    @property
    def made(self) -> Made:
        """What latents before selection are made of."""
        b_enc, gain, shift, log_threshold = self.columns("b_enc", "ln_gain", "ln_bias", "log_threshold")
        return Made(
            self.a, b_enc, gain, shift, log_threshold, self.moments, self.ratios, self.ends, self.n_rows, self.width
        )


def unique(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among some arguments, each once."""
    return list({id(value): value for value in values if isinstance(value, Tensor)}.values())

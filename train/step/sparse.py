"""Products over the latents that are not 0 alone: four of a step's five large products touch k latents a row, not all of them.

    x̂_i = Σ_j z_ij W_dec,j     ∂W_dec,j = Σ_i z_ij G_i     ∂z_ij = G_i · W_dec,j     ∂W_encᵀ,j = Σ_i ∂z_ij (x_i − b_dec)

over the entries (i, j) at which latent j is not 0 on row i; the encoder's own product needs all of them. W_enc lies in memory by
latents, so that a latent's gradient is a row. For topk and batchtopk without LayerNorm (whose gradient reaches every latent),
from where k has stopped falling; before that the products are dense. Here in plain PyTorch, the reference; `fused/sparse.py` has
the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.base.errors import UsageError
from train.config import Sparse, TrainConfig, selects

LEAST_WIDTH = 65_536
"""`auto` considers dictionaries from this width on: below it four dense products take less than what a sparse step adds."""

SHOWN: dict[str, int] = {}
"""GPUs on which a sparse step was faster than the dense one at LEAST_WIDTH, by the beginning of the name that torch gives, and
the largest k at which it was: what `tests/gpu/run.sh --only sparse` prints as "shown". None was measured yet."""

CHUNK = 1 << 14
"""Entries whose rows and latents are multiplied at a time."""


def refusal(config: TrainConfig, is_transcoder: bool) -> str:
    """Why a member cannot step with sparse products, or nothing."""
    if is_transcoder:
        return "transcoders have dense steps"
    if not selects(config):
        return f"{config.activation} has dense steps; --recipe topk or batchtopk"
    if config.layernorm != "none":
        return f"LayerNorm ({config.layernorm}) sends gradients to every latent; --layernorm none"
    if config.level_weighting == "random":
        return "random prefixes have dense steps; --level-weighting equal"
    return ""


def is_sparse(choice: Sparse, config: TrainConfig, device: torch.device, *, is_transcoder: bool = False) -> bool:
    """Whether a member steps with sparse products: where `on` asks for it, or where `auto` knows them to be faster.

    Raises UsageError when `on` is asked of a member that cannot.
    """
    why = refusal(config, is_transcoder)
    if choice == "on" and why:
        raise UsageError(f"--sparse on: {why}, or leave --sparse out")
    if choice != "auto" or why:
        return choice == "on"
    return (
        config.width >= LEAST_WIDTH
        and device.type == "cuda"
        and config.k <= largest_k(torch.cuda.get_device_name(device))
    )


def largest_k(device_name: str) -> int:
    """Latents a row up to which sparse products were shown to be faster on a GPU of this name; 0 where nothing was shown."""
    return max((k for name, k in SHOWN.items() if device_name.startswith(name)), default=0)


def by_latent(weight: Float[Tensor, "d_model latent"]) -> Float[Tensor, "d_model latent"]:
    """The same matrix, a latent a row in memory."""
    return weight.T.contiguous().T


class Active:
    """The entries of z that are not 0, by row and by latent. `blocks`: slices over latents, one a reconstruction term."""

    def __init__(self, z: Float[Tensor, "row latent"], blocks: Sequence[slice]) -> None:
        self.n_rows, self.width = z.shape
        self.blocks = blocks
        self.rows, self.latents = z.nonzero(as_tuple=True)
        self.values = z[self.rows, self.latents]
        order = torch.argsort(self.latents, stable=True)
        self.by_latent = order
        self.starts = offsets(self.latents[order], self.width)

    def decode(self, w_dec: Float[Tensor, "latent d"], out: Sequence[Float[Tensor, "row d"]]) -> None:
        """Every prefix's reconstruction, each from the one before."""
        for i, block in enumerate(self.blocks):
            own = torch.nonzero((self.latents >= block.start) & (self.latents < block.stop)).squeeze(1)
            rows = offsets(self.rows[own], self.n_rows)
            added = weighted_sums(w_dec, self.latents[own], rows, self.values[own])
            out[i].copy_(added if i == 0 else out[i - 1] + added)

    def decoder_gradient(self, gradients: Sequence[Float[Tensor, "row d"]], out: Float[Tensor, "latent d"]) -> None:
        """∂W_dec from what the loss sends back to each block."""
        for block, gradient in zip(self.blocks, gradients):
            out[block] = self._over_rows(gradient, self.values, block)

    def latents_gradient(
        self, gradients: Sequence[Float[Tensor, "row d"]], w_dec: Float[Tensor, "latent d"], wide: torch.dtype
    ) -> Float[Tensor, " entry"]:
        """∂loss/∂z of every entry, in the order of `rows`, in the dtype of `w_dec`."""
        out = torch.empty_like(self.values)
        for block, gradient in zip(self.blocks, gradients):
            own = torch.nonzero((self.latents >= block.start) & (self.latents < block.stop)).squeeze(1)
            for some in torch.split(own, CHUNK):
                left, right = gradient[self.rows[some]].to(wide), w_dec[self.latents[some]].to(wide)
                out[some] = (left * right).sum(1).to(out.dtype)
        return out

    def encoder_gradient(
        self, gradient: Float[Tensor, " entry"], x: Float[Tensor, "row d_model"], out: Float[Tensor, "latent d_model"]
    ) -> None:
        """∂W_encᵀ from ∂loss/∂z of every entry."""
        out.copy_(self._over_rows(x, gradient, slice(0, self.width)))

    def sums(self, gradient: Float[Tensor, " entry"]) -> Float[Tensor, " latent"]:
        """Σ over rows of a number an entry, a latent each."""
        ones = torch.ones(self.n_rows, 1, dtype=gradient.dtype, device=gradient.device)
        return self._over_rows(ones, gradient, slice(0, self.width)).squeeze(1)

    def _over_rows(self, table: Tensor, weights: Tensor, block: slice) -> Float[Tensor, "latent d"]:
        """Σ over the rows on which each latent of a block is not 0 of its weight times the table's row."""
        starts = self.starts[block]
        stop = self.starts[block.stop] if block.stop < self.width else len(self.rows)
        own = self.by_latent[int(starts[0]) : int(stop)]
        return weighted_sums(table, self.rows[own], starts - starts[0], weights[own])


def offsets(sorted_indices: Int[Tensor, " entry"], n: int) -> Int[Tensor, " n"]:
    """Where the entries of each index begin, of entries that are sorted by it."""
    return torch.searchsorted(sorted_indices, torch.arange(n, device=sorted_indices.device))


def weighted_sums(
    table: Float[Tensor, "index d"], indices: Int[Tensor, " entry"], starts: Int[Tensor, " bag"], weights: Tensor
) -> Float[Tensor, "bag d"]:
    """Of each bag of entries, the sum of weight times the table's row; bags lie one behind the other."""
    return F.embedding_bag(indices, table, starts, mode="sum", per_sample_weights=weights)

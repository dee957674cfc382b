"""From pre-activations to latents and back: bias, LayerNorm, activation, selection, counts, and their gradients.

Everything between the large products that touches a [row, latent] array is here, done in chunks of rows that stay in
cache. Without LayerNorm the chain works in place on the products' dtype; with it, in the weights' dtype. The formulas
forward are those of `pipeline.sae.nested`; with p the argument of the activation, r = ‖x‖/√d_model and g = ∂loss/∂z:

    relu, topk, batchtopk   ∂p = r · g where z ≠ 0, else 0
    jumprelu                the same, and for its threshold θ with bandwidth ε and K = 1 where |p − θ| < ε/2:
                            ∂θ = − Σ_rows (θ/ε) K r g − Σ_rows (λ/ε) K      (the second for an L0 penalty)

The last line is the straight-through estimate of Rajamanoharan et al. 2024, "Jumping Ahead", Eq. 11 and 12, with a
rectangle for the kernel, whose width ε is `bandwidth` · θ; the L0 penalty has no gradient but this one. What is trained is
log θ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from pipeline.sae.config import SAEConfig
from train.config import TrainConfig
from train.step.scratch import Scratch, row_chunks
from train.step.selection import MARGIN, batch_threshold, global_threshold, row_thresholds


@dataclass
class Fired:
    """Counts over one batch."""

    counts: Tensor  # [latent] rows on which each latent is not zero
    l1: Tensor  # [2] float64 Σ|z| over all rows: shared, specialised


@dataclass
class Penalty:
    """The gradient of the sparsity penalty, a number a latent: λ over the number of rows."""

    kind: str
    weight: Tensor  # [latent]


@dataclass
class PoolGradient:
    """What the auxiliary loss adds to ∂loss/∂z of the latents in its pool."""

    latents: Tensor  # [pool] int64
    gradient: Tensor  # [row, pool]


class Latents:
    """Latents of the batch at hand. `z` is [row, latent] in the products' dtype, valid until the next `forward`."""

    z: Tensor

    def __init__(
        self,
        config: TrainConfig,
        shape: SAEConfig,
        weights: Mapping[str, Tensor],
        scratch: Scratch,
        dtype: torch.dtype,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.config = config
        self.shape = shape
        self.weights = weights
        self.scratch = scratch
        self.dtype = dtype
        self.group = group
        self.wide = weights["b_enc"].dtype
        self.pool: Tensor | None = None
        self.last_threshold = 0.0

    def buffer(self, name: str, n_rows: int) -> Tensor:
        """A [row, latent] scratch array in the products' dtype."""
        return self.scratch.take(name, (n_rows, self.shape.width), self.dtype)

    def forward(
        self, a: Float[Tensor, "row latent"], norm: Float[Tensor, " row"], pool: Tensor | None, k: int, n_rows_all: int
    ) -> Fired:
        """Set `z` from products `a` = (x − b_dec) W_enc, which is overwritten and must live until `backward`.

        pool: latents whose values before selection are kept in `pool_z` [row, pool]. k: latents a row that topk and
        batchtopk keep; n_rows_all: rows of all processes, over which batchtopk keeps them.
        """
        n_rows, width = a.shape
        self._begin(a, norm)
        self.pool = pool
        if pool is not None:
            self.pool_z = self.scratch.take("pool_z", (n_rows, len(pool)), self.dtype)
        fired = Fired(torch.zeros_like(self.weights["b_enc"]), torch.zeros(2, dtype=torch.float64, device=a.device))
        for rows in row_chunks(n_rows, width, a.device):
            self._activate(rows)
            if self.shape.activation != "batchtopk":
                self._select(rows, k, fired)
        if self.shape.activation == "batchtopk":
            self.threshold = self.find_threshold(k * n_rows_all)
            for rows in row_chunks(n_rows, width, a.device):
                self._select(rows, k, fired)
        return fired

    def before_selection(
        self, a: Float[Tensor, "row latent"], norm: Float[Tensor, " row"]
    ) -> Float[Tensor, "row latent"]:
        """Set `z` to latents that nothing was selected of yet, and return it; `a` as in `forward`."""
        self._begin(a, norm)
        for rows in row_chunks(len(a), a.shape[1], a.device):
            self._activate(rows)
        return self.z

    def _begin(self, a: Tensor, norm: Tensor) -> None:
        """Where this batch's latents and moments are kept."""
        self.a = a
        self.ratio = (norm / math.sqrt(self.shape.d_model)).unsqueeze(1).to(self.wide)
        in_place = self.shape.layernorm == "none" and self.shape.activation != "jumprelu"
        self.z = a if in_place else self.buffer("z", len(a))
        self.moments = [self.scratch.take(f"moments{i}", (2, len(a), 1), self.wide) for i in range(self.shape.n_levels)]

    def find_threshold(self, n_keep: int) -> Float[Tensor, ""]:
        """The value of the smallest latent that batchtopk keeps."""
        if self.group is not None:
            return global_threshold(self.z, n_keep, self.group)
        threshold = batch_threshold(self.z, n_keep, self.last_threshold * MARGIN)
        if threshold.device.type == "cpu":
            self.last_threshold = float(threshold)
        return threshold

    def _activate(self, rows: slice) -> None:
        if self.shape.layernorm == "none":
            p = self.a[rows].add_(self.weights["b_enc"])
            if self.shape.activation == "jumprelu":
                torch.mul(p, self._above_threshold(p), out=self.z[rows])
            else:
                p.relu_()
            return
        p = self._layernorm(self._layernorm_input(rows), rows)
        if self.shape.activation == "jumprelu":
            p.mul_(self._above_threshold(p))
        elif self.shape.layernorm == "pre":
            p.relu_()
        if self.shape.layernorm_rescale:
            p.mul_(self.ratio[rows])
        self.z[rows] = p

    def _above_threshold(self, p: Tensor) -> Tensor:
        return (p > self.weights["log_threshold"].exp()).to(p.dtype)

    def _layernorm_input(self, rows: slice) -> Tensor:
        u = self.a[rows].to(self.wide, copy=True).add_(self.weights["b_enc"])
        return u.relu_() if self.shape.layernorm == "post" else u

    def _layernorm(self, u: Tensor, rows: slice) -> Tensor:
        """LayerNorm inside each level's block, float32 statistics, which are kept for the backward."""
        out = torch.empty_like(u)
        gain, bias = self.weights["ln_gain"], self.weights["ln_bias"]
        for block, kept in zip(self.shape.blocks, self.moments):
            size = [block.stop - block.start]
            eps = self.shape.layernorm_eps
            out[:, block], kept[0, rows], kept[1, rows] = torch.native_layer_norm(
                u[:, block], size, gain[block], bias[block], eps
            )
        return out

    def _select(self, rows: slice, k: int, fired: Fired) -> None:
        z = self.z[rows]
        mask = self.scratch.take("mask", tuple(z.shape), self.dtype)
        if self.pool is not None:
            torch.index_select(z, 1, self.pool, out=self.pool_z[rows])
        if self.shape.activation == "topk":
            z.mul_(torch.ge(z, row_thresholds(z, k), out=mask))
        elif self.shape.activation == "batchtopk":
            z.mul_(torch.ge(z, self.threshold, out=mask))
        fired.counts += torch.ne(z, 0, out=mask).sum(0, dtype=self.wide)
        size = z.abs() if self.shape.layernorm == "post" else z
        n_shared = self.shape.n_shared
        fired.l1[0] += size[:, :n_shared].sum(dtype=self.wide)
        fired.l1[1] += size[:, n_shared:].sum(dtype=self.wide)

    def backward(
        self, dz: Float[Tensor, "row latent"], penalty: Penalty, auxiliary: PoolGradient | None
    ) -> dict[str, Tensor]:
        """Turn ∂loss/∂z into ∂loss/∂a in place, the penalty and the auxiliary loss included; gradients of the vectors.

        `dz` holds the gradient of the reconstruction terms alone when called.
        """
        names = [name for name in ("b_enc", "ln_gain", "ln_bias", "log_threshold") if name in self.weights]
        gradients = {name: torch.zeros_like(self.weights[name]) for name in names}
        backward = self._backward_plain if self.shape.layernorm == "none" else self._backward_layernorm
        for rows in row_chunks(len(dz), self.shape.width, dz.device):
            backward(dz[rows], rows, penalty, auxiliary, gradients)
            gradients["b_enc"] += dz[rows].sum(0, dtype=self.wide)
        return gradients

    def _backward_plain(
        self, g: Tensor, rows: slice, penalty: Penalty, auxiliary: PoolGradient | None, gradients: dict[str, Tensor]
    ) -> None:
        if penalty.kind == "l1":
            g.add_(penalty.weight)
        if self.shape.activation == "jumprelu":
            gradients["log_threshold"] += self._threshold_gradient(g, self.a[rows], penalty)
        torch.ops.aten.threshold_backward.grad_input(g, self.z[rows], 0, grad_input=g)
        if auxiliary is not None:
            g.index_add_(1, auxiliary.latents, auxiliary.gradient[rows])

    def _backward_layernorm(
        self, dz: Tensor, rows: slice, penalty: Penalty, auxiliary: PoolGradient | None, gradients: dict[str, Tensor]
    ) -> None:
        g, z, u = dz.to(self.wide, copy=True), self.z[rows], self._layernorm_input(rows)
        if penalty.kind == "l1":
            g.add_(penalty.weight * z.sign() if self.shape.layernorm == "post" else penalty.weight)
        if self.shape.layernorm_rescale:
            g.mul_(self.ratio[rows])
        if self.shape.activation == "jumprelu":
            gradients["log_threshold"] += self._threshold_gradient(g, self._layernorm(u, rows), penalty)
        if self.shape.layernorm == "pre":
            g.mul_(torch.ne(z, 0, out=self.scratch.take("mask_wide", tuple(g.shape), self.wide)))
        if auxiliary is not None:
            extra = auxiliary.gradient[rows].to(self.wide)
            g.index_add_(1, auxiliary.latents, extra.mul_(self.ratio[rows]) if self.shape.layernorm_rescale else extra)
        self._layernorm_backward(g, u, rows, gradients)
        dz.copy_(g.mul_(u > 0) if self.shape.layernorm == "post" else g)

    def _layernorm_backward(self, g: Tensor, u: Tensor, rows: slice, gradients: dict[str, Tensor]) -> None:
        """g becomes the gradient of LayerNorm's input, in place."""
        gain, bias = self.weights["ln_gain"], self.weights["ln_bias"]
        for block, (mean, rstd) in zip(self.shape.blocks, self.moments):
            g[:, block], gain_gradient, bias_gradient = torch.ops.aten.native_layer_norm_backward(
                g[:, block],
                u[:, block],
                [block.stop - block.start],
                mean[rows],
                rstd[rows],
                gain[block],
                bias[block],
                [True, True, True],
            )
            gradients["ln_gain"][block] += gain_gradient
            gradients["ln_bias"][block] += bias_gradient

    def _threshold_gradient(self, g: Tensor, p: Tensor, penalty: Penalty) -> Tensor:
        """∂loss/∂log θ of these rows, by the straight-through estimate above; g includes the row's scale."""
        theta = self.weights["log_threshold"].exp()
        width = self.config.bandwidth * theta
        near = ((p.to(self.wide) - theta).abs() < width / 2).to(self.wide)
        slope = -(theta / width) * (near * g).sum(0)
        if penalty.kind == "l0":
            slope -= penalty.weight / width * near.sum(0)
        return theta * slope

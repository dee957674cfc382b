"""One SAE in training: forward and backward written out, five large products a step, nothing fetched from the device.

    a = (x − b_dec) W_enc     z = latents of a     x̂_l = x̂_{l−1} + z_l W_dec,l     ∂W_dec = zᵀ G     ∂z = G W_decᵀ
    ∂W_enc = (x − b_dec)ᵀ ∂a

G is the suffix sum of the levels' residuals (`objectives`). The gradient of b_dec through the encoder is −W_enc Σ_rows ∂a,
a product with a vector. Products are in bf16 (or float32), weights, moments, statistics and everything else in float32.

A transcoder makes other rows y than the x it reads: y stands for x in the residuals, a is x W_enc, so that b_dec has no
gradient through the encoder, and with a skip connection x̂_l has x W_skip beside b_dec, whose gradient is xᵀ G of level 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from pipeline.base.errors import CheckpointError
from pipeline.sae.nested import NestedSAE
from train.config import TrainConfig
from train.step import objectives, schedules, sparse
from train.step.graphs import Capture, Recorded
from train.step.latents import Fired, Latents, Penalty, PoolGradient
from train.step.optim import Adam
from train.step.reduce import Reducer
from train.step.sample import Sample
from train.step.schedules import Controller, Schedule
from train.step.scratch import Scratch
from train.step.selection import batch_threshold, global_threshold, nth_largest_over
from train.step.sums import Sums
from train.step.weights import LARGEST_START, first_l0, initial_weights, mapped_weights, needs_shrinking

PRODUCT_DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass
class Batch:
    """One batch in the training space, prepared once and shared by all members, which never write to it."""

    x: Tensor  # [row, d_model] float32, centred and scaled (members subtract b_dec and cast to bf16 themselves)
    norm: Tensor  # [row] ‖x‖
    total: Tensor  # [d_made] float64 Σ of the rows to be made: x, or a transcoder's y
    square: Tensor  # [] float64 Σ ‖·‖² of the same
    y: Tensor | None = None  # [row, d_out] as x, of the rows that a transcoder is to make

    @property
    def made(self) -> Tensor:
        """The rows to be made."""
        return self.x if self.y is None else self.y


@dataclass(frozen=True)
class Target:
    """The training space of the rows that a transcoder makes: centre [d_out], on the member's device, and scale."""

    center: Tensor
    scale: float


def normalise_batch(
    x_raw: Float[Tensor, "row d_model"], center: Float[Tensor, " d_model"], scale: float, out: Batch | None = None
) -> Batch:
    """(x_raw − center) · scale in the dtype of `center` (float32), before any cast.

    x_raw: any dtype, on the device of `center`. `out`: a batch of the same shape whose buffers are written again (give
    it: fresh large buffers cost page faults). Returns `out`, or a new batch.
    """
    x = torch.empty(x_raw.shape, dtype=center.dtype, device=center.device) if out is None else out.x
    x.copy_(x_raw).sub_(center).mul_(scale)
    norm = torch.linalg.vector_norm(x, dim=1)
    parts = (norm, x.sum(0).double(), norm.double().square().sum())
    if out is None:
        return Batch(x, *parts)
    for buffer, part in zip((out.norm, out.total, out.square), parts):
        buffer.copy_(part)
    return out


class Pairs:
    """Prepares batches of transcoders: the rows that are read and those to be made, each in its own space."""

    def __init__(self, center: Float[Tensor, " d_model"], scale: float, target: Target) -> None:
        self.center, self.scale, self.target = center, scale, target
        self.read: Batch | None = None
        self.made: Batch | None = None

    def normalise(self, x_raw: Float[Tensor, "row d_model"], y_raw: Float[Tensor, "row d_out"]) -> Batch:
        """As `normalise_batch`; the buffers of the batch before are written again."""
        self.read = normalise_batch(x_raw, self.center, self.scale, self.read)
        self.made = normalise_batch(y_raw, self.target.center, self.target.scale, self.made)
        return Batch(self.read.x, self.read.norm, self.made.total, self.made.square, self.made.x)


FEW_ROWS = 512
"""Rows whose latents are copied at a time, where a step's own memory is not used."""


class Member:
    """One SAE in training. All randomness is a function of config.seed and the step; the same values on every device.

    `config.dtype` is resolved, not "auto". center, scale: of the training space, to be recorded in the SAE.
    group: for data-parallel training; each process steps on its own rows of the global batch, gradients and counts are
    summed over processes, threshold and clip are those of the global batch. None: one process.
    capture: records steps to replay them (`graphs.py`); None: every step runs operation by operation.
    target: the space of the rows that it makes, where it is a transcoder.
    is_sparse: its products are over active latents alone once k has stopped falling, and W_enc lies in memory by latents.
    `counts_active`: whether sparse products need to know, on the host, how many latents are active.
    `n_steps` is the optimiser steps done, `n_rows` the rows seen by all processes together.
    """

    counts_active = True

    def __init__(
        self,
        config: TrainConfig,
        d_model: int,
        center: Tensor,
        scale: float,
        device: torch.device,
        scratch: Scratch,
        group: dist.ProcessGroup | None = None,
        capture: Capture | None = None,
        target: Target | None = None,
        is_sparse: bool = False,
    ) -> None:
        self.config = config
        self.target = target
        self.is_sparse = is_sparse
        d_out = None if target is None else len(target.center)
        self.shape = config.sae_config(d_model, d_out)
        self.scratch = scratch
        self.group = group
        self.dtype = product_dtype(config.dtype)
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.center = center
        self.scale = scale
        self.device = device
        self.n_steps = 0
        self.calibrated_at = (
            0  # steps after which the threshold was found: a line and a checkpoint of one step share it
        )
        self.n_rows = 0
        firsts = {
            self._draw_thresholds: config.activation == "jumprelu",
            self._aim_decoder: target is not None,
            self._shrink_encoder: target is None and needs_shrinking(config),
        }
        self.before_first = [do for do, is_due in firsts.items() if is_due]  # of a batch, before the first step on it
        drawn = initial_weights(config, d_model, d_out)
        self.weights = {name: weight.to(device, self.wide) for name, weight in drawn.items()}
        if is_sparse:
            self.weights["W_enc"] = sparse.by_latent(self.weights["W_enc"])
        self.adam = Adam(self.weights, self.dtype, config, schedules.level_rates(config, self.shape.levels))
        self.schedule = Schedule(config, device)
        self.recorded = Recorded(capture, self._changed)
        self.reducer = Reducer(group)
        self.latents = Latents(config, self.shape, self.weights, scratch, self.dtype, group)
        self.penalty = objectives.penalty_weights(config, self.shape.n_shared).to(device, self.wide)
        self.rows_since_fired = torch.zeros(config.width, dtype=torch.int64, device=device)
        self.controller = Controller(config.target_l0, config.steps, device)
        self.sample = Sample(config, d_model, self.dtype, device, group)
        self.threshold = torch.zeros((), dtype=self.wide, device=device)
        self.explained = torch.zeros(3, dtype=torch.float64, device=device)  # Σ errors: shared, whole; Σ ‖x‖²
        scalars = dict.fromkeys(("steps", "rows", "square", "loss", "l0", "aux", "grad_norm", "clipped"), 1)
        vectors = {"total": self.shape.d_made, "errors": self.shape.n_levels, "l1": 2}
        self.sums = Sums.zeros(scalars | vectors, device)  # since the last `metrics`
        self._prepare()

    def _prepare(self) -> None:
        """What another way of stepping keeps beside all this."""

    def step(self, batch: Batch) -> None:
        """One optimiser step on this process's rows of the batch. Fetches nothing from the device."""
        self.schedule.set(self.n_steps)
        self.sample.see(batch.x, self.n_steps)
        for do in self.before_first if self.n_steps == 0 else ():
            do(batch)
        self.recorded.run(self._kind(batch), lambda: self._step(batch))
        self.n_steps += 1
        self.n_rows += self._n_rows(batch)
        if self.config.alpha == "auto":
            self._adapt()

    def _draw_thresholds(self, batch: Batch) -> None:
        """jumprelu, before its first step: one threshold for all latents, which `first_l0` of them pass on this batch (syncs)."""
        log_threshold = self.weights["log_threshold"].fill_(-math.inf)
        z = self._before_selection(batch.x)
        if self.config.layernorm != "none" and self.config.layernorm_rescale:
            z = z.div_(self.latents.ratio)
        found = self._nth_largest(z, round(first_l0(self.config) * len(z)))
        log_threshold.fill_(math.log(max(float(found), 1e-12)))

    def _aim_decoder(self, batch: Batch) -> None:
        """A transcoder, before its first step: each latent makes what a linear map, fitted to this batch, makes of its encoder's
        direction (syncs). Drawn apart, twice as many latents or more make nothing of use, and die.

        The map is ridge regression, E[x xᵀ] with its mean eigenvalue on the diagonal: between the covariance and a full
        regression, so that fewer rows than dimensions do.
        """
        x, y = batch.x.double(), batch.made.double()
        moments = torch.cat([x.T @ x, x.T @ y], 1)
        self.reducer.add(moments)
        self.reducer.wait()
        square, cross = moments[:, : x.shape[1]], moments[:, x.shape[1] :]
        ridge = square + torch.eye(len(square), device=square.device, dtype=square.dtype) * square.trace() / len(square)
        rows = self.weights["W_enc"].T.double() @ torch.linalg.solve(ridge, cross)
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        w_dec = self.weights["W_dec"]
        w_dec.copy_(torch.where(norm > 0, rows / norm, w_dec.double()))
        self.adam.refresh_low()

    def _shrink_encoder(self, batch: Batch) -> None:
        """batchtopk of many levels, before its first step: latents smaller where a level of this batch would be further from its
        rows than zeros are. Rows of large norm get more of a batch's latents than `best_scale` counts on, the more the
        wider the dictionary.

        A level's x̂ is as large as its latents are: s x̂ is nearer than zeros while s < 2 Σ x·x̂ / Σ ‖x̂‖².
        """
        z, w_dec = self._before_selection(batch.x), self.adam.low["W_dec"]
        least = self._nth_largest(z, self._kept * len(z))
        moments = torch.zeros(2, self.shape.n_levels, dtype=torch.float64, device=self.device)
        for x, some in zip(torch.split(batch.x, FEW_ROWS), torch.split(z, FEW_ROWS)):
            some.mul_(some >= least)
            made, first = torch.zeros_like(x), 0
            for level, last in enumerate(self.shape.levels):
                made += (some[:, first:last].to(w_dec.dtype) @ w_dec[first:last]).to(made.dtype)
                moments[:, level] += torch.stack([(x * made).sum(), made.square().sum()])
                first = last
        self.reducer.add(moments)
        self.reducer.wait()
        most = LARGEST_START * (moments[0] / moments[1]).nan_to_num(nan=1.0, posinf=1.0).min()
        factor = torch.where(most > 0, most.clamp(max=1.0), 1.0).to(self.wide)
        for name in ("W_enc",) if self.config.layernorm == "none" else ("ln_gain", "ln_bias"):
            self.weights[name].mul_(factor)
        self.adam.refresh_low()

    def _calibrate(self) -> None:
        """batchtopk: let the threshold keep k latents a row of the sample's rows, under the weights as they are now."""
        if self.config.activation != "batchtopk" or not self.n_steps:
            return
        pieces = self.sample.pieces(self.n_steps)
        n_keep = self.config.k * sum(map(len, pieces))
        if self.device.type != "cpu":
            self.threshold = nth_largest_over(map(self._before_selection, pieces), n_keep).to(self.wide)
            return
        bound = float(batch_threshold(self._before_selection(pieces[0]), self.config.k * len(pieces[0]))) / 2
        large = self._above(pieces, bound)
        if len(large) < n_keep:
            large = self._above(pieces, -1.0)
        if len(large) < n_keep:  # some are no numbers, so that this member ends at its next line
            self.threshold.fill_(math.nan)
        else:
            self.threshold = batch_threshold(large[None], n_keep).to(self.wide)

    def _above(self, pieces: Sequence[Tensor], bound: float) -> Tensor:
        """All latents before selection that are above a bound, of some rows, in one dimension."""
        return torch.cat([z[z > bound] for z in map(self._before_selection, pieces)])

    def _before_selection(self, x: Tensor) -> Tensor:
        """Latents of normalised rows, at most a batch, before topk, batchtopk or a threshold; in scratch memory."""
        x_low = self._encoder_input(x)
        a = torch.mm(x_low, self.adam.low["W_enc"], out=self._take("a", len(x), self.config.width))
        return self.latents.before_selection(a, torch.linalg.vector_norm(x, dim=1, dtype=self.wide))

    def _encoder_input(self, x: Tensor) -> Tensor:
        """What the encoder is given of normalised rows, in the products' dtype, in scratch memory."""
        x_low = self._take("x", len(x), self.shape.d_model)
        return x_low.copy_(x if self.target is not None else x - self.weights["b_dec"])

    def _nth_largest(self, z: Tensor, n: int) -> Tensor:
        """The value that n entries of each process's z, all processes' together, are not below."""
        if self.group is None:
            return batch_threshold(z, n)
        return global_threshold(z, self._n_rows_of(n), self.group)

    def _n_rows_of(self, n: int) -> int:
        """So many rows of every process, together."""
        return n * (dist.get_world_size(self.group) if self.group else 1)

    def _n_rows(self, batch: Batch) -> int:
        """Rows of the batch, those of all processes."""
        return self._n_rows_of(len(batch.x))

    def _kind(self, batch: Batch) -> Hashable | None:
        """What a step depends on beside the contents of tensors; None where that is new at every step."""
        if self.config.level_weighting == "random" or self.group is not None:
            return None
        if self._is_sparse_now and self.counts_active:
            return None
        if self.config.k and not self._controls:
            return None  # a warm-up keeps another number of latents at nearly every step
        places = (batch.x.data_ptr(), self.scratch.generation)
        return (*places, self.shape.levels, self._kept, self._may_have_dead, self.n_steps == 0, self._controls)

    @property
    def _kept(self) -> int:
        return schedules.kept_a_row(self.config, self.n_steps)

    @property
    def _may_have_dead(self) -> bool:
        return self.n_rows >= self.config.dead_after_rows

    @property
    def _controls(self) -> bool:
        return self.n_steps >= self.config.sparsity_warmup_steps

    @property
    def _is_sparse_now(self) -> bool:
        return self.is_sparse and self._controls

    def _step(self, batch: Batch) -> None:
        forward = self._forward(batch)
        gradients, aux = self._backward(forward)
        sums = self._sums_of(batch, forward, aux)
        self._add_processes(gradients, sums)
        norm = self.adam.update(gradients, self.schedule.lr)
        self._account(forward, sums, norm)

    def _sums_of(self, batch: Batch, forward: Forward, aux: Tensor) -> Sums:
        """Over the rows of this batch: counts [latent], l1 [2], errors [level], total [d_model], square [1], aux [1]."""
        fired, errors = forward.fired, forward.decoded.errors
        return Sums.of(counts=fired.counts, l1=fired.l1, errors=errors, total=batch.total, square=batch.square, aux=aux)

    def _forward(self, batch: Batch) -> Forward:
        config, low = self.config, self.adam.low
        n_local, n_rows = len(batch.x), self._n_rows(batch)
        pool = objectives.auxiliary_pool(config, self.rows_since_fired) if self._may_have_dead else None
        x_low = self._encoder_input(batch.x)
        a = torch.mm(x_low, low["W_enc"], out=self._take("a", n_local, config.width))
        fired = self.latents.forward(a, batch.norm, pool, self._kept, n_rows)
        terms = objectives.reconstruction_terms(config, self.shape.levels, self.n_steps)
        rest = batch.made - (x_low @ low["W_skip"]).to(self.wide) if config.skip else batch.made
        active = sparse.Active(self.latents.z, terms.blocks) if self._is_sparse_now else None
        prefixes = [self._take(f"decoded{i}", *rest.shape) for i in range(len(terms.sizes))]
        if active is not None:
            active.decode(low["W_dec"], prefixes)
        else:
            objectives.decode(self.latents.z, low["W_dec"], terms, prefixes)
        decoded = objectives.reconstruct(
            prefixes, self.weights["b_dec"], rest, terms, n_rows, self.scratch, pool is not None
        )
        factor = self.schedule.ramp * self.controller.factor
        return Forward(n_rows, x_low, pool, terms, fired, decoded, factor, active)

    def _backward(self, forward: Forward) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients by name, and the value of the auxiliary loss."""
        backward = self._backward_dense if forward.active is None else self._backward_sparse
        gradients, aux = backward(forward)
        b_dec = forward.decoded.b_dec
        if self.target is None:
            b_dec = b_dec - self.weights["W_enc"] @ gradients["b_enc"]
        skip = {"W_skip": forward.x_low.T @ forward.decoded.gradients[0]} if self.config.skip else {}
        return gradients | {"b_dec": b_dec} | skip, aux

    def _backward_dense(self, forward: Forward) -> tuple[dict[str, Tensor], Tensor]:
        z, low, config = self.latents.z, self.adam.low, self.config
        w_dec = self._take("W_dec", config.width, self.shape.d_made)
        dz = self._take("dz", len(z), config.width)
        parts = list(zip(forward.terms.blocks, forward.decoded.gradients))
        for block, gradient in parts:
            torch.mm(z[:, block].T, gradient, out=w_dec[block])
        aux, auxiliary = self._auxiliary(forward, w_dec)
        self.reducer.add_whole(w_dec)
        for block, gradient in parts:
            torch.mm(gradient, low["W_dec"][block].T, out=dz[:, block])
        penalty = Penalty(config.penalty, self.penalty * (forward.factor / forward.n_rows).to(self.wide))
        gradients = self.latents.backward(dz, penalty, auxiliary)
        return gradients | {"W_enc": self._encoder_gradient(forward.x_low, dz), "W_dec": w_dec}, aux

    def _encoder_gradient(self, x_low: Tensor, da: Tensor) -> Tensor:
        """∂W_enc, in memory as W_enc lies there."""
        if self.is_sparse:
            rows = self._take("W_enc", self.config.width, self.shape.d_model)
            self.reducer.product(da.T, x_low, out=rows)
            return rows.T
        w_enc = self._take("W_enc", self.shape.d_model, self.config.width)
        self.reducer.product(x_low.T, da, out=w_enc)
        return w_enc

    def _backward_sparse(self, forward: Forward) -> tuple[dict[str, Tensor], Tensor]:
        """As `_backward_dense`, where ∂loss/∂a is 0 but for active latents and those of the auxiliary loss."""
        active, gradients = forward.active, forward.decoded.gradients
        assert active is not None, "a sparse backward follows a sparse forward"
        w_dec = self._take("W_dec", self.config.width, self.shape.d_made)
        w_enc = self._take("W_enc", self.config.width, self.shape.d_model)
        active.decoder_gradient(gradients, w_dec)
        aux, auxiliary = self._auxiliary(forward, w_dec)
        self.reducer.add_whole(w_dec)
        da = active.latents_gradient(gradients, self.adam.low["W_dec"], self.wide)
        b_enc = active.sums(da.to(self.wide))
        active.encoder_gradient(da, forward.x_low, w_enc)
        if auxiliary is not None:
            b_enc.index_add_(0, auxiliary.latents, auxiliary.gradient.sum(0, dtype=self.wide))
            w_enc.index_add_(0, auxiliary.latents, auxiliary.gradient.T @ forward.x_low)
        self.reducer.add_whole(w_enc)
        return {"W_enc": w_enc.T, "W_dec": w_dec, "b_enc": b_enc}, aux

    def _auxiliary(self, forward: Forward, w_dec: Tensor) -> tuple[Tensor, PoolGradient | None]:
        """The auxiliary loss and its gradient for latents; its decoder gradient is added to `w_dec`."""
        pool, remainder = forward.pool, forward.decoded.remainder
        if pool is None or remainder is None:
            return torch.zeros((), dtype=torch.float64, device=self.device), None
        is_dead = (self.rows_since_fired[pool] >= self.config.dead_after_rows).to(self.dtype)
        return objectives.auxiliary_loss(
            self.config, pool, is_dead, self.latents.pool_z, self.adam.low["W_dec"], remainder, forward.n_rows, w_dec
        )

    def _add_processes(self, gradients: dict[str, Tensor], sums: Sums) -> None:
        """Losses were divided by the rows of all processes, so gradients add up to those of the global batch. Those of the
        matrices are on their way already."""
        for name, gradient in gradients.items():
            if name not in ("W_enc", "W_dec"):
                self.reducer.add(gradient)
        self.reducer.add(sums.flat)
        self.reducer.wait()

    def _account(self, forward: Forward, sums: Sums, norm: Tensor) -> None:
        """Counters, running estimates and the sums that `metrics` reports."""
        config, n_rows = self.config, forward.n_rows
        self.rows_since_fired.add_(n_rows).masked_fill_(sums["counts"] > 0, 0)
        l0 = sums["counts"].sum() / n_rows
        for name in ("errors", "l1", "aux", "total", "square"):
            self.sums[name].add_(sums[name])
        self.sums["loss"].add_(self._loss(forward, sums))
        self.sums["l0"].add_(l0)
        self.sums["grad_norm"].add_(norm)
        self.sums["clipped"].add_(norm > config.clip_norm if config.clip_norm else 0)
        self.sums["steps"].add_(1)
        self.sums["rows"].add_(n_rows)
        if config.target_l0:
            self.controller.see(l0, first=self.n_steps == 0, acts=self._controls)
        if config.alpha == "auto":
            self.explained += torch.cat([sums["errors"], sums["square"]])
        self._pull_thresholds()

    def _pull_thresholds(self) -> None:
        """Lower jumprelu's thresholds of dead latents, by `threshold_pull` of their learning rate, until they fire again, but not
        below a quarter of what those of living latents are (a geometric mean).

        Where no row comes near θ, neither θ nor anything else of a latent has a gradient. Far below the others a latent fires on
        nearly every row, and none of these is near θ, so that no penalty reaches it.
        """
        if not self.config.threshold_pull or self.config.activation != "jumprelu":
            return
        log_threshold = self.weights["log_threshold"]
        is_dead = self.rows_since_fired >= self.config.dead_after_rows
        lowest = (log_threshold * ~is_dead).sum() / (~is_dead).sum().clamp(min=1) - math.log(4)
        most = self.schedule.lr * self.adam.rates["log_threshold"] * self.config.threshold_pull
        log_threshold.sub_(torch.minimum((log_threshold - lowest).clamp(min=0), most) * is_dead)

    def _adapt(self) -> None:
        """Move the end of the shared level when it is time (syncs then)."""
        if not schedules.adapts(self.config, self.n_steps):
            return
        *errors, square = self.explained.tolist()
        self.explained.zero_()
        width, target = self.config.width, self.config.shared_target
        self._share(schedules.adapted(self.shape.n_shared, width, errors, square, target))

    def _share(self, n_shared: int) -> None:
        """From now on the first `n_shared` latents are the shared ones."""
        self.shape = self.latents.shape = dataclasses.replace(self.shape, levels=(n_shared, self.config.width))
        self.penalty = objectives.penalty_weights(self.config, n_shared).to(self.device, self.wide)
        self.adam.set_rates(schedules.level_rates(self.config, self.shape.levels))

    def _loss(self, forward: Forward, sums: Sums) -> Tensor:
        """The whole objective of this batch, a row."""
        n_rows, n_shared = forward.n_rows, self.shape.n_shared
        loss = sums["aux"].sum()
        for weight, error in zip(forward.terms.weights, sums["errors"]):
            loss = loss + weight * error / n_rows
        if self.config.penalty == "none":
            return loss
        counts = sums["counts"]
        l0 = torch.stack([counts[:n_shared].sum(), counts[n_shared:].sum()])
        size = sums["l1"] if self.config.penalty == "l1" else l0
        shared, specialised = self.config.lambda_shared * size[0], self.config.lambda_specialised * size[1]
        return loss + forward.factor * (shared + specialised) / n_rows

    def metrics(self, more: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Scalars over the steps since the last call, in one fetch: a line of metrics.jsonl, but for the epoch. more: vectors on
        the device that the line ends with.

        step, rows (seen so far); means a row: loss (the whole objective), recon (a list, innermost level first; with
        random prefixes by rank), l1_shared and l1_specialised (E Σ|z|, before λ), aux, l0; n_shared (latents of the
        shared level now); ev (a list; centred on the mean of these rows); means a step: grad_norm (before clipping),
        clipped (share of steps); dead (share of latents that did not fire over the last dead_rows rows); lr and lambda
        (the penalty's factor: warm-up times controller) of the last step. Values may be NaN. After it the sums begin anew.
        """
        now = Sums.of(
            dead=dead_share(self.rows_since_fired, self.dead_rows), factor=self.controller.factor, **(more or {})
        )
        sums = Sums(torch.cat([self.sums.flat, now.flat]), self.sums.sizes | now.sizes).fetch()
        n_steps, n_rows = sums["steps"][0], sums["rows"][0]
        variance = sums["square"][0] - sum(total * total for total in sums["total"]) / n_rows
        last = self.n_steps - 1
        self.sums.flat.zero_()
        return {
            "step": self.n_steps,
            "rows": self.n_rows,
            "loss": sums["loss"][0] / n_steps,
            "recon": [error / n_rows for error in sums["errors"]],
            "ev": [1 - error / variance for error in sums["errors"]],
            "l1_shared": sums["l1"][0] / n_rows,
            "l1_specialised": sums["l1"][1] / n_rows,
            "aux": sums["aux"][0] / n_steps,
            "l0": sums["l0"][0] / n_steps,
            "n_shared": self.shape.n_shared,
            "dead": sums["dead"][0],
            "dead_rows": self.dead_rows,
            "grad_norm": sums["grad_norm"][0] / n_steps,
            "clipped": sums["clipped"][0] / n_steps,
            "lr": schedules.learning_rate(self.config, last),
            "lambda": schedules.sparsity_ramp(self.config, last) * sums["factor"][0],
        } | {name: sums[name] for name in more or {}}

    @property
    def dead_rows(self) -> int:
        """Over how many of the last rows latents are counted that did not fire."""
        return min(self.n_rows, self.config.dead_after_rows)

    def counters(self) -> dict[str, Tensor]:
        """The part of `state` that says how training goes: sums since the last `metrics`, rows since each latent fired."""
        return {"rows_since_fired": self.rows_since_fired, "sums": self.sums.flat}

    def was_finite(self, counters: Mapping[str, Tensor]) -> bool:
        """Whether every loss and gradient norm since the last `metrics` was finite, of a copy of `counters` (syncs where that is
        on a device). Ask before a checkpoint is written."""
        sums = Sums(counters["sums"], self.sums.sizes)
        return bool(torch.isfinite(sums["loss"] + sums["grad_norm"]).all())

    def state(self) -> dict[str, Tensor]:
        """All that `load_state` needs to go on bit-identically: the tensors themselves, so write them before stepping on."""
        estimates = {"controller": self.controller.state} | self.sample.state()
        position = {"n_steps": torch.tensor(self.n_steps), "n_rows": torch.tensor(self.n_rows)}
        if self.config.alpha == "auto":
            position |= {"n_shared": torch.tensor(self.shape.n_shared), "explained": self.explained}
        return self.adam.state() | estimates | self.counters() | position

    def _changed(self) -> dict[str, Tensor]:
        """All tensors that a step changes and a later one reads."""
        return self.state() | {f"low.{name}": low for name, low in self.adam.low.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from `state()` of a member of the same config. Raises CheckpointError when names or shapes differ."""
        own = self.state()
        wrong = [name for name in own.keys() | state.keys() if name not in own or name not in state]
        wrong += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
        if wrong:
            raise CheckpointError(f"the training state does not fit this member: {', '.join(sorted(wrong))}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.n_steps, self.n_rows = int(state["n_steps"]), int(state["n_rows"])
        self.calibrated_at = 0
        if "n_shared" in state:
            self._share(int(state["n_shared"]))
        self.adam.refresh_low()

    def load_weights(self, sae: NestedSAE) -> None:
        """Warm start: begin from the weights of an SAE of the same width, mapped into this training space. A jumprelu whose
        source has no thresholds finds its own on the first batch.

        Raises CheckpointError when its shape does not fit.
        """
        mapped = mapped_weights(sae, self.sae())
        finds = self.config.activation == "jumprelu" and "log_threshold" not in mapped
        self.before_first = [self._draw_thresholds] if finds else []
        for name, weight in mapped.items():
            self.weights[name].copy_(weight)
        self.adam.refresh_low()

    def sae(self) -> NestedSAE:
        """The SAE as it stands: a float32 copy on the CPU with center, scale and threshold filled in (syncs)."""
        return self.sae_of_state()(self.weights)

    def sae_of_state(self) -> Callable[[Mapping[str, Tensor]], NestedSAE]:
        """What makes the SAE as it stands from a copy of `state()`, or of the weights alone, of this moment, at any time and
        in any thread."""
        tensors, shape = self._sae_tensors(), self.shape

        def make(state: Mapping[str, Tensor]) -> NestedSAE:
            sae = NestedSAE(shape)
            sae.load_state_dict({name: tensor.detach().cpu().float() for name, tensor in tensors(state).items()})
            return sae.eval()

        return make

    def sae_here(self) -> NestedSAE:
        """The SAE as it stands, of the member's own tensors on its device as far as they are float32: until the next step.
        Nothing is fetched."""
        with torch.device("meta"):
            sae = NestedSAE(self.shape).requires_grad_(False)
        tensors = self._sae_tensors()(self.weights)
        sae.load_state_dict({name: tensor.detach().float() for name, tensor in tensors.items()}, assign=True)
        return sae.eval()

    def _sae_tensors(self) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        """What picks the tensors of the SAE as it stands from weights that are a member's."""
        if self.calibrated_at != self.n_steps:
            self._calibrate()
            self.calibrated_at = self.n_steps
        names = [name for name in self.weights if name != "log_threshold"]
        known = {"center": self.center, "scale": torch.full((), self.scale, device=self.device)}
        if self.target is not None:
            known |= {
                "target_center": self.target.center,
                "target_scale": torch.full((), self.target.scale, device=self.device),
            }
        if self.config.activation == "batchtopk":
            known["threshold"] = self.threshold.clone().expand(self.config.width)

        def pick(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = known | {name: weights[name] for name in names}
            return found | ({"threshold": weights["log_threshold"].exp()} if "log_threshold" in weights else {})

        return pick

    def _take(self, name: str, *shape: int) -> Tensor:
        return self.scratch.take(name, shape, self.dtype)


@dataclass
class Forward:
    """What the backward and the accounting of one step need of its forward."""

    n_rows: int  # of the global batch
    x_low: Tensor  # [row, d_model] x − b_dec in the products' dtype
    pool: Tensor | None  # [pool] candidates of the auxiliary loss
    terms: objectives.Terms
    fired: Fired
    decoded: objectives.Reconstruction
    factor: Tensor  # [] of the penalty: warm-up times controller
    active: sparse.Active | None  # where products are over active latents alone


def dead_share(rows_since_fired: Tensor, n_rows: int) -> Float[Tensor, ""]:
    """Share of latents that did not fire over the last `n_rows` rows."""
    return ((rows_since_fired >= n_rows) & (n_rows > 0)).double().mean()


def product_dtype(name: str) -> torch.dtype:
    """The torch dtype of products for a resolved config.dtype."""
    if name not in PRODUCT_DTYPES:
        raise ValueError(f"dtype {name!r} is not resolved; use runtime.resolve_dtype first")
    return PRODUCT_DTYPES[name]

"""Latents forward: bias, LayerNorm, activation, selection, counts and sums in one pass."""

from __future__ import annotations

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl

from train.step.fused import thresholds, tiles
from train.step.fused.activation import before_selection, columns, level_of, moments_kernel
from train.step.fused.context import Step
from train.step.fused.tiles import ceil_div, next_power
from train.step.traffic import launch

SELECTIONS = {"batchtopk": 1, "topk": 2}


@triton.jit
@no_type_check
def center_kernel(x, b_dec, out, n_rows, d_model, TILE_R: tl.constexpr, TILE_D: tl.constexpr):
    """out = x − b_dec in the products' dtype."""
    rows = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    cols = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    mask = (rows < n_rows)[:, None] & (cols < d_model)[None, :]
    at = rows.to(tl.int64)[:, None] * d_model + cols[None, :]
    value = tl.load(x + at, mask=mask, other=0.0) - tl.load(b_dec + cols, mask=cols < d_model, other=0.0)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def select_kernel(
    a,
    z_out,
    b_enc,
    gain,
    shift,
    log_threshold,
    moments,
    ratios,
    ends,
    thresholds,
    slots,
    pool_z,
    counts,
    sizes,
    n_rows,
    width,
    n_shared,
    pool_size,
    SELECT: tl.constexpr,
    POOL: tl.constexpr,
    N_LEVELS: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    RESCALE: tl.constexpr,
    PART_ROWS: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_F: tl.constexpr,
):
    """Latents of products, with SELECT 1 those not below the batch's threshold, 2 those not below their row's.

    counts [part, latent]: rows on which each is not 0. sizes [2, part, column block]: Σ|z| shared, specialised. POOL: latents
    before selection whose slot is not −1 go to pool_z [row, pool_size].
    """
    cols = tl.program_id(1) * TILE_F + tl.arange(0, TILE_F)
    col_mask = cols < width
    level = level_of(cols, ends, N_LEVELS)
    bias, gains, shifts = columns(cols, width, b_enc, gain, shift, NORM)
    theta, slot = bias, cols
    if KIND == 1:
        theta = tl.exp(tl.load(log_threshold + cols, mask=col_mask, other=0.0))
    if POOL:
        slot = tl.load(slots + cols, mask=col_mask, other=-1)
    count = tl.zeros((TILE_F,), tl.int32)
    size = tl.zeros((TILE_F,), tl.float32)
    first = tl.program_id(0) * PART_ROWS
    for start in range(first, min(first + PART_ROWS, n_rows), TILE_R):
        rows = start + tl.arange(0, TILE_R)
        row_mask = rows < n_rows
        mask = row_mask[:, None] & col_mask[None, :]
        at = rows.to(tl.int64)[:, None] * width + cols[None, :]
        z = before_selection(
            a,
            rows,
            cols,
            level,
            n_rows,
            width,
            bias,
            gains,
            shifts,
            theta,
            moments,
            ratios,
            N_LEVELS,
            KIND,
            NORM,
            RESCALE,
        )
        if POOL:
            to = rows.to(tl.int64)[:, None] * pool_size + slot[None, :]
            tl.store(pool_z + to, z.to(pool_z.dtype.element_ty), mask=mask & (slot >= 0)[None, :])
        if SELECT == 1:
            z = tl.where(z < tl.load(thresholds), 0.0, z)
        if SELECT == 2:
            z = tl.where(z < tl.load(thresholds + rows, mask=row_mask, other=0.0)[:, None], 0.0, z)
        z = tl.where(mask, z, 0.0)
        tl.store(z_out + at, z.to(z_out.dtype.element_ty), mask=mask)
        count += tl.sum((z != 0).to(tl.int32), 0)
        size += tl.sum(tl.abs(z), 0)
    tl.store(counts + tl.program_id(0) * width + cols, count, mask=col_mask)
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    n_parts = tl.num_programs(0) * tl.num_programs(1)
    tl.store(sizes + part, tl.sum(tl.where(cols < n_shared, size, 0.0)))
    tl.store(sizes + n_parts + part, tl.sum(tl.where(cols < n_shared, 0.0, size)))


def encode(step: Step) -> None:
    """x − b_dec in the products' dtype, and its product with the encoder."""
    x, b_dec = step.batch.x, step.member.weights["b_dec"]
    step.x_low = step.take("x", step.n_rows, step.d_model)
    launch(
        center_kernel,
        (ceil_div(step.n_rows, 16), ceil_div(step.d_model, 128)),
        [x, b_dec, step.x_low, step.n_rows, step.d_model],
        reads=[x, b_dec],
        writes=[step.x_low],
        TILE_R=16,
        TILE_D=128,
    )
    step.a = torch.mm(step.x_low, step.member.adam.low["W_enc"], out=step.take("a", step.n_rows, step.width))


def normalise(step: Step) -> None:
    """LayerNorm's means and deviations of each row's levels, and the rows' scale, where there is LayerNorm."""
    step.ratios = step.moments = step.none
    if step.kept.flags["RESCALE"]:
        step.ratios = step.batch.norm / math.sqrt(step.d_model)
    if norm := step.kept.flags["NORM"]:
        bias = step.member.weights["b_enc"]
        step.moments = step.wide("moments", 2, step.n_levels, step.n_rows)
        launch(
            moments_kernel,
            (ceil_div(step.n_rows, tiles.TALL),),
            [step.a, bias, step.ends, step.moments, step.n_rows, step.width, step.config.layernorm_eps],
            reads=[step.a, bias, step.ends],
            writes=[step.moments],
            N_LEVELS=step.n_levels,
            NORM=norm,
            TILE_R=tiles.TALL,
            SIZE=min(tiles.LONG, next_power(step.width)),
        )


def select(step: Step) -> None:
    """Latents of the encoder's products, those selected, and their counts and sums; those before selection of the pool."""
    member = step.member
    in_place = step.kept.flags["NORM"] == 0 and step.kept.kind == 0
    step.z = step.a if in_place else step.take("z", step.n_rows, step.width)
    bias, gain, shift, log_threshold = step.columns("b_enc", "ln_gain", "ln_bias", "log_threshold")
    least = thresholds.find(step)
    step.counts = member.scratch.take("counts", (step.n_parts, step.width), torch.int32)
    step.sizes = step.wide("sizes", 2, *step.tiles)
    pointers = [step.a, step.z, bias, gain, shift, log_threshold, step.moments, step.ratios, step.ends, least]
    pointers += [step.slots, step.pool_z, step.counts, step.sizes]
    launch(
        select_kernel,
        step.tiles,
        [*pointers, step.n_rows, step.width, member.shape.n_shared, step.pool_size],
        reads=step.read(step.a, bias, gain, shift, log_threshold, step.moments, step.ratios, least),
        writes=[step.z, step.counts, step.sizes],
        touched={"pool": step.pool_z},
        SELECT=SELECTIONS.get(step.config.activation, 0),
        POOL=bool(step.pool_size),
        N_LEVELS=step.n_levels,
        KIND=step.kept.kind,
        **step.kept.flags,
        **step.tiling,
    )

"""Latents backward: mask, penalty, LayerNorm, thresholds and column sums in one pass."""

from __future__ import annotations

from typing import Any, no_type_check

import triton
import triton.language as tl
from torch import Tensor

from train.step.fused import tiles
from train.step.fused.activation import argument, by_level, columns, level_of
from train.step.fused.context import Step
from train.step.fused.tiles import ceil_div, next_power
from train.step.traffic import launch


@triton.jit
@no_type_check
def incoming(
    g,
    z,
    rows,
    row_mask,
    penalty,
    ratio,
    slot,
    pool_gradient,
    pool_size,
    PENALTY: tl.constexpr,
    POOL: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    RESCALE: tl.constexpr,
):
    """∂loss/∂p of a tile from ∂loss/∂z (NORM 2: of LayerNorm's outcome), and before selection's mask, for thresholds."""
    g = g.to(tl.float32)
    z = z.to(tl.float32)
    if PENALTY:
        if NORM == 2:
            g += penalty[None, :] * ((z > 0).to(tl.float32) - (z < 0).to(tl.float32))
        else:
            g += penalty[None, :]
    if RESCALE:
        g *= ratio[:, None]
    unmasked = g
    if NORM != 2:
        g = tl.where(z != 0, g, 0.0)
    if POOL:
        at = rows.to(tl.int64)[:, None] * pool_size + slot[None, :]
        extra = tl.load(pool_gradient + at, mask=row_mask[:, None] & (slot >= 0)[None, :], other=0.0).to(tl.float32)
        if RESCALE:
            extra *= ratio[:, None]
        g += extra
    return g, unmasked


@triton.jit
@no_type_check
def backward_moments_kernel(
    dz,
    a,
    z,
    b_enc,
    gain,
    moments,
    ratios,
    ends,
    penalties,
    factor,
    slots,
    pool_gradient,
    sums,
    n_rows,
    width,
    pool_size,
    PENALTY: tl.constexpr,
    POOL: tl.constexpr,
    N_LEVELS: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    RESCALE: tl.constexpr,
    TILE_R: tl.constexpr,
    SIZE: tl.constexpr,
):
    """LayerNorm's backward needs the means of gain·g and of gain·g·x̂ over each row's levels: [2, level, row]; a program
    goes along TILE_R rows."""
    rows = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    row_mask = rows < n_rows
    ratio = tl.load(ratios + rows, mask=row_mask, other=0.0)
    start = 0
    for i in tl.static_range(N_LEVELS):
        stop = tl.load(ends + i)
        mean = tl.load(moments + i * n_rows + rows, mask=row_mask, other=0.0)
        rstd = tl.load(moments + (N_LEVELS + i) * n_rows + rows, mask=row_mask, other=0.0)
        total = tl.zeros((TILE_R,), tl.float32)
        along = tl.zeros((TILE_R,), tl.float32)
        for first in range(start, stop, SIZE):
            cols = first + tl.arange(0, SIZE)
            col_mask = cols < stop
            mask = row_mask[:, None] & col_mask[None, :]
            at = rows.to(tl.int64)[:, None] * width + cols[None, :]
            bias = tl.load(b_enc + cols, mask=col_mask, other=0.0)
            penalty, slot = bias, cols
            if PENALTY:
                penalty = tl.load(penalties + cols, mask=col_mask, other=0.0) * tl.load(factor)
            if POOL:
                slot = tl.load(slots + cols, mask=col_mask, other=-1)
            g, _ = incoming(
                tl.load(dz + at, mask=mask, other=0.0),
                tl.load(z + at, mask=mask, other=0.0),
                rows,
                row_mask,
                penalty,
                ratio,
                slot,
                pool_gradient,
                pool_size,
                PENALTY,
                POOL,
                KIND,
                NORM,
                RESCALE,
            )
            x_hat = (argument(tl.load(a + at, mask=mask, other=0.0), bias, NORM) - mean[:, None]) * rstd[:, None]
            g = tl.where(mask, g * tl.load(gain + cols, mask=col_mask, other=0.0)[None, :], 0.0)
            total += tl.sum(g, 1)
            along += tl.sum(g * x_hat, 1)
        tl.store(sums + i * n_rows + rows, total / (stop - start), mask=row_mask)
        tl.store(sums + (N_LEVELS + i) * n_rows + rows, along / (stop - start), mask=row_mask)
        start = stop


@triton.jit
@no_type_check
def backward_kernel(
    dz,
    a,
    z,
    b_enc,
    gain,
    shift,
    log_threshold,
    moments,
    ratios,
    ends,
    sums,
    penalties,
    factor,
    slots,
    pool_gradient,
    parts,
    n_rows,
    width,
    pool_size,
    BANDWIDTH: tl.constexpr,
    PENALTY: tl.constexpr,
    POOL: tl.constexpr,
    N_LEVELS: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    RESCALE: tl.constexpr,
    PART_ROWS: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_F: tl.constexpr,
):
    """∂loss/∂z becomes ∂loss/∂a in place. parts [quantity, part, latent]: sums over rows of ∂a; with LayerNorm of g·x̂ and g;
    with thresholds of g and of 1 within the kernel's width."""
    cols = tl.program_id(1) * TILE_F + tl.arange(0, TILE_F)
    col_mask = cols < width
    level = level_of(cols, ends, N_LEVELS)
    bias, gains, shifts = columns(cols, width, b_enc, gain, shift, NORM)
    theta, penalty, slot = bias, bias, cols
    if KIND == 1:
        theta = tl.exp(tl.load(log_threshold + cols, mask=col_mask, other=0.0))
    if PENALTY:
        penalty = tl.load(penalties + cols, mask=col_mask, other=0.0) * tl.load(factor)
    if POOL:
        slot = tl.load(slots + cols, mask=col_mask, other=-1)
    bias_sum = tl.zeros((TILE_F,), tl.float32)
    gain_sum = tl.zeros((TILE_F,), tl.float32)
    shift_sum = tl.zeros((TILE_F,), tl.float32)
    near_sum = tl.zeros((TILE_F,), tl.float32)
    near_count = tl.zeros((TILE_F,), tl.float32)
    first = tl.program_id(0) * PART_ROWS
    for start in range(first, min(first + PART_ROWS, n_rows), TILE_R):
        rows = start + tl.arange(0, TILE_R)
        row_mask = rows < n_rows
        mask = row_mask[:, None] & col_mask[None, :]
        at = rows.to(tl.int64)[:, None] * width + cols[None, :]
        ratio = tl.load(ratios + rows, mask=row_mask, other=0.0)
        before = tl.load(dz + at, mask=mask, other=0.0)
        g, unmasked = incoming(
            before,
            tl.load(z + at, mask=mask, other=0.0),
            rows,
            row_mask,
            penalty,
            ratio,
            slot,
            pool_gradient,
            pool_size,
            PENALTY,
            POOL,
            KIND,
            NORM,
            RESCALE,
        )
        g = tl.where(mask, g, 0.0)
        if (NORM != 0) | (KIND == 1):
            u = argument(tl.load(a + at, mask=mask, other=0.0), bias, NORM)
            p = u
            if NORM != 0:
                mean = by_level(moments, rows, row_mask, level, n_rows, N_LEVELS)
                rstd = by_level(moments + N_LEVELS * n_rows, rows, row_mask, level, n_rows, N_LEVELS)
                x_hat = (u - mean) * rstd
                p = x_hat * gains[None, :] + shifts[None, :]
            if KIND == 1:
                near = (tl.abs(p - theta[None, :]) < BANDWIDTH * theta[None, :] / 2) & mask
                near_sum += tl.sum(tl.where(near, unmasked, 0.0), 0)
                near_count += tl.sum(near.to(tl.float32), 0)
            if NORM != 0:
                gain_sum += tl.sum(g * x_hat, 0)
                shift_sum += tl.sum(g, 0)
                mean_g = by_level(sums, rows, row_mask, level, n_rows, N_LEVELS)
                along = by_level(sums + N_LEVELS * n_rows, rows, row_mask, level, n_rows, N_LEVELS)
                g = rstd * (g * gains[None, :] - mean_g - x_hat * along)
                if NORM == 2:
                    g = tl.where(u > 0, g, 0.0)
        out = g.to(dz.dtype.element_ty)
        tl.store(dz + at, out, mask=mask)
        bias_sum += tl.sum(tl.where(mask, out.to(tl.float32), 0.0), 0)
    to = parts + tl.program_id(0) * width + cols
    step = tl.num_programs(0) * width
    tl.store(to, bias_sum, mask=col_mask)
    if NORM != 0:
        tl.store(to + step, gain_sum, mask=col_mask)
        tl.store(to + 2 * step, shift_sum, mask=col_mask)
        to += 2 * step
    if KIND == 1:
        tl.store(to + step, near_sum, mask=col_mask)
        tl.store(to + 2 * step, near_count, mask=col_mask)


@triton.jit
@no_type_check
def column_sums_kernel(
    parts,
    out,
    thresholds_out,
    log_threshold,
    penalties,
    factor,
    n_parts,
    width,
    BANDWIDTH: tl.constexpr,
    L0: tl.constexpr,
    N_PLAIN: tl.constexpr,
    KIND: tl.constexpr,
    TILE_F: tl.constexpr,
):
    """Sums over parts: out [N_PLAIN, latent], and with KIND 1 the gradient of the log-thresholds from the two last."""
    cols = tl.program_id(0) * TILE_F + tl.arange(0, TILE_F)
    mask = cols < width
    for i in tl.static_range(N_PLAIN):
        total = tl.zeros((TILE_F,), tl.float32)
        for part in range(n_parts):
            total += tl.load(parts + (i * n_parts + part) * width + cols, mask=mask, other=0.0)
        tl.store(out + i * width + cols, total, mask=mask)
    if KIND == 1:
        near = tl.zeros((TILE_F,), tl.float32)
        count = tl.zeros((TILE_F,), tl.float32)
        for part in range(n_parts):
            near += tl.load(parts + (N_PLAIN * n_parts + part) * width + cols, mask=mask, other=0.0)
            count += tl.load(parts + ((N_PLAIN + 1) * n_parts + part) * width + cols, mask=mask, other=0.0)
        theta = tl.exp(tl.load(log_threshold + cols, mask=mask, other=0.0))
        slope = -near / BANDWIDTH
        if L0:
            weight = tl.load(penalties + cols, mask=mask, other=0.0) * tl.load(factor)
            slope -= weight / (BANDWIDTH * theta) * count
        tl.store(thresholds_out + cols, theta * slope, mask=mask)


@triton.jit
@no_type_check
def b_dec_kernel(w_enc, b_enc_gradient, parts, out, n_parts, d_model, width, TILE_D: tl.constexpr, SIZE: tl.constexpr):
    """∂loss/∂b_dec: through the decoder, whose parts are added up, minus W_enc Σ_rows ∂a through the encoder."""
    dims = tl.program_id(0) * TILE_D + tl.arange(0, TILE_D)
    mask = dims < d_model
    along = tl.zeros((TILE_D, SIZE), tl.float32)
    for start in range(0, width, SIZE):
        cols = start + tl.arange(0, SIZE)
        at = dims.to(tl.int64)[:, None] * width + cols[None, :]
        w = tl.load(w_enc + at, mask=mask[:, None] & (cols < width)[None, :], other=0.0).to(tl.float32)
        along += w * tl.load(b_enc_gradient + cols, mask=cols < width, other=0.0)[None, :]
    total = tl.zeros((TILE_D,), tl.float32)
    for part in range(n_parts):
        total += tl.load(parts + part * d_model + dims, mask=mask, other=0.0)
    tl.store(out + dims, total - tl.sum(along, 1), mask=mask)


def latents_backward(step: Step, dz: Tensor) -> None:
    """∂loss/∂z of the reconstructions, in place, becomes ∂loss/∂a; gradients of all vectors but b_dec."""
    member, config = step.member, step.config
    norm, kind = step.kept.flags["NORM"], step.kept.kind
    bias, gain, shift, log_threshold = step.columns("b_enc", "ln_gain", "ln_bias", "log_threshold")
    step.factor = step.none
    if config.penalty != "none":
        step.factor = member.schedule.ramp * member.controller.factor / step.n_rows_all
    factor = step.factor.float() if config.penalty != "none" else step.none
    penalised, pool = config.penalty == "l1", bool(step.pool_size)
    penalty = member.penalty if config.penalty != "none" else step.none
    sums = step.none
    flags: dict[str, Any] = {
        "PENALTY": penalised,
        "POOL": pool,
        "N_LEVELS": step.n_levels,
        "KIND": kind,
        **step.kept.flags,
    }
    if norm:
        sums = step.wide("moments_backward", 2, step.n_levels, step.n_rows)
        launch(
            backward_moments_kernel,
            (ceil_div(step.n_rows, tiles.TALL),),
            [
                dz,
                step.a,
                step.z,
                bias,
                gain,
                step.moments,
                step.ratios,
                step.ends,
                penalty,
                factor,
                step.slots,
                step.pool_gradient,
                sums,
                step.n_rows,
                step.width,
                step.pool_size,
            ],
            reads=step.read(dz, step.a, step.z, bias, gain, step.moments, step.ratios, penalty, factor),
            writes=[sums],
            touched={"pool": step.pool_gradient},
            TILE_R=tiles.TALL,
            SIZE=min(tiles.LONG, next_power(step.width)),
            **flags,
        )
    n_plain = 3 if norm else 1
    n_sums = n_plain + 2 * kind
    parts = step.wide("latent_parts", n_sums, step.n_parts, step.width)
    arguments = [dz, step.a, step.z, bias, gain, shift, log_threshold, step.moments, step.ratios, step.ends, sums]
    arguments += [penalty, factor, step.slots, step.pool_gradient, parts]
    reads = [dz, step.z, gain, shift, log_threshold, step.moments, step.ratios, sums, penalty, factor, bias]
    launch(
        backward_kernel,
        step.tiles,
        [*arguments, step.n_rows, step.width, step.pool_size],
        reads=step.read(*reads, *([step.a] if norm or kind else [])),
        writes=[dz, parts],
        touched={"pool": step.pool_gradient},
        BANDWIDTH=config.bandwidth,
        **flags,
        **step.tiling,
    )
    step.vectors = step.wide("vector_gradients", len(step.kept.vectors[0]))
    thresholds = step.vectors[-step.width :]
    launch(
        column_sums_kernel,
        (ceil_div(step.width, 128),),
        [parts, step.vectors, thresholds, log_threshold, penalty, factor, step.n_parts, step.width],
        reads=[parts, *([log_threshold, penalty, factor] if kind else [])],
        writes=[step.vectors[: n_plain * step.width], *([thresholds] if kind else [])],
        BANDWIDTH=config.bandwidth,
        L0=config.penalty == "l0",
        N_PLAIN=n_plain,
        KIND=kind,
        TILE_F=128,
    )


def b_dec_gradient(step: Step) -> None:
    """Through the decoder and through the encoder."""
    n_plain = 3 if step.kept.flags["NORM"] else 1
    out = step.vectors[n_plain * step.width :][: step.d_model]
    w_enc, b_enc = step.member.adam.low["W_enc"], step.vectors[: step.width]
    launch(
        b_dec_kernel,
        (ceil_div(step.d_model, 4),),
        [w_enc, b_enc, step.b_dec_parts, out, len(step.b_dec_parts), step.d_model, step.width],
        reads=[w_enc, b_enc, step.b_dec_parts],
        writes=[out],
        TILE_D=4,
        SIZE=1024,
    )

"""Pre-activations become latents before selection, in registers: what every pass over [row, latent] begins with."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl
from torch import Tensor


class Made(NamedTuple):
    """What latents before selection are made of, one argument of a kernel; one that its config does not have is `b_enc`."""

    a: Tensor  # [row, latent] the encoder's product
    b_enc: Tensor
    gain: Tensor  # LayerNorm's
    shift: Tensor
    log_threshold: Tensor
    moments: Tensor  # [2, level, row]
    ratios: Tensor  # [row]
    ends: Tensor  # [level]
    n_rows: int
    width: int


@triton.jit
@no_type_check
def level_of(cols, ends, N_LEVELS: tl.constexpr):
    """The level whose block each latent is in."""
    level = tl.zeros_like(cols)
    for i in tl.static_range(N_LEVELS):
        level += (cols >= tl.load(ends + i)).to(tl.int32)
    return level


@triton.jit
@no_type_check
def by_level(table, rows, row_mask, level, n_rows, N_LEVELS: tl.constexpr):
    """[row, latent] of what a [level, row] table says for the latent's level."""
    found = tl.zeros((rows.shape[0], level.shape[0]), tl.float32)
    for i in tl.static_range(N_LEVELS):
        value = tl.load(table + i * n_rows + rows, mask=row_mask, other=0.0)
        found = tl.where((level == i)[None, :], value[:, None], found)
    return found


@triton.jit
@no_type_check
def argument(a, bias, NORM: tl.constexpr):
    """What the activation takes, or LayerNorm where there is one, float32 [row, latent]; without LayerNorm rounded as stored."""
    u = a.to(tl.float32) + bias[None, :]
    if NORM == 0:
        u = u.to(a.dtype).to(tl.float32)
    if NORM == 2:
        u = tl.where(u < 0, 0.0, u)
    return u


@triton.jit
@no_type_check
def activated(p, theta, ratio, KIND: tl.constexpr, NORM: tl.constexpr, RESCALE: tl.constexpr):
    """Latents before selection, of the activation's argument (NORM 2: of LayerNorm's outcome). Here and in the selection
    comparisons say what is dropped, not what is kept, so that NaN stays and a divergence is seen."""
    z = p
    if KIND == 1:
        z = tl.where(p <= theta[None, :], 0.0, p)
    elif NORM != 2:
        z = tl.where(p < 0, 0.0, p)
    if RESCALE:
        z = z * ratio[:, None]
    return z


@triton.jit
@no_type_check
def columns(cols, width, b_enc, gain, shift, NORM: tl.constexpr):
    """What a program holds of its latents: bias, and LayerNorm's gain and shift where there is one."""
    mask = cols < width
    bias = tl.load(b_enc + cols, mask=mask, other=0.0)
    gains, shifts = bias, bias
    if NORM != 0:
        gains = tl.load(gain + cols, mask=mask, other=0.0)
        shifts = tl.load(shift + cols, mask=mask, other=0.0)
    return bias, gains, shifts


@triton.jit
@no_type_check
def held(made, cols, N_LEVELS: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr):
    """What a program holds of its latents: level, bias, LayerNorm's gain and shift, threshold."""
    bias, gains, shifts = columns(cols, made.width, made.b_enc, made.gain, made.shift, NORM)
    theta = bias
    if KIND == 1:
        theta = tl.exp(tl.load(made.log_threshold + cols, mask=cols < made.width, other=0.0))
    return level_of(cols, made.ends, N_LEVELS), bias, gains, shifts, theta


@triton.jit
@no_type_check
def before_selection(
    made, rows, cols, own, N_LEVELS: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr, RESCALE: tl.constexpr
):
    """A tile of latents before selection, as stored (float32 of the products' dtype), from the products in memory; own: what the
    program holds of `cols`."""
    level, bias, gains, shifts, theta = own
    row_mask = rows < made.n_rows
    mask = row_mask[:, None] & (cols < made.width)[None, :]
    tile = tl.load(made.a + rows.to(tl.int64)[:, None] * made.width + cols[None, :], mask=mask, other=0.0)
    p = argument(tile, bias, NORM)
    ratio = tl.load(made.ratios + rows, mask=row_mask, other=0.0)
    if NORM != 0:
        mean = by_level(made.moments, rows, row_mask, level, made.n_rows, N_LEVELS)
        rstd = by_level(made.moments + N_LEVELS * made.n_rows, rows, row_mask, level, made.n_rows, N_LEVELS)
        p = (p - mean) * rstd * gains[None, :] + shifts[None, :]
    return activated(p, theta, ratio, KIND, NORM, RESCALE).to(tile.dtype).to(tl.float32)


@triton.jit
@no_type_check
def moments_kernel(
    a,
    b_enc,
    ends,
    moments,
    n_rows,
    width,
    eps,
    N_LEVELS: tl.constexpr,
    NORM: tl.constexpr,
    TILE_R: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Mean and 1/σ of each row's levels, [2, level, row]; a program goes along TILE_R rows."""
    rows = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    row_mask = rows < n_rows
    start = 0
    for i in tl.static_range(N_LEVELS):
        stop = tl.load(ends + i)
        total = tl.zeros((TILE_R,), tl.float32)
        for first in range(start, stop, SIZE):
            cols = first + tl.arange(0, SIZE)
            mask = row_mask[:, None] & (cols < stop)[None, :]
            tile = tl.load(a + rows.to(tl.int64)[:, None] * width + cols[None, :], mask=mask, other=0.0)
            u = argument(tile, tl.load(b_enc + cols, mask=cols < stop, other=0.0), NORM)
            total += tl.sum(tl.where(mask, u, 0.0), 1)
        mean = total / (stop - start)
        square = tl.zeros((TILE_R,), tl.float32)
        for first in range(start, stop, SIZE):
            cols = first + tl.arange(0, SIZE)
            mask = row_mask[:, None] & (cols < stop)[None, :]
            tile = tl.load(a + rows.to(tl.int64)[:, None] * width + cols[None, :], mask=mask, other=0.0)
            u = argument(tile, tl.load(b_enc + cols, mask=cols < stop, other=0.0), NORM) - mean[:, None]
            square += tl.sum(tl.where(mask, u * u, 0.0), 1)
        rstd = 1.0 / tl.sqrt(square / (stop - start) + eps)
        tl.store(moments + i * n_rows + rows, mean, mask=row_mask)
        tl.store(moments + (N_LEVELS + i) * n_rows + rows, rstd, mask=row_mask)
        start = stop

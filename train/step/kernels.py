"""Triton kernels of a step on a CUDA device: every number of the large arrays is read and written as rarely as can be.

What they compute is what `latents`, `objectives`, `optim` and `member` say; `fused.py` calls them in the order of a step. All
arithmetic is in float32 in registers, sums over the batch in float64; nothing is added by floating-point atomics, so a step
gives the same bits every time. Arrays of [row, latent] go through in tiles: a program takes ROWS rows of LATENTS latents, and
leaves a partial sum a column, [part, latent], where the batch is summed over.

    KIND  0 relu, topk, batchtopk (whose selection is a threshold)    1 jumprelu
    NORM  0 none    1 LayerNorm before the activation    2 after it
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

ROWS, TILE_ROWS, LATENTS = 256, 16, 128
"""Rows of a program, rows of them at a time, latents of a program."""

CHUNK = 4096
"""Numbers of a row, or of a vector, that a program which goes along it takes at a time."""

BINS = 1 << 15
"""Of a histogram: the 15 upper bits below the sign of a non-negative float32, which are all bits of a bf16."""

LOW_BINS = 1 << 16
"""Of a histogram of float32's other bits."""


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


# ---- latents, forward ----


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
def before_selection(
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
    N_LEVELS: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    RESCALE: tl.constexpr,
):
    """A tile of latents before selection, as stored (float32 of the products' dtype), from the products `a` in memory."""
    row_mask = rows < n_rows
    mask = row_mask[:, None] & (cols < width)[None, :]
    tile = tl.load(a + rows.to(tl.int64)[:, None] * width + cols[None, :], mask=mask, other=0.0)
    p = argument(tile, bias, NORM)
    ratio = tl.load(ratios + rows, mask=row_mask, other=0.0)
    if NORM != 0:
        mean = by_level(moments, rows, row_mask, level, n_rows, N_LEVELS)
        rstd = by_level(moments + N_LEVELS * n_rows, rows, row_mask, level, n_rows, N_LEVELS)
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


@triton.jit
@no_type_check
def histogram_kernel(
    a,
    b_enc,
    gain,
    shift,
    moments,
    ratios,
    ends,
    search,
    counts,
    n_rows,
    width,
    PASS: tl.constexpr,
    N_LEVELS: tl.constexpr,
    NORM: tl.constexpr,
    RESCALE: tl.constexpr,
    PART_ROWS: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_F: tl.constexpr,
):
    """Count latents before selection by the upper bits of their float32: those above the guess (PASS 0), all the other
    positive ones when those were too few (PASS 1), or by the lower bits those whose upper bits are the wanted one's (PASS 2).

    search, float32: the guess, the threshold, 1 where the guess was too high, and as an int32 how many are wanted of the bin.
    """
    guess = tl.load(search)
    missed = tl.load(search + 2)
    wanted = tl.load(search + 1).to(tl.int32, bitcast=True) >> 16
    if (PASS != 1) | (missed > 0):
        cols = tl.program_id(1) * TILE_F + tl.arange(0, TILE_F)
        col_mask = cols < width
        level = level_of(cols, ends, N_LEVELS)
        bias, gains, shifts = columns(cols, width, b_enc, gain, shift, NORM)
        first = tl.program_id(0) * PART_ROWS
        for start in range(first, min(first + PART_ROWS, n_rows), TILE_R):
            rows = start + tl.arange(0, TILE_R)
            row_mask = rows < n_rows
            mask = row_mask[:, None] & col_mask[None, :]
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
                bias,
                moments,
                ratios,
                N_LEVELS,
                0,
                NORM,
                RESCALE,
            )
            key = z.to(tl.int32, bitcast=True)
            if PASS == 0:
                tl.atomic_add(counts + (key >> 16), 1, mask=mask & (z > guess), sem="relaxed")
            elif PASS == 1:
                tl.atomic_add(counts + (key >> 16), 1, mask=mask & (z > 0) & (z <= guess), sem="relaxed")
            else:
                tl.atomic_add(counts + (key & 0xFFFF), 1, mask=mask & ((key >> 16) == wanted), sem="relaxed")


@triton.jit
@no_type_check
def find_kernel(
    search, counts, n, margin, PASS: tl.constexpr, LAST: tl.constexpr, N_BINS: tl.constexpr, SIZE: tl.constexpr
):
    """The bin that holds the n-th largest value, from the histogram of the pass; one program. What is there after the last
    pass is the threshold, and the next step's guess a little below it; counts are 0 again."""
    missed = tl.load(search + 2)
    if (PASS != 1) | (missed > 0):
        left = n + tl.zeros((), tl.int32)
        if PASS == 2:
            left = tl.load(search + 3).to(tl.int32, bitcast=True)
        above = tl.zeros((), tl.int32)  # values in the bins after the chunk at hand
        found = tl.full((), -1, tl.int32)
        rest = left
        for i in range(N_BINS // SIZE):
            base = N_BINS - (i + 1) * SIZE
            count = tl.load(counts + base + tl.arange(0, SIZE))
            behind = above + tl.cumsum(count, 0, reverse=True)  # values in this bin and all after it
            n_enough = tl.sum((behind >= left).to(tl.int32))
            here = (found < 0) & (n_enough > 0)
            later = tl.max(tl.where(behind < left, behind, above))  # values in the bins after the one that is found
            found = tl.where(here, base + n_enough - 1, found)
            rest = tl.where(here, left - later, rest)
            above += tl.sum(count)
        threshold = tl.maximum(found, 0) << 16
        if PASS == 2:
            threshold = (tl.load(search + 1).to(tl.int32, bitcast=True) >> 16) << 16
            threshold = tl.where(threshold == 0, 0, threshold + tl.maximum(found, 0))
        else:
            tl.store(search + 3, rest.to(tl.float32, bitcast=True))
        if PASS == 0:
            tl.store(search + 2, tl.where(found < 0, 1.0, 0.0))
        tl.debug_barrier()
        tl.store(search + 1, threshold.to(tl.float32, bitcast=True))
        tl.debug_barrier()
    if PASS != 0:
        for i in range(N_BINS // SIZE):
            tl.store(counts + i * SIZE + tl.arange(0, SIZE), tl.zeros((SIZE,), tl.int32))
    if LAST:
        tl.store(search, tl.load(search + 1) * margin)


@triton.jit
@no_type_check
def row_threshold_kernel(
    a,
    b_enc,
    gain,
    shift,
    moments,
    ratios,
    ends,
    thresholds,
    n_rows,
    width,
    k,
    FIRST_BIT: tl.constexpr,
    N_LEVELS: tl.constexpr,
    NORM: tl.constexpr,
    RESCALE: tl.constexpr,
    TILE_R: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The k-th largest latent of each row before selection, bit by bit from the highest; a program goes along TILE_R rows,
    whose products stay in cache. FIRST_BIT: the lowest bit that is not always 0 in the products' dtype."""
    rows = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    row_mask = rows < n_rows
    found = tl.zeros((TILE_R,), tl.int32)
    for i in range(31 - FIRST_BIT):
        tried = found | (1 << (30 - i))
        count = tl.zeros((TILE_R,), tl.int32)
        for start in range(0, width, SIZE):
            cols = start + tl.arange(0, SIZE)
            col_mask = cols < width
            mask = row_mask[:, None] & col_mask[None, :]
            level = level_of(cols, ends, N_LEVELS)
            bias, gains, shifts = columns(cols, width, b_enc, gain, shift, NORM)
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
                bias,
                moments,
                ratios,
                N_LEVELS,
                0,
                NORM,
                RESCALE,
            )
            key = z.to(tl.int32, bitcast=True)
            count += tl.sum(((key >= tried[:, None]) & mask).to(tl.int32), 1)
        found = tl.where(count >= k, tried, found)
    tl.store(thresholds + rows, found.to(tl.float32, bitcast=True), mask=row_mask)


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


# ---- latents, backward ----


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


# ---- reconstructions ----


@triton.jit
@no_type_check
def residuals_kernel(
    x,
    b_dec,
    decoded,
    slopes,
    remainder,
    n_dead,
    errors,
    parts,
    n_rows,
    d_model,
    N_TERMS: tl.constexpr,
    TERMS: tl.constexpr,
    POOL: tl.constexpr,
    PART_ROWS: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Decodes of all prefixes, [term, row, d_model], become the suffix sums of slope · (x̂ − x) in place.

    errors [term, block]: Σ‖x − x̂‖²; parts [part, d_model]: sums over rows of what reaches the first block. POOL: x̂ − x of the
    last is kept in `remainder` where any latent is dead. TERMS: N_TERMS, or the next power of two.
    """
    cols = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    col_mask = cols < d_model
    bias = tl.load(b_dec + cols, mask=col_mask, other=0.0)
    gradient = tl.zeros((TILE_D,), tl.float32)
    block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    n_blocks = tl.num_programs(0) * tl.num_programs(1)
    first = tl.program_id(0) * PART_ROWS
    stop = min(first + PART_ROWS, n_rows)
    term_size = n_rows.to(tl.int64) * d_model
    keep = 0
    if POOL:
        keep = tl.load(n_dead)
    squares = tl.zeros((TERMS, TILE_D), tl.float32)
    index = tl.arange(0, TERMS)
    for start in range(first, stop, TILE_R):
        rows = start + tl.arange(0, TILE_R)
        mask = (rows < n_rows)[:, None] & col_mask[None, :]
        at = rows.to(tl.int64)[:, None] * d_model + cols[None, :]
        target = tl.load(x + at, mask=mask, other=0.0) - bias[None, :]
        suffix = tl.zeros((TILE_R, TILE_D), tl.float32)
        for j in tl.static_range(N_TERMS):
            term = N_TERMS - 1 - j
            error = tl.load(decoded + term * term_size + at, mask=mask, other=0.0).to(tl.float32) - target
            error = tl.where(mask, error, 0.0)
            squares += tl.where((index == term)[:, None], tl.sum(error * error, 0)[None, :], 0.0)
            if POOL and j == 0 and keep > 0:
                tl.store(remainder + at, error.to(remainder.dtype.element_ty), mask=mask)
            suffix += error * tl.load(slopes + term)
            tl.store(decoded + term * term_size + at, suffix.to(decoded.dtype.element_ty), mask=mask)
        gradient += tl.sum(suffix, 0)
    tl.store(errors + index * n_blocks + block, tl.sum(squares, 1), mask=index < N_TERMS)
    tl.store(parts + tl.program_id(0) * d_model + cols, gradient, mask=col_mask)


# ---- the auxiliary loss: nothing is read or written beyond `n_dead` while no latent is dead ----


@triton.jit
@no_type_check
def dead_pool_kernel(
    rows_since_fired, pool, slots, n_dead, width, dead_after, POOL_SIZE: tl.constexpr, SIZE: tl.constexpr
):
    """The POOL_SIZE latents that have gone longest without firing among dead ones, the first of equals; one program.

    pool [POOL_SIZE]: their indices, ascending; slots [latent]: a latent's place in it or −1; n_dead: how many there are.
    """
    count = tl.zeros((), tl.int32)
    oldest = tl.zeros((), tl.int64)
    for start in range(0, width, SIZE):
        cols = start + tl.arange(0, SIZE)
        age = tl.load(rows_since_fired + cols, mask=cols < width, other=-1)
        count += tl.sum((age >= dead_after).to(tl.int32))
        oldest = tl.maximum(oldest, tl.max(age))
    low = tl.zeros((), tl.int64) + dead_after  # the largest age that POOL_SIZE latents reach, or what makes one dead
    high = oldest
    if count <= POOL_SIZE:
        high = low
    while low < high:
        middle = (low + high + 1) // 2
        reach = tl.zeros((), tl.int32)
        for start in range(0, width, SIZE):
            cols = start + tl.arange(0, SIZE)
            age = tl.load(rows_since_fired + cols, mask=cols < width, other=-1)
            reach += tl.sum((age >= middle).to(tl.int32))
        if reach >= POOL_SIZE:
            low = middle
        else:
            high = middle - 1
    older = tl.zeros((), tl.int32)
    for start in range(0, width, SIZE):
        cols = start + tl.arange(0, SIZE)
        age = tl.load(rows_since_fired + cols, mask=cols < width, other=-1)
        older += tl.sum((age > low).to(tl.int32))
    n_equal = tl.zeros((), tl.int32)  # latents of that very age so far
    n_taken = tl.zeros((), tl.int32)
    for start in range(0, width, SIZE):
        cols = start + tl.arange(0, SIZE)
        mask = cols < width
        age = tl.load(rows_since_fired + cols, mask=mask, other=-1)
        equal = (age == low).to(tl.int32)
        rank = n_equal + tl.cumsum(equal, 0)
        taken = (age > low) | ((equal > 0) & (rank <= POOL_SIZE - older))
        slot = n_taken + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(slots + cols, tl.where(taken, slot, -1), mask=mask)
        tl.store(pool + slot, cols, mask=taken & mask)
        n_equal += tl.sum(equal)
        n_taken += tl.sum(taken.to(tl.int32))
    tl.store(n_dead, n_taken)


@triton.jit
@no_type_check
def pool_select_kernel(pool_z, n_dead, k, POOL_SIZE: tl.constexpr, FIRST_BIT: tl.constexpr, SIZE: tl.constexpr):
    """Of each row's latents in the pool only the k largest stay, ties with the k-th included; a program a row."""
    n = tl.load(n_dead)
    if n > k:
        cols = tl.arange(0, SIZE)
        mask = cols < n
        at = pool_z + tl.program_id(0).to(tl.int64) * POOL_SIZE + cols
        value = tl.load(at, mask=mask, other=0.0)
        key = value.to(tl.float32).to(tl.int32, bitcast=True)
        found = tl.zeros((), tl.int32)
        for i in range(31 - FIRST_BIT):
            tried = found | (1 << (30 - i))
            found = tl.where(tl.sum(((key >= tried) & mask).to(tl.int32)) >= k, tried, found)
        tl.store(at, tl.where(key >= found, value, 0.0), mask=mask)


@triton.jit
@no_type_check
def pool_decode_kernel(
    pool_z,
    pool,
    w_dec,
    remainder,
    slope,
    losses,
    n_dead,
    n_rows,
    d_model,
    pool_size,
    factor,
    TILE_R: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """slope = factor · (ẑ W_dec + x̂ − x) over the pool; losses [block]: Σ of its square before the factor."""
    n = tl.load(n_dead)
    block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    loss = tl.zeros((), tl.float32)
    if n > 0:
        rows = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
        cols = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
        mask = (rows < n_rows)[:, None] & (cols < d_model)[None, :]
        total = tl.zeros((TILE_R, TILE_D), tl.float32)
        for start in range(0, n, TILE_K):
            slots = start + tl.arange(0, TILE_K)
            latents = tl.load(pool + slots, mask=slots < n, other=0).to(tl.int64)
            left = tl.load(
                pool_z + rows.to(tl.int64)[:, None] * pool_size + slots[None, :],
                mask=(rows < n_rows)[:, None] & (slots < n)[None, :],
                other=0.0,
            )
            right = tl.load(
                w_dec + latents[:, None] * d_model + cols[None, :],
                mask=(slots < n)[:, None] & (cols < d_model)[None, :],
                other=0.0,
            )
            total = tl.dot(left, right, total, input_precision="ieee")
        at = rows.to(tl.int64)[:, None] * d_model + cols[None, :]
        error = tl.where(mask, total + tl.load(remainder + at, mask=mask, other=0.0).to(tl.float32), 0.0)
        tl.store(slope + at, (error * factor).to(slope.dtype.element_ty), mask=mask)
        loss = tl.sum(error * error)
    tl.store(losses + block, loss)


@triton.jit
@no_type_check
def pool_decoder_kernel(
    pool_z,
    pool,
    slope,
    gradient,
    n_dead,
    n_rows,
    d_model,
    pool_size,
    TILE_P: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """ẑᵀ slope is added to the decoder's gradient at the pool's latents."""
    n = tl.load(n_dead)
    slots = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    if tl.program_id(0) * TILE_P < n:
        cols = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
        total = tl.zeros((TILE_P, TILE_D), tl.float32)
        for start in range(0, n_rows, TILE_K):
            rows = start + tl.arange(0, TILE_K)
            left = tl.load(
                pool_z + rows.to(tl.int64)[None, :] * pool_size + slots[:, None],
                mask=(rows < n_rows)[None, :] & (slots < n)[:, None],
                other=0.0,
            )
            right = tl.load(
                slope + rows.to(tl.int64)[:, None] * d_model + cols[None, :],
                mask=(rows < n_rows)[:, None] & (cols < d_model)[None, :],
                other=0.0,
            )
            total = tl.dot(left, right, total, input_precision="ieee")
        latents = tl.load(pool + slots, mask=slots < n, other=0).to(tl.int64)
        at = gradient + latents[:, None] * d_model + cols[None, :]
        mask = (slots < n)[:, None] & (cols < d_model)[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, total.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def pool_latents_kernel(
    slope,
    pool,
    w_dec,
    pool_z,
    out,
    n_dead,
    n_rows,
    d_model,
    pool_size,
    TILE_R: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """∂loss/∂ẑ of the pool's latents, 0 where they are not above 0: [row, pool_size]."""
    n = tl.load(n_dead)
    slots = tl.program_id(1) * TILE_P + tl.arange(0, TILE_P)
    if tl.program_id(1) * TILE_P < n:
        rows = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
        latents = tl.load(pool + slots, mask=slots < n, other=0).to(tl.int64)
        total = tl.zeros((TILE_R, TILE_P), tl.float32)
        for start in range(0, d_model, TILE_K):
            dims = start + tl.arange(0, TILE_K)
            left = tl.load(
                slope + rows.to(tl.int64)[:, None] * d_model + dims[None, :],
                mask=(rows < n_rows)[:, None] & (dims < d_model)[None, :],
                other=0.0,
            )
            right = tl.load(
                w_dec + latents[None, :] * d_model + dims[:, None],
                mask=(slots < n)[None, :] & (dims < d_model)[:, None],
                other=0.0,
            )
            total = tl.dot(left, right, total, input_precision="ieee")
        at = rows.to(tl.int64)[:, None] * pool_size + slots[None, :]
        mask = (rows < n_rows)[:, None] & (slots < n)[None, :]
        value = tl.load(pool_z + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, tl.where(value > 0, total, 0.0).to(out.dtype.element_ty), mask=mask)


# ---- the optimiser ----


@triton.jit
@no_type_check
def squares_kernel(gradients, parts, n, PART: tl.constexpr, SIZE: tl.constexpr):
    """Sums of squares, one a program that takes PART numbers."""
    first = tl.program_id(0).to(tl.int64) * PART
    total = tl.zeros((SIZE,), tl.float32)
    for start in range(0, PART, SIZE):
        at = first + start + tl.arange(0, SIZE)
        value = tl.load(gradients + at, mask=at < n, other=0.0).to(tl.float32)
        total += value * value
    tl.store(parts + tl.program_id(0), tl.sum(total))


@triton.jit
@no_type_check
def clip_kernel(
    parts,
    vectors,
    lr,
    n_updates,
    norm_out,
    control,
    n_parts,
    n_vectors,
    CLIP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The gradient's norm, and what Adam needs of this update: control = [clip factor, lr / (1 − β₁ᵗ), 1 / √(1 − β₂ᵗ)]."""
    total = tl.zeros((SIZE,), tl.float64)
    for start in range(0, n_parts, SIZE):
        at = start + tl.arange(0, SIZE)
        total += tl.load(parts + at, mask=at < n_parts, other=0.0).to(tl.float64)
    for start in range(0, n_vectors, SIZE):
        at = start + tl.arange(0, SIZE)
        value = tl.load(vectors + at, mask=at < n_vectors, other=0.0).to(tl.float64)
        total += value * value
    norm = tl.sqrt(tl.sum(total))
    tl.store(norm_out, norm)
    shrink = norm * 0 + 1.0
    if NORMALIZE:
        shrink = 1.0 / tl.maximum(norm, 1e-30)
    elif CLIP > 0:
        shrink = tl.minimum(CLIP / tl.maximum(norm, 1e-30), 1.0)
    t = tl.load(n_updates) + 1.0
    tl.store(n_updates, t)
    steps = t.to(tl.float64)
    first = 1.0 - tl.exp2(steps * BETA1)  # β as its base-2 logarithm
    second = 1.0 - tl.exp2(steps * BETA2)
    tl.store(control, shrink.to(tl.float32))
    tl.store(control + 1, (tl.load(lr).to(tl.float64) / first).to(tl.float32))
    tl.store(control + 2, (1.0 / tl.sqrt(second)).to(tl.float32))


@triton.jit
@no_type_check
def adam(g, w, m, v, step_size, correction, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    """Adam's new weight and moments."""
    m = m + (1 - BETA1) * (g - m)
    v = BETA2 * v + (1 - BETA2) * g * g
    return w - step_size * m / (tl.sqrt(v) * correction + EPS), m, v


@triton.jit
@no_type_check
def adam_rows_kernel(
    weight,
    gradient,
    first,
    second,
    low,
    control,
    n_rows,
    d_model,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    LOW: tl.constexpr,
    TILE_R: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The decoder: clip, projection, Adam, renormalisation and the low-precision copy; a program takes TILE_R whole rows."""
    rows = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    cols = tl.arange(0, SIZE)
    mask = (rows < n_rows)[:, None] & (cols < d_model)[None, :]
    at = rows.to(tl.int64)[:, None] * d_model + cols[None, :]
    w = tl.load(weight + at, mask=mask, other=0.0)
    g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32) * tl.load(control)
    g = g - tl.sum(g * w, 1)[:, None] * w
    m = tl.load(first + at, mask=mask, other=0.0)
    v = tl.load(second + at, mask=mask, other=0.0)
    w, m, v = adam(g, w, m, v, tl.load(control + 1), tl.load(control + 2), BETA1, BETA2, EPS)
    tl.store(first + at, m, mask=mask)
    tl.store(second + at, v, mask=mask)
    w = tl.where(mask, w, 0.0)
    length = tl.sqrt(tl.sum(w * w, 1))
    w = w / tl.where(rows < n_rows, length, 1.0)[:, None]
    tl.store(weight + at, w, mask=mask)
    if LOW:
        tl.store(low + at, w.to(low.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def adam_kernel(
    weight,
    gradient,
    first,
    second,
    low,
    control,
    n,
    scaled_from,
    scale,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    LOW: tl.constexpr,
    SIZE: tl.constexpr,
):
    """All other weights: clip, Adam and the low-precision copy; the learning rate is `scale` times as large from
    `scaled_from` on."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = at < n
    g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32) * tl.load(control)
    w = tl.load(weight + at, mask=mask, other=0.0)
    m = tl.load(first + at, mask=mask, other=0.0)
    v = tl.load(second + at, mask=mask, other=0.0)
    step_size = tl.load(control + 1) * tl.where(at >= scaled_from, scale, 1.0)
    w, m, v = adam(g, w, m, v, step_size, tl.load(control + 2), BETA1, BETA2, EPS)
    tl.store(first + at, m, mask=mask)
    tl.store(second + at, v, mask=mask)
    tl.store(weight + at, w, mask=mask)
    if LOW:
        tl.store(low + at, w.to(low.dtype.element_ty), mask=mask)


# ---- counters and sums ----


@triton.jit
@no_type_check
def collect_kernel(
    counts,
    sizes,
    errors,
    losses,
    batch_total,
    batch_square,
    out,
    n_count_parts,
    n_size_parts,
    n_error_parts,
    n_losses,
    aux_factor,
    width,
    d_model,
    N_TERMS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Sums over this process's rows, float64: counts [latent], l1 [2], errors [term], total [d_model], square, aux."""
    cols = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    count = tl.zeros((SIZE,), tl.int32)
    for part in range(n_count_parts):
        count += tl.load(counts + part * width + cols, mask=cols < width, other=0)
    tl.store(out + cols, count.to(tl.float64), mask=cols < width)
    mask = cols < d_model
    total = tl.load(batch_total + cols, mask=mask, other=0.0)
    tl.store(out + width + 2 + N_TERMS + cols, total, mask=mask)
    if tl.program_id(0) == 0:
        index = tl.arange(0, SIZE)
        for i in tl.static_range(2):
            sum_ = tl.zeros((SIZE,), tl.float64)
            for start in range(0, n_size_parts, SIZE):
                at = start + index
                sum_ += tl.load(sizes + i * n_size_parts + at, mask=at < n_size_parts, other=0.0).to(tl.float64)
            tl.store(out + width + i, tl.sum(sum_))
        for i in tl.static_range(N_TERMS):
            sum_ = tl.zeros((SIZE,), tl.float64)
            for start in range(0, n_error_parts, SIZE):
                at = start + index
                sum_ += tl.load(errors + i * n_error_parts + at, mask=at < n_error_parts, other=0.0).to(tl.float64)
            tl.store(out + width + 2 + i, tl.sum(sum_))
        tl.store(out + width + 2 + N_TERMS + d_model, tl.load(batch_square))
        sum_ = tl.zeros((SIZE,), tl.float64)
        for start in range(0, n_losses, SIZE):
            at = start + index
            sum_ += tl.load(losses + at, mask=at < n_losses, other=0.0).to(tl.float64)
        tl.store(out + width + 2 + N_TERMS + d_model + 1, tl.sum(sum_) * aux_factor)


@triton.jit
@no_type_check
def account_kernel(
    now,
    slopes,
    factor,
    norm,
    rows_since_fired,
    scalars,
    total,
    errors,
    l1,
    l0_out,
    n_rows,
    width,
    d_model,
    n_shared,
    lambda_shared,
    lambda_specialised,
    CLIP: tl.constexpr,
    PENALTY: tl.constexpr,
    N_TERMS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Counters, and the sums that a line of metrics is made of, from the sums over all processes' rows; one program.

    scalars: steps, rows, square, loss, l0, aux, grad_norm, clipped. factor: of the penalty, over the number of rows. PENALTY:
    0 none, 1 l1, 2 l0. slopes: 2 · weight / n of every term.
    """
    shared = tl.zeros((SIZE,), tl.float64)
    rest = tl.zeros((SIZE,), tl.float64)
    for start in range(0, width, SIZE):
        cols = start + tl.arange(0, SIZE)
        mask = cols < width
        count = tl.load(now + cols, mask=mask, other=0.0)
        age = tl.load(rows_since_fired + cols, mask=mask, other=0)
        tl.store(rows_since_fired + cols, tl.where(count > 0, 0, age + n_rows), mask=mask)
        shared += tl.where(cols < n_shared, count, 0.0)
        rest += tl.where(cols < n_shared, 0.0, count)
    n_first = tl.sum(shared)
    n_second = tl.sum(rest)
    l0 = (n_first + n_second) / n_rows
    at = now + width
    size_first = tl.load(at)
    size_second = tl.load(at + 1)
    tl.store(l1, tl.load(l1) + size_first)
    tl.store(l1 + 1, tl.load(l1 + 1) + size_second)
    aux = tl.load(at + 2 + N_TERMS + d_model + 1)
    loss = aux
    for i in tl.static_range(N_TERMS):
        error = tl.load(at + 2 + i)
        loss += tl.load(slopes + i).to(tl.float64) * 0.5 * error
        tl.store(errors + i, tl.load(errors + i) + error)
    if PENALTY == 1:
        loss += tl.load(factor) * (lambda_shared * size_first + lambda_specialised * size_second)
    if PENALTY == 2:
        loss += tl.load(factor) * (lambda_shared * n_first + lambda_specialised * n_second)
    for start in range(0, d_model, SIZE):
        dims = start + tl.arange(0, SIZE)
        mask = dims < d_model
        value = tl.load(total + dims, mask=mask, other=0.0) + tl.load(at + 2 + N_TERMS + dims, mask=mask, other=0.0)
        tl.store(total + dims, value, mask=mask)
    length = tl.load(norm)
    tl.store(scalars, tl.load(scalars) + 1.0)
    tl.store(scalars + 1, tl.load(scalars + 1) + n_rows)
    tl.store(scalars + 2, tl.load(scalars + 2) + tl.load(at + 2 + N_TERMS + d_model))
    tl.store(scalars + 3, tl.load(scalars + 3) + loss)
    tl.store(scalars + 4, tl.load(scalars + 4) + l0)
    tl.store(scalars + 5, tl.load(scalars + 5) + aux)
    tl.store(scalars + 6, tl.load(scalars + 6) + length)
    if CLIP > 0:
        tl.store(scalars + 7, tl.load(scalars + 7) + (length > CLIP).to(tl.float64))
    tl.store(l0_out, l0)


# ---- the batch ----


@triton.jit
@no_type_check
def normalise_kernel(raw, center, scale, x, norm, parts, n_rows, d_model, PART_ROWS: tl.constexpr, SIZE: tl.constexpr):
    """x = (raw − center) · scale in float32; norm [row]; parts [part, d_model]: sums over the rows of a program."""
    rows = tl.program_id(0) * PART_ROWS + tl.arange(0, PART_ROWS)
    row_mask = rows < n_rows
    square = tl.zeros((PART_ROWS,), tl.float32)
    for start in range(0, d_model, SIZE):
        cols = start + tl.arange(0, SIZE)
        mask = row_mask[:, None] & (cols < d_model)[None, :]
        at = rows.to(tl.int64)[:, None] * d_model + cols[None, :]
        middle = tl.load(center + cols, mask=cols < d_model, other=0.0)
        value = (tl.load(raw + at, mask=mask, other=0.0).to(tl.float32) - middle[None, :]) * scale
        value = tl.where(mask, value, 0.0)
        tl.store(x + at, value, mask=mask)
        square += tl.sum(value * value, 1)
        tl.store(parts + tl.program_id(0) * d_model + cols, tl.sum(value, 0), mask=cols < d_model)
    tl.store(norm + rows, tl.sqrt(square), mask=row_mask)


@triton.jit
@no_type_check
def batch_sums_kernel(parts, norm, total, square, n_parts, n_rows, d_model, SIZE: tl.constexpr):
    """Σ x over rows [d_model] and Σ ‖x‖², float64."""
    cols = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = cols < d_model
    sum_ = tl.zeros((SIZE,), tl.float64)
    for part in range(n_parts):
        sum_ += tl.load(parts + part * d_model + cols, mask=mask, other=0.0).to(tl.float64)
    tl.store(total + cols, sum_, mask=mask)
    if tl.program_id(0) == 0:
        squares = tl.zeros((SIZE,), tl.float64)
        for start in range(0, n_rows, SIZE):
            rows = start + tl.arange(0, SIZE)
            value = tl.load(norm + rows, mask=rows < n_rows, other=0.0).to(tl.float64)
            squares += value * value
        tl.store(square, tl.sum(squares))

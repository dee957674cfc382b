"""Latents forward: bias, LayerNorm, activation, selection, counts and sums in one pass.

batchtopk's threshold is known only when all latents are, so the pass keeps what is not below a guess, the last threshold a little
lowered, and counts it in a histogram; of what it kept, the few latents below the threshold are taken out again where the pass
noted that there are any. Where the guess was too high, which the device decides, latents are made once more.
"""

from __future__ import annotations

import math
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.step.fused import thresholds, tiles
from train.step.fused.activation import before_selection, held, moments_kernel
from train.step.fused.context import Step, unique
from train.step.fused.thresholds import kept_again
from train.step.fused.tiles import ceil_div, next_power
from train.step.traffic import launch

SELECTIONS = {"batchtopk": 1, "topk": 2}


class Noted(NamedTuple):
    """What the pass over latents notes of those that it keeps, one argument of a kernel; where a guess selects, the last two in
    place of `sizes`, for `settle_kernel`."""

    counts: Tensor  # [part, latent] rows on which each is not 0
    sizes: Tensor  # [2, part, column block] Σ|z| shared, specialised
    least: Tensor  # [row, column block] the smallest kept, ∞ where there is none
    row_sizes: Tensor  # [2, row, column block] Σ|z| shared, specialised


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
def sizes_of_rows(z, cols, n_shared):
    """Of each row of a tile Σ|z| over shared and over specialised latents."""
    size = tl.abs(z)
    shared = (cols < n_shared)[None, :]
    return tl.sum(tl.where(shared, size, 0.0), 1), tl.sum(tl.where(shared, 0.0, size), 1)


@triton.jit
@no_type_check
def select_kernel(
    made,
    noted,
    z_out,
    thresholds,
    slots,
    pool_z,
    bins,
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
    """Latents of products, with SELECT 1 those not below the guess at the batch's threshold, 2 those not below their row's.

    POOL: latents before selection whose slot is not −1 go to pool_z [row, pool_size]. SELECT 1: bins, how many above the guess
    have each upper half of a float32.
    """
    n_blocks = tl.num_programs(1)
    cols = tl.program_id(1) * TILE_F + tl.arange(0, TILE_F)
    col_mask = cols < made.width
    own = held(made, cols, N_LEVELS, KIND, NORM)
    slot = cols
    if POOL:
        slot = tl.load(slots + cols, mask=col_mask, other=-1)
    count = tl.zeros((TILE_F,), tl.int32)
    size = tl.zeros((TILE_F,), tl.float32)
    first = tl.program_id(0) * PART_ROWS
    for start in range(first, min(first + PART_ROWS, made.n_rows), TILE_R):
        rows = start + tl.arange(0, TILE_R)
        row_mask = rows < made.n_rows
        mask = row_mask[:, None] & col_mask[None, :]
        at = rows.to(tl.int64)[:, None] * made.width + cols[None, :]
        z = before_selection(made, rows, cols, own, N_LEVELS, KIND, NORM, RESCALE)
        if POOL:
            to = rows.to(tl.int64)[:, None] * pool_size + slot[None, :]
            tl.store(pool_z + to, z.to(pool_z.dtype.element_ty), mask=mask & (slot >= 0)[None, :])
        if SELECT == 1:
            guess = tl.load(thresholds)
            key = z.to(tl.int32, bitcast=True)
            tl.atomic_add(bins + (key >> 16), 1, mask=mask & (z > guess), sem="relaxed")
            z = tl.where(z < guess, 0.0, z)
        if SELECT == 2:
            z = tl.where(z < tl.load(thresholds + rows, mask=row_mask, other=0.0)[:, None], 0.0, z)
        z = tl.where(mask, z, 0.0)
        tl.store(z_out + at, z.to(z_out.dtype.element_ty), mask=mask)
        count += tl.sum((z != 0).to(tl.int32), 0)
        if SELECT == 1:
            to = rows.to(tl.int64) * n_blocks + tl.program_id(1)
            tl.store(noted.least + to, tl.min(tl.where(z == 0, float("inf"), z), 1), mask=row_mask)
            shared, rest = sizes_of_rows(z, cols, n_shared)
            tl.store(noted.row_sizes + to, shared, mask=row_mask)
            tl.store(noted.row_sizes + tl.cast(made.n_rows, tl.int64) * n_blocks + to, rest, mask=row_mask)
        else:
            size += tl.sum(tl.abs(z), 0)
    tl.store(noted.counts + tl.program_id(0) * made.width + cols, count, mask=col_mask)
    if SELECT != 1:
        part = tl.program_id(0) * n_blocks + tl.program_id(1)
        n_parts = tl.num_programs(0) * n_blocks
        tl.store(noted.sizes + part, tl.sum(tl.where(cols < n_shared, size, 0.0)))
        tl.store(noted.sizes + n_parts + part, tl.sum(tl.where(cols < n_shared, 0.0, size)))


@triton.jit
@no_type_check
def settle_kernel(
    made,
    noted,
    z,
    search,
    n_shared,
    N_LEVELS: tl.constexpr,
    NORM: tl.constexpr,
    RESCALE: tl.constexpr,
    PART_ROWS: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_F: tl.constexpr,
):
    """Latents not below batchtopk's threshold, of those not below its guess, in place; counts too, and sizes as of
    `select_kernel`. Of z only rows of a column block are read whose least is below the threshold; where the guess was above it,
    all latents are made from `a` again. search as of `histogram_kernel`."""
    n_blocks = tl.num_programs(1)
    cols = tl.program_id(1) * TILE_F + tl.arange(0, TILE_F)
    col_mask = cols < made.width
    threshold = tl.load(search + 1)
    missed = tl.load(search + 2) > 0
    at_counts = noted.counts + tl.program_id(0) * made.width + cols
    count = tl.where(missed, 0, tl.load(at_counts, mask=col_mask, other=0))
    n_first = tl.zeros((TILE_R,), tl.float32)
    n_rest = tl.zeros((TILE_R,), tl.float32)
    first = tl.program_id(0) * PART_ROWS
    for start in range(first, min(first + PART_ROWS, made.n_rows), TILE_R):
        rows = start + tl.arange(0, TILE_R)
        row_mask = rows < made.n_rows
        of_row = rows.to(tl.int64) * n_blocks + tl.program_id(1)
        at_rest = noted.row_sizes + tl.cast(made.n_rows, tl.int64) * n_blocks + of_row
        shared = tl.load(noted.row_sizes + of_row, mask=row_mask, other=0.0)
        rest = tl.load(at_rest, mask=row_mask, other=0.0)
        smallest = tl.load(noted.least + of_row, mask=row_mask, other=float("inf"))
        changes = row_mask & (tl.where(missed, -1.0, smallest) < threshold)
        if tl.max(changes.to(tl.int32), 0) > 0:
            mask = changes[:, None] & col_mask[None, :]
            at = rows.to(tl.int64)[:, None] * made.width + cols[None, :]
            before = kept_again(made, z, rows, cols, mask, missed, N_LEVELS, NORM, RESCALE)
            after = tl.where(mask, tl.where(before < threshold, 0.0, before), 0.0)
            tl.store(z + at, after.to(z.dtype.element_ty), mask=mask & (after != tl.where(missed, -1.0, before)))
            counted = tl.where(missed, 0, (before != 0).to(tl.int32))
            count += tl.sum((after != 0).to(tl.int32) - counted, 0)
            shared_after, rest_after = sizes_of_rows(after, cols, n_shared)
            shared = tl.where(changes, shared_after, shared)
            rest = tl.where(changes, rest_after, rest)
        n_first += shared
        n_rest += rest
    tl.store(at_counts, count, mask=col_mask)
    part = tl.program_id(0) * n_blocks + tl.program_id(1)
    tl.store(noted.sizes + part, tl.sum(n_first))
    tl.store(noted.sizes + tl.num_programs(0) * n_blocks + part, tl.sum(n_rest))


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
    config, shape = step.config, (step.n_rows, step.tiles[1])
    step.z = step.take("z", step.n_rows, step.width)
    step.counts = step.member.scratch.take("counts", (step.n_parts, step.width), torch.int32)
    step.sizes = step.wide("sizes", 2, *step.tiles)
    noted, bins, bounds = Noted(step.counts, step.sizes, step.none, step.none), step.none, step.none
    guesses = config.activation == "batchtopk"
    if guesses:
        noted = noted._replace(least=step.wide("least", *shape), row_sizes=step.wide("row_sizes", 2, *shape))
        bins, bounds = step.kept.bins[0], step.kept.search
    if config.activation == "topk":
        bounds = thresholds.row_thresholds(step)
    launch(
        select_kernel,
        step.tiles,
        [step.made, noted, step.z, bounds, step.slots, step.pool_z, bins, step.member.shape.n_shared, step.pool_size],
        reads=unique([*step.made, bounds, step.slots]),
        writes=[step.z, step.counts, *(noted[2:] if guesses else [step.sizes])],
        touched={"pool": step.pool_z, "bins": bins},
        SELECT=SELECTIONS.get(config.activation, 0),
        POOL=bool(step.pool_size),
        N_LEVELS=step.n_levels,
        KIND=step.kept.kind,
        num_warps=8 if guesses else 4,
        **step.kept.flags,
        **step.tiling,
    )
    if guesses:
        thresholds.find(step, noted.least)
        settle(step, noted)


def settle(step: Step, noted: Noted) -> None:
    """Of latents not below the guess those not below batchtopk's threshold, their counts and sums."""
    search = step.kept.search
    launch(
        settle_kernel,
        step.tiles,
        [step.made, noted, step.z, search, step.member.shape.n_shared],
        reads=[search, noted.least, noted.row_sizes, noted.counts],
        writes=[noted.counts, noted.sizes],
        touched={"below the threshold": step.z},
        gathered=thresholds.doubted_bytes(step),
        N_LEVELS=step.n_levels,
        **step.kept.flags,
        **step.tiling,
    )

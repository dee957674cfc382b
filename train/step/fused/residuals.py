"""Residuals of all prefixes in one pass."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from train.step.fused.context import Step
from train.step.fused.tiles import ceil_div, next_power
from train.step.traffic import launch


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
    term_size = tl.cast(n_rows, tl.int64) * d_model
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
            if (POOL and j == 0) and keep > 0:  # chains of more than two are too new for Triton 3.3
                tl.store(remainder + at, error.to(remainder.dtype.element_ty), mask=mask)
            suffix += error * tl.load(slopes + term)
            tl.store(decoded + term * term_size + at, suffix.to(decoded.dtype.element_ty), mask=mask)
        gradient += tl.sum(suffix, 0)
    tl.store(errors + index * n_blocks + block, tl.sum(squares, 1), mask=index < N_TERMS)
    tl.store(parts + tl.program_id(0) * d_model + cols, gradient, mask=col_mask)


def measure(step: Step) -> None:
    """Errors of the decodes of all prefixes; then, in the same memory, the suffix sums of the backward."""
    n_terms = len(step.terms.sizes)
    part_rows, grid = 64, (ceil_div(step.n_rows, 64), ceil_div(step.d_model, 128))
    step.remainder = step.take("remainder", step.n_rows, step.d_model) if step.pool_size else step.none
    step.errors = step.wide("errors", n_terms, *grid)
    step.b_dec_parts = step.wide("b_dec_parts", grid[0], step.d_model)
    x, b_dec = step.batch.x, step.member.weights["b_dec"]
    launch(
        residuals_kernel,
        grid,
        [
            x,
            b_dec,
            step.decoded,
            step.slopes,
            step.remainder,
            step.n_dead,
            step.errors,
            step.b_dec_parts,
            step.n_rows,
            step.d_model,
        ],
        reads=[x, b_dec, step.decoded, step.slopes, *([step.n_dead] if step.pool_size else [])],
        writes=[step.decoded, step.errors, step.b_dec_parts],
        touched={"pool": step.remainder},
        N_TERMS=n_terms,
        TERMS=next_power(n_terms),
        POOL=bool(step.pool_size),
        PART_ROWS=part_rows,
        TILE_R=16,
        TILE_D=128,
    )

"""Products over the latents that are not 0 alone (`train/step/sparse.py` says which four, and of which members).

Entries are listed twice, by row and by latent. A row's list has room for all latents and a latent's for all rows, so that
nothing overflows whatever is selected; only what is not 0 is written. Lists hold places, in ascending order; values are read at
those places of z and of ∂loss/∂z.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.step.fused import auxiliary
from train.step.fused.context import Step
from train.step.fused.tiles import ceil_div, next_power
from train.step.traffic import launch

ENTRIES, DIMS = 16, 512
"""Entries and dimensions that a program takes at a time."""

PART = 1024
"""Latents whose share of ∂loss/∂b_dec one program sums."""


@triton.jit
@no_type_check
def row_lists_kernel(
    z, ends, latents, stops, n_rows, width, N_TERMS: tl.constexpr, TERMS: tl.constexpr, SIZE: tl.constexpr
):
    """Of each row the latents that are not 0: latents [row, latent]; stops [term, row]: how many of them the prefix of each term
    has. A program a row. TERMS: N_TERMS, or the next power of two."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, TERMS)
    end = tl.load(ends + index, mask=index < N_TERMS, other=0)
    n = tl.zeros((), tl.int32)
    inside = tl.zeros((TERMS,), tl.int32)
    for start in range(0, width, SIZE):
        cols = start + tl.arange(0, SIZE)
        value = tl.load(z + row * width + cols, mask=cols < width, other=0.0).to(tl.float32)
        active = (value != 0).to(tl.int32)
        tl.store(latents + row * width + n + tl.cumsum(active, 0) - 1, cols, mask=active > 0)
        inside += tl.sum(tl.where(cols[None, :] < end[:, None], active[None, :], 0), 1)
        n += tl.sum(active)
    tl.store(stops + index * n_rows + row, inside, mask=index < N_TERMS)


@triton.jit
@no_type_check
def latent_lists_kernel(
    z, counts, rows_out, n_rows, width, PART_ROWS: tl.constexpr, TILE_R: tl.constexpr, TILE_F: tl.constexpr
):
    """Of each latent the rows on which it is not 0: rows_out [latent, row], behind those of the parts before, whose counts
    [part, latent] say how many they are."""
    cols = tl.program_id(1) * TILE_F + tl.arange(0, TILE_F)
    col_mask = cols < width
    n = tl.zeros((TILE_F,), tl.int32)
    for part in range(tl.program_id(0)):
        n += tl.load(counts + part * width + cols, mask=col_mask, other=0)
    first = tl.program_id(0) * PART_ROWS
    for start in range(first, min(first + PART_ROWS, n_rows), TILE_R):
        rows = start + tl.arange(0, TILE_R)
        mask = (rows < n_rows)[:, None] & col_mask[None, :]
        at = rows.to(tl.int64)[:, None] * width + cols[None, :]
        active = (tl.load(z + at, mask=mask, other=0.0).to(tl.float32) != 0).to(tl.int32)
        place = n[None, :] + tl.cumsum(active, 0) - 1
        to = rows_out + cols.to(tl.int64)[None, :] * n_rows + place
        tl.store(to, rows[:, None] + tl.zeros_like(place), mask=active > 0)
        n += tl.sum(active, 0)


@triton.jit
@no_type_check
def sparse_decode_kernel(
    z,
    latents,
    stops,
    w_dec,
    decoded,
    n_rows,
    width,
    d_model,
    N_TERMS: tl.constexpr,
    TILE_E: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Reconstructions of all prefixes, [term, row, d_model]; a program takes TILE_D dimensions of a row."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    dim_mask = dims < d_model
    total = tl.zeros((TILE_D,), tl.float32)
    begin = 0
    for i in tl.static_range(N_TERMS):
        stop = tl.load(stops + i * n_rows + row)
        for start in range(begin, stop, TILE_E):
            entries = start + tl.arange(0, TILE_E)
            mask = entries < stop
            own = tl.load(latents + row * width + entries, mask=mask, other=0).to(tl.int64)
            value = tl.load(z + row * width + own, mask=mask, other=0.0).to(tl.float32)
            at = own[:, None] * d_model + dims[None, :]
            w = tl.load(w_dec + at, mask=mask[:, None] & dim_mask[None, :], other=0.0).to(tl.float32)
            total += tl.sum(value[:, None] * w, 0)
        to = decoded + (i * n_rows + row) * d_model + dims
        tl.store(to, total.to(decoded.dtype.element_ty), mask=dim_mask)
        begin = stop


@triton.jit
@no_type_check
def latents_gradient_kernel(
    latents,
    stops,
    gradients,
    w_dec,
    dz,
    n_rows,
    width,
    d_model,
    N_TERMS: tl.constexpr,
    TILE_E: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """∂loss/∂z of the entries, at their places in dz [row, latent], whose other numbers mean nothing; a program a row.
    gradients [term, row, d_model]: what the loss sends back to each term's own block."""
    row = tl.program_id(0).to(tl.int64)
    begin = 0
    for i in tl.static_range(N_TERMS):
        stop = tl.load(stops + i * n_rows + row)
        for start in range(begin, stop, TILE_E):
            entries = start + tl.arange(0, TILE_E)
            mask = entries < stop
            own = tl.load(latents + row * width + entries, mask=mask, other=0).to(tl.int64)
            total = tl.zeros((TILE_E,), tl.float32)
            for first in range(0, d_model, TILE_D):
                dims = first + tl.arange(0, TILE_D)
                dim_mask = dims < d_model
                g = tl.load(gradients + (i * n_rows + row) * d_model + dims, mask=dim_mask, other=0.0).to(tl.float32)
                at = own[:, None] * d_model + dims[None, :]
                w = tl.load(w_dec + at, mask=mask[:, None] & dim_mask[None, :], other=0.0).to(tl.float32)
                total += tl.sum(w * g[None, :], 1)
            tl.store(dz + row * width + own, total.to(dz.dtype.element_ty), mask=mask)
        begin = stop


@triton.jit
@no_type_check
def weight_rows_kernel(
    values,
    rows_of,
    counts,
    ends,
    table,
    out,
    sums,
    slots,
    pool_gradient,
    n_rows,
    width,
    d_model,
    pool_size,
    n_parts,
    N_TERMS: tl.constexpr,
    SUMS: tl.constexpr,
    POOL: tl.constexpr,
    TILE_E: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """A gradient of a matrix, out [latent, d_model]: Σ over a latent's rows of its value there times that row of the table
    [term, row, d_model], of the term whose own block it is in. A program takes TILE_D dimensions of a latent.

    SUMS: sums [latent], Σ of the values, and with POOL of pool_gradient [row, pool_size] at the latent's slot, where it has one.
    """
    latent = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    dim_mask = dims < d_model
    n = tl.zeros((), tl.int32)
    for part in range(n_parts):
        n += tl.load(counts + part * width + latent)
    term = tl.zeros((), tl.int64)
    for i in tl.static_range(N_TERMS - 1):
        term += (latent >= tl.load(ends + i)).to(tl.int64)
    total = tl.zeros((TILE_D,), tl.float32)
    size = tl.zeros((TILE_E,), tl.float32)
    for start in range(0, n, TILE_E):
        entries = start + tl.arange(0, TILE_E)
        mask = entries < n
        rows = tl.load(rows_of + latent * n_rows + entries, mask=mask, other=0).to(tl.int64)
        value = tl.load(values + rows * width + latent, mask=mask, other=0.0).to(tl.float32)
        at = (term * n_rows + rows)[:, None] * d_model + dims[None, :]
        row = tl.load(table + at, mask=mask[:, None] & dim_mask[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * row, 0)
        size += value
    tl.store(out + latent * d_model + dims, total.to(out.dtype.element_ty), mask=dim_mask)
    if SUMS and tl.program_id(1) == 0:
        whole = tl.sum(size)
        if POOL:
            slot = tl.load(slots + latent)
            if slot >= 0:
                extra = tl.zeros((TILE_D,), tl.float32)
                for start in range(0, n_rows, TILE_D):
                    rows = start + tl.arange(0, TILE_D)
                    at = rows.to(tl.int64) * pool_size + slot
                    extra += tl.load(pool_gradient + at, mask=rows < n_rows, other=0.0).to(tl.float32)
                whole += tl.sum(extra)
        tl.store(sums + latent, whole)


@triton.jit
@no_type_check
def encoder_parts_kernel(
    w_enc, b_enc_gradient, parts, width, d_model, PART: tl.constexpr, TILE_F: tl.constexpr, TILE_D: tl.constexpr
):
    """parts [part, d_model]: Σ over PART latents of W_encᵀ [latent, d_model] times a number a latent; rows of those whose number
    is 0 are not read."""
    dims = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    dim_mask = dims < d_model
    total = tl.zeros((TILE_D,), tl.float32)
    first = tl.program_id(0) * PART
    for start in range(first, min(first + PART, width), TILE_F):
        latents = start + tl.arange(0, TILE_F)
        factor = tl.load(b_enc_gradient + latents, mask=latents < width, other=0.0)
        at = latents.to(tl.int64)[:, None] * d_model + dims[None, :]
        w = tl.load(w_enc + at, mask=(factor != 0)[:, None] & dim_mask[None, :], other=0.0).to(tl.float32)
        total += tl.sum(w * factor[:, None], 0)
    tl.store(parts + tl.program_id(0) * d_model + dims, total, mask=dim_mask)


@triton.jit
@no_type_check
def b_dec_parts_kernel(decoder, encoder, out, n_decoder, n_encoder, d_model, TILE_D: tl.constexpr):
    """∂loss/∂b_dec: parts of what comes through the decoder minus parts of what comes through the encoder."""
    dims = tl.program_id(0) * TILE_D + tl.arange(0, TILE_D)
    mask = dims < d_model
    total = tl.zeros((TILE_D,), tl.float32)
    for part in range(n_decoder):
        total += tl.load(decoder + part * d_model + dims, mask=mask, other=0.0)
    for part in range(n_encoder):
        total -= tl.load(encoder + part * d_model + dims, mask=mask, other=0.0)
    tl.store(out + dims, total, mask=mask)


def decode(step: Step) -> None:
    """Lists of what is not 0, and every prefix's reconstruction from the row's own."""
    n_terms, take = len(step.terms.sizes), step.member.scratch.take
    w_dec, terms = step.member.adam.low["W_dec"], step.kept.table(step.terms.sizes, torch.int32)
    step.row_lists = take("row_lists", (step.n_rows, step.width), torch.int32)
    step.latent_lists = take("latent_lists", (step.width, step.n_rows), torch.int32)
    step.stops = take("stops", (n_terms, step.n_rows), torch.int32)
    launch(
        row_lists_kernel,
        (step.n_rows,),
        [step.z, terms, step.row_lists, step.stops, step.n_rows, step.width],
        reads=[step.z, terms],
        writes=[step.stops],
        gathered=4 * n_entries(step),
        N_TERMS=n_terms,
        TERMS=next_power(n_terms),
        SIZE=min(4096, next_power(step.width)),
        num_warps=8,
    )
    launch(
        latent_lists_kernel,
        step.tiles,
        [step.z, step.counts, step.latent_lists, step.n_rows, step.width],
        reads=[step.z, step.counts[:-1]],
        writes=[],
        gathered=4 * n_entries(step),
        **step.tiling,
    )
    step.decoded = step.take("decoded", n_terms, step.n_rows, step.d_model)
    launch(
        sparse_decode_kernel,
        (step.n_rows, ceil_div(step.d_model, DIMS)),
        [step.z, step.row_lists, step.stops, w_dec, step.decoded, step.n_rows, step.width, step.d_model],
        reads=[step.stops],
        writes=[step.decoded],
        gathered=n_entries(step) * row_nbytes(step, w_dec),
        N_TERMS=n_terms,
        TILE_E=ENTRIES,
        TILE_D=DIMS,
    )


def n_entries(step: Step) -> int:
    """Latents that are not 0 on this process's rows, but for ties and for rows with fewer positive ones."""
    return step.member._kept * step.n_rows


def row_nbytes(step: Step, table: Tensor) -> int:
    """Bytes read for an entry: a row of a table, its place in a list and its value."""
    return step.d_model * table.element_size() + 4 + step.z.element_size()


def backward(step: Step) -> None:
    """Gradients of all weights: matrices in the products' dtype, W_enc's by latents, vectors in float32."""
    reducer, w_dec = step.member.reducer, step.member.adam.low["W_dec"]
    n_terms = len(step.terms.sizes)
    step.factor = step.none
    step.vectors = step.wide("vector_gradients", len(step.kept.vectors[0]))
    step.gradients = step.take("gradients", 2, step.width * step.d_model)
    step.w_dec, step.w_enc = (half.view(step.width, step.d_model) for half in step.gradients)
    dz = step.take_dz()
    weight_rows(step, step.z, step.decoded, step.w_dec, None)
    auxiliary.backward(step)
    reducer.add_whole(step.w_dec)
    launch(
        latents_gradient_kernel,
        (step.n_rows,),
        [step.row_lists, step.stops, step.decoded, w_dec, dz, step.n_rows, step.width, step.d_model],
        reads=[step.stops, step.decoded],
        writes=[],
        gathered=n_entries(step) * row_nbytes(step, w_dec),
        N_TERMS=n_terms,
        TILE_E=ENTRIES,
        TILE_D=DIMS,
    )
    weight_rows(step, dz, step.x_low, step.w_enc, step.vectors[: step.width])
    auxiliary.encoder_backward(step)
    reducer.add_whole(step.w_enc)
    b_dec_gradient(step)


def weight_rows(step: Step, values: Tensor, table: Tensor, out: Tensor, sums: Tensor | None) -> None:
    """A matrix's gradient by latents; `sums`: where the values' sums over rows go, those of the pool included."""
    has_terms, pool = table is step.decoded, bool(step.pool_size) and sums is not None
    n_terms = len(step.terms.sizes) if has_terms else 1
    terms = step.kept.table(step.terms.sizes, torch.int32)
    sizes = [step.n_rows, step.width, step.d_model, step.pool_size, step.n_parts]
    lists = [values, step.latent_lists, step.counts, terms, table, out]
    options: dict[str, Any] = {"N_TERMS": n_terms, "SUMS": sums is not None, "POOL": pool}
    launch(
        weight_rows_kernel,
        (step.width, ceil_div(step.d_model, DIMS)),
        [*lists, step.none if sums is None else sums, step.slots, step.pool_gradient, *sizes],
        reads=[step.counts, *([step.slots] if pool else [])],
        writes=[out, *([] if sums is None else [sums])],
        touched={"pool": step.pool_gradient},
        gathered=n_entries(step) * row_nbytes(step, table),
        TILE_E=ENTRIES,
        TILE_D=DIMS,
        **options,
    )


def b_dec_gradient(step: Step) -> None:
    """∂loss/∂b_dec of a member whose W_enc lies by latents."""
    n_parts, tile = ceil_div(step.width, PART), min(128, next_power(step.d_model))
    w_enc, b_enc, out = step.member.adam.low["W_enc"], step.vectors[: step.width], step.vectors[step.width :]
    parts = step.wide("encoder_parts", n_parts, step.d_model)
    launch(
        encoder_parts_kernel,
        (n_parts, ceil_div(step.d_model, tile)),
        [w_enc, b_enc, parts, step.width, step.d_model],
        reads=[w_enc, b_enc],
        writes=[parts],
        PART=PART,
        TILE_F=32,
        TILE_D=tile,
    )
    launch(
        b_dec_parts_kernel,
        (ceil_div(step.d_model, tile),),
        [step.b_dec_parts, parts, out, len(step.b_dec_parts), n_parts, step.d_model],
        reads=[step.b_dec_parts, parts],
        writes=[out[: step.d_model]],
        TILE_D=tile,
    )

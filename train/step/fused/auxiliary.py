"""The auxiliary loss: nothing is read or written beyond `n_dead` while no latent is dead."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.step.fused.context import Step
from train.step.fused.tiles import ceil_div, next_power
from train.step.traffic import launch


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
def pool_weights_kernel(
    pool_values,
    pool,
    rows_of,
    gradient,
    n_dead,
    n_rows,
    d_model,
    pool_size,
    TILE_P: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """pool_values [row, pool_size] transposed times rows_of [row, d_model] is added to a gradient, at the pool's latents."""
    n = tl.load(n_dead)
    slots = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    if tl.program_id(0) * TILE_P < n:
        cols = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
        total = tl.zeros((TILE_P, TILE_D), tl.float32)
        for start in range(0, n_rows, TILE_K):
            rows = start + tl.arange(0, TILE_K)
            left = tl.load(
                pool_values + rows.to(tl.int64)[None, :] * pool_size + slots[:, None],
                mask=(rows < n_rows)[None, :] & (slots < n)[:, None],
                other=0.0,
            )
            right = tl.load(
                rows_of + rows.to(tl.int64)[:, None] * d_model + cols[None, :],
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


def find_pool(step: Step) -> None:
    """Dead latents for the auxiliary loss."""
    if not step.pool_size:
        step.slots = step.pool = step.n_dead = step.pool_z = step.pool_gradient = step.none
        return
    member, take = step.member, step.member.scratch.take
    step.pool = take("pool", (step.pool_size,), torch.int32)
    step.slots = take("slots", (step.width,), torch.int32)
    step.n_dead = take("n_dead", (1,), torch.int32)
    step.pool_z = step.take("pool_z", step.n_rows, step.pool_size)
    step.pool_gradient = step.take("pool_gradient", step.n_rows, step.pool_size)
    launch(
        dead_pool_kernel,
        (1,),
        [member.rows_since_fired, step.pool, step.slots, step.n_dead, step.width, step.config.dead_after_rows],
        reads=[member.rows_since_fired],
        writes=[step.slots, step.n_dead],
        touched={"pool": step.pool},
        POOL_SIZE=step.pool_size,
        SIZE=min(4096, next_power(step.width)),
        num_warps=16,
    )


def forward(step: Step) -> None:
    """The auxiliary loss, the slope that it sends back and, of the latents in the pool, its gradient."""
    if not step.pool_size:
        step.losses = step.wide("losses", 1).zero_()
        return
    member, config = step.member, step.config
    w_dec, tile = member.adam.low["W_dec"], 64
    launch(
        pool_select_kernel,
        (step.n_rows,),
        [step.pool_z, step.n_dead, config.aux_k],
        reads=[step.n_dead],
        writes=[],
        touched={"pool": step.pool_z},
        POOL_SIZE=step.pool_size,
        FIRST_BIT=step.first_bit,
        SIZE=next_power(step.pool_size),
    )
    grid = (ceil_div(step.n_rows, tile), ceil_div(step.d_model, tile))
    step.losses = step.wide("losses", *grid)
    step.slope = step.take("slope", step.n_rows, step.d_model)
    sizes = [step.n_rows, step.d_model, step.pool_size]
    launch(
        pool_decode_kernel,
        grid,
        [
            step.pool_z,
            step.pool,
            w_dec,
            step.remainder,
            step.slope,
            step.losses,
            step.n_dead,
            *sizes,
            2 * config.aux_coefficient / step.n_rows_all,
        ],
        reads=[step.n_dead],
        writes=[step.losses],
        touched={"pool": w_dec},
        TILE_R=tile,
        TILE_D=tile,
        TILE_K=32,
        num_warps=8,
    )
    launch(
        pool_latents_kernel,
        (ceil_div(step.n_rows, tile), ceil_div(step.pool_size, tile)),
        [step.slope, step.pool, w_dec, step.pool_z, step.pool_gradient, step.n_dead, *sizes],
        reads=[step.n_dead],
        writes=[],
        touched={"pool": w_dec},
        TILE_R=tile,
        TILE_P=tile,
        TILE_K=32,
        num_warps=8,
    )


def backward(step: Step) -> None:
    """What the auxiliary loss adds to the decoder's gradient."""
    if step.pool_size:
        add_product(step, step.pool_z, step.slope, step.w_dec)


def encoder_backward(step: Step) -> None:
    """What the auxiliary loss adds to the encoder's gradient, which lies by latents."""
    if step.pool_size:
        add_product(step, step.pool_gradient, step.x_low, step.w_enc)


def add_product(step: Step, pool_values: Tensor, rows: Tensor, gradient: Tensor) -> None:
    """pool_values [row, pool] transposed times rows [row, d_model] is added to a gradient by latents, at the pool's."""
    tile = 64
    launch(
        pool_weights_kernel,
        (ceil_div(step.pool_size, tile), ceil_div(step.d_model, tile)),
        [pool_values, step.pool, rows, gradient, step.n_dead, step.n_rows, step.d_model, step.pool_size],
        reads=[step.n_dead],
        writes=[],
        touched={"pool": gradient},
        TILE_P=tile,
        TILE_D=tile,
        TILE_K=32,
        num_warps=8,
    )

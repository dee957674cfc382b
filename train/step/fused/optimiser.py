"""The optimiser: each number of gradients, weights and moments is read and written once."""

from __future__ import annotations

import math
from typing import Any, no_type_check

import triton
import triton.language as tl
from torch import Tensor

from train.step.fused.context import Step
from train.step.fused.tiles import ceil_div, next_power
from train.step.traffic import launch

SQUARES = 1 << 15
"""Gradients whose squares one program sums."""

COLUMNS = 1024
"""Of a row of weights, those that one program updates."""


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
    rates,
    n_rows,
    d_model,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    LOW: tl.constexpr,
    TILE_R: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The decoder: clip, projection, Adam, renormalisation and the low-precision copy; a program takes TILE_R whole rows, of
    latents that learn at `rates` [row] of the learning rate."""
    rows = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    cols = tl.arange(0, SIZE)
    mask = (rows < n_rows)[:, None] & (cols < d_model)[None, :]
    at = rows.to(tl.int64)[:, None] * d_model + cols[None, :]
    w = tl.load(weight + at, mask=mask, other=0.0)
    g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32) * tl.load(control)
    g = g - tl.sum(g * w, 1)[:, None] * w
    m = tl.load(first + at, mask=mask, other=0.0)
    v = tl.load(second + at, mask=mask, other=0.0)
    step_size = tl.load(control + 1) * tl.load(rates + rows, mask=rows < n_rows, other=0.0)[:, None]
    w, m, v = adam(g, w, m, v, step_size, tl.load(control + 2), BETA1, BETA2, EPS)
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
    rates,
    n_columns,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    LOW: tl.constexpr,
    BY_ROW: tl.constexpr,
    SIZE: tl.constexpr,
):
    """All other weights: clip, Adam and the low-precision copy; a program takes SIZE columns of a row. `rates` are parts of the
    learning rate, a row if BY_ROW, else a column."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    mask = columns < n_columns
    at = row.to(tl.int64) * n_columns + columns
    g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32) * tl.load(control)
    w = tl.load(weight + at, mask=mask, other=0.0)
    m = tl.load(first + at, mask=mask, other=0.0)
    v = tl.load(second + at, mask=mask, other=0.0)
    rate = tl.load(rates + row) if BY_ROW else tl.load(rates + columns, mask=mask, other=0.0)
    step_size = tl.load(control + 1) * rate
    w, m, v = adam(g, w, m, v, step_size, tl.load(control + 2), BETA1, BETA2, EPS)
    tl.store(first + at, m, mask=mask)
    tl.store(second + at, v, mask=mask)
    tl.store(weight + at, w, mask=mask)
    if LOW:
        tl.store(low + at, w.to(low.dtype.element_ty), mask=mask)


def update(step: Step) -> None:
    """All weights, moments and copies that products read, from the gradients."""
    member, config = step.member, step.config
    n = step.gradients.numel()
    n_squares = ceil_div(n, SQUARES)
    squares = step.wide("squares", n_squares)
    launch(
        squares_kernel,
        (n_squares,),
        [step.gradients, squares, n],
        reads=[step.gradients],
        writes=[squares],
        PART=SQUARES,
        SIZE=2048,
    )
    n_updates = member.adam.n_updates
    launch(
        clip_kernel,
        (1,),
        [
            squares,
            step.vectors,
            member.schedule.lr,
            n_updates,
            step.kept.norm,
            step.kept.control,
            n_squares,
            len(step.vectors),
        ],
        reads=[squares, step.vectors, member.schedule.lr, n_updates],
        writes=[n_updates, step.kept.norm, step.kept.control],
        CLIP=config.clip_norm,
        NORMALIZE=config.normalize_gradients,
        BETA1=log2(config.beta1),
        BETA2=log2(config.beta2),
        SIZE=min(4096, next_power(max(n_squares, len(step.vectors)))),
        num_warps=16,
    )
    betas: dict[str, Any] = {"BETA1": config.beta1, "BETA2": config.beta2, "EPS": config.eps}
    size = next_power(step.d_model)
    tall = max(1, 1024 // size)
    update_matrix(
        step,
        adam_rows_kernel,
        (ceil_div(step.width, tall),),
        "W_dec",
        step.w_dec,
        [step.width, step.d_model],
        TILE_R=tall,
        SIZE=size,
        num_warps=min(16, max(4, size // 512)),
        **betas,
    )
    n_rows, n_columns = step.w_enc.shape
    update_matrix(
        step,
        adam_kernel,
        (n_rows, ceil_div(n_columns, COLUMNS)),
        "W_enc",
        step.w_enc,
        [n_columns],
        BY_ROW=member.is_sparse,
        SIZE=COLUMNS,
        **betas,
    )
    n = len(step.vectors)
    weight, first, second = step.kept.vectors
    launch(
        adam_kernel,
        (1, ceil_div(n, COLUMNS)),
        [weight, step.vectors, first, second, weight, step.kept.control, step.kept.rates, n],
        reads=[weight, step.vectors, first, second, step.kept.control, step.kept.rates],
        writes=[weight, first, second],
        LOW=False,
        BY_ROW=False,
        SIZE=COLUMNS,
        **betas,
    )


def update_matrix(
    step: Step,
    kernel: Any,
    grid: tuple[int, ...],
    name: str,
    gradient: Tensor,
    numbers: list[int],
    **options: Any,
) -> None:
    """Adam on a matrix, by the kernel of its kind; numbers: what it takes behind the tensors."""
    adam = step.member.adam
    weight, first, second, low = adam.weights[name], adam.first[name], adam.second[name], adam.low[name]
    rates = adam.rates[name]
    has_low = low.dtype != weight.dtype
    launch(
        kernel,
        grid,
        [weight, gradient, first, second, low, step.kept.control, rates, *numbers],
        reads=[weight, gradient, first, second, step.kept.control, rates],
        writes=[weight, first, second, *([low] if has_low else [])],
        LOW=has_low,
        **options,
    )


def log2(beta: float) -> float:
    """The binary logarithm of one of Adam's β, finite."""
    return math.log2(beta) if beta else -1e4

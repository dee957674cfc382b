"""Counters, and the sums that a line of metrics is made of."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from train.step.fused.context import Step
from train.step.fused.tiles import ceil_div, next_power
from train.step.sums import Sums
from train.step.traffic import launch

PENALTIES = {"none": 0, "l1": 1, "l0": 2}

SCALARS = ("steps", "rows", "square", "loss", "l0", "aux", "grad_norm", "clipped")
"""What `account_kernel` adds to, in this order: the first of `Member.sums`."""


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


def collect(step: Step) -> Sums:
    """Sums over this process's rows: what all processes' are added to."""
    sizes = {"counts": step.width, "l1": 2, "errors": len(step.terms.sizes)}
    sizes |= {"total": step.d_model, "square": 1, "aux": 1}
    flat = step.member.scratch.take("now", (sum(sizes.values()),), torch.float64)
    pointers = [step.counts, step.sizes, step.errors, step.losses, step.batch.total, step.batch.square]
    launch(
        collect_kernel,
        (ceil_div(max(step.width, step.d_model), 1024),),
        [
            *pointers,
            flat,
            step.n_parts,
            step.sizes[0].numel(),
            step.errors[0].numel(),
            step.losses.numel(),
            step.config.aux_coefficient / step.n_rows_all,
            step.width,
            step.d_model,
        ],
        reads=pointers,
        writes=[flat],
        N_TERMS=len(step.terms.sizes),
        SIZE=1024,
    )
    return Sums(flat, sizes)


def account(step: Step, now: Sums) -> None:
    """Counters and the sums of a line of metrics, from the sums over all processes' rows."""
    member, config, sums = step.member, step.config, step.member.sums
    pointers = [now.flat, step.slopes, step.factor, step.kept.norm, member.rows_since_fired]
    scalars = sums.flat[: len(SCALARS)]
    kept = [scalars, sums["total"], sums["errors"], sums["l1"]]
    launch(
        account_kernel,
        (1,),
        [
            *pointers,
            *kept,
            step.kept.l0,
            step.n_rows_all,
            step.width,
            step.d_model,
            member.shape.n_shared,
            config.lambda_shared,
            config.lambda_specialised,
        ],
        reads=[*pointers, *kept],
        writes=[member.rows_since_fired, *kept, step.kept.l0],
        CLIP=config.clip_norm,
        PENALTY=PENALTIES[config.penalty],
        N_TERMS=len(step.terms.sizes),
        SIZE=min(4096, next_power(max(step.width, step.d_model))),
        num_warps=16,
    )
    if config.target_l0:
        member.controller.see(step.kept.l0, first=member.n_steps == 0, acts=member._controls)
    if config.alpha == "auto":
        member.explained += torch.cat([now["errors"], now["square"]])
    member._pull_thresholds()

"""What topk and batchtopk keep: the n-th largest latent of each row or of the batch, exactly, found on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import no_type_check

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from train.step.fused import tiles
from train.step.fused.activation import before_selection, held
from train.step.fused.context import Kept, Step, unique
from train.step.fused.tiles import ceil_div, next_power
from train.step.selection import MARGIN
from train.step.traffic import launch

DOUBTED = 0.04
"""Rows of a column block that hold a latent between guess and threshold, a latent kept: of batches of 2048 rows, width 4096 and k
32 or 64, .034 on average of steps 100 to 300, at most .06, and the guess was never too high."""


@triton.jit
@no_type_check
def kept_again(made, z, rows, cols, mask, missed, N_LEVELS: tl.constexpr, NORM: tl.constexpr, RESCALE: tl.constexpr):
    """A tile of the latents not below the guess, as the pass over all has left them in z; of all where it was too high."""
    if missed:
        own = held(made, cols, N_LEVELS, 0, NORM)
        tile = before_selection(made, rows, cols, own, N_LEVELS, 0, NORM, RESCALE)
    else:
        tile = tl.load(z + rows.to(tl.int64)[:, None] * made.width + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return tile


@triton.jit
@no_type_check
def histogram_kernel(
    made,
    z,
    least,
    search,
    counts,
    PASS: tl.constexpr,
    KEPT: tl.constexpr,
    N_LEVELS: tl.constexpr,
    NORM: tl.constexpr,
    RESCALE: tl.constexpr,
    PART_ROWS: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_F: tl.constexpr,
):
    """Count latents before selection by the upper bits of their float32: those above the guess (PASS 0), all the other
    positive ones when those were too few (PASS 1), or by the lower bits those whose upper bits are the wanted one's (PASS 2).
    KEPT: the pass over all latents has left those not below the guess in z, of which PASS 2 reads only rows of a column block
    whose least is below the end of the wanted bin.

    search, float32: the guess, the threshold, 1 where the guess was too high, and as an int32 how many are wanted of the bin.
    """
    guess = tl.load(search)
    missed = tl.load(search + 2) > 0
    wanted = tl.load(search + 1).to(tl.int32, bitcast=True) >> 16
    if (PASS != 1) | missed:
        cols = tl.program_id(1) * TILE_F + tl.arange(0, TILE_F)
        col_mask = cols < made.width
        first = tl.program_id(0) * PART_ROWS
        for start in range(first, min(first + PART_ROWS, made.n_rows), TILE_R):
            rows = start + tl.arange(0, TILE_R)
            row_mask = rows < made.n_rows
            if KEPT:
                of_row = rows.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
                smallest = tl.load(least + of_row, mask=row_mask, other=float("inf"))
                end = ((wanted + 1) << 16).to(tl.float32, bitcast=True)
                inside = row_mask & (tl.where(missed, -1.0, smallest) < end)
                if tl.max(inside.to(tl.int32), 0) > 0:
                    mask = inside[:, None] & col_mask[None, :]
                    tile = kept_again(made, z, rows, cols, mask, missed, N_LEVELS, NORM, RESCALE)
                    key = tile.to(tl.int32, bitcast=True)
                    tl.atomic_add(counts + (key & 0xFFFF), 1, mask=mask & ((key >> 16) == wanted), sem="relaxed")
            else:
                mask = row_mask[:, None] & col_mask[None, :]
                own = held(made, cols, N_LEVELS, 0, NORM)  # which does not change with rows, as the compiler sees
                tile = before_selection(made, rows, cols, own, N_LEVELS, 0, NORM, RESCALE)
                key = tile.to(tl.int32, bitcast=True)
                if PASS == 0:
                    tl.atomic_add(counts + (key >> 16), 1, mask=mask & (tile > guess), sem="relaxed")
                elif PASS == 1:
                    tl.atomic_add(counts + (key >> 16), 1, mask=mask & (tile > 0) & (tile <= guess), sem="relaxed")
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
        left = n + tl.zeros((), tl.int64)
        if PASS == 2:
            left = tl.load(search + 3).to(tl.int32, bitcast=True).to(tl.int64)
        above = tl.zeros((), tl.int64)  # values in the bins after the chunk at hand, which may be more than 2³¹
        found = tl.full((), -1, tl.int32)
        rest = left
        for i in range(N_BINS // SIZE):
            base = N_BINS - (i + 1) * SIZE
            count = tl.load(counts + base + tl.arange(0, SIZE)).to(tl.int64)
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
            tl.store(search + 3, rest.to(tl.int32).to(tl.float32, bitcast=True))
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
    made,
    thresholds,
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
    row_mask = rows < made.n_rows
    found = tl.zeros((TILE_R,), tl.int32)
    for i in range(31 - FIRST_BIT):
        tried = found | (1 << (30 - i))
        count = tl.zeros((TILE_R,), tl.int32)
        for start in range(0, made.width, SIZE):
            cols = start + tl.arange(0, SIZE)
            col_mask = cols < made.width
            mask = row_mask[:, None] & col_mask[None, :]
            own = held(made, cols, N_LEVELS, 0, NORM)
            z = before_selection(made, rows, cols, own, N_LEVELS, 0, NORM, RESCALE)
            key = z.to(tl.int32, bitcast=True)
            count += tl.sum(((key >= tried[:, None]) & mask).to(tl.int32), 1)
        found = tl.where(count >= k, tried, found)
    tl.store(thresholds + rows, found.to(tl.float32, bitcast=True), mask=row_mask)


def find(step: Step, least: Tensor) -> None:
    """batchtopk's threshold, of all processes' rows, from the histogram of the latents above the guess, which are in `step.z`."""
    kept, group = step.kept, step.member.group
    for index in range(1 + len(kept.bins)):
        if index:
            count(step, kept.search, index, least)
        counts = kept.bins[index == 2]
        if group is not None:
            counts = counts.clone() if index == 0 else counts  # pass 1 adds to what this process itself has counted
            dist.all_reduce(counts, group=group)
        find_bin(kept, kept.search, counts, index, step.member._kept * step.n_rows_all)


def find_over(steps: Callable[[], Iterable[Step]], kept: Kept, n: int) -> Tensor:
    """The n-th largest latent of many rows, in pieces whose products `a` are made anew for every look at them: a number on the
    device. The guess is a half of the last batch's."""
    search = torch.zeros_like(kept.search)
    search[:1] = kept.search[:1] / 2
    for index in range(1 + len(kept.bins)):
        for step in steps():
            count(step, search, index)
        find_bin(kept, search, kept.bins[index == 2], index, n)
    return search[1]


def row_thresholds(step: Step) -> Tensor:
    """topk's: the k-th largest latent of each row."""
    thresholds = step.wide("row_thresholds", step.n_rows)
    launch(
        row_threshold_kernel,
        (ceil_div(step.n_rows, tiles.TALL),),
        [step.made, thresholds, step.member._kept],
        reads=unique(step.made),
        writes=[thresholds],
        FIRST_BIT=step.first_bit,
        N_LEVELS=step.n_levels,
        TILE_R=tiles.TALL,
        SIZE=min(tiles.LONG, next_power(step.width)),
        **step.kept.flags,
    )
    return thresholds


def count(step: Step, search: Tensor, index: int, least: Tensor | None = None) -> None:
    """Add this step's latents to the histogram of a pass; `least`: those not below the guess are in `step.z`."""
    counts = step.kept.bins[index == 2]
    z, touched, gathered = step.none, {"bins": counts}, 0
    reads = [search] if index == 1 else [search, *unique(step.made)]
    if least is not None and index == 2:
        z, touched, gathered = step.z, touched | {"below the bin's end": step.z}, doubted_bytes(step)
        reads = [search, least]
    launch(
        histogram_kernel,
        step.tiles,
        [step.made, z, step.none if least is None else least, search, counts],
        reads=reads,
        writes=[],
        touched=touched,
        gathered=gathered,
        PASS=index,
        KEPT=bool(gathered),
        N_LEVELS=step.n_levels,
        num_warps=8,
        **step.kept.flags,
        **step.tiling,
    )


def doubted_bytes(step: Step) -> int:
    """Bytes of latents that are expected to be read again, where the guess was right."""
    return int(DOUBTED * step.member._kept * step.n_rows) * tiles.LATENTS * step.z.element_size()


def find_bin(kept: Kept, search: Tensor, counts: Tensor, index: int, n: int) -> None:
    """What the histogram of a pass says of the n-th largest; with the last pass that is all."""
    launch(
        find_kernel,
        (1,),
        [search, counts, n, MARGIN],
        reads=[search] if index == 1 else [search, counts],
        writes=[search, counts] if index else [search],
        PASS=index,
        LAST=index == len(kept.bins),
        N_BINS=len(counts),
        SIZE=4096,
        num_warps=8,
    )

"""A batch prepared in two launches."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from train.step.fused.tiles import ceil_div
from train.step.member import Batch, normalise_batch
from train.step.scratch import Scratch
from train.step.traffic import launch


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


class FusedBatches:
    """`normalise_batch` in two launches; partial sums in the scratch memory given."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch

    def normalise(
        self,
        x_raw: Float[Tensor, "row d_model"],
        center: Float[Tensor, " d_model"],
        scale: float,
        out: Batch | None = None,
    ) -> Batch:
        """As `normalise_batch` with a float32 `center`."""
        if out is None:
            out = normalise_batch(torch.zeros_like(x_raw), center, scale)
        n_rows, d_model = x_raw.shape
        part_rows = 8
        n_parts = ceil_div(n_rows, part_rows)
        parts = self.scratch.take("batch_parts", (n_parts, d_model), torch.float32)
        launch(
            normalise_kernel,
            (n_parts,),
            [x_raw, center, scale, out.x, out.norm, parts, n_rows, d_model],
            reads=[x_raw, center],
            writes=[out.x, out.norm, parts],
            PART_ROWS=part_rows,
            SIZE=256,
        )
        launch(
            batch_sums_kernel,
            (ceil_div(d_model, 64),),
            [parts, out.norm, out.total, out.square, n_parts, n_rows, d_model],
            reads=[parts, out.norm],
            writes=[out.total, out.square],
            SIZE=64,
        )
        return out

"""Norms and moments of residual rows, and the mean and scale of a split: float64 sums, merged in shard order.

A shard's moments are one vector of 2 + d_model numbers over its non-special rows: count, Σ‖x‖², Σx.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from pipeline.base.errors import StoreError

MASSIVE_MULTIPLE = 3.0
"""Rows whose norm is beyond this multiple of the median norm are massive and left out of training and statistics. On a
real Gemma layer 0.07 % of rows lay beyond it and carried 90 % of the total variance (DESIGN.md)."""

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """What `harvest` measured over the training split when it finished; counts are rows. FORMAT.md, "statistics".

    `mean_share` is ‖E x‖² / E‖x‖² over kept rows: how much of the mean square centring takes away.
    """

    n_rows: int
    n_special: int
    n_massive: int
    n_kept: int
    massive_multiple: float
    median_norm: float
    mean_sha256: str
    scale: float
    mean_share: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self)


BLOCK = 128
"""Rows converted to float64 at a time: at any usual width they stay in a core's cache."""


def to_float32(rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Stored rows, bf16 bits as uint16 or float32, as float32 numbers. Exact; in one thread, beside a model that computes."""
    return (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows


def norms_and_moments(
    rows: npt.NDArray[Any], special: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float32], Float64]:
    """float32 [row] norms of all rows, and float64 [2 + d_model] moments of those that are not special.

    `rows` [row, d_model] are as stored: bf16 bits as uint16, or float32. Sums run in float64, block by block from the
    first row on, in an order that does not depend on threads.
    """
    squares, total = np.empty(len(rows)), np.zeros(rows.shape[1])
    held = np.empty((min(BLOCK, len(rows)), rows.shape[1]))
    squared = np.empty_like(held)
    for a in range(0, len(rows), BLOCK):
        b = min(a + BLOCK, len(rows))
        x = held[: b - a]
        np.copyto(x, to_float32(rows[a:b]))
        np.square(x, out=squared[: b - a]).sum(axis=1, out=squares[a:b])
        x[special[a:b]] = 0.0
        total += np.add.reduce(x, axis=0)
    moments = np.concatenate([[np.count_nonzero(~special), squares[~special].sum()], total])
    return np.sqrt(squares).astype(np.float32), moments


@dataclass(frozen=True)
class Measured:
    """Of some rows, where they lie: float32 [row] norms, float64 [2 + d_model] moments of those that are not special."""

    norm: Tensor
    moments: Tensor


MEASURED_BLOCK = 4096
"""Rows that an accelerator converts to float64 at a time."""


def measure_rows(rows: Shaped[Tensor, "row d_model"], special: Bool[Tensor, " row"]) -> Measured:
    """What `norms_and_moments` says, by the device that holds the rows (bf16 or float32), in float64: nothing is fetched.

    The order of the sums is the device's and is a function of the shape: equal batches of rows have equal moments.
    """
    squares, total = [], torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for block, is_special in zip(*(torch.split(part, MEASURED_BLOCK) for part in (rows, special))):
        x = block.double()
        squares.append(x.square().sum(1))
        total += x.masked_fill_(is_special[:, None], 0.0).sum(0)
    square = torch.cat(squares)
    usable = torch.stack([(~special).sum().double(), square.masked_fill(special, 0.0).sum()])
    return Measured(square.sqrt().float(), torch.cat([usable, total]))


def not_massive(norm: npt.NDArray[np.float32], multiple: float, median: float) -> npt.NDArray[np.bool_]:
    """Rows whose norm is at most `multiple` times the median, compared in float64."""
    return norm <= np.float64(multiple * median)


def median_of(parts: Callable[[], Iterable[npt.NDArray[np.float32]]]) -> float:
    """The median of non-negative float32 numbers that come in parts, exactly numpy's in float64; `parts` is called twice.

    Such numbers are ordered as their bits are: count the upper halves of all, then the lower halves of those in the
    middle. Raises ValueError when there are none.
    """
    upper = np.zeros(1 << 16, np.int64)
    for part in parts():
        upper += np.bincount(part.view(np.uint32) >> 16, minlength=1 << 16)
    n = int(upper.sum())
    if n == 0:
        raise ValueError("no numbers, no median")
    below = np.cumsum(upper)
    middle = [(n - 1) // 2, n // 2]
    halves = [int(np.searchsorted(below, rank, side="right")) for rank in middle]
    lower = {half: np.zeros(1 << 16, np.int64) for half in halves}
    for part in parts():
        bits = part.view(np.uint32)
        for half, counts in lower.items():
            counts += np.bincount(bits[bits >> 16 == half] & 0xFFFF, minlength=1 << 16)
    values = []
    for rank, half in zip(middle, halves):
        rest = rank - int(below[half] - upper[half])
        low = int(np.searchsorted(np.cumsum(lower[half]), rest, side="right"))
        values.append(float(np.array([half << 16 | low], np.uint32).view(np.float32)[0]))
    return sum(values) / 2


def merge(moments: Float64) -> Float64:
    """Sum of the moments of parts, [part, 2 + d_model] → [2 + d_model], one after the other."""
    total = np.zeros(moments.shape[1])
    for part in moments:
        total += part
    return total


def mean_and_scale(total: Float64, where: str) -> tuple[Float64, float, float]:
    """Mean [d_model], scale = (E‖x − mean‖²)^−½ and mean_share of the rows whose moments these are.

    Raises StoreError when there are no rows, or when all are the same, so that nothing can be scaled.
    """
    n, sum_of_squares = total[0], total[1]
    if n < 1:
        raise StoreError(f"{where}: no training row is left without special and massive ones; harvest more tokens")
    mean = total[2:] / n
    mean_square = float(np.square(mean).sum())
    variance = float(sum_of_squares / n) - mean_square
    if not variance > 0:
        raise StoreError(
            f"{where}: all {n:.0f} training rows are the same vector (variance {variance}); check the model"
        )
    return mean, variance**-0.5, mean_square / float(sum_of_squares / n)

"""Which latents TopK and BatchTopK keep: the n-th largest value, exactly, without sorting the batch.

Ties are kept: all latents equal to the n-th largest stay, so what is kept does not depend on an order of rows, and is
what a threshold would keep. In float32 ties all but never happen; in bf16 they add up to two latents in a hundred.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

MARGIN = 0.97
"""The last batch's threshold times this sorts out most latents before the exact search; it changes no result."""
LOWER = (1.0, 0.9, 0.7, 0.4)
"""Shares of a guess that are tried in turn: small batches' thresholds differ by more than the margin, and a search of all
entries takes twenty times as long as another look (9 ms against 0.4 for 512 rows × 768 latents)."""


def row_thresholds(z: Float[Tensor, "row latent"], k: int) -> Float[Tensor, "row 1"]:
    """The k-th largest of each row of non-negative z."""
    if z.device.type != "cpu":
        return z.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    kth = z.shape[1] - k
    numbers = np.partition(ordered_numbers(z), kth, axis=1)[:, kth : kth + 1]
    return from_ordered_numbers(numbers, z.dtype)


def batch_threshold(z: Float[Tensor, "row latent"], n: int, guess: float = 0.0) -> Float[Tensor, ""]:
    """The n-th largest of all entries of non-negative z: equal to the last value of `torch.topk(z.flatten(), n)`.

    On a CPU only entries above `guess` are searched, or above a share of it, when at least n of them are; else all are.
    torch's own top-k over the flattened batch runs on one thread and takes as long as a matrix product.
    """
    if z.device.type != "cpu":
        return z.flatten().topk(n, sorted=False).values.amin()
    numbers = ordered_numbers(z).reshape(-1)
    survivors = numbers
    for bound in ordered_numbers(torch.tensor([guess * share for share in LOWER if guess > 0], dtype=z.dtype)):
        places = np.flatnonzero(numbers > bound)
        if len(places) >= n:
            survivors = numbers[places]
            break
    kth = len(survivors) - n
    return from_ordered_numbers(np.partition(survivors, kth)[kth : kth + 1], z.dtype)[0]


def global_threshold(z: Float[Tensor, "row latent"], n: int, group: dist.ProcessGroup) -> Float[Tensor, ""]:
    """The n-th largest of all entries of z over the processes of a group, each of which holds its own rows."""
    largest = torch.zeros(n, dtype=z.dtype, device=z.device)
    own = z.flatten().topk(min(n, z.numel()), sorted=False).values
    largest[: len(own)] = own
    gathered = [torch.empty_like(largest) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, largest, group=group)
    return torch.cat(gathered).topk(n, sorted=False).values.amin()


def nth_largest_over(parts: Iterable[Tensor], n: int) -> Float[Tensor, ""]:
    """The n-th largest of all entries of several z, one after another in the same memory, with no fetch from an accelerator: the
    n largest so far are kept."""
    largest: list[Tensor] = []
    for z in parts:
        both = torch.cat([*largest, z.flatten().topk(min(n, z.numel()), sorted=False).values])
        largest = [both.topk(min(n, len(both)), sorted=False).values]
    return largest[0].amin()


def ordered_numbers(z: Tensor) -> npt.NDArray[Any]:
    """A numpy view that compares as non-negative z does: numpy has no bf16, whose bits are in the order of its values."""
    return (z.view(torch.int16) if z.dtype == torch.bfloat16 else z).numpy()


def from_ordered_numbers(numbers: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
    """The values of `ordered_numbers`, copied."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor

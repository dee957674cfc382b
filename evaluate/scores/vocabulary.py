"""One pass over the vocabulary on a GPU: soft cap, logsumexp, the dot with clean probabilities, the largest and the target's.

A row of logits is read once, and once the clean probabilities beside it; nothing of its length is written. The plain way
(`behaviour.compare`) writes a float32 log-softmax and reads it three times. The formulas are its own: KL = Σ p log p − Σ p l +
logsumexp(l) Σ p, and the soft cap rounds where the model's own does.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

SIZE = 4096
"""Numbers of a row at a time."""


@triton.jit
@no_type_check
def compare_kernel(
    logits, p, targets, tops, negative_entropy, out, n_rows, vocab, cap, CAPS: tl.constexpr, SIZE: tl.constexpr
):
    """out [3, row]: KL, cross-entropy (0 without a target), 1 where the largest logit, the first of equals, is `tops`."""
    row = tl.program_id(0)
    at = row.to(tl.int64) * vocab
    lanes = tl.arange(0, SIZE)
    largest = tl.full((), float("-inf"), tl.float32)
    where = tl.zeros((), tl.int32)
    total = tl.zeros((), tl.float32)
    dots = tl.zeros((SIZE,), tl.float32)
    mass = tl.zeros((SIZE,), tl.float32)
    wanted = tl.zeros((SIZE,), tl.float32)
    target = tl.load(targets + row).to(tl.int32)
    for start in range(0, vocab, SIZE):
        cols = start + lanes
        mask = cols < vocab
        raw = tl.load(logits + at + cols, mask=mask, other=0.0)
        value = raw.to(tl.float32)
        if CAPS:
            scaled = (value / cap).to(raw.dtype).to(tl.float32)
            bent = (1.0 - 2.0 / (tl.exp(2.0 * scaled) + 1.0)).to(raw.dtype).to(tl.float32)
            value = (bent * cap).to(raw.dtype).to(tl.float32)
        value = tl.where(mask, value, float("-inf"))
        here = tl.max(value, 0)
        first = tl.min(tl.where(value == here, cols, vocab), 0)
        where = tl.where(here > largest, first, where)
        before = largest
        largest = tl.maximum(largest, here)
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(value - largest), 0)
        share = tl.load(p + at + cols, mask=mask, other=0.0)
        dots += share * tl.where(mask, value, 0.0)
        mass += share
        wanted += tl.where(mask & (cols == target), value, 0.0)
    log_total = largest + tl.log(total)
    kl = tl.load(negative_entropy + row) - (tl.sum(dots, 0) - log_total * tl.sum(mass, 0))
    ce = tl.where(target >= 0, log_total - tl.sum(wanted, 0), 0.0)
    tl.store(out + row, kl)
    tl.store(out + n_rows + row, ce)
    tl.store(out + 2 * n_rows + row, (tl.load(tops + row).to(tl.int32) == where).to(tl.float32))


def compare_arguments(
    logits: Float[Tensor, "row vocab"],
    p: Float[Tensor, "row vocab"],
    targets: Int[Tensor, " row"],
    tops: Int[Tensor, " row"],
    negative_entropy: Float[Tensor, " row"],
    out: Float[Tensor, "3 row"],
    cap: float | None,
) -> tuple[list[Any], dict[str, Any]]:
    """What the kernel is launched with, a program a row."""
    tensors = [logits.contiguous(), p.contiguous(), targets, tops, negative_entropy, out]
    options = {"CAPS": cap is not None, "SIZE": min(SIZE, triton.next_power_of_2(logits.shape[1])), "num_warps": 8}
    return [*tensors, *logits.shape, cap or 1.0], options


def compared(
    logits: Float[Tensor, "row vocab"],
    p: Float[Tensor, "row vocab"],
    targets: Int[Tensor, " row"],
    tops: Int[Tensor, " row"],
    negative_entropy: Float[Tensor, " row"],
    cap: float | None,
) -> Float[Tensor, "3 row"]:
    """KL, cross-entropy and agreement of each row, float32, from logits before a soft cap `cap`, or after all."""
    out = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    arguments, options = compare_arguments(logits, p, targets, tops, negative_entropy, out, cap)
    if len(logits):
        compare_kernel[(len(logits),)](*arguments, **options)
    return out

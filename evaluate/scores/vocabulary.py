"""One pass over the vocabulary on a GPU: soft cap, logsumexp, the dot with clean probabilities, the largest and the target's.

A row of logits is read once, and once the clean probabilities beside it; nothing of its length is written. The clean model's own
logits are read twice, and its probabilities written once. The plain way
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
def final_logits(raw, cap, CAPS: tl.constexpr):
    """float32 of logits after the soft cap, rounded where the model rounds."""
    value = raw.to(tl.float32)
    if CAPS:
        scaled = (value / cap).to(raw.dtype).to(tl.float32)
        bent = (1.0 - 2.0 / (tl.exp(2.0 * scaled) + 1.0)).to(raw.dtype).to(tl.float32)
        value = (bent * cap).to(raw.dtype).to(tl.float32)
    return value


@triton.jit
@no_type_check
def clean_kernel(logits, targets, p, tops, out, n_rows, vocab, cap, CAPS: tl.constexpr, SIZE: tl.constexpr):
    """p [row, vocab]: probabilities; tops [row]: the largest logit, the first of equals; out [2, row]: Σ p log p, cross-entropy,
    0 without a target."""
    row = tl.program_id(0)
    at = row.to(tl.int64) * vocab
    lanes = tl.arange(0, SIZE)
    largest = tl.full((), float("-inf"), tl.float32)
    where = tl.zeros((), tl.int32)
    total = tl.zeros((), tl.float32)
    wanted = tl.zeros((SIZE,), tl.float32)
    target = tl.load(targets + row).to(tl.int32)
    for start in range(0, vocab, SIZE):
        cols = start + lanes
        mask = cols < vocab
        value = final_logits(tl.load(logits + at + cols, mask=mask, other=0.0), cap, CAPS)
        value = tl.where(mask, value, float("-inf"))
        here = tl.max(value, 0)
        where = tl.where(here > largest, tl.min(tl.where(value == here, cols, vocab), 0), where)
        before = largest
        largest = tl.maximum(largest, here)
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(value - largest), 0)
        wanted += tl.where(mask & (cols == target), value, 0.0)
    log_total = largest + tl.log(total)
    dots = tl.zeros((SIZE,), tl.float32)
    for start in range(0, vocab, SIZE):
        cols = start + lanes
        mask = cols < vocab
        value = final_logits(tl.load(logits + at + cols, mask=mask, other=0.0), cap, CAPS) - log_total
        share = tl.exp(value)
        tl.store(p + at + cols, share, mask=mask)
        dots += tl.where(mask, share * value, 0.0)
    tl.store(tops + row, where.to(tl.int64))
    tl.store(out + row, tl.sum(dots, 0))
    tl.store(out + n_rows + row, tl.where(target >= 0, log_total - tl.sum(wanted, 0), 0.0))


@triton.jit
@no_type_check
def compare_kernel(
    logits, places, p, targets, tops, negative_entropy, out, n_rows, vocab, cap, CAPS: tl.constexpr, SIZE: tl.constexpr
):
    """out [3, row]: KL, cross-entropy (0 without a target), 1 where the largest logit, the first of equals, is `tops`. places
    [row]: which row of the logits is each row's."""
    row = tl.program_id(0)
    at = row.to(tl.int64) * vocab
    own = tl.load(places + row).to(tl.int64) * vocab
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
        value = final_logits(tl.load(logits + own + cols, mask=mask, other=0.0), cap, CAPS)
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


def options_of(logits: Tensor, cap: float | None) -> dict[str, Any]:
    """What both kernels are compiled for, a program a row."""
    return {"CAPS": cap is not None, "SIZE": min(SIZE, triton.next_power_of_2(logits.shape[1])), "num_warps": 8}


def compare_arguments(
    logits: Float[Tensor, "place vocab"],
    places: Int[Tensor, " row"],
    p: Float[Tensor, "row vocab"],
    targets: Int[Tensor, " row"],
    tops: Int[Tensor, " row"],
    negative_entropy: Float[Tensor, " row"],
    out: Float[Tensor, "3 row"],
    cap: float | None,
) -> tuple[list[Any], dict[str, Any]]:
    """What `compare_kernel` is launched with."""
    tensors = [logits.contiguous(), places, p.contiguous(), targets, tops, negative_entropy, out]
    return [*tensors, *p.shape, cap or 1.0], options_of(logits, cap)


def compared(
    logits: Float[Tensor, "place vocab"],
    p: Float[Tensor, "row vocab"],
    targets: Int[Tensor, " row"],
    tops: Int[Tensor, " row"],
    negative_entropy: Float[Tensor, " row"],
    cap: float | None,
    places: Int[Tensor, " row"] | None = None,
) -> Float[Tensor, "3 row"]:
    """KL, cross-entropy and agreement of each row, float32, from logits before a soft cap `cap`, or after all; `places`: which of
    the logits' rows is each row's, its own where None."""
    out = torch.empty(3, len(p), dtype=torch.float32, device=logits.device)
    if places is None:
        places = torch.arange(len(p), device=logits.device)
    arguments, options = compare_arguments(logits, places, p, targets, tops, negative_entropy, out, cap)
    if len(p):
        compare_kernel[(len(p),)](*arguments, **options)
    return out


def clean_arguments(
    logits: Float[Tensor, "row vocab"],
    targets: Int[Tensor, " row"],
    p: Float[Tensor, "row vocab"],
    tops: Int[Tensor, " row"],
    out: Float[Tensor, "2 row"],
    cap: float | None,
) -> tuple[list[Any], dict[str, Any]]:
    """What `clean_kernel` is launched with."""
    return [logits.contiguous(), targets, p, tops, out, *logits.shape, cap or 1.0], options_of(logits, cap)


def clean(
    logits: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"], p: Float[Tensor, "row vocab"], cap: float | None
) -> tuple[Float[Tensor, " row"], Int[Tensor, " row"], Float[Tensor, " row"]]:
    """Write probabilities into p (float32, contiguous); returns Σ p log p, the most likely token, and cross-entropy, float32."""
    tops = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    out = torch.empty(2, len(logits), dtype=torch.float32, device=logits.device)
    arguments, options = clean_arguments(logits, targets, p, tops, out, cap)
    if len(logits):
        clean_kernel[(len(logits),)](*arguments, **options)
    return out[0], tops, out[1]

"""The evaluation sample: the store's eval split batch by batch, and what one pass over its rows says without any SAE."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.base.runtime import sent
from pipeline.sae.metrics import Moments, row_squares

if TYPE_CHECKING:
    from pipeline.store.reader import Store

GROUP_SEQUENCES = 16
"""Sequences in the "batch" of `ev_legacy` and `ev_saebench`, as in SAEBench: fixed, whatever batch size we run with."""

WEIGHTINGS = ("scores", "scores_without_massive")
"""Every average is computed twice: over all kept rows, and over those that are not massive. Names as in FORMAT.md."""


@dataclass(frozen=True)
class Batch:
    """Some sequences of the split. Kept rows are the positions that are not special, in order.

    `weights` [2, row] is 1 where a kept row counts: always; unless it is massive. `targets` is the next token of the
    same sequence, −1 after the last position; where rows are of no text, `tokens` and `targets` are −1. `group` numbers
    each row's group of GROUP_SEQUENCES sequences. `index`: each kept row's place among all positions, sequence by sequence.
    `read`: of transcoders, the kept rows that are encoded, where `residual` and `x` are those to be made.
    """

    first: int
    residual: Float[Tensor, "seq pos d_model"]
    tokens: Int[Tensor, "seq pos"]
    kept: Bool[Tensor, "seq pos"]
    x: Float[Tensor, "row d_model"]
    weights: Float[Tensor, "2 row"]
    targets: Int[Tensor, " row"]
    group: Int[Tensor, " row"]
    index: Int[Tensor, " row"]
    read: Float[Tensor, "row d_in"] | None = None

    @property
    def encoded(self) -> Float[Tensor, "row d_in"]:
        """The kept rows that are encoded."""
        return self.x if self.read is None else self.read


@dataclass(frozen=True)
class Sample:
    """The first `n_sequences` sequences of a store's eval split, read in batches to a device; `source`: the store of the same
    sequences whose rows are encoded, where that is another."""

    store: Store
    n_sequences: int
    batch_size: int
    device: torch.device
    source: Store | None = None

    @property
    def n_groups(self) -> int:
        """Groups of GROUP_SEQUENCES sequences; the last may be smaller."""
        return -(-self.n_sequences // GROUP_SEQUENCES)

    def survey(self) -> Survey:
        """What one pass over the rows says."""
        return survey(self.batches(), self.n_groups, self.store.d_model, self.device)

    def batches(self, first: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches of sequences first … stop − 1 (None: of all) in the order of the split; the last may be smaller. Raises
        DamagedError when bytes changed."""
        stop = self.n_sequences if stop is None else stop
        for start in range(first, stop, self.batch_size):
            yield self.batch(start, min(start + self.batch_size, stop))

    def batch(self, first: int, stop: int) -> Batch:
        """Sequences first to stop − 1."""
        split, context, device = self.store.eval, self.store.context, self.device
        rows = slice(first * context, stop * context)
        residual = sent(split.read(rows.start, rows.stop), device).view(stop - first, context, -1)
        kept = ~torch.from_numpy(split.special_of(first, stop)).bool()
        has_tokens = split.shape.layout.has_tokens
        tokens = torch.from_numpy(split.tokens_of(first, stop)).long() if has_tokens else torch.full(kept.shape, -1)
        normal = torch.from_numpy(split.kept_of(first, stop)).view_as(kept)[kept]
        targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], 1)[kept]
        group = (torch.arange(first, stop) // GROUP_SEQUENCES)[:, None].expand_as(kept)[kept]
        index = sent(kept.flatten().nonzero()[:, 0], device)
        read = None
        if self.source is not None and self.source is not self.store:
            read = sent(self.source.eval.read(rows.start, rows.stop), device)[index].float()
        return Batch(
            first=first,
            residual=residual,
            tokens=sent(tokens, device),
            kept=sent(kept, device),
            x=residual.flatten(0, 1)[index].float(),
            weights=sent(torch.stack([torch.ones_like(normal), normal]).double(), device),
            targets=sent(targets, device),
            group=sent(group, device),
            index=index,
            read=read,
        )


@dataclass(frozen=True)
class Survey:
    """What one pass over the rows says, in float64, for both weightings: moments, and per group the count and Σ‖x‖²."""

    moments: tuple[Moments, Moments]
    group_n: Float[Tensor, "2 group"]
    group_sum_sq: Float[Tensor, "2 group"]

    @staticmethod
    def n_bytes(n_groups: int, d_model: int) -> int:
        """Bytes that it takes."""
        return 2 * 8 * (2 + d_model) + 2 * 2 * 8 * n_groups

    @property
    def n_rows(self) -> Float[Tensor, "2"]:
        """Rows that count."""
        return torch.stack([m.n for m in self.moments])


def survey(batches: Iterable[Batch], n_groups: int, d_model: int, device: torch.device) -> Survey:
    """Read the rows once, before any checkpoint."""
    moments = (Moments.zeros(d_model, device), Moments.zeros(d_model, device))
    n, sum_sq = torch.zeros(2, 2, n_groups, dtype=torch.float64, device=device)
    for batch in batches:
        squares = row_squares(batch.x).double()
        for k, weights in enumerate(batch.weights):
            moments[k].update(batch.x, weights)
            n[k].index_add_(0, batch.group, weights)
            sum_sq[k].index_add_(0, batch.group, weights * squares)
    return Survey(moments, n, sum_sq)


class GroupMeans:
    """Means of the groups that batches touch, while these go by in order. The rest of a group that a batch cuts is read with it;
    the mean of the last group is kept for the batch that follows, and nothing else."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.group, self.mean = -1, torch.empty(0)

    def of(self, batch: Batch) -> Float[Tensor, "2 group d_model"]:
        """Of a batch's groups from its first on, over all their rows, for both weightings, float64."""
        start, stop = batch.first, batch.first + len(batch.residual)
        first, last = start // GROUP_SEQUENCES, (stop - 1) // GROUP_SEQUENCES
        is_known = self.group == first
        if is_known and first == last:
            return self.mean[:, None]
        end = min((last + 1) * GROUP_SEQUENCES, self.sample.n_sequences)
        before = () if is_known else self.sample.batches(first * GROUP_SEQUENCES, start)
        means = group_means(itertools.chain(before, [batch], self.sample.batches(stop, end)), first, last)
        if is_known:
            means[:, 0] = self.mean
        self.group, self.mean = last, means[:, -1].clone()
        return means


def group_means(batches: Iterable[Batch], first: int, last: int) -> Float[Tensor, "2 group d_model"]:
    """Means of groups first … last for both weightings, float64, over the rows of `batches`, which are of these alone; they are
    added in the order of the split, so that the batches they come in do not matter."""
    n, sums = torch.empty(0), torch.empty(0)
    for batch in batches:
        if not len(sums):
            n = batch.weights.new_zeros(2, last + 1 - first)
            sums = batch.weights.new_zeros(2, last + 1 - first, batch.x.shape[1])
        group, x = batch.group - first, batch.x.double()
        for k, weights in enumerate(batch.weights):
            n[k].index_add_(0, group, weights)
            sums[k].index_add_(0, group, weights[:, None] * x)
    return sums.div_(n.clamp_(min=1)[..., None])

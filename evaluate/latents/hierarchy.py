"""Which specialised latents fire with which shared one far more than chance: the paper's claim, with counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

N_RELATED = 12
"""Relatives kept a latent."""
MIN_COUNT, MIN_LIFT, CHANCE = 10, 2.0, 0.01
"""Fewest tokens on which both fire; least lift; largest bound on the expected number of pairs found by chance."""


@dataclass
class Counts:
    """How often each latent fired (float64 counts) on how many kept tokens; the first n_shared latents are shared."""

    count: Float[Tensor, " latent"]
    n_shared: int
    n_tokens: int = 0

    def density(self) -> Float[Tensor, " latent"]:
        """Share of kept tokens on which each latent fires."""
        return self.count / max(self.n_tokens, 1)


Pair = tuple[int, int, int, float, float, float]
"""(shared latent, specialised latent, tokens on which both fire, lift, share, decoder cosine)."""
Link = tuple[int, int, float, float, float]
"""A relative of a latent: (its id, tokens on which both fire, lift, share, decoder cosine).

The share is that of the specialised latent's tokens on which the shared one fires too.
"""
Related = list[list[Link]]
"""Each latent's relatives, strongest first."""


def relate(
    pairs: Float[Tensor, "shared specialised"], firing: Counts, W_dec: Float[Tensor, "latent d_model"], first: int
) -> list[Pair]:
    """The strongest pairs by lift, for each latent of either kind, out of a block of co-firing counts.

    Rows of `pairs` are shared latents from `first` on. lift = P(both) / (P(shared) P(specialised)) over kept tokens.
    Kept are pairs with at least MIN_COUNT tokens, a lift of at least MIN_LIFT, and a Chernoff bound
    exp(−(c ln(c/e) − c + e)) of seeing c where chance expects e that stays under CHANCE after multiplying by the number
    of pairs (tokens taken as independent, which they are only nearly).
    """
    if pairs.numel() == 0:
        return []
    special_count = firing.count[firing.n_shared :]
    n_pairs = firing.n_shared * len(special_count)
    shared_count = firing.count[first : first + len(pairs), None]
    expected = (shared_count * special_count / firing.n_tokens).float().clamp(min=1e-12)
    lift = pairs / expected
    evidence = pairs * lift.clamp(min=1e-12).log() - pairs + expected
    far = (pairs >= MIN_COUNT) & (lift >= MIN_LIFT) & (evidence >= math.log(n_pairs / CHANCE))
    shared, special = strongest(torch.where(far, lift, 0.0)).nonzero(as_tuple=True)
    count, lifts = pairs[shared, special].double(), lift[shared, special]
    share = count / special_count[special]
    decoder = torch.nn.functional.normalize(W_dec.float().cpu(), dim=1)
    cosine = (decoder[first + shared] * decoder[firing.n_shared + special]).sum(1)
    columns = (first + shared, firing.n_shared + special, count.long(), lifts, share, cosine)
    return list(zip(*(column.tolist() for column in columns)))


def strongest(lift: Float[Tensor, "shared specialised"]) -> Tensor:
    """Which entries are positive and among the N_RELATED largest of their row or of their column."""
    strong = torch.zeros_like(lift, dtype=torch.bool)
    for dim in (0, 1):
        top = lift.topk(min(N_RELATED, lift.shape[dim]), dim)
        strong |= torch.zeros_like(strong).scatter(dim, top.indices, top.values > 0)
    return strong


def both_ways(pairs: list[Pair], width: int) -> Related:
    """Each latent's relatives, at most N_RELATED, by falling lift, then count."""
    related: Related = [[] for _ in range(width)]
    for shared, special, count, lift, share, cosine in pairs:
        related[shared].append((special, count, lift, share, cosine))
        related[special].append((shared, count, lift, share, cosine))
    return [sorted(links, key=lambda link: (-link[2], -link[1], link[0]))[:N_RELATED] for links in related]

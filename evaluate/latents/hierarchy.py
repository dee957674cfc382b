"""Which specialised latents fire inside which shared one more than chance: containment over the null of `scores/structure.py`.

The containment of a specialised latent in a shared one is the share of its tokens on which the shared one fires too. Its
null takes the specialised latent's firings from the sequence before, position by position: what densities alone give.
Lift would hide what matters, since it cannot exceed 1 / P(shared): a latent wholly inside a frequent one has little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from evaluate.scores.structure import MIN_COUNT

N_RELATED = 12
"""Relatives kept a latent."""
CHANCE = 0.01
"""Largest expected number of pairs found by chance."""


@dataclass
class Counts:
    """How often each latent fired (float64 counts) on how many kept tokens; the first n_shared latents are shared."""

    count: Float[Tensor, " latent"]
    n_shared: int
    n_tokens: int = 0

    def density(self) -> Float[Tensor, " latent"]:
        """Share of kept tokens on which each latent fires."""
        return self.count / max(self.n_tokens, 1)


@dataclass(frozen=True)
class Blocks:
    """Tokens on which shared latents (rows) fire with specialised ones (columns): as it is, and with the specialised ones'
    firings taken from the sequence before."""

    together: Float[Tensor, "shared specialised"]
    moved: Float[Tensor, "shared specialised"]


Pair = tuple[int, int, int, float, float, float]
"""(shared latent, specialised latent, tokens on which both fire, containment, its null, decoder cosine)."""
Link = tuple[int, int, float, float, float]
"""A relative of a latent: (its id, tokens on which both fire, containment, its null, decoder cosine).

The containment is that of the specialised latent in the shared one, whichever of the two the page is of.
"""
Related = list[list[Link]]
"""Each latent's relatives, strongest first."""


def relate(blocks: Blocks, firing: Counts, W_dec: Float[Tensor, "latent d_model"], first: int) -> list[Pair]:
    """The pairs whose containment exceeds its null by most, for each latent of either kind.

    Rows of `blocks` are shared latents from `first` on. Kept are pairs whose specialised latent fires on MIN_COUNT tokens
    and whose excess is significant at CHANCE over the number of pairs (two proportions, tokens taken as independent).
    """
    if blocks.together.numel() == 0:
        return []
    n = firing.count[firing.n_shared :].float()
    often = n >= MIN_COUNT
    if not often.any():
        return []
    share, null = (part / n.clamp(min=1) for part in (blocks.together, blocks.moved))
    both = (share + null) / 2
    error = (2 * both * (1 - both) / n.clamp(min=1)).sqrt()
    bound = NormalDist().inv_cdf(1 - min(CHANCE / (firing.n_shared * int(often.sum())), 0.5))
    excess = torch.where(often & (share - null > bound * error), share - null, 0.0)
    shared, special = strongest(excess).nonzero(as_tuple=True)
    decoder = torch.nn.functional.normalize(W_dec.float().cpu(), dim=1)
    cosine = (decoder[first + shared] * decoder[firing.n_shared + special]).sum(1)
    columns = (
        first + shared,
        firing.n_shared + special,
        blocks.together[shared, special].long(),
        share[shared, special],
        null[shared, special],
        cosine,
    )
    return list(zip(*(column.tolist() for column in columns)))


def strongest(excess: Float[Tensor, "shared specialised"]) -> Tensor:
    """Which entries are positive and among the N_RELATED largest of their row or of their column."""
    strong = torch.zeros_like(excess, dtype=torch.bool)
    for dim in (0, 1):
        top = excess.topk(min(N_RELATED, excess.shape[dim]), dim)
        strong |= torch.zeros_like(strong).scatter(dim, top.indices, top.values > 0)
    return strong


def both_ways(pairs: list[Pair], width: int) -> Related:
    """Each latent's relatives, at most N_RELATED, by falling excess of containment over its null, then count."""
    related: Related = [[] for _ in range(width)]
    for shared, special, count, share, null, cosine in pairs:
        related[shared].append((special, count, share, null, cosine))
        related[special].append((shared, count, share, null, cosine))
    return [sorted(links, key=lambda link: (link[3] - link[2], -link[1], link[0]))[:N_RELATED] for links in related]


class Containment:
    """Each specialised latent's largest containment in a shared one, and its null, over blocks of shared latents."""

    def __init__(self, n_special: int) -> None:
        self.together, self.moved = torch.zeros(2, n_special)

    def update(self, blocks: Blocks) -> None:
        """Add a block."""
        if len(blocks.together):
            self.together = torch.maximum(self.together, blocks.together.amax(0))
            self.moved = torch.maximum(self.moved, blocks.moved.amax(0))

    def summary(self, firing: Counts) -> dict[str, float | int | None]:
        """Means over specialised latents that fire on MIN_COUNT tokens, as `structure` reports them: containment, null,
        and their difference with its 95 % interval over latents (normal); None where there is no such latent."""
        n = firing.count[firing.n_shared :]
        often = n >= MIN_COUNT
        gains = (self.together - self.moved)[often].double() / n[often]
        if not firing.n_shared or not len(gains):
            return {"n": 0} | dict.fromkeys(("containment", "null", "excess", "low", "high"))
        excess = float(gains.mean())
        half = 1.96 * float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else None
        return {
            "n": len(gains),
            "containment": float((self.together[often].double() / n[often]).mean()),
            "null": float((self.moved[often].double() / n[often]).mean()),
            "excess": excess,
            "low": None if half is None else excess - half,
            "high": None if half is None else excess + half,
        }

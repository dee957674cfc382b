"""What latents are like: densities, how evenly they are used, their geometry, and how they fire together.

Blocks are "shared" (the innermost level, when there are several) and "specialised" (all others). Densities are over all
kept rows. Correlations are over rows that are not massive (a handful would own every Pearson coefficient), among at
most N_SAMPLED latents of each block drawn by seed: 2 · (2 · N_SAMPLED)² · 8 bytes, never width × width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from evaluate.scores.firing import Firing
from evaluate.scores.sample import Batch
from pipeline.base.runtime import numpy_rng
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE

N_SAMPLED = 512
MIN_FIRED = 10
"""Rows on which a latent must fire for its correlations to count."""
CHUNK_VALUES = 1 << 24
"""Cosines held at once while looking for nearest neighbours (float32)."""
DENSITY_EDGES = [-6 + i / 4 for i in range(25)]
COSINE_EDGES = [i / 20 for i in range(-20, 21)]


def blocks(config: SAEConfig) -> dict[str, slice]:
    """The latents of each block by name; a flat SAE has only specialised ones."""
    split = config.n_shared
    both = {"shared": slice(0, split), "specialised": slice(split, config.width)}
    return {name: block for name, block in both.items() if block.stop > block.start}


def describe(values: Float[Tensor, " n"]) -> dict[str, float | int | None]:
    """Count, mean and quantiles of some numbers; None where there are none."""
    if values.numel() == 0:
        return {"n": 0, "mean": None, "p5": None, "p50": None, "p95": None, "max": None}
    ordered = values.double().sort().values
    at = {
        name: float(ordered[round(q * (len(ordered) - 1))]) for name, q in (("p5", 0.05), ("p50", 0.5), ("p95", 0.95))
    }
    return {"n": values.numel(), "mean": float(ordered.mean()), **at, "max": float(ordered[-1])}


def histogram(values: Float[Tensor, " n"], edges: list[float]) -> list[int]:
    """Counts between edges; values outside fall into the first or the last bin."""
    inside = values.double().cpu().clamp(edges[0], edges[-1])
    return [int(count) for count in torch.histogram(inside, torch.tensor(edges, dtype=torch.float64)).hist]


def density_features(config: SAEConfig, firing: Firing) -> dict[str, Any]:
    """Histograms of log10 density (latents that never fired counted apart), and how evenly each block is used."""
    density = firing.density()
    found: dict[str, Any] = {"edges": DENSITY_EDGES, "never": {}}
    use = {}
    for name, block in blocks(config).items():
        part = density[block]
        found[name] = histogram(part[part > 0].log10(), DENSITY_EDGES)
        found["never"][name] = int((part == 0).sum())
        use[name] = utilisation(part)
    return {"density": found, "utilisation": use}


def utilisation(density: Float[Tensor, " latent"]) -> dict[str, float | None]:
    """How evenly a block fires, and how much of it is dense.

    `entropy`: of the shares of all firings, over its maximum ln(number of latents); 1 is even. `gini`: of densities; 0 is
    even, near 1 a few latents do it all. `freq_over_p`: share of latents firing on more than p of rows; `mass_over_p`:
    their share of all firings. None where nothing fires (or one latent has no entropy).
    """
    n, total = len(density), float(density.sum())
    found: dict[str, float | None] = {}
    for name, bound in (("1_percent", 0.01), ("10_percent", 0.1)):
        over = density > bound
        found[f"freq_over_{name}"] = float(over.double().mean())
        found[f"mass_over_{name}"] = float(density[over].sum()) / total if total else None
    share = density[density > 0] / total if total else density[:0]
    found["entropy"] = float(-(share * share.log()).sum()) / math.log(n) if total and n > 1 else None
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=density.device)
    found["gini"] = float(2 * (rank * density.sort().values).sum() / (n * total) - (n + 1) / n) if total else None
    return found


def geometry(sae: NestedSAE) -> dict[str, Any]:
    """Cosine of each encoder column with its decoder row (not of a transcoder, where they are of different points), and of
    each decoder row with its nearest neighbours, per block."""
    decoder = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
    own = None
    if not sae.config.is_transcoder:
        own = (torch.nn.functional.normalize(sae.W_enc.float(), dim=0).T * decoder).sum(1)
    found: dict[str, Any] = {"edges": COSINE_EDGES, "encoder_decoder": {}, "nearest": {}}
    names = blocks(sae.config)
    for name, block in names.items():
        if own is not None:
            found["encoder_decoder"][name] = describe(own[block]) | {"histogram": histogram(own[block], COSINE_EDGES)}
        for other, of in names.items():
            best = nearest(decoder, block, of)
            key = f"within {name}" if other == name else f"{name} to {other}"
            found["nearest"][key] = describe(best) | {"histogram": histogram(best, COSINE_EDGES)}
    return found


def nearest(decoder: Float[Tensor, "latent d_model"], block: slice, among: slice) -> Float[Tensor, " n"]:
    """The largest cosine of each latent of a block with another of `among`; CHUNK_VALUES cosines at a time."""
    n_among = among.stop - among.start
    if block == among and n_among < 2:
        return decoder.new_zeros(0)
    size, parts = max(1, CHUNK_VALUES // n_among), []
    for start in range(block.start, block.stop, size):
        rows = torch.arange(start, min(start + size, block.stop), device=decoder.device)
        cosine = decoder[rows] @ decoder[among].T
        if block == among:
            cosine[rows - start, rows - among.start] = -torch.inf
        parts.append(cosine.amax(1))
    return torch.cat(parts)


class Correlation:
    """How sampled latents fire together: co-firing counts and products of activations, streamed in float64."""

    def __init__(self, config: SAEConfig, seed: int, device: torch.device | str) -> None:
        self.blocks = blocks(config)
        drawn = {
            name: numpy_rng("correlation", seed, name).permutation(block.stop - block.start)[:N_SAMPLED] + block.start
            for name, block in self.blocks.items()
        }
        self.sampled = {name: torch.from_numpy(ids).sort().values.to(device) for name, ids in drawn.items()}
        self.ids = torch.cat(list(self.sampled.values()))
        n = len(self.ids)
        self.rows = torch.zeros((), dtype=torch.float64, device=device)
        self.sums = torch.zeros(n, dtype=torch.float64, device=device)
        self.products = torch.zeros(n, n, dtype=torch.float64, device=device)
        self.together = torch.zeros_like(self.products)

    def update(self, z: Float[Tensor, "row latent"], batch: Batch) -> None:
        """Add the rows of a batch that are not massive; products are float32 within a batch."""
        some = z[:, self.ids] * batch.weights[1, :, None].float()
        fires = (some != 0).float()
        self.rows += batch.weights[1].sum()
        self.sums += some.double().sum(0)
        self.products += (some.T @ some).double()
        self.together += (fires.T @ fires).double()

    def features(self) -> dict[str, Any]:
        """Pearson and Jaccard over pairs of latents that fired on MIN_FIRED rows, within each block and across."""
        pearson, jaccard = self.pearson(), self.jaccard()
        found: dict[str, Any] = {
            "n_sampled": {name: len(ids) for name, ids in self.sampled.items()},
            "edges": COSINE_EDGES,
        }
        for name, pairs in self.pairs():
            found[name] = {
                "pearson": describe(pearson[pairs]) | {"histogram": histogram(pearson[pairs], COSINE_EDGES)},
                "jaccard": describe(jaccard[pairs]),
                "mean_abs_pearson": describe(pearson[pairs].abs())["mean"],
            }
        return found

    def pearson(self) -> Float[Tensor, "latent latent"]:
        """Pearson correlation of activations over the rows; 0 where a latent does not vary."""
        mean = self.sums / self.rows.clamp(min=1)
        covariance = self.products / self.rows.clamp(min=1) - mean[:, None] * mean
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        scale = deviation[:, None] * deviation
        correlation: Tensor = torch.where(scale > 0, (covariance / scale).clamp(-1, 1), 0.0)
        return correlation

    def jaccard(self) -> Float[Tensor, "latent latent"]:
        """Rows on which both fire over rows on which either fires."""
        count = self.together.diagonal()
        return self.together / (count[:, None] + count - self.together).clamp(min=1)

    def pairs(self) -> Iterator[tuple[str, Bool[Tensor, "latent latent"]]]:
        """Masks of the pairs to average: each unordered pair once, both latents having fired often enough."""
        often = self.together.diagonal() >= MIN_FIRED
        once = torch.ones_like(self.together, dtype=torch.bool).triu(1) & often[:, None] & often
        n = len(self.sampled[next(iter(self.sampled))])
        first = torch.arange(len(self.ids), device=self.ids.device) < n
        names = list(self.sampled)
        yield f"within {names[0]}", once & first[:, None] & first
        if len(names) > 1:
            yield f"within {names[1]}", once & ~first[:, None] & ~first
            yield "across", once & first[:, None] & ~first

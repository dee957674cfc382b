"""Rows as a pure function of (spec, seed, split, position): blocks of BLOCK rows, each with a generator of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.special
import torch
from jaxtyping import Float
from torch import Tensor

from harvest.truth.forest import Forest, log_normal, make_forest
from harvest.truth.spec import Spec
from pipeline.base.files import hash_config
from pipeline.base.runtime import numpy_rng

BLOCK = 4096
"""Rows drawn by one generator: a row's numbers depend on its block and its place in it alone."""


@dataclass(frozen=True)
class Firings:
    """Which features fired on some rows, and how strongly, as sparse rows: those of row r are start[r] … start[r + 1] − 1.

    start int64 [row + 1], feature int32 and strength float32 [firing]; features of a row ascend.
    """

    start: npt.NDArray[np.int64]
    feature: npt.NDArray[np.int32]
    strength: npt.NDArray[np.float32]

    def rows(self, first: int, stop: int) -> Firings:
        """Rows first … stop − 1."""
        span = slice(int(self.start[first]), int(self.start[stop]))
        return Firings(self.start[first : stop + 1] - self.start[first], self.feature[span], self.strength[span])


def join(parts: list[Firings]) -> Firings:
    """Consecutive rows in one."""
    offsets = np.cumsum([0, *(len(part.feature) for part in parts)])
    start = np.concatenate([[0], *(part.start[1:] + offset for part, offset in zip(parts, offsets))])
    feature = np.concatenate([part.feature for part in parts])
    return Firings(start.astype(np.int64), feature, np.concatenate([part.strength for part in parts]))


class Rows:
    """The rows of a spec. `directions` float32 [feature, d_model], as the store carries them.

    `seed` and a split's name choose the stream of rows; the features are the spec's own.
    """

    def __init__(self, spec: Spec, directions: npt.NDArray[np.float32], seed: int) -> None:
        self.spec, self.seed, self.forest = spec, seed, make_forest(spec)
        self.key = hash_config(spec.to_dict())
        self.directions = torch.tensor(directions)
        bias = numpy_rng("truth bias", spec.seed).standard_normal(spec.d_model)
        self.bias = torch.from_numpy((spec.bias * bias / np.linalg.norm(bias)).astype(np.float32))

    def firings(self, split: str, first: int, stop: int) -> Firings:
        """What fires on rows first … stop − 1 of a split."""
        return join(list(self.firings_in_blocks(split, first, stop)))

    def firings_in_blocks(self, split: str, first: int, stop: int) -> Iterator[Firings]:
        """The same of each block of them."""
        for part, _ in self._blocks(split, first, stop, with_noise=False):
            yield part

    def rows(self, split: str, first: int, stop: int) -> Float[Tensor, "row d_model"]:
        """Rows first … stop − 1 of a split, float32: bias + Σ strength · direction + noise."""
        return torch.cat([self._sum(part, noise) for part, noise in self._blocks(split, first, stop)])

    def _sum(self, part: Firings, noise: npt.NDArray[np.float32] | None) -> Float[Tensor, "row d_model"]:
        x: Tensor = torch.nn.functional.embedding_bag(
            torch.from_numpy(part.feature),
            self.directions,
            torch.from_numpy(part.start.astype(np.int32)),
            mode="sum",
            per_sample_weights=torch.from_numpy(part.strength),
            include_last_offset=True,
        )
        x += self.bias
        return x if noise is None else x.add_(torch.from_numpy(noise))

    def _blocks(
        self, split: str, first: int, stop: int, with_noise: bool = True
    ) -> Iterator[tuple[Firings, npt.NDArray[np.float32] | None]]:
        """The firings and the noise of each block, cut to the rows asked for."""
        for number in range(first // BLOCK, -(-stop // BLOCK)):
            rng = numpy_rng("truth rows", self.key, self.seed, split, number)
            part, noise = draw(self.forest, self.spec, rng), None
            a, b = max(first - number * BLOCK, 0), min(stop - number * BLOCK, BLOCK)
            if self.spec.noise and with_noise:
                noise = rng.standard_normal((BLOCK, self.spec.d_model), dtype=np.float32)[a:b]
                noise *= np.float32(self.spec.noise)
            yield part.rows(a, b), noise


def draw(forest: Forest, spec: Spec, rng: np.random.Generator) -> Firings:
    """What fires on one block of rows, exactly as the spec's probabilities say."""
    row, node = np.nonzero(draw_roots(forest, spec, rng))
    rows, features = [row], [node]
    while len(row):
        row, node = draw_children(forest, rng, row, node)
        rows.append(row)
        features.append(node)
    row, feature = np.concatenate(rows), np.concatenate(features)
    order = np.argsort(row * len(forest.parent) + feature)
    feature = feature[order]
    strength = forest.mean[feature]
    if forest.spread.any():
        strength = strength * log_normal(rng.standard_normal(len(feature)), forest.spread[feature])
    start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=BLOCK))])
    return Firings(start.astype(np.int64), feature.astype(np.int32), strength.astype(np.float32))


def draw_roots(forest: Forest, spec: Spec, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which roots fire, bool [BLOCK, root]. Correlated ones by a Gaussian copula: a normal number each, with a part in
    common, falls below the quantile of the root's probability."""
    n = forest.n_roots
    probability = forest.conditional[:n]
    if not spec.correlation:
        uniform: npt.NDArray[np.float32] = rng.random((BLOCK, n), dtype=np.float32)
        return uniform < probability.astype(np.float32)
    n_groups, size = -(-n // spec.correlated), spec.correlated
    own = rng.standard_normal((BLOCK, n_groups, size), dtype=np.float32)
    own *= np.float32(np.sqrt(1 - spec.correlation))
    own += np.float32(np.sqrt(spec.correlation)) * rng.standard_normal((BLOCK, n_groups, 1), dtype=np.float32)
    quantile: npt.NDArray[np.float32] = scipy.special.ndtri(probability).astype(np.float32)
    return own.reshape(BLOCK, -1)[:, :n] < quantile


def draw_children(
    forest: Forest, rng: np.random.Generator, row: npt.NDArray[np.int64], node: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The (row, feature) of the children that fire, given the (row, node) of their parents that do."""
    inner = forest.n_children[node] > 0
    row, node = row[inner], node[inner]
    bounds, first = forest.bounds[node], forest.first_child[node].astype(np.int64)
    uniform = rng.random(bounds.shape)
    free = ~forest.exclusive[node]
    chosen = (uniform[:, :1] >= bounds).sum(1)  # of exclusive children
    one = ~free & (chosen < forest.n_children[node])
    many, child = np.nonzero((uniform < bounds) & free[:, None])
    return np.concatenate([row[one], row[many]]), np.concatenate([first[one] + chosen[one], first[many] + child])

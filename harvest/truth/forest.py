"""A spec's features as arrays: parents, depths, exact probabilities, strengths, and directions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from harvest.truth.spec import Spec, Trees
from pipeline.base.errors import UsageError
from pipeline.base.runtime import numpy_rng

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

STEPS = 2000
"""Steps of repulsion before a wanted coherence is given up."""


@dataclass(frozen=True)
class Forest:
    """Every feature once, roots first, then depth by depth; the children of a node stand one after the other.

    `conditional`: P(feature | its parent), for a root its probability. `mean`, `spread`: strength of a firing.
    `exclusive`: of a node's children. All [feature].
    """

    parent: Ints
    depth: Ints
    first_child: Ints
    n_children: Ints
    exclusive: npt.NDArray[np.bool_]
    conditional: Floats
    mean: Floats
    spread: Floats

    @cached_property
    def n_roots(self) -> int:
        """Trees; the features 0 … n_roots − 1 are their roots."""
        return int((self.depth == 0).sum())

    @cached_property
    def probability(self) -> Floats:
        """P(feature fires), float64 [feature]: exact, the product of the conditionals down from the root."""
        found = self.conditional.copy()
        for depth in range(1, int(self.depth.max()) + 1):
            at = self.depth == depth
            found[at] *= found[self.parent[at]]
        return found

    @cached_property
    def bounds(self) -> Floats:
        """What a uniform number is compared with, float64 [feature, most children]: exclusive children share one number,
        the i-th fires where it lies between bounds i − 1 and i; free ones have a number each, below their bound."""
        bounds = np.zeros((len(self.parent), max(1, int(self.n_children.max()))))
        for node in np.flatnonzero(self.n_children):
            n = self.n_children[node]
            given = self.conditional[self.first_child[node] : self.first_child[node] + n]
            bounds[node, :n] = np.cumsum(given) if self.exclusive[node] else given
            if self.exclusive[node]:
                bounds[node, n:] = bounds[node, n - 1]
        return bounds


def make_forest(spec: Spec) -> Forest:
    """The features of a spec in order; means of strengths that spread across features are drawn by its seed."""
    deepest = max(len(group.branching) for group in spec.trees)
    counts = np.array([[n_at(group, depth) for group in spec.trees] for depth in range(deepest + 2)])
    start = np.cumsum(np.concatenate([[0], counts.ravel()]))[:-1].reshape(counts.shape)  # [depth, group]
    levels = [
        columns_of(group, depth, above=int(start[depth - 1, g]), below=int(start[depth + 1, g]))
        for depth in range(deepest + 1)
        for g, group in enumerate(spec.trees)
        if counts[depth, g]
    ]
    columns = [np.concatenate(column) for column in zip(*levels)]
    parent, depth, first_child, n_children, exclusive, conditional, mean, spread, across = columns
    z = numpy_rng("truth strengths", spec.seed).standard_normal(len(mean))
    return Forest(
        parent=parent.astype(np.int32),
        depth=depth.astype(np.int32),
        first_child=first_child.astype(np.int32),
        n_children=n_children.astype(np.int32),
        exclusive=exclusive.astype(np.bool_),
        conditional=conditional,
        mean=mean * log_normal(z, across),
        spread=spread,
    )


def n_at(group: Trees, depth: int) -> int:
    """Nodes of a group of trees at a depth."""
    return group.count * group.n_nodes[depth] if depth <= len(group.branching) else 0


def columns_of(group: Trees, depth: int, above: int, below: int) -> tuple[npt.NDArray[np.generic], ...]:
    """The columns of Forest, then spread_across, for one group's nodes at one depth, whose parents begin at feature
    `above` and whose children at `below`."""
    n, deeper = n_at(group, depth), depth < len(group.branching)
    here = np.arange(n)
    siblings = group.branching[depth - 1] if depth else 1
    children = group.branching[depth] if deeper else 0
    return (
        above + here // siblings if depth else np.full(n, -1),
        np.full(n, depth),
        below + here * children if deeper else np.full(n, -1),
        np.full(n, children),
        np.full(n, group.exclusive),
        np.tile(group.children(depth - 1), n // siblings) if depth else np.array(group.roots()),
        np.full(n, group.magnitudes()[depth]),
        np.full(n, group.spread),
        np.full(n, group.spread_across),
    )


def log_normal(z: Floats, spread: Floats) -> Floats:
    """Positive numbers of mean 1 and standard deviation `spread` from standard normal z."""
    variance = np.log1p(spread**2)
    return np.exp(np.sqrt(variance) * z - variance / 2)


def make_directions(spec: Spec) -> npt.NDArray[np.float32]:
    """Unit directions, float32 [feature, d_model], by the spec's seed. Raises UsageError when a coherence is not reached."""
    rng, shape = numpy_rng("truth directions", spec.seed), (spec.n_features, spec.d_model)
    if spec.coherence == 0:
        return np.linalg.qr(rng.standard_normal(shape[::-1]))[0].T.astype(np.float32)
    rows = rng.standard_normal(shape, dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows if spec.coherence == "random" else repelled(rows, spec.coherence)


def repelled(rows: npt.NDArray[np.float32], most: float) -> npt.NDArray[np.float32]:
    """The rows pushed apart until no |cosine| is above `most`. Raises UsageError after STEPS steps."""
    for _ in range(STEPS):
        cosine = rows @ rows.T
        np.fill_diagonal(cosine, 0)
        beyond = np.sign(cosine) * np.maximum(np.abs(cosine) - 0.98 * most, 0)
        if np.abs(cosine).max() <= most:
            return rows
        rows = rows - 0.5 * beyond @ rows
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    raise UsageError(f"coherence = {most:g}: not reached in {STEPS} steps; the largest is {np.abs(cosine).max():.3g}")

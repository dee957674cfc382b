"""Scores of a dictionary against the features that a store's rows were made of, for each level as a dictionary alone.

A feature's latent is the one whose decoder row has the largest |cosine| with its direction. Precision, recall and the
silence of parents compare that latent's firing (z ≠ 0) with the feature's, over all rows of the sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from evaluate.scores.matching import best_matching
from pipeline.base.errors import DamagedError, StoreError
from pipeline.sae.nested import NestedSAE

if TYPE_CHECKING:
    from pipeline.store.reader import Store

FOUND = 0.9
"""|cosine| above which a feature counts as found."""
N_STRATA = 10
"""Groups of equal size, by firing probability, in which the depths of held features are compared."""
N_TREES, N_CHILDREN = 3, 3
"""Trees that are shown feature by feature, and children shown of each feature."""


@runtime_checkable
class Values(Protocol):
    """Integers of one dimension, of which parts are taken: a tensor, or an array that is read as they are."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Any: ...


@dataclass(frozen=True)
class Truth:
    """The features of a store. directions [feature, d_model], unit rows; parent and depth int64, probability float64
    [feature]; what fired on the evaluation split's rows: start [row + 1], feature [firing], whole or read in parts."""

    directions: Float[Tensor, "feature d_model"]
    parent: Int[Tensor, " feature"]
    depth: Int[Tensor, " feature"]
    probability: Float[Tensor, " feature"]
    start: Values
    feature: Values

    @staticmethod
    def read(store: Store, device: torch.device | str) -> Truth:
        """The truth of a store. Raises StoreError when it has none."""
        if "truth/directions" not in store.extras:
            raise StoreError(
                f"{store.where}: holds no truth, so there is nothing to compare with; make a store with "
                "python -m harvest --truth, or leave truth out of --scores"
            )

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(np.array(store.extra(name))).to(device)

        truth = Truth(
            directions=tensor("truth/directions"),
            parent=tensor("truth/parent").long(),
            depth=tensor("truth/depth").long(),
            probability=tensor("truth/probability"),
            start=store.extra_in_parts("eval/truth/start"),
            feature=store.extra_in_parts("eval/truth/feature"),
        )
        if problem := truth.problem():
            raise DamagedError(f"{store.where}: its truth contradicts itself ({problem}); make the store again")
        return truth

    def problem(self) -> str:
        """What of its numbers cannot be: an index out of range, firings that do not follow each other; else nothing."""
        n, m = self.n_features, len(self.feature)
        if bool(((self.parent < -1) | (self.parent >= n)).any()) or bool((self.depth < 0).any()):
            return "a parent or a depth that no feature has"
        if any(bool(((part < 0) | (part >= n)).any()) for part in in_parts(self.feature)):
            return "a firing of a feature that there is not"
        ends = [int(integers(self.start[at : at + 1])[0]) for at in (0, len(self.start) - 1)]
        if ends != [0, m] or any(bool((part.diff() < 0).any()) for part in in_parts(self.start)):
            return "firings that are not row after row"
        if not bool(self.directions.isfinite().all()):
            return "a direction that is not finite"
        return ""

    @property
    def n_features(self) -> int:
        """Features."""
        return len(self.parent)

    @cached_property
    def is_parent(self) -> Bool[Tensor, " feature"]:
        """Which features have children."""
        found = torch.zeros(self.n_features, dtype=torch.bool, device=self.parent.device)
        found[self.parent[self.parent >= 0]] = True
        return found

    def firings(self, first: int, stop: int) -> tuple[Int[Tensor, " firing"], Int[Tensor, " firing"]]:
        """(row − first, feature) of what fired on rows first … stop − 1, by row, then feature."""
        start, device = integers(self.start[first : stop + 1]), self.parent.device
        span = slice(int(start[0]), int(start[-1]))
        rows = torch.repeat_interleave(torch.arange(stop - first, device=start.device), start.diff())
        return rows.to(device), integers(self.feature[span]).to(device)


PART = 1 << 17
"""Values that are looked at at a time."""


def integers(values: Tensor | npt.NDArray[Any]) -> Int[Tensor, " n"]:
    """As int64."""
    return torch.as_tensor(values).long()


def in_parts(values: Values) -> Iterator[Int[Tensor, " n"]]:
    """All of them in order; a part begins with the last of the one before."""
    for first in range(0, len(values), PART):
        yield integers(values[max(first - 1, 0) : first + PART])


class TruthScore:
    """One SAE's counts against the truth, float64, streamed over the rows of the evaluation split."""

    def __init__(self, sae: NestedSAE, truth: Truth) -> None:
        self.sae, self.truth = sae, truth
        device, n, n_levels = sae.W_dec.device, truth.n_features, sae.config.n_levels
        cosine = self.cosine(sae.config.width)
        best = [cosine[:m].max(0) for m in sae.config.levels]
        self.best, self.best_cosine = torch.stack([b.indices for b in best]), torch.stack([b.values for b in best])
        self.n_rows, self.n_firings = 0, 0
        self.latent_on = torch.zeros(sae.config.width, dtype=torch.float64, device=device)
        self.feature_on = torch.zeros(n, dtype=torch.float64, device=device)
        self.both_on = torch.zeros(n_levels, n, dtype=torch.float64, device=device)
        self.with_child = torch.zeros(2, n_levels, dtype=torch.float64, device=device)
        self.without_child = torch.zeros(2, n_levels, dtype=torch.float64, device=device)

    def cosine(self, m: int) -> Float[Tensor, "latent feature"]:
        """|cosine| of the first m decoder rows and the directions: made again when needed, as it is large."""
        rows = torch.nn.functional.normalize(self.sae.W_dec[:m].detach().float(), dim=1)
        return (rows @ self.truth.directions.T).abs_()

    def update(self, z: Float[Tensor, "row latent"], first_row: int) -> None:
        """Add rows first_row … of the split, every one of them."""
        truth, fires = self.truth, z != 0
        rows, features = truth.firings(first_row, first_row + len(z))
        self.n_rows += len(z)
        self.n_firings += len(rows)
        self.latent_on += fires.sum(0).double()
        self.feature_on += torch.bincount(features, minlength=truth.n_features).double()
        parents = truth.parent[features]
        child = parents >= 0
        has_child = torch.zeros(len(z) * truth.n_features, dtype=torch.bool, device=z.device)
        has_child[rows[child] * truth.n_features + parents[child]] = True
        lonely = truth.is_parent[features] & ~has_child[rows * truth.n_features + features]
        for level in range(len(self.best)):
            on = fires[rows, self.best[level][features]]
            self.both_on[level] += torch.bincount(features[on], minlength=truth.n_features).double()
            parent_off = ~fires[rows[child], self.best[level][parents[child]]]
            self.with_child[:, level] += torch.stack([parent_off.sum(), child.sum()]).double()
            self.without_child[:, level] += torch.stack([(lonely & ~on).sum(), lonely.sum()]).double()

    def scores(self, level: int) -> dict[str, float | None]:
        """The scores of one level by metric id; None where nothing fired that they are about."""
        m, best_cosine = self.sae.config.levels[level], self.best_cosine[level]
        cosine = self.cosine(m)
        matched = cosine[best_matching(cosine)]
        both, latent_on, feature_on = self.both_on[level], self.latent_on[self.best[level]], self.feature_on
        seen = feature_on > 0
        claims, own = self.best[level].bincount(minlength=m), cosine.argmax(1)
        return {
            "truth_mcc": float(matched.double().mean()),
            "truth_precision": mean((both / latent_on.clamp(min=1))[seen]),
            "truth_recall": mean((both / feature_on.clamp(min=1))[seen]),
            "truth_f1": mean((2 * both / (latent_on + feature_on).clamp(min=1))[seen]),
            "truth_found": float((best_cosine > FOUND).double().mean()),
            "truth_unique": float((claims == 1).double().mean()),
            "truth_distinct": int((own.bincount() > 0).sum()) / m,
            "truth_parent_silent": share(self.with_child[:, level]),
            "truth_parent_missed": share(self.without_child[:, level]),
            "truth_hedging": hedging(self.sae.W_dec, self.best[level], self.truth),
        }

    def about(self) -> dict[str, Any]:
        """What the scores are over, and which depths of the forest the levels hold."""
        return {
            "n_features": self.truth.n_features,
            "n_rows": self.n_rows,
            "l0": self.n_firings / self.n_rows if self.n_rows else None,
            "n_parent_and_child": int(self.with_child[1, 0]),
            "n_parent_alone": int(self.without_child[1, 0]),
            "depths": depths(self.truth, self.best[-1], self.best_cosine[-1], self.sae.config.levels),
            "trees": [[self.node(feature) for feature in tree] for tree in shown_trees(self.truth)],
        }

    def node(self, feature: int) -> dict[str, Any]:
        """One feature and, in every level alone, its latent: |cosine|, and the share of the feature's rows it is on."""
        on = max(float(self.feature_on[feature]), 1)
        levels = [
            {
                "latent": int(self.best[level, feature]),
                "cosine": float(self.best_cosine[level, feature]),
                "recall": float(self.both_on[level, feature]) / on if self.feature_on[feature] else None,
            }
            for level in range(len(self.best))
        ]
        parent = int(self.truth.parent[feature])
        return {"feature": feature, "parent": parent, "depth": int(self.truth.depth[feature]), "levels": levels}


def mean(values: Float[Tensor, " n"]) -> float | None:
    """The mean, or None of nothing."""
    return float(values.double().mean()) if len(values) else None


def share(counts: Float[Tensor, "2"]) -> float | None:
    """First over second, or None."""
    return float(counts[0] / counts[1]) if counts[1] else None


def hedging(W_dec: Float[Tensor, "latent d_model"], best: Int[Tensor, " feature"], truth: Truth) -> float | None:
    """Mean over pairs of parent and child of the child's part in the decoder row of the parent's latent.

    The row is written as a·parent + Σ b_c·child_c + rest by least squares over the parent and all its children; a child's
    part is b_c / (|a| + Σ|b|), with the sign of a: 0 where the latent is the parent alone, positive where it hedges. None
    when no feature has a child.
    """
    child = (truth.parent >= 0).nonzero()[:, 0]
    parts: list[float] = []
    for parent in truth.is_parent.nonzero()[:, 0].tolist():
        family = torch.cat([torch.tensor([parent], device=child.device), child[truth.parent[child] == parent]])
        basis = truth.directions[family].double()
        weights = torch.linalg.lstsq(basis.T.cpu(), W_dec[best[parent]].double().cpu()[:, None]).solution[:, 0]
        total = weights.abs().sum()
        parts += (weights[1:] * weights[0].sign() / total.clamp(min=1e-300)).tolist()
    return sum(parts) / len(parts) if parts else None


def shown_trees(truth: Truth) -> list[list[int]]:
    """Features of the N_TREES trees with children whose roots fire most: root first, N_CHILDREN of each, depth by depth.

    They are chosen by the truth alone, so that every dictionary shows the same ones.
    """
    parent = truth.parent.cpu().numpy()
    roots = ((truth.parent < 0) & truth.is_parent).nonzero()[:, 0].cpu().numpy()
    probability = truth.probability.cpu().numpy()
    trees = []
    for root in roots[np.argsort(-probability[roots], kind="stable")][:N_TREES]:
        tree, level = [int(root)], [int(root)]
        while level:
            level = [int(child) for one in level for child in np.flatnonzero(parent == one)[:N_CHILDREN]]
            tree += level
        trees.append(tree)
    return trees


def depths(
    truth: Truth, best: Int[Tensor, " feature"], cosine: Float[Tensor, " feature"], levels: Sequence[int]
) -> list[dict[str, Any]]:
    """For every level but the last and every depth of the forest: which share of the found features it holds.

    A feature is found where its latent, in the whole dictionary, has |cosine| above FOUND, and held by a level that has
    that latent. `by_size`: what the level's share of the latents would give; `by_frequency`: the mean, over the depth's
    features, of the share held among all found features of like probability (N_STRATA groups of equal size): what firing
    frequency alone would give. Shares are None where no feature of a depth is found.
    """
    found = (cosine > FOUND).nonzero()[:, 0]
    stratum = strata(truth.probability[found].cpu().numpy())
    rows = []
    for level, m in enumerate(levels[:-1]):
        held = (best[found] < m).double().cpu().numpy()
        expected = np.array([held[stratum == s].mean() for s in stratum]) if len(found) else held
        for depth in range(int(truth.depth.max()) + 1):
            at = (truth.depth[found] == depth).cpu().numpy()
            rows.append(
                {
                    "level": level,
                    "depth": depth,
                    "n": int((truth.depth == depth).sum()),
                    "n_found": int(at.sum()),
                    "held": float(held[at].mean()) if at.any() else None,
                    "by_size": m / levels[-1],
                    "by_frequency": float(expected[at].mean()) if at.any() else None,
                }
            )
    return rows


def strata(probability: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The group of each feature by rank of probability; equal ones are in the same group."""
    if not len(probability):
        return np.empty(0, np.int64)
    ordered = np.sort(probability)
    rank = np.searchsorted(ordered, probability, side="left")
    return rank * N_STRATA // len(ordered)

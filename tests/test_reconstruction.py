"""Reconstruction scores against slow float64 references, by hand, and for any batch size; the sample they are over."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evaluate.scores.behaviour import splice
from evaluate.scores.firing import Firing
from evaluate.scores.reconstruction import SCORES, Reconstruction, row_numbers, spread_in_group
from evaluate.scores.sample import GROUP_SEQUENCES, Batch, GroupMeans, Sample, Survey, group_means, survey
from pipeline.store.reader import Store
from support.reference import reference_reconstruction

CPU = torch.device("cpu")


def sample_of(path: Path, batch_size: int, n_sequences: int = 32) -> Sample:
    return Sample(Store.open(path), n_sequences, batch_size, CPU)


def rebuilt(x: torch.Tensor) -> torch.Tensor:
    """A reconstruction that is a function of the row alone: shrunk, and coarser."""
    return (0.9 * x * 8).round() / 8


def scored(sample: Sample) -> list[dict[str, float | None]]:
    sums, means = Reconstruction(sample.survey()), GroupMeans(sample)
    for batch in sample.batches():
        sums.update(batch, rebuilt(batch.x), spread_in_group(batch, means.of(batch)))
    return sums.scores()


def batch_of(x: torch.Tensor, weights: torch.Tensor | None = None) -> tuple[Batch, Survey]:
    """Rows as one batch of one group, and their survey."""
    n = len(x)
    both = torch.ones(2, n, dtype=torch.float64) if weights is None else torch.stack([torch.ones(n).double(), weights])
    nothing = torch.zeros(n, dtype=torch.int64)
    batch = Batch(
        0, x[:, None], nothing[:, None], torch.ones(n, 1, dtype=torch.bool), x, both, nothing, nothing, torch.arange(n)
    )
    return batch, survey([batch], 1, x.shape[1], CPU)


def kept_rows(store: Store, massive: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept rows of the eval split and their groups, straight from the store."""
    mask = store.eval.kept(None) if massive else store.eval.kept()
    groups = torch.arange(store.eval.n_rows) // (store.context * GROUP_SEQUENCES)
    kept = torch.from_numpy(mask)
    return store.eval.read(0, store.eval.n_rows)[kept].float(), groups[kept]


def test_scores_equal_float64_references(tiny_store: Path) -> None:
    """Every score equals its float64 reference with and without massive rows."""
    found = scored(sample_of(tiny_store, 7))
    for k, massive in enumerate((True, False)):
        x, groups = kept_rows(Store.open(tiny_store), massive)
        expected = reference_reconstruction(x, rebuilt(x), groups)
        assert set(found[k]) == set(SCORES)
        for name, value in expected.items():
            assert found[k][name] == pytest.approx(value, rel=2e-6), name


def test_massive_rows_change_only_the_average(tiny_store: Path) -> None:
    """Massive rows change the average and nothing else."""
    found = sample_of(tiny_store, 16).survey()
    store = Store.open(tiny_store)
    assert found.n_rows.tolist() == [store.eval.kept(None).sum(), store.eval.kept().sum()]
    assert found.n_rows[0] > found.n_rows[1]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_changes_no_score(tiny_store: Path, batch_size: int) -> None:
    """Scores do not depend on the batch size."""
    for one, other in zip(scored(sample_of(tiny_store, batch_size)), scored(sample_of(tiny_store, 16))):
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=1e-6), name


class NoFetch(TorchDispatchMode):
    """Raises where an accelerator would have to be waited for: a value, a mask's places, a histogram's length."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool]
        if name in ("_local_scalar_dense", "nonzero", "bincount") or (name.startswith("index") and masks):
            raise RuntimeError(f"{name} fetches")
        return func(*args, **(kwargs or {}))


def test_a_batch_is_scored_without_fetching(tiny_store: Path) -> None:
    """Kept rows are found once, as the batch is read: splicing, reconstruction and firing wait for nothing."""
    sample = sample_of(tiny_store, 5)
    found, batch = sample.survey(), next(iter(sample.batches()))
    sums, firing = Reconstruction(found), Firing((4, 10), CPU)
    z = torch.randn(len(batch.x), 10, generator=torch.Generator().manual_seed(0)).relu()
    with NoFetch():
        sums.update(batch, rebuilt(batch.x), spread_in_group(batch, group_means([batch], 0, 0)))
        firing.update(z, batch)
        spliced = splice(batch, rebuilt(batch.x))
    with pytest.raises(RuntimeError, match="fetches"), NoFetch():
        spliced[batch.kept]
    assert torch.equal(spliced[batch.kept], rebuilt(batch.x).to(spliced.dtype))
    assert torch.equal(spliced[~batch.kept], batch.residual[~batch.kept])
    assert firing.l0_counts.sum(1).tolist() == [len(batch.x)] * 2


def test_kept_rows_know_their_next_token(tiny_store: Path) -> None:
    """Kept rows are all but the special positions and know their next token."""
    sample, store = sample_of(tiny_store, 5), Store.open(tiny_store)
    batch = list(sample.batches())[1]  # sequences 5 to 9
    rows = store.eval.read(5 * store.context, 10 * store.context).view(5, store.context, -1)
    assert torch.equal(batch.kept, torch.from_numpy(~store.eval.special[5:10]))
    assert torch.equal(batch.x, rows[batch.kept].float())
    assert torch.equal(batch.residual, rows)
    at = batch.kept.nonzero().tolist()
    for row, (i, j) in enumerate(at):
        following = int(store.eval.tokens[5 + i, j + 1]) if j + 1 < store.context else -1
        assert int(batch.targets[row]) == following


def test_hand_computed_reconstruction() -> None:
    """A reconstruction computed by hand has the scores of that computation."""
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-3.0, 0.0]])
    x_hat = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-3.0, 0.0]])  # errors 16, 1, 0; mean (0, 2); spread 13 + 0 + 13
    batch, found = batch_of(x)
    sums = Reconstruction(found)
    sums.update(batch, x_hat, spread_in_group(batch, group_means([batch], 0, 0)))
    scores = sums.scores()[0]
    assert scores["ev"] == pytest.approx(1 - 17 / 26)
    assert scores["mse"] == pytest.approx(17 / 3)
    assert scores["mse_per_dim"] == pytest.approx(17 / 6)
    assert scores["cosine"] == pytest.approx((3 / 5 + 1 + 1) / 3)
    assert scores["l2_ratio"] == pytest.approx((3 / 5 + 1 / 2 + 1) / 3)
    assert scores["relative_reconstruction_bias"] == pytest.approx((9 + 1 + 9) / (9 + 2 + 9))
    s = (25 + 4 + 9) / 3
    assert scores["ev_saebench"] == pytest.approx(1 - 17 / 3 / (s - (s / 2) ** 2))
    assert scores["ev_legacy"] is None  # the second row is its group's mean: a division by zero


def test_perfect_reconstruction_scores_one() -> None:
    """A perfect reconstruction scores one."""
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    batch, found = batch_of(x)
    sums = Reconstruction(found)
    sums.update(batch, x, spread_in_group(batch, group_means([batch], 0, 0)))
    scores = sums.scores()[0]
    for name in ("ev", "ev_legacy", "ev_saebench", "cosine", "l2_ratio", "relative_reconstruction_bias"):
        assert scores[name] == pytest.approx(1), name
    assert scores["mse"] == 0


def test_saebench_definition_depends_on_scale() -> None:
    """The SAEBench definition depends on the scale of x and ours does not."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + 1
    values = []
    for factor in (1.0, 3.0):
        batch, found = batch_of(factor * x)
        sums = Reconstruction(found)
        sums.update(batch, 0.9 * factor * x, spread_in_group(batch, group_means([batch], 0, 0)))
        values.append(sums.scores()[0])
    assert values[0]["ev"] == pytest.approx(values[1]["ev"], rel=1e-6)
    assert abs(values[0]["ev_saebench"] - values[1]["ev_saebench"]) > 0.01  # type: ignore[operator]
    assert values[1]["ev_saebench"] > 1  # type: ignore[operator]


def test_no_rows_undefined_broken_is_nan() -> None:
    """Scores over no rows are undefined and a broken reconstruction is NaN."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    batch, found = batch_of(x, torch.zeros(4, dtype=torch.float64))
    sums = Reconstruction(found)
    sums.update(batch, x * math.nan, spread_in_group(batch, group_means([batch], 0, 0)))
    whole, without = sums.scores()
    assert all(value is None for value in without.values())
    assert all(math.isnan(value) for value in whole.values() if value is not None)


def test_zero_row_is_divided_by_one() -> None:
    """A row of zeros is divided by one as in SAEBench."""
    numbers = row_numbers(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
    assert numbers["l2_ratio"].tolist() == [5.0]
    assert numbers["cosine"].tolist() == [0.0]

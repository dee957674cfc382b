"""Known features: the spec's checks, exact probabilities, and rows as a pure function of position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

from harvest.truth.forest import Forest, make_directions, make_forest
from harvest.truth.rows import BLOCK, Firings, Rows
from harvest.truth.spec import Spec, load_spec, read_spec, shipped
from pipeline.base.errors import UsageError
from pipeline.base.files import hash_config
from pipeline.definitions import SHIPPED_SPECS

GROUP: dict[str, Any] = {"count": 2, "branching": [2, 3], "probability": 0.5, "child_probability": [0.4, 0.3]}
N = 64 * BLOCK


def spec(**changes: Any) -> Spec:
    """Two trees of nine features in sixteen dimensions, and four single features."""
    single = {"count": 4, "branching": [], "probability": [0.1, 0.2, 0.3, 0.4]}
    group = {**GROUP, **changes.pop("group", {})}
    return read_spec({"d_model": 16, "n_features": 22, "trees": [group, single], **changes})


def rows_of(spec: Spec, seed: int = 0) -> Rows:
    return Rows(spec, make_directions(spec), seed)


def dense(fired: Firings, n_features: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Strengths [row, feature]."""
    found = np.zeros((len(fired.start) - 1, n_features), np.float32)
    found[np.repeat(np.arange(len(found)), np.diff(fired.start)), fired.feature] = fired.strength
    return found


def within(found: float, expected: float, n: int) -> bool:
    """Whether a share of n draws is within five standard errors of its probability."""
    return abs(found - expected) <= 5 * (expected * (1 - expected) / n) ** 0.5


def test_parents_and_depths_follow_branching() -> None:
    """Roots come first, then depth by depth; the children of a node stand together."""
    forest = make_forest(spec())
    assert forest.parent.tolist() == [-1] * 6 + [0, 0, 1, 1] + [6] * 3 + [7] * 3 + [8] * 3 + [9] * 3
    assert forest.depth.tolist() == [0] * 6 + [1] * 4 + [2] * 12
    assert forest.first_child[:2].tolist() == [6, 8]
    assert forest.first_child[6:10].tolist() == [10, 13, 16, 19]


def test_probability_is_a_product_of_conditionals() -> None:
    """Hand values: .5, .5 · .4, .5 · .4 · .3; singles as listed."""
    probability = make_forest(spec()).probability
    assert probability[:6].tolist() == [0.5, 0.5, 0.1, 0.2, 0.3, 0.4]
    np.testing.assert_allclose(probability[6:10], 0.2)
    np.testing.assert_allclose(probability[10:], 0.06)


def test_zipf_exponent_falls_with_rank() -> None:
    """The i-th root has p · i^−s."""
    data = {"d_model": 4, "n_features": 3, "trees": [{"count": 3, "branching": [], "probability": 0.6, "zipf": 2}]}
    np.testing.assert_allclose(make_forest(read_spec(data)).probability, [0.6, 0.15, 0.6 / 9])


@pytest.mark.parametrize("exclusive", [False, True])
def test_features_fire_as_often_as_stated(exclusive: bool) -> None:
    """Every feature's share of rows is its exact probability, up to sampling error."""
    s = spec(group={"exclusive": exclusive})
    fired, forest = rows_of(s).firings("train", 0, N), make_forest(s)
    share = np.bincount(fired.feature, minlength=22) / N
    assert all(within(found, p, N) for found, p in zip(share, forest.probability))


def test_children_fire_only_under_parents() -> None:
    """On no row does a child fire without its parent, at any depth."""
    s = spec()
    on, forest = dense(rows_of(s).firings("train", 0, N), 22) > 0, make_forest(s)
    child = forest.parent >= 0
    assert on[:, child].any(0).all()
    assert not (on[:, child] & ~on[:, forest.parent[child]]).any()


def test_exclusive_children_never_share_a_row() -> None:
    """At most one child of a node fires; P(no child | parent) is what is left."""
    on = dense(rows_of(spec(group={"exclusive": True})).firings("train", 0, N), 22) > 0
    assert on[:, [6, 7]].sum(1).max() == 1
    assert on[:, [10, 11, 12]].sum(1).max() == 1
    parent = on[:, 0]
    assert within(float((on[:, [6, 7]].sum(1) == 0)[parent].mean()), 0.2, int(parent.sum()))


def test_free_children_independent_given_parent() -> None:
    """P(both | parent) = .4 · .4."""
    on = dense(rows_of(spec()).firings("train", 0, N), 22) > 0
    parent = on[:, 0]
    assert within(float((on[:, 6] & on[:, 7])[parent].mean()), 0.16, int(parent.sum()))


def test_correlated_roots_follow_the_copula() -> None:
    """P(both roots) is the bivariate normal's, within a block of correlated trees; across blocks the product."""
    s = spec(correlation=0.5, correlated=2)
    on = dense(rows_of(s).firings("train", 0, N), 22) > 0
    quantile = norm.ppf([0.3, 0.4])
    both = multivariate_normal(cov=[[1, 0.5], [0.5, 1]]).cdf(quantile)
    assert both > 1.5 * 0.12
    assert within(float((on[:, 4] & on[:, 5]).mean()), float(both), N)  # the third block: singles of .3 and .4
    assert within(float((on[:, 0] & on[:, 4]).mean()), 0.5 * 0.3, N)
    assert within(float(on[:, 4].mean()), 0.3, N)


def test_strengths_have_their_mean_and_spread() -> None:
    """Log-normal with mean 2 (roots) and 3, spread .25 of it."""
    s = spec(group={"magnitude": [2, 3, 3], "spread": 0.25})
    fired = rows_of(s).firings("train", 0, N)
    root, child = (fired.strength[fired.feature == f] for f in (0, 6))
    assert root.mean() == pytest.approx(2, rel=0.01)
    assert root.std() == pytest.approx(0.5, rel=0.02)
    assert child.mean() == pytest.approx(3, rel=0.01)
    assert root.min() > 0


def test_rows_are_sums_of_their_directions() -> None:
    """Against float64: bias + Σ strength · direction; without noise nothing else."""
    s = spec(bias=0.7, group={"spread": 0.3})
    rows = rows_of(s)
    fired = dense(rows.firings("eval", 0, 500), 22).astype(np.float64)
    expected = rows.bias.double().numpy() + fired @ rows.directions.double().numpy()
    np.testing.assert_allclose(rows.rows("eval", 0, 500).numpy(), expected, rtol=0, atol=1e-5)
    assert float(rows.bias.norm()) == pytest.approx(0.7)


def test_noise_has_its_deviation() -> None:
    """What noise adds is normal, of the standard deviation asked for, and changes no firing."""
    still, noisy = rows_of(spec()), rows_of(spec(noise=0.1))
    assert len(noisy.firings("eval", 0, 100).feature) > 0
    loud = noisy.rows("eval", 0, 4096) - still.bias
    fired = torch.from_numpy(dense(noisy.firings("eval", 0, 4096), 22)) @ noisy.directions
    assert float((loud - fired).std()) == pytest.approx(0.1, rel=0.02)


def test_a_row_depends_on_position_alone() -> None:
    """Any range, across blocks, gives the same bits; another seed and another split give others."""
    rows = rows_of(spec(noise=0.1))
    whole = rows.rows("train", 0, 2 * BLOCK + 100)
    assert torch.equal(rows.rows("train", BLOCK - 3, BLOCK + 9), whole[BLOCK - 3 : BLOCK + 9])
    assert torch.equal(rows.rows("train", 2 * BLOCK + 1, 2 * BLOCK + 100), whole[2 * BLOCK + 1 :])
    assert not torch.equal(rows.rows("eval", 0, 50), whole[:50])
    assert not torch.equal(rows_of(spec(noise=0.1), seed=1).rows("train", 0, 50), whole[:50])
    part = rows.firings("train", BLOCK - 3, BLOCK + 9)
    joined = rows.firings("train", 0, 2 * BLOCK).rows(BLOCK - 3, BLOCK + 9)
    assert part.start.tolist() == joined.start.tolist()
    assert part.feature.tolist() == joined.feature.tolist()


def test_directions_are_unit_and_coherent() -> None:
    """Orthogonal for 0, pushed below the bound for a number, random otherwise."""
    orthogonal, apart, random = (
        make_directions(spec(d_model=24, coherence=c)).astype(np.float64) for c in (0, 0.15, "random")
    )
    for directions in (orthogonal, apart, random):
        np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-6)
    off = ~np.eye(22, dtype=bool)
    assert np.abs(orthogonal @ orthogonal.T)[off].max() < 1e-6
    assert np.abs(apart @ apart.T)[off].max() <= 0.15 + 1e-6
    assert np.abs(random @ random.T)[off].max() > 0.4


@pytest.mark.parametrize("name", shipped())
def test_shipped_specs_are_whole(name: str) -> None:
    """Each reads, and says itself again as plain data."""
    s = load_spec(name)
    assert Spec.from_dict(s.to_dict()) == s
    forest: Forest = make_forest(s)
    assert len(forest.parent) == s.n_features
    assert (forest.probability[forest.parent >= 0] <= forest.probability[forest.parent[forest.parent >= 0]]).all()


def test_shipped_specs_are_called_by_name() -> None:
    """What a report calls a shipped spec goes by the hash that its stores carry for a model."""
    assert {hash_config(load_spec(name).to_dict())[:10]: name for name in shipped()} == SHIPPED_SPECS


def test_rare_parents_and_frequent_leaves() -> None:
    """In `forest` some parents are rarer than most leaves: frequency does not give depth away."""
    forest = make_forest(load_spec("forest"))
    parents, leaves = forest.probability[forest.n_children > 0], forest.probability[forest.depth == 2]
    assert np.quantile(leaves, 0.9) > parents.min()
    assert (forest.probability[forest.depth == 0] < leaves.max()).mean() > 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"group": {"child_probability": [1.2, 0.3]}},
            r"^trees\[0\]\.child_probability\[0\] = 1\.2: .*more often than",
        ),
        (
            {"group": {"exclusive": True, "child_probability": [0.6, 0.3]}},
            r"^trees\[0\]\.child_probability\[0\]: 2 excl",
        ),
        ({"group": {"child_probability": [0.4]}}, r"^trees\[0\]\.child_probability: expected a list of 2"),
        ({"group": {"probability": 1.5}}, r"^trees\[0\]\.probability = 1\.5"),
        ({"group": {"probability": float("nan")}}, r"^trees\[0\]\.probability = nan"),
        ({"group": {"branching": [2, 0]}}, r"^trees\[0\]\.branching\[1\] = 0"),
        ({"group": {"colour": 1}}, r"^trees\[0\]\.colour: not a field"),
        ({"n_features": 0}, r"^n_features = 0: expected a whole number from 1"),
        ({"n_features": 23}, r"^n_features = 23: the trees have 22 nodes"),
        ({"d_model": True}, r"^d_model = True"),
        ({"wings": 2}, r"^wings: not a field"),
        ({"coherence": 0.05}, r"^coherence = 0\.05: 22 directions in 16 dimensions cannot be below"),
        ({"correlation": 0.5}, r"^correlated = 1, correlation = 0\.5"),
        ({"trees": []}, r"^trees: expected at least one"),
    ],
)
def test_impossible_specs_name_their_field(changes: dict[str, Any], message: str) -> None:
    """One line that begins with the field."""
    group = {**GROUP, **changes.pop("group", {})}
    single = {"count": 4, "branching": [], "probability": [0.1, 0.2, 0.3, 0.4]}
    with pytest.raises(UsageError, match=message) as error:
        read_spec({"d_model": 16, "n_features": 22, "trees": [group, single], **changes})
    assert "\n" not in str(error.value)


def test_a_missing_spec_names_the_shipped(tmp_path: Any) -> None:
    """A name that is neither a file nor shipped, and a file that is no TOML."""
    with pytest.raises(UsageError, match=r"--truth bush: no such file, and not one of forest, large, tree"):
        load_spec("bush")
    (tmp_path / "x.toml").write_text("d_model = = 3")
    with pytest.raises(UsageError, match=r"x\.toml: not a TOML file"):
        load_spec(str(tmp_path / "x.toml"))

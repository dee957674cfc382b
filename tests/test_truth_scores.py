"""Scores against known features: hand-computed cases, a slow float64 reference, and what they must not depend on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from evaluate.plan import Sizes, kept, make_plan, sizes
from evaluate.run import EvaluateConfig, run
from evaluate.scores.truth import Truth, TruthScore, depths, hedging, strata
from harvest.truth.run import TruthConfig, run_truth
from pipeline.base import progress
from pipeline.base.errors import UsageError
from pipeline.sae.checkpoint import save_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from pipeline.store.reader import Store
from support.stores import make_store

PARENT = torch.tensor([-1, -1, 0, 0, 1])
"""Two roots; the first with two children, the second with one."""


def truth_of(rows: list[list[int]], d_model: int = 6, directions: Tensor | None = None) -> Truth:
    """Five features along the axes; `rows` name what fires."""
    start = np.cumsum([0, *map(len, rows)])
    return Truth(
        directions=torch.eye(d_model)[:5] if directions is None else directions,
        parent=PARENT,
        depth=(PARENT >= 0).long(),
        probability=torch.full((5,), 0.1, dtype=torch.float64),
        start=torch.from_numpy(start),
        feature=torch.tensor([f for row in rows for f in row], dtype=torch.int64),
    )


def sae_of(W_dec: Tensor, levels: tuple[int, ...] | None = None) -> NestedSAE:
    width, d_model = W_dec.shape
    sae = NestedSAE(SAEConfig(d_model=d_model, width=width, levels=levels or (width,)))
    sae.W_dec.data = W_dec.clone()
    return sae.requires_grad_(False)


def scored(W_dec: Tensor, z: Tensor, truth: Truth, levels: tuple[int, ...] | None = None) -> TruthScore:
    score = TruthScore(sae_of(W_dec, levels), truth)
    for first in range(0, len(z), 2):  # in batches
        score.update(z[first : first + 2], first)
    return score


def test_perfect_dictionary_scores_one() -> None:
    """Latents that are the features, firing where they do."""
    rows = [[0, 2], [0], [1, 4], [0, 3], [], [1]]
    z = torch.zeros(6, 5)
    for i, row in enumerate(rows):
        z[i, row] = 0.5
    found = scored(torch.eye(6)[:5], z, truth_of(rows)).scores(0)
    ones = ("mcc", "f1", "precision", "recall", "found", "unique", "distinct")
    assert {name: found[f"truth_{name}"] for name in ones} == dict.fromkeys(ones, 1.0)
    assert (found["truth_parent_silent"], found["truth_parent_missed"]) == (0.0, 0.0)
    assert found["truth_hedging"] == pytest.approx(0, abs=1e-12)


def test_absorption_is_told_from_misses() -> None:
    """Hand case: the parent's latent is off on 2 of 3 rows with a child and on 1 of 2 rows alone."""
    rows = [[0, 2], [0, 2], [0, 3], [0], [0], [1]]
    z = torch.zeros(6, 5)
    z[2, 0] = z[3, 0] = 1.0
    z[5, 1] = 1.0
    score = scored(torch.eye(6)[:5], z, truth_of(rows))
    assert score.scores(0)["truth_parent_silent"] == pytest.approx(2 / 3)
    assert score.scores(0)["truth_parent_missed"] == pytest.approx(1 / 3)  # root 1 is alone and on too
    assert (score.about()["n_parent_and_child"], score.about()["n_parent_alone"]) == (3, 3)


def test_trees_show_latents_of_each_level() -> None:
    """The tree of the likelier root comes first; latents, cosines and recalls are those of each level alone."""
    truth = truth_of([[0, 2], [0], [1, 4]])
    truth.probability[1] = 0.3
    z = torch.zeros(3, 5)
    z[0, 0] = 1.0
    trees = scored(torch.eye(6)[:5], z, truth, levels=(2, 5)).about()["trees"]
    assert [[node["feature"] for node in tree] for tree in trees] == [[1, 4], [0, 2, 3]]
    root, child = trees[1][0], trees[1][1]
    assert (root["parent"], child["parent"], child["depth"]) == (-1, 0, 1)
    assert root["levels"] == [{"latent": 0, "cosine": 1.0, "recall": 0.5}] * 2
    assert child["levels"][0]["cosine"] == 0.0
    assert child["levels"][1] == {"latent": 2, "cosine": 1.0, "recall": 0.0}
    assert trees[1][2]["levels"][1]["recall"] is None  # it never fired


def test_precision_and_recall_by_hand() -> None:
    """One feature on rows 0–3; its latent on rows 2–4: precision 2/3, recall 1/2, F1 4/7. Others never fire."""
    z = torch.zeros(5, 5)
    z[2:5, 0] = 1.0
    found = scored(torch.eye(6)[:5], z, truth_of([[0], [0], [0], [0], []])).scores(0)
    assert found["truth_precision"] == pytest.approx(2 / 3)
    assert found["truth_recall"] == pytest.approx(1 / 2)
    assert found["truth_f1"] == pytest.approx(4 / 7)


def test_hedging_by_hand() -> None:
    """The first parent's latent holds .6 of it and .3, .1 of its children; the second's only itself: (.3 + .1 + 0) / 3."""
    W_dec = torch.eye(6)[:5].clone()
    W_dec[0] = torch.tensor([0.6, 0, 0.3, 0.1, 0, 0])
    truth = truth_of([[0]])
    best = torch.arange(5)
    assert hedging(W_dec, best, truth) == pytest.approx((0.3 + 0.1) / 3)
    assert hedging(-5 * W_dec, best, truth) == pytest.approx((0.3 + 0.1) / 3)  # sign and length say nothing


def test_hedging_sees_through_overlap() -> None:
    """Directions that overlap: the pure parent's latent still hedges nothing."""
    directions = torch.nn.functional.normalize(torch.randn(5, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    assert hedging(directions, torch.arange(5), truth_of([[0]], directions=directions)) == pytest.approx(0, abs=1e-6)


def test_nothing_fires_gives_no_score() -> None:
    """Rows without a firing leave rates undefined, not zero."""
    found = scored(torch.eye(6)[:5], torch.zeros(2, 5), truth_of([[], []])).scores(0)
    for name in ("precision", "recall", "f1", "parent_silent", "parent_missed"):
        assert found[f"truth_{name}"] is None
    assert found["truth_mcc"] == 1.0


def random_case(seed: int) -> tuple[Tensor, Tensor, Truth]:
    """A random dictionary of 9 latents, random activations and firings where children imply parents."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(5, 6, generator=g), dim=1)
    W_dec = torch.randn(9, 6, generator=g)
    on = torch.rand(60, 5, generator=g) < 0.4
    on[:, 0] |= on[:, 2] | on[:, 3]
    on[:, 1] |= on[:, 4]
    z = torch.rand(60, 9, generator=g) * (torch.rand(60, 9, generator=g) < 0.5)
    rows = [row.nonzero()[:, 0].tolist() for row in on]
    return W_dec, z, truth_of(rows, directions=directions)


def reference(W_dec: Tensor, z: Tensor, truth: Truth) -> dict[str, float]:
    """The definitions, one feature and one row at a time, in float64."""
    W, D = W_dec.double().numpy(), truth.directions.double().numpy()
    cosine = np.abs((W / np.linalg.norm(W, axis=1, keepdims=True)) @ D.T)
    on = np.zeros((len(z), 5), bool)
    for r in range(len(z)):
        on[r, truth.feature[truth.start[r] : truth.start[r + 1]].tolist()] = True
    fires, best = z.numpy() != 0, cosine.argmax(0)
    precision, recall, f1 = [], [], []
    for f in range(5):
        tp = sum(fires[r, best[f]] and on[r, f] for r in range(len(z)))
        n_latent, n_feature = fires[:, best[f]].sum(), on[:, f].sum()
        precision.append(tp / n_latent if n_latent else 0.0)
        recall.append(tp / n_feature)
        f1.append(2 * tp / (n_latent + n_feature))
    silent, missed = [], []
    for r in range(len(z)):
        for p in (0, 1):
            children = [c for c in range(5) if truth.parent[c] == p]
            silent += [not fires[r, best[p]] for c in children if on[r, c]]
            if on[r, p] and not any(on[r, c] for c in children):
                missed.append(not fires[r, best[p]])
    claims = np.bincount(best, minlength=len(W))
    return {
        "mcc": cosine[linear_sum_assignment(cosine, maximize=True)].mean(),
        "precision": np.mean(precision),
        "recall": np.mean(recall),
        "f1": np.mean(f1),
        "found": (cosine.max(0) > 0.9).mean(),
        "unique": (claims == 1).mean(),
        "distinct": len(set(cosine.argmax(1).tolist())) / len(W),
        "parent_silent": np.mean(silent),
        "parent_missed": np.mean(missed),
    }


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_the_slow_reference_s(seed: int) -> None:
    """The whole dictionary, and a level as a dictionary alone."""
    W_dec, z, truth = random_case(seed)
    score = scored(W_dec, z, truth, levels=(4, 9))
    for level, m in enumerate((4, 9)):
        found = score.scores(level)
        for name, expected in reference(W_dec[:m], z[:, :m], truth).items():
            assert found[f"truth_{name}"] == pytest.approx(expected, abs=1e-6), (level, name)


def test_scores_ignore_order_sign_and_unit() -> None:
    """Latents permuted, decoder rows negated or stretched, z in another unit: the same scores."""
    W_dec, z, truth = random_case(7)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    plain = scored(W_dec, z, truth).scores(0)
    for other in (scored(W_dec[order], z[:, order], truth), scored(-3 * W_dec, 0.01 * z, truth)):
        assert other.scores(0) == pytest.approx(plain, abs=1e-6)


def test_depths_by_hand() -> None:
    """Six found features of two depths; level 0 holds the three roots. Frequency says half of each stratum."""
    truth = Truth(
        directions=torch.eye(6),
        parent=torch.tensor([-1, -1, -1, 0, 1, 2]),
        depth=torch.tensor([0, 0, 0, 1, 1, 1]),
        probability=torch.tensor([0.3, 0.2, 0.1, 0.3, 0.2, 0.1], dtype=torch.float64),
        start=torch.zeros(1, dtype=torch.int64),
        feature=torch.zeros(0, dtype=torch.int64),
    )
    found = depths(truth, torch.arange(6), torch.ones(6), (3, 12))
    assert [(row["depth"], row["held"], row["by_size"], row["by_frequency"]) for row in found] == [
        (0, 1.0, 0.25, 0.5),
        (1, 0.0, 0.25, 0.5),
    ]
    nothing = depths(truth, torch.arange(6), torch.zeros(6), (3, 12))
    assert [(row["n_found"], row["held"]) for row in nothing] == [(0, None), (0, None)]


def test_equal_probabilities_share_a_stratum() -> None:
    """Rank groups never cut through ties."""
    assert strata(np.array([0.5] * 7 + [0.1] * 3)).tolist() == [3] * 7 + [0] * 3


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("truth") / "tree.zarr"
    run_truth(TruthConfig("tree", str(path), tokens=4096, eval_tokens=2048, context=16), quiet=True)
    return Store.open(path)


def oracle(store: Store, path: Path) -> Path:
    """A checkpoint whose latents are the features of `tree`, parents and singles shared: orthogonal directions read off."""
    sae = NestedSAE(SAEConfig(d_model=24, width=20, levels=(11, 20)))
    D = torch.from_numpy(np.array(store.extra("truth/directions")))
    sae.W_enc.data, sae.W_dec.data = D.T.clone(), D.clone()
    sae.b_enc.data.fill_(-0.05)
    provenance: dict[str, Any] = {"member": "oracle", "train": {}, "store": {"id": store.id}}
    save_checkpoint(path, sae, step=1, provenance=provenance)
    return path


def test_the_command_scores_a_truth(tree: Store, tmp_path: Path) -> None:
    """End to end: an oracle finds every feature, its shared level all roots and no child; results carry it."""
    place = oracle(tree, tmp_path / "oracle.safetensors")
    scores = ("ev", "l0", "truth", "structure")
    outcome = run(EvaluateConfig(store=tree.path, out=tmp_path / "out", scores=scores), [place])
    assert outcome.failed == []
    data = json.loads(Path(outcome.results[0]["path"]).read_text())
    shared, whole = (level["scores"] for level in data["levels"])
    assert whole["truth_found"] == 1
    assert whole["truth_mcc"] == pytest.approx(1, abs=1e-4)
    assert whole["truth_recall"] > 0.99
    assert whole["truth_parent_silent"] < 0.01
    assert shared["truth_found"] == pytest.approx(11 / 20)
    assert [(row["held"], row["n_found"]) for row in data["truth"]["depths"]] == [(1.0, 11), (0.0, 9)]
    assert data["truth"]["l0"] == pytest.approx(1.255, abs=0.1)
    hierarchy = data["structure"]["hierarchy"]["level"]
    assert hierarchy["containment"] > 0.95
    assert hierarchy["excess"] > 0.5
    assert hierarchy["low"] > 0


def test_structure_says_how_far_it_is(
    tree: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What meta-dictionaries will take is said before, and a line moves while they are fitted: each step of each is counted."""
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    place = oracle(tree, tmp_path / "oracle.safetensors")
    run(EvaluateConfig(store=tree.path, out=tmp_path / "out", scores=("l0", "structure")), [place])
    said = capsys.readouterr().err
    assert "structure, 2 meta-dictionaries: about " in said
    counts = [int(n.replace(",", "")) for n in re.findall(r"meta-dictionaries: \d+ %, ([\d,]+) of 1,800 steps", said)]
    assert counts == [*range(1, 1801), 1800]
    assert said.index("meta-dictionaries: about") < said.index("meta-dictionaries: 0 %")


def test_scores_not_possible_left_out(tree: Store, tmp_path: Path) -> None:
    """kl on a truth is refused in one line before any work, every other score goes on; alone it is an error."""
    place = oracle(tree, tmp_path / "oracle.safetensors")
    outcome = run(EvaluateConfig(store=tree.path, out=tmp_path / "out", scores=("kl", "ev")), [place])
    assert [str(error) for _, error in outcome.failed] == [
        f"--scores kl: {tree.path} was made without a language model, so there is none to splice into"
    ]
    assert len(outcome.results) == 1
    with pytest.raises(UsageError, match="--scores kl"):
        run(EvaluateConfig(store=tree.path, out=tmp_path / "out", scores=("kl",)), [place])


def test_truth_of_model_store_refused(tmp_path: Path) -> None:
    """A store that does not know its features."""
    store = make_store(tmp_path / "s.zarr")
    with pytest.raises(UsageError, match="does not know its features; make one with python -m harvest --truth"):
        run(EvaluateConfig(store=store.path, out=tmp_path / "out", scores=("truth",)), [tmp_path])


def test_other_scores_go_on(tmp_path: Path) -> None:
    """--scores ev,truth on a store that does not know its features: one line about truth, and ev is scored."""
    store = make_store(tmp_path / "acts.zarr", n_sequences=40, eval_sequences=8, context=16, d_model=24)
    sae = NestedSAE(SAEConfig(d_model=24, width=20, levels=(20,)))
    save_checkpoint(
        tmp_path / "one.safetensors", sae, step=1, provenance={"member": "one", "train": {}, "store": {"id": store.id}}
    )
    config = EvaluateConfig(store=store.path, out=tmp_path / "out", scores=("ev", "truth"))
    outcome = run(config, [tmp_path / "one.safetensors"])
    assert ["does not know its features" in str(error) for _, error in outcome.failed] == [True]
    assert "\n" not in str(outcome.failed[0][1])
    scores = json.loads(Path(outcome.results[0]["path"]).read_text())["levels"][0]["scores"]
    assert "ev" in scores
    assert "truth_mcc" not in scores


@pytest.mark.parametrize(("family", "purpose"), [("absorption", "label them by"), ("first_letter", "make words of")])
def test_absorption_needs_a_tokenizer(tree: Store, tmp_path: Path, family: str, purpose: str) -> None:
    """A tokenizer that cannot be found, or rows of no text: refused in one line before any work, ev goes on."""
    place = oracle(tree, tmp_path / "oracle.safetensors")
    outcome = run(EvaluateConfig(store=tree.path, out=tmp_path / "a", scores=("ev", family)), [place])
    assert [f"are of no text, so there is nothing to {purpose}" in str(error) for _, error in outcome.failed] == [True]
    assert len(outcome.results) == 1
    store = make_store(tmp_path / "acts.zarr", n_sequences=40, eval_sequences=8, context=16, d_model=24)
    save_checkpoint(
        tmp_path / "one.safetensors",
        NestedSAE(SAEConfig(d_model=24, width=20, levels=(20,))),
        step=1,
        provenance={"member": "one", "train": {}, "store": {"id": store.id}},
    )
    config = EvaluateConfig(store.path, tmp_path / "b", model=str(tmp_path / "nowhere"), scores=("ev", family))
    outcome = run(config, [tmp_path / "one.safetensors"])
    assert [f"no tokenizer to {purpose}" in str(error) for _, error in outcome.failed] == [True]
    assert "\n" not in str(outcome.failed[0][1])
    assert len(outcome.results) == 1


def test_plan_counts_what_scores_keep() -> None:
    """By hand: each family adds its arrays; a plan with them needs more than the limit that holds without."""
    sae = SAEConfig(d_model=24, width=1000, levels=(200, 1000), activation="batchtopk", k=10)
    nothing = kept(("ev", "l0"), [sae], 24, 16, 1600, 0)
    assert nothing == Sizes(0, 0, 0, 0)
    truth = kept(("truth",), [sae], 24, 16, 1600, 50)
    assert truth.fixed == 50 * (24 * 4 + 40) + 2 * (3 * 2**20 + 32) + 3 * 1000 * 50 * 4
    assert truth.sequence == 16 * (50 + 1000 + 16 + 20 * 5)
    assert truth.checkpoint == 2 * 50 * 20
    assert kept(("structure",), [sae], 24, 16, 1600, 0).checkpoint == 16 * 1600 * 10
    assert kept(("absorption",), [sae], 24, 16, 100_000, 0).checkpoint == 20 * 40_000 * 10
    words = kept(("first_letter",), [sae], 24, 16, 1600, 0, 500)
    assert words.fixed == 500 * (3 * 24 * 4 + 31 + 17) + 44 * 500 * 10 + 3 * 4 * 2**22
    without, with_truth = (sizes([sae], None, 24, 16, 100, 0, more) for more in (nothing, truth))
    limit = without.peak(1, 64, 1)
    assert make_plan(without, 1, 1, 16, 0, limit, "cpu").group == 1
    with pytest.raises(UsageError, match="raise --max-memory"):
        make_plan(with_truth, 1, 1, 16, 0, limit, "cpu")

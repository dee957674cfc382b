"""Absorption from the store alone: labels, probes, the published definitions by hand, and a dictionary that absorbs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from evaluate.scores.absorption import (
    AbsorptionScore,
    Asked,
    absorbed,
    average,
    probe_f1,
    probe_logits,
    split_latents,
)
from evaluate.scores.labels import (
    CLASSES,
    LABELS,
    PER_TYPE,
    TRAIN_SHARE,
    Labelled,
    Probes,
    best_threshold,
    f1_score,
    fit_logistic,
    label_rows,
    labels_of,
    train_probes,
)
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE


def said(text: str) -> dict[str, int]:
    return {name: value for name, value in zip(LABELS, labels_of(text)) if value != -1}


def test_letters_are_asked_of_word_starts() -> None:
    """A space and a letter; case does not matter; anything else asks no letter."""
    assert {name for name, value in said(" Apple").items() if value} == {"a", "word start", "capitalised"}
    assert set(said("apple")) == set(CLASSES)
    assert set(said(" 7")) == set(CLASSES)
    assert said(" zoo")["a"] == 0


@pytest.mark.parametrize(
    ("text", "label"),
    [("42", "digit"), (" ,", "punctuation"), ("↵↵", "whitespace"), (" ", "whitespace"), ("X", "capitalised")],
)
def test_classes_of_characters(text: str, label: str) -> None:
    """Each sample text is of one class."""
    assert [name for name in CLASSES if said(text)[name]] == [label]


def test_rows_are_split_by_type() -> None:
    """No token type is in both parts, none has more than PER_TYPE rows, special rows are left out."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (40, 32)).astype(np.int32)
    kept = np.ones_like(tokens, dtype=bool)
    kept[:, 0] = False
    rows = label_rows([(tokens, kept)], lambda token: f" {'abcde'[token % 5]}{token}", 0)
    assert np.bincount(rows.type).max() == PER_TYPE
    assert (rows.position % 32 != 0).all()
    assert (np.diff(rows.position) > 0).all()
    assert not set(rows.type[rows.train]) & set(rows.type[~rows.train])
    assert len(set(rows.type[rows.train])) == round(TRAIN_SHARE * 50)
    assert (rows.type == tokens.reshape(-1)[rows.position]).all()


def test_labels_without_probe_are_named() -> None:
    """Letters that rows show are found on unseen types; one that rows do not show is left out with its F1."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 120, (60, 32), generator=g).numpy().astype(np.int32)
    text = lambda token: f" {'abcde'[token % 5]}{token}"  # noqa: E731
    rows = label_rows([(tokens, np.ones_like(tokens, dtype=bool))], text, 0)
    x = 0.3 * torch.randn(len(rows.type), 8, generator=g)
    x[:, 0] += torch.from_numpy((rows.type % 5 == 0).astype(np.float32))
    probes = train_probes(x, rows)
    assert "a" in probes.names
    assert probes.left_out["z"] == "0 token types to train on and 0 to test on"
    assert "F1 of" in probes.left_out["b"]
    a = probes.names.index("a")
    assert float(torch.nn.functional.normalize(probes.weight[a], dim=0)[0]) > 0.95


def test_label_of_all_is_left_out() -> None:
    """Where every token begins a word there is nothing to tell starts of words from: named, no probe, no crash."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 60, (30, 32), generator=g).numpy().astype(np.int32)
    rows = label_rows([(tokens, np.ones_like(tokens, dtype=bool))], lambda token: f" {'ab'[token % 2]}{token}", 0)
    probes = train_probes(torch.randn(len(rows.type), 8, generator=g), rows)
    assert probes.left_out["word start"] == "no token types without it to train on"
    assert "word start" not in probes.names


def test_one_token_has_no_probe() -> None:
    """Rows of one token have no probe, and every label is named with the reason."""
    rows = label_rows([(np.zeros((4, 8), np.int32), np.ones((4, 8), dtype=bool))], lambda _: " word", 0)
    probes = train_probes(torch.randn(len(rows.type), 8), rows)
    assert probes.names == ()
    assert probes.left_out.keys() == set(LABELS)


def test_silent_rows_count_as_one() -> None:
    """Logits of probes on latents that rarely fire are those of all rows with balanced classes, one row each; so is the F1."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    y, y_test = rng.random(3000) < 0.1, rng.random(1000) < 0.1
    fit, test = (
        ((rng.random((len(part), 2)) < 0.02 + 0.5 * part[:, None]) * rng.random((len(part), 2))).astype(np.float32)
        for part in (y, y_test)
    )
    spread = fit.std(0)
    model = LogisticRegression(class_weight="balanced", max_iter=200, tol=1e-8).fit(fit / spread, y)
    slow = [model.decision_function(part / spread) for part in (fit, test)]
    logit, logit_test, quiet = probe_logits(fit, test, y)
    np.testing.assert_allclose(logit, slow[0], atol=0.01)
    np.testing.assert_allclose(logit_test, slow[1], atol=0.01)
    assert quiet == pytest.approx(float(model.intercept_[0]), abs=0.01)
    assert quiet < -0.5
    cut = max(best_threshold(torch.from_numpy(slow[0]), torch.from_numpy(y)), quiet)
    wanted = f1_score(torch.from_numpy(slow[1]) > cut, torch.from_numpy(y_test))
    assert 0.5 < wanted < 0.95
    assert probe_f1(fit, test, y, y_test) == pytest.approx(wanted, abs=0.01)


def test_encoded_rows_have_their_centre() -> None:
    """What an SAE is asked to encode are the rows themselves, however far from 0 their centre: in chunks, as it encodes them."""
    g = torch.Generator().manual_seed(0)
    x, center = torch.randn(50, 6, generator=g), 10 * torch.randn(6, generator=g)
    sae = NestedSAE(SAEConfig(d_model=6, width=12, levels=(12,)))
    sae.W_enc.data = torch.randn(6, 12, generator=g)
    at = np.arange(50)
    rows = Labelled(at, at, np.full((50, len(LABELS)), -1, np.int8), at < 30, "words", ())
    probes = Probes((), torch.zeros(0, 6), torch.zeros(0), (), {}, rows, x)
    score = AbsorptionScore(sae.requires_grad_(False), probes)
    score.encode(center)
    z = torch.zeros(50, 12)
    z[np.concatenate(score.rows), np.concatenate(score.latents)] = torch.from_numpy(np.concatenate(score.values))
    wanted = sae.encode(x + center)
    torch.testing.assert_close(z, wanted)
    assert 0.2 < float((wanted > 0).float().mean()) < 0.8
    assert not torch.allclose(wanted, sae.encode(x))


def test_logistic_fit_is_sklearn_s() -> None:
    """Same objective, same optimum: C = 1 / (n · penalty) in units of the rows' scale."""
    from sklearn.linear_model import LogisticRegression

    from evaluate.scores.labels import PENALTY

    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=g)
    y = (x[:, 0] + torch.randn(300, generator=g) > 0).long()
    weight, bias = fit_logistic(x, y[:, None])
    scale = float(x.square().mean().sqrt())
    model = LogisticRegression(C=1 / (300 * PENALTY), tol=1e-8).fit((x / scale).numpy(), y.numpy())
    np.testing.assert_allclose(weight[0].numpy() * scale, model.coef_[0], atol=2e-3)
    assert float(bias[0]) == pytest.approx(float(model.intercept_[0]), abs=2e-3)


def test_the_cut_has_the_best_f1() -> None:
    """Against every possible cut; never between equal values."""
    g = torch.Generator().manual_seed(3)
    logit = (torch.randn(40, generator=g) * 4).round() / 4
    is_one = logit + torch.randn(40, generator=g) > 0.3
    best = max(f1_score(logit > cut, is_one) for cut in [-9.0, *logit.tolist()])
    assert f1_score(logit > best_threshold(logit, is_one), is_one) == pytest.approx(best)


def test_absorption_by_hand() -> None:
    """Four rows: own latent fires; silent and one other carries .5; silent and the other carries .3; both share."""
    cosine = torch.tensor([0.9, 0.5, 0.05])
    z = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.6, 0.0], [0.2, 1.0, 0.0]])
    found = absorbed(csr_matrix(z.numpy()), torch.ones(4), cosine, [0])
    assert found.full.tolist() == [False, True, False, False]
    assert found.fraction.tolist() == pytest.approx([0.0, 1.0, 0.0, 0.5 / 0.68])


def test_weak_alignment_is_no_absorption() -> None:
    """Cosine under .025: not full; under .1: no absorber of the fraction."""
    found = absorbed(csr_matrix([[0.0, 50.0]]), torch.ones(1), torch.tensor([0.9, 0.02]), [0])
    assert (found.full.tolist(), found.fraction.tolist()) == ([False], [0.0])


def dense(z: Tensor, projection: Tensor, cosine: Tensor, main: list[int]) -> tuple[Tensor, Tensor]:
    """Full absorption and fraction over all latents, firing or not, in float64, row by row."""
    full, fraction = [], []
    for values, along in zip(z.double(), projection.double()):
        carried = values * cosine.double()
        top = int(carried.argmax())
        is_full = bool((values[main] < 1e-8).all()) and float(cosine[top]) >= 0.025 and float(along) >= 0
        full.append(is_full and float(carried[top] / along) >= 0.4)
        own = float(carried[main].sum())
        others = [float(carried[i]) for i in range(len(carried)) if i not in main and cosine[i] >= 0.1]
        taken = sum(sorted((max(x, 0) for x in others), reverse=True)[:3])
        part = min(taken, float(along) - own)
        share = 1.0 if own <= 0 else min(1.0, max(0.0, part / (part + own)))
        fraction.append(0.0 if own >= along or taken / along < 0.4 else share)
    return torch.tensor(full), torch.tensor(fraction)


def test_silent_latents_change_nothing() -> None:
    """Random sparse codes, negative cosines and projections, empty rows among them: equal to a slow count over all."""
    g = torch.Generator().manual_seed(3)
    cosine = torch.randn(30, generator=g) / 4
    z = torch.rand(400, 30, generator=g) * (torch.rand(400, 30, generator=g) < 0.15) * 3
    z[:5] = 0
    projection = z @ cosine + torch.randn(400, generator=g) / 4
    found = absorbed(csr_matrix(z.numpy()), projection, cosine, [2, 7])
    full, fraction = dense(z, projection, cosine, [2, 7])
    assert found.full.tolist() == full.tolist()
    assert 10 < int(full.sum()) < 390
    assert torch.allclose(found.fraction.double(), fraction.double(), atol=1e-5)


def split(z: np.ndarray, label: np.ndarray) -> tuple[list[int], list[float]]:
    """Latents of a label that is asked of every row, every second row to train on."""
    train = np.arange(len(z)) % 2 == 0
    return split_latents(Asked.of(csr_matrix(z), label >= 0, train), label)


def test_split_latents_add_f1() -> None:
    """A label carried by two latents on different rows has both; a third that repeats the first adds nothing."""
    rng = np.random.default_rng(0)
    label = (rng.random(2000) < 0.4).astype(np.int8)
    half = rng.random(2000) < 0.5
    z = np.stack([label * half, label * ~half, label * half * 0.5, rng.random(2000) < 0.3], 1).astype(np.float32)
    latents, f1s = split(z, label)
    assert len(latents) == 2
    assert 1 in latents
    assert f1s[-1] == pytest.approx(1.0)
    assert f1s[0] < 0.8


def test_silent_latent_has_no_f1() -> None:
    """Saying yes where nothing fires does not count, however frequent the label."""
    label = (np.arange(200) % 4 != 0).astype(np.int8)
    latents, f1s = split(np.zeros((200, 3), np.float32), label)
    assert (len(latents), f1s) == (1, [0.0])


def test_averages_count_labels_with_rows() -> None:
    """A label without rows is left out; nothing gives None."""
    one = {"label": "a", "n": 10, "latents": [1, 2], "full": 0.5, "fraction": 0.2, "f1": 0.8, "recall": 0.9}
    none = {**one, "n": 0, "full": None, "fraction": None, "recall": None}
    assert average([one, none])["full"]["value"] == 0.5
    assert average([one, none])["n_labels"] == 1
    assert average([none])["full"] == {"value": None, "low": None, "high": None}

"""Targeted probe perturbation: a case by hand, and the long way for every ablated and tested class."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluate.probing.ablation import ranking
from evaluate.probing.tasks import Contrast
from evaluate.probing.tpp import one_seed, tpp_scores
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from support.probing_cases import bank_of, one_ablation, padded_texts, random_draw, random_probes, random_sae
from support.reference import reference_pool_ablated, reference_tpp


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_equal_the_long_way(seed: int) -> None:
    """Scores equal the long way at every level and n."""
    sae = random_sae(seed)
    padded, n_real = padded_texts(180, seed)
    draw = random_draw(("a", "b", "c"), 100, 80, seed)
    probes = random_probes(draw, seed)
    found = tpp_scores([one_ablation(sae, bank_of(padded, n_real), draw, probes)], {0: 10, 1: 40}, (2, 5, 20, 500))
    assert {(level, n) for _, level, n in found} == {(0, 2), (0, 5), (1, 2), (1, 5), (1, 20)}
    for (metric, level, n), values in found.items():
        expected = reference_tpp(sae, padded, n_real, draw, probes, sae.config.levels[level], n)
        assert values == [pytest.approx(expected[metric], abs=1e-9)], (metric, level, n)


def one_latent_a_class() -> tuple[NestedSAE, object]:
    """Three classes, each an axis that its texts have and others lack; a latent and a probe read each."""
    classes = np.repeat(np.arange(3), 10)
    x = torch.eye(3)[torch.from_numpy(classes)] + 0.1
    sae = NestedSAE(SAEConfig(3, 3, (3,)))
    sae.W_enc.data, sae.W_dec.data = torch.eye(3), torch.eye(3)
    draw = {}
    for c in range(3):
        contrast = Contrast(np.flatnonzero(classes == c), np.flatnonzero(classes != c)[:10])
        draw[str(c)] = (contrast, contrast)
    probes = {str(c): (torch.eye(3)[c], torch.tensor(-0.5)) for c in range(3)}
    bank = bank_of(x[:, None], torch.ones(30, dtype=torch.long))
    return sae.requires_grad_(False), one_ablation(sae.requires_grad_(False), bank, draw, probes)


def test_latent_hits_only_its_probe() -> None:
    """One latent a class hits its own probe and no other."""
    _, seed = one_latent_a_class()
    scores = one_seed(seed, 3, [1])
    assert scores["tpp_intended"].tolist() == [0.5]  # 1.0 → 0.5: positives are lost
    assert scores["tpp_unintended"].tolist() == [0.0]
    assert scores["tpp"].tolist() == [0.5]


def test_less_firing_latents_are_not_chosen() -> None:
    """Latents that fire less on a class are not chosen for it."""
    _, seed = one_latent_a_class()
    effects = seed.effects("0", signed=True)
    assert (effects > 0).tolist() == [True, False, False]
    assert (effects[1:] == 0).all()


def test_ties_follow_dictionary_order() -> None:
    """Latents of equal effect are taken in the order of the dictionary."""
    assert ranking(torch.tensor([0.0, 2, 0, -1, 2, 0]), 5).tolist() == [1, 4, 0, 2, 5]


def test_shortcut_agrees_on_topk() -> None:
    """The long way and the shortcut agree on a TopK code."""
    sae = random_sae(activation="topk", k=5)
    padded, n_real = padded_texts(12)
    whole = reference_pool_ablated(sae, padded, n_real, [])
    torch.testing.assert_close(whole, padded.double().sum(1) / n_real[:, None])

"""Spurious correlation removal: the one-encode shortcut against the long way, a case by hand, the missing key."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from evaluate.probing.ablation import ranking
from evaluate.probing.probes import ProbedTexts
from evaluate.probing.scr import one_seed, removed_share, reported, scr_scores
from evaluate.probing.tasks import Contrast
from evaluate.probing.texts import pool_all, raw_decoder
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from support.probing_cases import bank_of, one_ablation, padded_texts, random_draw, random_probes, random_sae
from support.reference import reference_pool_ablated, reference_scr

NAMES = ("second", "first", "both")
KINDS = [
    {},
    {"layernorm": "pre"},
    {"activation": "topk", "k": 6},
    {"activation": "jumprelu"},
    {"activation": "batchtopk", "k": 6},
]


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_modified_mean_equals_ablating_everywhere(fields: dict[str, object]) -> None:
    """The modified mean equals ablating at every position and pooling."""
    sae = random_sae(**fields)
    padded, n_real = padded_texts(20)
    latents = [0, 3, 4, 11, 25, 39]
    long_way = reference_pool_ablated(sae, padded, n_real, latents)
    bank = bank_of(padded, n_real)
    pooled = pool_all([sae], bank)[0]
    removed = pooled.over_all_positions(torch.arange(20), torch.tensor(latents)) @ raw_decoder(sae)[latents]
    torch.testing.assert_close((bank.mean - removed).double(), long_way, rtol=1e-5, atol=1e-5)


def test_masked_positions_count_as_zeros() -> None:
    """Masked positions contribute the latents of the zero vector."""
    sae = random_sae()
    padded, n_real = padded_texts(20)
    pooled = pool_all([sae], bank_of(padded, n_real))[0]
    assert (pooled.at_zero > 0).any()
    long_way = sae.encode(padded).sum(1) / n_real[:, None]
    torch.testing.assert_close(
        pooled.over_all_positions(torch.arange(20), torch.arange(40)), long_way, rtol=1e-5, atol=1e-6
    )
    real_only = (sae.encode(padded) * (padded != 0).any(-1)[..., None]).sum(1) / n_real[:, None]
    torch.testing.assert_close(pooled.mean, real_only, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", KINDS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_equal_the_long_way(fields: dict[str, object], seed: int) -> None:
    """Scores equal the long way at every level and n."""
    sae = random_sae(seed, **fields)
    padded, n_real = padded_texts(160, seed)
    draw = random_draw(NAMES, 100, 60, seed)
    probes = random_probes(draw, seed)
    found = scr_scores([one_ablation(sae, bank_of(padded, n_real), draw, probes)], {0: 10, 1: 40}, (2, 5, 10, 20, 500))
    assert {(level, n) for _, level, n in found} == {(0, 2), (0, 5), (0, 10), (1, 2), (1, 5), (1, 10), (1, 20)}
    for level, n_latents in ((0, 10), (1, 40)):
        for n in (2, 5, 10, 20):
            if n <= n_latents:
                expected = reference_scr(sae, padded, n_real, draw, probes, n_latents, n)
                for metric, value in expected.items():
                    assert found[metric, level, n] == [pytest.approx(value, abs=1e-9)], (metric, level, n)


def hand_case() -> tuple[NestedSAE, object]:
    """Dimension 0 carries the attribute of interest, dimension 1 the spurious one, stronger; latents read ±each.

    Rows are (first, second) signs; the "both" probe leans on dimension 1. Latents 0, 1 are of the first attribute, 2 and 3
    of the second, 4 and 5 of nothing.
    """
    signs = [(1, 1), (1, -1), (-1, 1), (-1, -1)] * 10
    x = torch.tensor([[0.5 * a, 1.0 * b, 0.3] for a, b in signs])
    sae = NestedSAE(SAEConfig(3, 6, (6,)))
    axes = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    sae.W_enc.data, sae.W_dec.data = axes.T.clone(), axes.clone()
    sae.scale.fill_(2.0)
    a, b = (np.array([s[i] for s in signs]) for i in (0, 1))
    contrasts = {"second": (b > 0, b < 0), "first": (a > 0, a < 0), "both": ((a > 0) & (b > 0), (a < 0) & (b < 0))}
    draw = {name: (Contrast(*map(np.flatnonzero, pair)),) * 2 for name, pair in contrasts.items()}
    probes = {
        "second": (torch.tensor([0.0, 1, 0]), torch.zeros(())),
        "first": (torch.tensor([1.0, 0, 0]), torch.zeros(())),
        "both": (torch.tensor([1.0, 1, 0]), torch.zeros(())),
    }
    return sae.requires_grad_(False), one_ablation(
        sae, bank_of(x[:, None], torch.ones(40, dtype=torch.long)), draw, probes
    )


def test_ablation_removes_the_spurious_attribute() -> None:
    """Ablating the latents that carry the spurious attribute removes it."""
    _, seed = hand_case()
    assert seed.texts.accuracy("both", "first") == 0.5  # dimension 1 decides
    assert seed.texts.accuracy("both", "second") == 1.0
    effects = seed.effects("second", signed=False)
    assert ranking(effects, 2).sort().values.tolist() == [2, 3]
    scores = one_seed(seed, 6, [2, 5])
    assert scores["scr_dir1"] == [1.0, 1.0]
    assert scores["scr_dir2"] == [0.0, 0.0]  # the biased probe is as good as the clean one: nothing to remove
    assert scores["scr"] == [1.0, 1.0]  # direction 1: 0.5 < 1.0


def test_only_effective_latents_are_ablated() -> None:
    """More latents than have an effect ablate only those that have."""
    _, seed = hand_case()
    effects = seed.effects("second", signed=False)
    assert int(effects.count_nonzero()) == 2
    after = seed.accuracy_ablated("both", "first", effects, [1, 2, 6])
    assert after[1:] == [1.0, 1.0]


def test_no_effect_keeps_the_accuracy() -> None:
    """No effect at all leaves the accuracy as it was."""
    _, seed = hand_case()
    assert seed.accuracy_ablated("both", "first", torch.zeros(6), [2, 5]) == [0.5, 0.5]


def test_equal_accuracies_give_no_score() -> None:
    """Equal accuracies of both directions give no reported score."""
    assert reported([0.75, 0.75], [[0.1], [0.2]]) == [None]
    assert reported([0.5, 0.75], [[0.1], [0.2]]) == [0.1]
    assert reported([0.75, 0.5], [[0.1], [0.2]]) == [0.2]
    _, seed = hand_case()
    equal = ProbedTexts(
        seed.texts.draw, seed.texts.mean_x, seed.texts.probes | {"both": (torch.tensor([0.0, 0, 1]), torch.zeros(()))}
    )
    scores = one_seed(dataclasses.replace(seed, texts=equal), 6, [2])
    assert scores["scr"] == [None]
    assert None not in scores["scr_dir1"]


def test_tiny_gap_scores_zero() -> None:
    """A gap below a thousandth scores zero."""
    assert removed_share(0.9, 0.5, 0.9005) == 0.0
    assert removed_share(0.9, 0.5, 0.8) == 0.0
    assert removed_share(0.5, 0.6, 0.9) == pytest.approx(0.25)
    assert removed_share(0.5, 0.4, 0.9) == pytest.approx(-0.25)


def test_sae_scale_changes_no_ablation() -> None:
    """The scale of the SAE does not change what ablation removes."""
    sae = random_sae()
    padded, n_real = padded_texts(120)
    draw = random_draw(NAMES, 80, 40)
    probes = random_probes(draw)
    same = random_sae()
    same.scale.mul_(3.0)
    same.W_enc.data /= 3.0
    same.W_dec.data *= 3.0
    same.b_enc.data += sae.b_dec @ (same.W_enc - sae.W_enc)
    bank = bank_of(padded, n_real)
    first, second = (scr_scores([one_ablation(s, bank, draw, probes)], {0: 40}, (2, 20)) for s in (sae, same))
    assert first == {key: pytest.approx(value) for key, value in second.items()}

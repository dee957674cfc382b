"""How latents fire and what they are like: by hand, against slow references, and streamed in any batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from evaluate.scores import features
from evaluate.scores.coding import SparseCoding
from evaluate.scores.features import Correlation, density_features, geometry, nearest, utilisation
from evaluate.scores.firing import Firing
from evaluate.scores.sample import Batch, Survey, survey
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from support.reference import reference_firing, reference_sparse_coding

CPU = torch.device("cpu")


def batches_of(x: torch.Tensor, sizes: Sequence[int], massive: torch.Tensor | None = None) -> list[Batch]:
    """Rows as kept rows of batches, all of one group; `massive` [row] do not count in the second weighting."""
    normal = torch.ones(len(x), dtype=torch.float64) if massive is None else (~massive).double()
    found, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        nothing = torch.zeros(size, dtype=torch.int64)
        weights = torch.stack([torch.ones(size, dtype=torch.float64), normal[rows]])
        kept = torch.ones(size, 1, dtype=torch.bool)
        found.append(
            Batch(start, x[rows, None], nothing[:, None], kept, x[rows], weights, nothing, nothing, torch.arange(size))
        )
        start += size
    return found


def survey_of(batches: list[Batch]) -> Survey:
    return survey(batches, 1, batches[0].x.shape[1], CPU)


def sparse_latents(n_rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Latents [row latent] of which one in five fires; latent 3 never does."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(n_rows, width, generator=generator) * (torch.rand(n_rows, width, generator=generator) < 0.2)
    z[:, 3] = 0
    return z


def fired(
    z: torch.Tensor, levels: tuple[int, ...], massive: torch.Tensor | None = None, sizes: Sequence[int] = ()
) -> Firing:
    firing, start = Firing(levels, CPU), 0
    for batch in batches_of(torch.zeros(len(z), 2), sizes or [len(z)], massive):
        firing.update(z[start : start + len(batch.x)], batch)
        start += len(batch.x)
    return firing


def test_l0_l1_dead_equal_the_reference() -> None:
    """L0, L1 and dead latents equal the reference at every level."""
    z, massive = sparse_latents(50, 20), torch.arange(50) % 9 == 0
    firing = fired(z, (6, 20), massive, [20, 1, 29])
    for level, m in enumerate((6, 20)):
        whole, without = firing.scores(level)
        assert whole == pytest.approx(reference_firing(z[:, :m]), rel=1e-6)
        assert without == pytest.approx(reference_firing(z[~massive, :m]), rel=1e-6)


def test_l0_quantiles_are_of_sorted_counts() -> None:
    """L0 quantiles are those of the sorted counts."""
    z = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]])
    quantiles = fired(z, (3,)).l0_quantiles(0)
    assert quantiles == {"0": 0, "0.05": 0, "0.25": 0, "0.5": 1, "0.75": 2, "0.95": 3, "1": 3}


def test_negative_latents_fire_too() -> None:
    """Negative latents fire too."""
    scores = fired(torch.tensor([[-1.0, 0.0]]), (2,)).scores(0)[0]
    assert (scores["l0"], scores["l1"], scores["dead"]) == (1, 1, 0.5)


def test_silent_latents_give_zeros() -> None:
    """No latent firing gives zeros and no utilisation."""
    config = SAEConfig(d_model=2, width=4, levels=(2, 4))
    found = density_features(config, fired(torch.zeros(5, 4), (2, 4)))
    assert fired(torch.zeros(5, 4), (2, 4)).scores(1)[0]["dead"] == 1
    assert found["density"]["never"] == {"shared": 2, "specialised": 2}
    assert sum(found["density"]["shared"]) == 0
    assert found["utilisation"]["shared"]["entropy"] is None
    assert found["utilisation"]["shared"]["gini"] is None


def test_densities_land_in_log_bins() -> None:
    """Densities land in the bins of their logarithm."""
    z = torch.zeros(1000, 4)
    z[:, 0] = 1  # log10 0
    z[:100, 1] = 1  # -1
    z[:2, 2] = 1  # -2.7
    found = density_features(SAEConfig(d_model=2, width=4, levels=(4,)), fired(z, (4,)))["density"]
    assert "shared" not in found
    assert found["never"] == {"specialised": 1}
    bins = {round(found["edges"][i], 2): n for i, n in enumerate(found["specialised"]) if n}
    assert bins == {-0.25: 1, -1.0: 1, -2.75: 1}


def test_entropy_runs_from_even_to_single() -> None:
    """Even use has full entropy and one latent doing all has none."""
    even = utilisation(torch.full((8,), 0.05, dtype=torch.float64))
    assert (even["entropy"], even["gini"]) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert (even["freq_over_1_percent"], even["mass_over_1_percent"], even["freq_over_10_percent"]) == (
        1,
        pytest.approx(1),
        0,
    )
    one = utilisation(torch.tensor([0.0, 0, 0, 0.5], dtype=torch.float64))
    assert (one["entropy"], one["gini"]) == (pytest.approx(0, abs=1e-12), pytest.approx(0.75))
    assert (one["freq_over_10_percent"], one["mass_over_10_percent"]) == (0.25, 1)


def test_gini_equals_mean_pair_difference() -> None:
    """Gini equals the mean difference of all pairs."""
    density = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = (density[:, None] - density).abs().mean() / (2 * density.mean())
    assert utilisation(density)["gini"] == pytest.approx(float(pairs))


def random_sae(d_model: int = 12, levels: tuple[int, ...] = (10, 40), seed: int = 0) -> NestedSAE:
    sae = NestedSAE(SAEConfig(d_model=d_model, width=levels[-1], levels=levels)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    sae.center, sae.scale = torch.randn(d_model, generator=generator), torch.tensor(0.5)
    return sae


def test_geometry_equals_single_cosines() -> None:
    """Geometry equals cosines taken one by one."""
    sae = random_sae()
    found = geometry(sae)
    own = torch.nn.functional.cosine_similarity(sae.W_enc.T.double(), sae.W_dec.double())
    assert found["encoder_decoder"]["shared"]["mean"] == pytest.approx(float(own[:10].mean()), rel=1e-5)
    assert found["encoder_decoder"]["specialised"]["max"] == pytest.approx(float(own[10:].max()), rel=1e-5)
    decoder = sae.W_dec.double() / sae.W_dec.double().norm(dim=1, keepdim=True)
    cosine = decoder @ decoder.T
    across = cosine[:10, 10:].amax(1).mean()
    within = cosine[10:, 10:].fill_diagonal_(-2).amax(1).mean()
    assert found["nearest"]["shared to specialised"]["mean"] == pytest.approx(float(across), rel=1e-5)
    assert found["nearest"]["within specialised"]["mean"] == pytest.approx(float(within), rel=1e-5)


def test_neighbours_hold_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearest neighbours are the same in small chunks."""
    decoder = torch.nn.functional.normalize(torch.randn(50, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    block = slice(7, 50)
    whole = nearest(decoder, block, block)
    monkeypatch.setattr(features, "CHUNK_VALUES", 100)
    torch.testing.assert_close(nearest(decoder, block, block), whole)


def test_copy_is_a_neighbour_self_not() -> None:
    """A latent is not its own neighbour but a copy is."""
    decoder = torch.eye(4)
    assert nearest(decoder, slice(0, 4), slice(0, 4)).tolist() == [0, 0, 0, 0]
    decoder[3] = decoder[0]
    assert nearest(decoder, slice(0, 4), slice(0, 4)).tolist() == [1, 0, 0, 1]
    assert nearest(decoder, slice(0, 1), slice(0, 1)).numel() == 0


def correlated(
    z: torch.Tensor, config: SAEConfig, sizes: Sequence[int], massive: torch.Tensor | None = None
) -> Correlation:
    correlation, start = Correlation(config, 0, CPU), 0
    for batch in batches_of(torch.zeros(len(z), 2), sizes, massive):
        correlation.update(z[start : start + len(batch.x)], batch)
        start += len(batch.x)
    return correlation


def test_streamed_correlations_equal_numpy() -> None:
    """Streamed correlations equal numpy over rows that are not massive."""
    config = SAEConfig(d_model=2, width=20, levels=(8, 20))
    z, massive = sparse_latents(300, 20), torch.arange(300) % 17 == 0
    z[:, 5] = 2 * z[:, 4]
    z[massive] *= 1000
    correlation = correlated(z, config, [100, 1, 199], massive)
    assert correlation.ids.tolist() == list(range(20))  # fewer latents than are sampled
    rows = z[~massive].double().numpy()
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(np.corrcoef(rows.T))
    np.testing.assert_allclose(correlation.pearson().numpy(), expected, atol=1e-6)
    active = rows != 0
    both, either = active.T.astype(int) @ active, (active[:, :, None] | active[:, None, :]).sum(0)
    np.testing.assert_allclose(correlation.jaccard().numpy(), both / np.maximum(either, 1), atol=1e-12)
    found = correlation.features()
    pairs = {name: found[name]["pearson"]["n"] for name in ("within shared", "within specialised", "across")}
    assert pairs == {
        "within shared": 7 * 6 / 2,
        "within specialised": 12 * 11 / 2,
        "across": 7 * 12,
    }  # latent 3 is dead
    assert found["within shared"]["pearson"]["max"] == pytest.approx(1)
    assert sum(found["across"]["pearson"]["histogram"]) == 7 * 12
    within = [expected[i, j] for i in range(8, 20) for j in range(i + 1, 20)]
    assert found["within specialised"]["mean_abs_pearson"] == pytest.approx(np.abs(within).mean(), abs=1e-6)


def test_flat_sae_has_one_block() -> None:
    """A flat SAE has one block."""
    found = correlated(sparse_latents(100, 6), SAEConfig(d_model=2, width=6, levels=(6,)), [100]).features()
    assert "within specialised" in found
    assert "across" not in found


def test_correlations_take_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correlations hold a bounded sample of latents drawn by seed."""
    monkeypatch.setattr(features, "N_SAMPLED", 5)
    config = SAEConfig(d_model=2, width=100, levels=(30, 100))
    one, same, other = Correlation(config, 0, CPU), Correlation(config, 0, CPU), Correlation(config, 1, CPU)
    assert one.products.shape == (10, 10)
    assert torch.equal(one.ids, same.ids)
    assert not torch.equal(one.ids, other.ids)
    assert (one.sampled["shared"] < 30).all()
    assert (one.sampled["specialised"] >= 30).all()


def coded(sae: NestedSAE, x: torch.Tensor, sizes: Sequence[int]) -> SparseCoding:
    batches = batches_of(x, sizes)
    coding = SparseCoding(sae, survey_of(batches), (2, 5, 20))
    for batch in batches:
        coding.update(sae.encode(batch.x), batch, range(sae.config.n_levels))
    return coding


def test_coding_rate_equals_sorting_reference() -> None:
    """The sparse coding rate equals a reference that sorts each row."""
    sae = random_sae()
    sae.W_dec *= torch.linspace(0.1, 3, 40)[:, None]  # norms matter in the ranking
    x = torch.randn(60, 12, generator=torch.Generator().manual_seed(3))
    z, normal = sae.encode(x), sae.normalize(x)
    coding = coded(sae, x, [60])
    for level, m in enumerate(sae.config.levels):
        rates = dict(coding.rates(level, 0.5))
        assert list(rates) == [n for n in (2, 5, 20) if n <= m]
        for n, rate in rates.items():
            expected = reference_sparse_coding(normal, z[:, :m], sae.W_dec[:m], sae.b_dec, n) / 0.5
            assert rate == pytest.approx(expected, rel=1e-4)


def test_explained_without_massive_rows() -> None:
    """Absolute variance explained at n is the reference's, over all rows and over those that are not massive."""
    sae, x = random_sae(levels=(20,)), torch.randn(60, 12, generator=torch.Generator().manual_seed(3))
    batches = [
        dataclasses.replace(batch, weights=torch.stack([batch.weights[0], (torch.arange(60) % 3 > 0).double()]))
        for batch in batches_of(x, [60])
    ]
    coding = SparseCoding(sae, survey_of(batches), (2, 5))
    coding.update(sae.encode(x), batches[0], [0])
    z, normal = sae.encode(x), sae.normalize(x)
    for k, rows in enumerate((slice(None), torch.arange(60) % 3 > 0)):
        for n, ev in coding.explained(0, k):
            expected = reference_sparse_coding(normal[rows], z[rows], sae.W_dec, sae.b_dec, n)
            assert ev == pytest.approx(expected, rel=1e-4)


def test_keeping_all_latents_keeps_all_ev() -> None:
    """Keeping every latent that fires keeps all of the explained variance."""
    sae = random_sae(levels=(20,))
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(3))
    full = reference_sparse_coding(sae.normalize(x), sae.encode(x), sae.W_dec, sae.b_dec, 20)
    assert full < 0  # of a random SAE; the ratio below is undefined for it, so compare the sums
    assert dict(coded(sae, x, [7, 23]).rates(0, 1.0))[20] == pytest.approx(full, rel=1e-4)


@pytest.mark.parametrize("full", [0.0, -0.3, None])
def test_coding_rate_without_ev_is_undefined(full: float | None) -> None:
    """The sparse coding rate is undefined where nothing is explained."""
    sae = random_sae()
    coding = coded(sae, torch.randn(30, 12), [30])
    assert [rate for _, rate in coding.rates(1, full)] == [None, None, None]


def test_describe_of_nothing_has_no_numbers() -> None:
    """Describe of nothing has no numbers."""
    assert features.describe(torch.zeros(0))["mean"] is None
    assert features.describe(torch.tensor([1.0, 2.0, 6.0]))["mean"] == 3
    assert not math.isnan(features.describe(torch.tensor([1.0]))["p95"])  # type: ignore[arg-type]

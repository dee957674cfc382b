import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.errors import UsageError
from pipeline.sae.config import SAEConfig, level_size, levels_for_alpha
from pipeline.sae.nested import NestedSAE

KINDS = {
    "relu": SAEConfig(16, 64, (16, 64)),
    "relu, LayerNorm": SAEConfig(16, 64, (16, 64), layernorm="pre"),
    "relu, LayerNorm after": SAEConfig(16, 64, (16, 64), layernorm="post"),
    "jumprelu": SAEConfig(16, 64, (4, 16, 64), "jumprelu"),
    "batchtopk": SAEConfig(16, 64, (4, 8, 16, 32, 64), "batchtopk", k=6),
    "topk": SAEConfig(16, 64, (64,), "topk", k=6),
}


def random_sae(config: SAEConfig, seed: int = 0) -> NestedSAE:
    sae, generator = NestedSAE(config), torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        parameter.data.normal_(generator=generator)
        if name == "threshold":
            parameter.data.abs_()
    sae.center.normal_(generator=generator)
    sae.scale.fill_(0.37)
    return sae


@pytest.mark.parametrize("kind", KINDS)
def test_encode_decode_follow_the_formula(kind: str) -> None:
    """Encode and decode follow the formula in float64."""
    config = KINDS[kind]
    sae = random_sae(config).double()
    raw = torch.randn(9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = slow_encode(sae, raw)
    z = sae.encode(raw)
    assert torch.allclose(z.double(), expected, atol=2e-5)
    x_hat = (expected @ sae.W_dec + sae.b_dec) / sae.scale.double() + sae.center.double()
    assert torch.allclose(sae.decode(z).double(), x_hat, rtol=1e-5, atol=2e-4)


def slow_encode(sae: NestedSAE, raw: torch.Tensor) -> torch.Tensor:
    config, rows = sae.config, []
    for row in raw:
        x = (row - sae.center.double()) * sae.scale.double()
        a = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        if config.layernorm == "post":
            a = a.clamp(min=0)
        if config.layernorm != "none":
            start, parts = 0, []
            for m in config.levels:
                block = a[start:m]
                parts.append((block - block.mean()) / (block.var(correction=0) + config.layernorm_eps).sqrt())
                start = m
            a = torch.cat(parts) * sae.ln_gain + sae.ln_bias
        z = a if config.layernorm == "post" else a.clamp(min=0)
        if config.activation == "jumprelu":
            z = z * (a > sae.threshold)
        if config.layernorm != "none" and config.layernorm_rescale:
            z = z * x.norm() / 16**0.5
        if config.activation == "batchtopk":
            z = z * (z > sae.threshold)
        if config.activation == "topk":
            z = z * (z >= z.sort(descending=True).values[config.k - 1])
        rows.append(z)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "topk"])
def test_prefix_is_an_sae(kind: str) -> None:
    """A prefix of the dictionary is itself an SAE."""
    sae, raw = random_sae(KINDS[kind]), torch.randn(33, 16)
    z = sae.encode(raw)
    for level, m in enumerate(sae.config.levels):
        small = sae.prefix(level)
        assert small.config.width == m
        assert torch.allclose(small.encode(raw), z[:, :m], atol=1e-5)
        assert torch.allclose(small.decode(z[:, :m]), sae.decode_level(z, level), atol=1e-4)


def test_topk_prefix_is_refused() -> None:
    """A prefix of TopK is refused because it selects over all latents."""
    sae = random_sae(dataclasses.replace(KINDS["topk"], levels=(16, 64)))
    with pytest.raises(UsageError, match="topk"):
        sae.prefix(0)


def test_levels_decode_from_the_one_before() -> None:
    """Every level is decoded from the one before."""
    sae, raw = random_sae(KINDS["batchtopk"]), torch.randn(7, 16)
    z = sae.encode(raw)
    for level, x_hat in enumerate(sae.decode_levels(z)):
        assert torch.allclose(x_hat, sae.decode_level(z, level), atol=1e-4)


def test_raw_rows_centre_in_float32() -> None:
    """Raw rows of any dtype are centred in float32 before any cast."""
    sae = NestedSAE(SAEConfig(4, 8, (8,)))
    sae.center.copy_(torch.tensor([1000.0, 0, 0, 0]))
    raw = torch.tensor([[1004.0, 1, 2, 3]])
    assert torch.equal(sae.to(torch.bfloat16).normalize(raw), torch.tensor([[4.0, 1, 2, 3]]))
    assert sae.normalize(raw.bfloat16()).dtype == torch.float32


def test_silent_code_decodes_to_bias() -> None:
    """No latent firing decodes to the bias alone."""
    sae = random_sae(KINDS["relu"])
    z = torch.zeros(3, 64)
    assert torch.allclose(sae.decode(z), sae.denormalize(sae.b_dec).expand(3, -1))


@given(st.floats(0, 0.99), st.integers(2, 5000))
def test_alpha_gives_two_levels_or_reason(alpha: float, width: int) -> None:
    """Alpha gives the paper's two levels or says why not."""
    try:
        levels = levels_for_alpha(alpha, width)
    except UsageError:
        assert alpha > 0
        assert level_size(alpha, width) in (0, width)
        return
    assert levels == ((width,) if alpha == 0 else (level_size(alpha, width), width))
    assert SAEConfig(8, width, levels).n_shared == (levels[0] if alpha else 0)


@given(st.floats(0, 1), st.integers(1, 5000))
def test_level_shares_end_aligned(share: float, width: int) -> None:
    """A level has its share of the latents and a wide one ends aligned."""
    m = level_size(share, width)
    assert 0 <= m <= width
    if width < 1024:
        assert m == round(share * width)
    else:
        assert abs(m - share * width) <= 4
        assert m % 8 == 0 or m == width


@pytest.mark.parametrize("alpha", [-0.1, 1.0, 1.5, float("nan")])
def test_alpha_outside_unit_is_refused(alpha: float) -> None:
    """Alpha outside zero to one is refused."""
    with pytest.raises(UsageError, match="alpha"):
        levels_for_alpha(alpha, 100)


@pytest.mark.parametrize("levels", [(), (8, 8), (0, 64), (32,), (128, 64)])
def test_levels_must_increase_to_the_width(levels: tuple[int, ...]) -> None:
    """Levels must increase to the width."""
    with pytest.raises(UsageError, match="levels"):
        SAEConfig(16, 64, levels)

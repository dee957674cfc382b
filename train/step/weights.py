"""Where a member's weights come from: drawn from its seed, or an SAE that may be from another store's space."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor

from pipeline.base.errors import CheckpointError
from pipeline.base.files import hash_file
from pipeline.base.runtime import torch_rng
from pipeline.sae.foreign import foreign_sha256, is_foreign
from pipeline.sae.nested import NestedSAE
from train.config import TrainConfig, selects


def initial_shapes(config: TrainConfig, d_model: int) -> dict[str, tuple[int, ...]]:
    """Trained tensors by name."""
    width = config.width
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_model, width), "b_enc": (width,), "W_dec": (width, d_model)}
    shapes["b_dec"] = (d_model,)
    if config.layernorm != "none":
        shapes |= {"ln_gain": (width,), "ln_bias": (width,)}
    return shapes | ({"log_threshold": (width,)} if config.activation == "jumprelu" else {})


def initial_weights(config: TrainConfig, d_model: int) -> dict[str, Tensor]:
    """Decoder rows uniform on the unit sphere, the encoder its transpose times `encoder_scale`, biases 0 but LayerNorm's; a
    function of the config alone. jumprelu's thresholds are found on the first batch (`Member`)."""
    weights = {name: torch.zeros(shape) for name, shape in initial_shapes(config, d_model).items()}
    w_dec = weights["W_dec"].normal_(generator=torch_rng("init", config.seed))
    w_dec /= torch.linalg.vector_norm(w_dec, dim=1, keepdim=True)
    scale = config.encoder_scale or best_scale(config, d_model) * part_of_best(config)
    if config.layernorm == "none":
        weights["W_enc"].copy_(w_dec.T * scale)
        return weights
    weights["W_enc"].copy_(w_dec.T)
    weights["ln_gain"].fill_(scale)
    if config.layernorm == "pre":
        weights["ln_bias"].fill_(scale * config.layernorm_bias)
    return weights


QUICKER, MANY_LEVELS = 0.4, 1.6
"""topk and batchtopk begin with the encoder at this part of the best scale: Adam turns a smaller encoder faster, but the small
first levels of more than two are better served by a larger one, up to where the first error nears 1. Explained variance on a
real model at 8 latents a dimension: flat .923 against .921 at the best scale, two levels alike; five levels, first and whole:
.7415, .8982 at 1.6 of the best, .7346, .8979 at 0.4 of it."""


def part_of_best(config: TrainConfig) -> float:
    """The part of `best_scale` that the encoder begins with."""
    if not selects(config):
        return 1.0
    return QUICKER if len(config.levels) <= 2 else MANY_LEVELS


def best_scale(config: TrainConfig, d_model: int) -> float:
    """The factor of the latents at which random decoder rows w explain most: x̂ = s Σ_j f(u_j) w_j ‖x‖/√d, u_j = √d w_j·x/‖x‖.

    The u_j are standard normal, so x̂ is s c x and a remainder of mean square s² n ‖x‖², c = F/d E[u f(u)] and n = F/d E[f(u)²]:
    the error (1 − s c)² + s² n is least at s = c / (c² + n), where it is n / (c² + n) < 1; and every prefix, whose c and n are
    smaller in proportion, has one below 1 too.
    """
    u_f, f_f = first_moments(config)
    per_row = config.width / d_model
    c, n = per_row * u_f, per_row * f_f
    plain = config.layernorm == "none" or config.layernorm_rescale
    return c / (c * c + n) / (1.0 if plain else math.sqrt(d_model))


def first_moments(config: TrainConfig) -> tuple[float, float]:
    """E[u f(u)] and E[f(u)²] of a standard normal u, f the activation as training begins, of gain 1."""
    normal = NormalDist()
    if config.layernorm == "post":  # f = (relu(u) − μ) / σ
        return 0.5 / math.sqrt(0.5 - 1 / (2 * math.pi)), 1.0
    if config.layernorm == "pre" and config.activation == "relu":  # f = relu(u + b)
        b = config.layernorm_bias
        share, density = normal.cdf(b), normal.pdf(b)
        return share, (1 + b * b) * share + b * density
    share = {"relu": 0.5, "jumprelu": first_l0(config) / config.width}.get(config.activation, config.k / config.width)
    least = normal.inv_cdf(1 - min(share, 0.5))  # f = u above it, else 0
    kept = least * normal.pdf(least) + min(share, 0.5)
    return kept, kept


def first_l0(config: TrainConfig) -> float:
    """Latents a row that jumprelu's thresholds let through as training begins."""
    return config.target_l0 or config.initial_l0


def named_by_content(init_from: str) -> str:
    """PATH#hash of its content, which makes another member of another SAE under the same path. Raises CheckpointError."""
    path = Path(init_from)
    if is_foreign(path):
        return f"{init_from}#{foreign_sha256(path)[:16]}"
    if not path.is_file():
        raise CheckpointError(
            f"init_from {init_from}: no such file; give the path of a checkpoint, or of an SAE's folder made elsewhere"
        )
    return f"{init_from}#{hash_file(path)[:16]}"


def path_of(init_from: str) -> Path:
    """The path in what `named_by_content` returns."""
    return Path(init_from.rpartition("#")[0])


def mapped_weights(source: NestedSAE, target: NestedSAE) -> dict[str, Tensor]:
    """Weights for `target`'s training space that compute what `source` does on raw residuals, by a member's names.

    With x' = ρ x + δ between the spaces (ρ = s'/s, δ = (c − c') s'): b_dec = (b_dec' − δ)/ρ, and latents are divided by
    ρ, so b_enc and thresholds are too. Levels and activation may differ: they are the target's. Raises CheckpointError
    when the shape or LayerNorm differs, or when LayerNorm's row scale ‖x‖ would be about another centre.
    """
    a, b = source.config, target.config
    if (a.d_model, a.width, a.layernorm) != (b.d_model, b.width, b.layernorm):
        raise CheckpointError(
            f"init_from holds d_model {a.d_model}, width {a.width}, layernorm {a.layernorm}; this training has "
            f"{b.d_model}, {b.width}, {b.layernorm}; choose another SAE or match its shape"
        )
    rho = source.scale / target.scale
    delta = (target.center - source.center) * source.scale
    if a.layernorm != "none" and b.layernorm_rescale and bool(delta.abs().max() > 1e-6):
        raise CheckpointError("init_from has LayerNorm and another centre, which no weights can make up for")
    with torch.no_grad():
        weights = {"W_enc": source.W_enc, "W_dec": source.W_dec, "b_dec": (source.b_dec - delta) / rho}
        weights["b_enc"] = source.b_enc / rho
        if a.layernorm != "none":
            shrink = 1.0 if b.layernorm_rescale else rho
            weights |= {"ln_gain": source.ln_gain / shrink, "ln_bias": source.ln_bias / shrink}
        if a.activation == b.activation == "jumprelu":
            threshold_scale = rho if a.layernorm == "none" or not b.layernorm_rescale else 1.0
            weights["log_threshold"] = (source.threshold / threshold_scale).log()
    return {name: weight.detach().clone() for name, weight in weights.items()}

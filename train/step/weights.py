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
from pipeline.sae.config import SAEConfig
from pipeline.sae.foreign.reader import folder_of, is_foreign, sha256_of
from pipeline.sae.nested import NestedSAE
from train.config import TrainConfig, selects


def initial_shapes(config: TrainConfig, d_model: int, d_out: int | None = None) -> dict[str, tuple[int, ...]]:
    """Trained tensors by name; with `d_out` those of a transcoder."""
    width, made = config.width, d_model if d_out is None else d_out
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_model, width), "b_enc": (width,), "W_dec": (width, made)}
    shapes["b_dec"] = (made,)
    if config.skip:
        shapes["W_skip"] = (d_model, made)
    if config.layernorm != "none":
        shapes |= {"ln_gain": (width,), "ln_bias": (width,)}
    return shapes | ({"log_threshold": (width,)} if config.activation == "jumprelu" else {})


def initial_weights(config: TrainConfig, d_model: int, d_out: int | None = None) -> dict[str, Tensor]:
    """Decoder rows uniform on the unit sphere, the encoder its transpose times `encoder_scale`, biases 0 but LayerNorm's; a
    function of the config alone. jumprelu's thresholds are found on the first batch (`Member`). A transcoder (`d_out`) reads
    other rows than it makes, so its encoder is drawn as the decoder is, on its own, and the decoder is aimed on the first batch
    (`Member`); a skip connection begins at 0."""
    weights = {name: torch.zeros(shape) for name, shape in initial_shapes(config, d_model, d_out).items()}
    w_dec = unit_rows(weights["W_dec"], torch_rng("init", config.seed))
    rows = w_dec
    if d_out is not None:
        rows = unit_rows(torch.empty(config.width, d_model), torch_rng("init encoder", config.seed))
    scale = config.encoder_scale or best_scale(config, d_model) * part_of_best(config)
    if config.layernorm == "none":
        weights["W_enc"].copy_(rows.T * scale)
        return weights
    weights["W_enc"].copy_(rows.T)
    weights["ln_gain"].fill_(scale)
    if config.layernorm == "pre":
        weights["ln_bias"].fill_(scale * config.layernorm_bias)
    return weights


def unit_rows(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix [row, dimension] filled, in place, with directions uniform on the unit sphere."""
    weight.normal_(generator=generator)
    return weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True))


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


LARGEST_START = 1.9
"""Latents that a batch's selection begins with, at most, in units of those that would explain most (2: no nearer than zeros)."""


def needs_shrinking(config: TrainConfig) -> bool:
    """Whether `best_scale` may be too large for rows of different norms: the first batch then says (`Member`)."""
    return config.activation == "batchtopk" and part_of_best(config) > 1 and not config.encoder_scale


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
    path = folder_of(Path(init_from))
    if is_foreign(path):
        return f"{path}#{sha256_of(path)[:16]}"
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
    when the shape or LayerNorm differs, when LayerNorm's row scale ‖x‖ would be about another centre, or for a transcoder
    of other spaces.
    """
    a, b = source.config, target.config
    if (a.d_out, a.skip) != (b.d_out, b.skip):
        raise CheckpointError(f"init_from holds {kind_of(a)}, this trains {kind_of(b)}; choose another one")
    if (a.d_model, a.width, a.layernorm) != (b.d_model, b.width, b.layernorm):
        raise CheckpointError(
            f"init_from holds d_model {a.d_model}, width {a.width}, layernorm {a.layernorm}; this training has "
            f"{b.d_model}, {b.width}, {b.layernorm}; choose another SAE or match its shape"
        )
    if a.row_norm:
        raise CheckpointError(
            "init_from holds an SAE that normalises each row by itself; training does not: choose another one"
        )
    if a.is_transcoder:
        return transcoder_weights(source, target)
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


def kind_of(config: SAEConfig) -> str:
    """In words, what a config is of."""
    if not config.is_transcoder:
        return "an SAE"
    return f"a transcoder to {config.d_out} dimensions {'with' if config.skip else 'without'} a skip connection"


def transcoder_weights(source: NestedSAE, target: NestedSAE) -> dict[str, Tensor]:
    """The weights of a transcoder for another one of the very same spaces. Raises CheckpointError where they differ."""
    for name in ("center", "scale", "target_center", "target_scale"):
        if not torch.allclose(getattr(source, name), getattr(target, name), rtol=1e-6, atol=1e-6):
            raise CheckpointError(
                f"init_from is of other stores ({name} differs); a transcoder goes on in its own alone"
            )
    left_out = ("center", "scale", "target_center", "target_scale", "threshold")
    weights = {name: weight for name, weight in source.state_dict().items() if name not in left_out}
    if source.config.activation == target.config.activation == "jumprelu":
        weights["log_threshold"] = source.threshold.log()
    return {name: weight.detach().clone() for name, weight in weights.items()}

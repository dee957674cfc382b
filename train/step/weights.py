"""Where a member's weights come from: drawn from its seed, or an SAE that may be from another store's space."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from pipeline.base.errors import CheckpointError
from pipeline.base.files import hash_file
from pipeline.base.runtime import torch_rng
from pipeline.sae.nested import NestedSAE
from train.config import TrainConfig


def initial_shapes(config: TrainConfig, d_model: int) -> dict[str, tuple[int, ...]]:
    """Trained tensors by name."""
    width = config.width
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_model, width), "b_enc": (width,), "W_dec": (width, d_model)}
    shapes["b_dec"] = (d_model,)
    if config.layernorm != "none":
        shapes |= {"ln_gain": (width,), "ln_bias": (width,)}
    return shapes | ({"log_threshold": (width,)} if config.activation == "jumprelu" else {})


def initial_weights(config: TrainConfig, d_model: int) -> dict[str, Tensor]:
    """Decoder rows uniform on the unit sphere, the encoder its transpose, biases 0; a function of config.seed alone."""
    weights = {name: torch.zeros(shape) for name, shape in initial_shapes(config, d_model).items()}
    w_dec = weights["W_dec"].normal_(generator=torch_rng("init", config.seed))
    w_dec /= torch.linalg.vector_norm(w_dec, dim=1, keepdim=True)
    weights["W_enc"].copy_(w_dec.T)
    if "ln_gain" in weights:
        weights["ln_gain"].fill_(1.0)
    if "log_threshold" in weights:
        weights["log_threshold"].fill_(math.log(config.initial_threshold))
    return weights


def named_by_content(init_from: str) -> str:
    """PATH#hash of the file, which makes another member of another SAE under the same path. Raises CheckpointError."""
    if not Path(init_from).is_file():
        raise CheckpointError(f"init_from {init_from}: no such file; give the path of a checkpoint")
    return f"{init_from}#{hash_file(Path(init_from))[:16]}"


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

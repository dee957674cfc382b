"""From tensors of our names to a NestedSAE, and the algebra that brings others' encoders to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE

Tensors = dict[str, Tensor]


def uncentred(tensors: Tensors) -> Tensors:
    """Our tensors for an encoder that does not subtract b_dec: ours does, so its bias makes up for it."""
    return tensors | {"b_enc": tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]}


def ungated(tensors: Tensors, b_gate: Tensor, b_mag: Tensor) -> Tensors:
    """A gated encoder as a jumprelu: with u = x W, it is on where u + b_gate > 0, its value relu(eʳ u + b_mag); so it is the
    pre-activation a = eʳ u + b_mag where a > b_mag − eʳ b_gate."""
    gain = tensors["r_mag"].exp()
    return tensors | {"W_enc": tensors["W_enc"] * gain, "b_enc": b_mag, "threshold": b_mag - gain * b_gate}


def rescaled(tensors: Tensors) -> Tensors:
    """Latents times the norms of their decoder rows, which become unit: the product is what selects, and no x̂ changes."""
    norm = tensors["W_dec"].norm(dim=1)
    scaled = {
        "W_enc": tensors["W_enc"] * norm,
        "b_enc": tensors["b_enc"] * norm,
        "W_dec": tensors["W_dec"] / norm[:, None],
    }
    return tensors | scaled


def assemble(activation: Any, k: int, levels: list[int], tensors: Tensors, *, row_norm: bool = False) -> NestedSAE:
    """A NestedSAE of raw rows from tensors of our names; a single threshold goes to every latent."""
    d_model, width = tensors["W_enc"].shape
    select = k if activation in ("topk", "batchtopk") else 0
    sae = NestedSAE(SAEConfig(d_model, width, tuple(int(m) for m in levels), activation, select, row_norm=row_norm))
    state = {name: tensors[name].contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if sae.config.has_threshold:
        state["threshold"] = tensors["threshold"].expand(width).contiguous()
    sae.load_state_dict(state | {"center": torch.zeros(d_model), "scale": torch.ones(())})
    return sae


def assemble_transcoder(activation: Any, k: int, tensors: Tensors) -> NestedSAE:
    """The same for a transcoder, flat; W_skip [d_model, d_out] where there is one."""
    (d_model, width), d_out, skips = tensors["W_enc"].shape, tensors["W_dec"].shape[1], "W_skip" in tensors
    sae = NestedSAE(SAEConfig(d_model, width, (width,), activation, k, d_out=d_out, skip=skips))
    state = {name: tensors[name].contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    state |= {"W_skip": tensors["W_skip"].contiguous()} if skips else {}
    state |= {"threshold": tensors["threshold"].expand(width).contiguous()} if sae.config.has_threshold else {}
    places = {"center": torch.zeros(d_model), "target_center": torch.zeros(d_out)}
    sae.load_state_dict(state | places | {"scale": torch.ones(()), "target_scale": torch.ones(())})
    return sae

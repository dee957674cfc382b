"""Gemma Scope: params.npz. Gemma Scope 2: params.safetensors, with or without config.json."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.base.errors import CheckpointError
from pipeline.base.fields import Fields
from pipeline.sae.foreign.assembly import Tensors, assemble, assemble_transcoder, uncentred
from pipeline.sae.foreign.checks import only, refuse_unknown, refuse_unless, require_size
from pipeline.sae.foreign.hooks import About, hook_point
from pipeline.sae.nested import NestedSAE

GEMMA_SCOPE_2_FIELDS = "architecture model_name hf_hook_point_in hf_hook_point_out width l0 affine_connection type"

BEFORE_GAIN = "ln2.hook_normalized"
"""Where transcoders of Gemma Scope read, in TransformerLens's words: the MLP's input before its norm's gain."""


def behind_gain(sae: NestedSAE, norm_weight: Tensor) -> NestedSAE:
    """A transcoder of Gemma Scope as one of what the MLP reads (mlp_in), a row times the gain 1 + norm_weight [d_model] of
    Gemma-2's norm: the same latents, W_enc's rows divided by the gain. Raises CheckpointError where the gain is 0: what the
    MLP reads says nothing of that dimension."""
    gain = 1 + norm_weight.detach().double().cpu()
    if len(gain) != sae.config.d_model:
        raise CheckpointError(f"the transcoder is of {sae.config.d_model} dimensions, the model's norm of {len(gain)}")
    if zeros := int((gain == 0).sum()):
        raise CheckpointError(
            f"the norm before the MLP has a gain of 0 in {zeros} dimensions, which the transcoder reads: it cannot be placed"
        )
    folded = copy.deepcopy(sae)
    folded.W_enc.data.copy_(sae.W_enc.detach().double().cpu() / gain[:, None])
    folded.made_for = {**sae.made_for, "hook": "mlp_in"}
    return folded


def from_gemma_scope(folder: Path, _data: Mapping[str, Any], tensors: Tensors) -> tuple[NestedSAE, About]:
    """JumpReLU that does not subtract b_dec: a · (a > threshold), a = x W_enc + b_enc. The path names layer and hook: an
    SAE's and a transcoder's tensors are alike. Transcoders read the MLP's norm before its gain: `behind_gain` places them."""
    only(folder, tensors, "W_enc W_dec b_enc b_dec threshold")
    path = str(folder.resolve())
    found = re.findall(r"/layer_(\d+)(?=/|$)", path)
    layer = int(found[-1]) if found else None
    release = re.findall(r"gemma-scope-[^/]*-(res|mlp|att|transcoders)(?=[-/]|$)", path)
    model = gemma_2(path)
    if release and release[-1] == "transcoders":
        target = {"layer": layer, "hook": "mlp_out"}
        return assemble_transcoder("jumprelu", 0, tensors), {
            "model": model,
            "layer": layer,
            "hook": BEFORE_GAIN,
            "target": target,
        }
    sae = assemble("jumprelu", 0, [len(tensors["W_dec"])], uncentred(tensors))
    hook = {"res": "resid_post", "mlp": "mlp_out", "att": "attn.hook_z"}[release[-1]] if release else None
    if layer is None and "/embedding/" in path:
        hook = "embedding, before its scale"
    return sae, {"model": model, "layer": layer, "hook": hook}


def gemma_2(path: str) -> str | None:
    """The model that a release of Gemma Scope is of, by its name in a path."""
    found = re.findall(r"gemma-scope-(\d+b)-(pt|it)(?=[-/]|$)", path)
    return f"gemma-2-{found[-1][0]}{'-it' if found[-1][1] == 'it' else ''}" if found else None


def from_gemma_scope_2(folder: Path, data: Mapping[str, Any], tensors: Tensors) -> tuple[NestedSAE, About]:
    """The same JumpReLU under names in lower case; config.json, else the path, names layer and hook. A transcoder, from what the
    MLP reads to what it adds, has `affine_skip_connection` [d_in, d_out] where it is affine."""
    fields = Fields(folder / "config.json", data)
    refuse_unless(folder, "architecture", fields.text("architecture", "jump_relu"), ("jump_relu",))
    refuse_unknown(folder, "config.json", data, GEMMA_SCOPE_2_FIELDS)
    refuse_unless(folder, "type", data.get("type"), (None, "sae", "transcoder"))
    reads, writes = fields.text("hf_hook_point_in", ""), fields.data.get("hf_hook_point_out")
    place = re.findall(r"/(resid_post|mlp_out|attn_out|transcoder)[^/]*/layer_(\d+)", str(folder.resolve()))
    transcodes = writes not in (None, reads) if reads else bool(place) and place[-1][0] == "transcoder"
    skips = transcodes and "affine_skip_connection" in tensors
    affine = data.get("affine_connection", skips)
    refuse_unless(folder, "affine_connection", affine, (True,) if skips else (False, None))
    only(folder, tensors, "w_enc w_dec b_enc b_dec threshold" + " affine_skip_connection" * skips)
    tensors = tensors | {"W_enc": tensors["w_enc"], "W_dec": tensors["w_dec"]}
    require_size(folder, tensors, None, fields.some_whole("width"))
    model = fields.text("model_name", "").replace("gemma-v3", "gemma-3") or None
    about: About = {"model": model}
    if not transcodes:
        sae = assemble("jumprelu", 0, [len(tensors["W_dec"])], uncentred(tensors))
        hooks = {"attn_out": "attn.hook_z"}  # Gemma Scope's attention is read before its output matrix
        named = {"hook": hooks.get(place[-1][0], place[-1][0]), "layer": int(place[-1][1])} if place else {}
        return sae, about | (hook_point(folder, reads) if reads else named)
    sae = assemble_transcoder("jumprelu", 0, tensors | ({"W_skip": tensors["affine_skip_connection"]} if skips else {}))
    if not reads:
        layer = int(place[-1][1])
        return sae, about | {"hook": "mlp_in", "layer": layer, "target": {"hook": "mlp_out", "layer": layer}}
    made = hook_point(folder, fields.text("hf_hook_point_out"))
    norm = re.fullmatch(
        r"model\.layers\.(\d+)\.pre_feedforward_layernorm\.output", reads
    )  # Gemma's MLP reads just this
    read = {"hook": "mlp_in", "layer": int(norm[1])} if norm else hook_point(folder, reads)
    return sae, about | read | {"target": made}

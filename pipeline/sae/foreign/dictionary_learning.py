"""dictionary_learning: config.json with a trainer, ae.pt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.base.errors import CheckpointError
from pipeline.base.fields import Fields
from pipeline.sae.foreign.assembly import Tensors, assemble, uncentred, ungated
from pipeline.sae.foreign.checks import only, refuse_unknown, refuse_unless, require_size, set_threshold
from pipeline.sae.foreign.hooks import About, hook_point, layer_in
from pipeline.sae.nested import NestedSAE

DICTIONARY_ACTIVATIONS = {
    "AutoEncoder": "relu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
    "JumpReluAutoEncoder": "jumprelu",
    "GatedAutoEncoder": "jumprelu",
}

DICTIONARY_STYLES = (
    "encoder.weight encoder.bias decoder.weight bias",
    "encoder.weight encoder.bias decoder.weight b_dec",
    "W_enc b_enc W_dec b_dec",
)
"""What the tensors that all but the gated have are called."""

DICTIONARY_GATED = "encoder.weight decoder.weight decoder_bias r_mag gate_bias mag_bias"

DICTIONARY_EXTRAS = {
    "AutoEncoder": ("", ""),
    "AutoEncoderTopK": ("", "k threshold"),
    "BatchTopKSAE": ("threshold", "k"),
    "MatryoshkaBatchTopKSAE": ("threshold group_sizes", "k"),
    "JumpReluAutoEncoder": ("threshold", ""),
}
"""What a class has beside them, and what it may have."""

DICTIONARY_FIELDS = (
    "dict_class activation_dim dict_size k layer lm_name submodule_name "
    "trainer_class lr steps seed device wandb_name warmup_steps decay_start auxk_alpha threshold_beta "
    "threshold_start_step top_k_aux group_fractions group_weights group_sizes l1_penalty resample_steps "
    "sparsity_warmup_steps sparsity_function sparsity_penalty p_start p_end anneal_start sparsity_queue_length "
    "n_sparsity_updates bandwidth target_l0 norm_factor k_anneal_steps log_steps"
)
"""Of its trainers: first those that are read. A `norm_factor` is in the biases already, as they are saved."""


def from_dictionary_learning(folder: Path, data: Mapping[str, Any], tensors: Tensors) -> tuple[NestedSAE, About]:
    """AutoEncoder, TopK, BatchTopK, Matryoshka (its groups become levels), JumpRelu or Gated, in either style of names."""
    config = Fields(folder / "config.json", data)
    trainer = config.inner("trainer")
    kind = trainer.text("dict_class")
    refuse_unless(folder, "dict_class", kind, tuple(DICTIONARY_ACTIVATIONS))
    refuse_unknown(folder, "config.json's trainer", trainer.data, DICTIONARY_FIELDS)
    refuse_unless(folder, "io of its buffer", config.inner("buffer").data.get("io", "out"), ("out",))
    activation = DICTIONARY_ACTIVATIONS[kind]
    only_dictionary(folder, tensors, kind)
    if kind == "GatedAutoEncoder":
        turned = {"W_enc": tensors["encoder.weight"].T, "W_dec": tensors["decoder.weight"].T}
        turned |= {"b_dec": tensors["decoder_bias"], "r_mag": tensors["r_mag"]}
        tensors = ungated(turned, tensors["gate_bias"], tensors["mag_bias"])
    elif "encoder.weight" in tensors:
        bias = "bias" if "bias" in tensors else "b_dec"
        same = {"W_enc": tensors["encoder.weight"].T, "W_dec": tensors["decoder.weight"].T, "b_dec": tensors[bias]}
        tensors = tensors | same | {"b_enc": tensors["encoder.bias"]}
    require_size(folder, tensors, trainer.some_whole("activation_dim"), trainer.some_whole("dict_size"))
    if kind == "JumpReluAutoEncoder":  # does not subtract b_dec
        tensors = uncentred(tensors)
    if activation == "batchtopk":
        set_threshold(folder, tensors["threshold"])
    sizes = tensors.get("group_sizes", torch.tensor([len(tensors["W_dec"])]))
    if sizes.is_floating_point():
        raise CheckpointError(f"{folder}: its group_sizes should be whole numbers, found {sizes.dtype}; get it again")
    k = int(tensors["k"]) if "k" in tensors else trainer.whole("k", 0)
    if activation == "topk":
        refuse_unless(folder, "k of config.json's trainer", trainer.whole("k", k), (k,))
    sae = assemble(activation, k, sizes.cumsum(0).tolist(), tensors)
    return sae, dictionary_place(folder, trainer) | {"model": trainer.text("lm_name", "") or None}


def only_dictionary(folder: Path, tensors: Tensors, kind: str) -> None:
    """Raise CheckpointError unless the tensors are those of a class of dictionary_learning, in one of its styles of names."""
    if kind == "GatedAutoEncoder":
        only(folder, tensors, DICTIONARY_GATED)
        return
    style = max(DICTIONARY_STYLES, key=lambda names: len(tensors.keys() & set(names.split())))
    needed, optional = DICTIONARY_EXTRAS[kind]
    only(folder, tensors, f"{style} {needed}", optional)


def dictionary_place(folder: Path, trainer: Fields) -> About:
    """Hook point that a trainer names: with the layer in the submodule's name, beside it, or nowhere."""
    submodule, layer = trainer.text("submodule_name", ""), trainer.some_whole("layer")
    if not submodule:
        return {"layer": layer}
    if re.search(r"\d", submodule):
        refuse_unless(folder, f"layer (beside {submodule})", layer, (layer_in(submodule), None))
        return hook_point(folder, submodule)
    placed = hook_point(folder, f"{submodule}_layer_{1 if layer is None else layer}")
    return placed if layer is not None else {n: v for n, v in placed.items() if n not in ("layer", "called")}

"""bartbussmann's matryoshka_sae, and his BatchTopK: config.json, sae.pt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.base.fields import Fields
from pipeline.sae.foreign.assembly import Tensors, assemble
from pipeline.sae.foreign.checks import only, refuse_unknown, refuse_unless, require_size, set_threshold
from pipeline.sae.foreign.hooks import About, hook_point, layer_in
from pipeline.sae.nested import NestedSAE

MATRYOSHKA_ACTIVATIONS = {
    "vanilla": "relu",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "global-matryoshka-topk": "batchtopk",
}

MATRYOSHKA_NEUTRAL = {"activation": ("relu", None), "tied_weights": (False, None)}

MATRYOSHKA_FIELDS = (
    "sae_type input_unit_norm act_size dict_size group_sizes top_k hook_point layer site model_name "
    "seed batch_size lr num_tokens l1_coeff l1_warmup_frac beta1 beta2 max_grad_norm seq_len dtype sae_dtype model_dtype "
    "device model_batch_size num_batches_in_buffer dataset_path wandb_project perf_log_freq checkpoint_freq "
    "checkpoint_dir name top_k_aux aux_penalty n_batches_to_dead bandwidth pool_size softmax_aux_penalty quantile "
    "quantile_lr max_seq_len"
)
"""First those that are read."""


def from_matryoshka_sae(folder: Path, data: Mapping[str, Any], tensors: Tensors) -> tuple[NestedSAE, About]:
    """vanilla, topk, batchtopk, or global-matryoshka-topk, whose groups become levels; only vanilla uses b_enc."""
    fields = Fields(folder / "config.json", data)
    kind = fields.text("sae_type")
    refuse_unless(folder, "sae_type", kind, tuple(MATRYOSHKA_ACTIVATIONS))
    row_norm = data.get("input_unit_norm")
    refuse_unless(folder, "input_unit_norm", row_norm, (False, True))
    refuse_unknown(folder, "config.json", data, MATRYOSHKA_FIELDS, MATRYOSHKA_NEUTRAL)
    activation = MATRYOSHKA_ACTIVATIONS[kind]
    threshold = " threshold" * (activation == "batchtopk")
    only(folder, tensors, "W_enc W_dec b_enc b_dec" + threshold, "threshold num_batches_not_active")
    require_size(folder, tensors, fields.some_whole("act_size"), fields.some_whole("dict_size"))
    levels = [len(tensors["W_dec"])]
    if kind == "global-matryoshka-topk":  # the trainer writes the list as text
        sizes = re.fullmatch(r"\[(\d+(?:, ?\d+)*)\]", str(data.get("group_sizes")))
        if sizes is None:
            raise fields.wrong("group_sizes", "a list of sizes", data.get("group_sizes"))
        levels = torch.tensor([int(size) for size in sizes[1].split(",")]).cumsum(0).tolist()
    if activation == "batchtopk":
        set_threshold(folder, tensors["threshold"])
    if activation != "relu":
        tensors = tensors | {"b_enc": torch.zeros_like(tensors["b_enc"])}
    k = fields.whole("top_k", least=1) if activation != "relu" else 0
    hook, site, layer = fields.text("hook_point", ""), fields.text("site", ""), fields.some_whole("layer")
    if hook:
        refuse_unless(folder, f"layer (beside {hook})", layer, (layer_in(hook), None))
    elif site and layer is not None:
        hook = f"blocks.{layer}.hook_{site}"
    about: About = {"model": fields.text("model_name", "") or None} | (hook_point(folder, hook) if hook else {})
    return assemble(activation, k, levels, tensors, row_norm=bool(row_norm)), about

"""SAELens: cfg.json, sae_weights.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.base.errors import CheckpointError
from pipeline.base.fields import Fields
from pipeline.sae.foreign.assembly import Tensors, assemble, assemble_transcoder, rescaled, uncentred, ungated
from pipeline.sae.foreign.checks import only, refuse_unknown, refuse_unless, require_size, set_threshold
from pipeline.sae.foreign.hooks import About, hook_point, layer_in
from pipeline.sae.nested import NestedSAE

SAELENS_ACTIVATIONS = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "jumprelu",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
}
"""The last two are a trainer's own checkpoints; what SAELens saves for inference is a jumprelu without its levels."""

SAELENS_TRANSCODERS = {
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}

SAELENS_TENSORS = {
    "gated": "W_enc W_dec b_gate b_mag r_mag b_dec",
    "jumprelu": "W_enc W_dec b_enc b_dec threshold",
    "batchtopk": "W_enc W_dec b_enc b_dec topk_threshold",
    "matryoshka_batchtopk": "W_enc W_dec b_enc b_dec topk_threshold",
}

SAELENS_NEUTRAL = {
    "normalize_activations": ("none", False, None),
    "reshape_activations": ("none",),
    "rescale_acts_by_decoder_norm": (False, True),
    "finetuning_scaling_factor": (False, None),
    "hook_head_index": (None,),
}
"""Fields that change what is computed, with the values that change nothing (or that `from_saelens` reads)."""

SAELENS_FIELDS = (
    "architecture activation_fn activation_fn_str activation_fn_kwargs apply_b_dec_to_input d_in d_out d_sae hook_layer "
    "hook_name k matryoshka_widths metadata model_name "
    "aux_loss_coefficient context_size dataset_path dataset_trust_remote_code decoder_init_norm device dtype "
    "from_pretrained_path l1_coefficient lp_norm model_class_name model_from_pretrained_kwargs neuronpedia_id noise_std "
    "prepend_bos sae_lens_training_version sae_lens_version seqpos_slice topk_threshold_lr use_matryoshka_aux_loss "
    "use_sparse_activations"
)
"""First those that are read, then those that say how it was trained or stored."""

MODEL_HARMLESS = (
    "fold_ln fold_value_biases center_unembed refactor_factored_attn_matrices default_prepend_bos default_padding_side "
    "device device_map n_devices move_to_device dtype torch_dtype attn_implementation low_cpu_mem_usage first_n_layers "
    "trust_remote_code local_files_only cache_dir token use_fast"
)
"""Options for loading a model that leave the rows of its stream as they are, but for rounding."""


def from_saelens(folder: Path, data: Mapping[str, Any], tensors: Tensors) -> tuple[NestedSAE, About]:
    """standard, topk, jumprelu, gated, and a trainer's batchtopk: act((x − b_dec · apply) W_enc + b_enc), z W_dec + b_dec."""
    fields = Fields(folder / "cfg.json", data)
    architecture = fields.text("architecture", "standard")
    if architecture in SAELENS_TRANSCODERS:
        return from_saelens_transcoder(folder, data, tensors, architecture)
    refuse_unless(folder, "architecture", architecture, (*SAELENS_ACTIVATIONS, *SAELENS_TRANSCODERS))
    row_norm = data.get("normalize_activations") == "layer_norm"
    refuse_unknown(
        folder,
        "cfg.json",
        {**data, "normalize_activations": "none"} if row_norm else data,
        SAELENS_FIELDS,
        SAELENS_NEUTRAL,
    )
    activation, k = saelens_activation(folder, fields, architecture)
    only(folder, tensors, SAELENS_TENSORS.get(architecture, "W_enc W_dec b_enc b_dec"))
    require_size(folder, tensors, data.get("d_in"), data.get("d_sae"))
    levels = [len(tensors["W_dec"])]
    if architecture == "gated":
        tensors = ungated(tensors, tensors["b_gate"], tensors["b_mag"])
    if activation == "batchtopk":  # its k may be a fraction, and what decides at inference is the threshold
        threshold = set_threshold(folder, tensors["topk_threshold"])
        tensors, k = tensors | {"threshold": threshold}, max(1, round(fields.number("k")))
        levels = fields.list_of_wholes("matryoshka_widths") if "matryoshka_widths" in data else levels
    if data.get("rescale_acts_by_decoder_norm", False):
        refuse_unless(folder, "activation of rescale_acts_by_decoder_norm", activation, ("topk", "batchtopk"))
        tensors = rescaled(tensors)
    applies = data.get("apply_b_dec_to_input", True)
    refuse_unless(folder, "apply_b_dec_to_input", applies, (True, False))
    if (made := saelens_place(folder, fields, "hook_name_out")).get("hook") is not None:
        refuse_unless(
            folder, "hook_name_out (of an SAE)", made, ({"model": None}, saelens_place(folder, fields, "hook_name"))
        )
    sae = assemble(activation, k, levels, tensors if applies else uncentred(tensors), row_norm=row_norm)
    return sae, saelens_place(folder, fields, "hook_name")


def saelens_activation(folder: Path, fields: Fields, architecture: str) -> tuple[str, int]:
    """What an SAE applies, and its k where that is topk: by its architecture and, in older folders, by `activation_fn` or
    `activation_fn_str`, whose kwargs then hold k. Raises CheckpointError where these do not agree."""
    own: str = SAELENS_ACTIVATIONS[architecture]
    named: dict[str, str] = {}
    for name in ("activation_fn", "activation_fn_str"):
        value = fields.data.get(name)
        refuse_unless(folder, name, value, (None, "relu", "topk", *(("jumprelu",) if own == "jumprelu" else ())))
        named |= {} if value is None else {name: value}
    if len(set(named.values())) > 1:
        raise CheckpointError(f"{folder}: cfg.json says {named}, two activations; remove the wrong one")
    if "topk" in named.values():
        refuse_unless(folder, f"architecture (with {next(iter(named))} 'topk')", architecture, ("standard", "topk"))
        own = "topk"
    told = fields.inner("activation_fn_kwargs")
    refuse_unknown(folder, "cfg.json's activation_fn_kwargs", told.data, "k")
    if own != "topk":
        return own, 0
    k = fields.whole("k", told.whole("k", 0))
    refuse_unless(folder, "k of activation_fn_kwargs", told.whole("k", k), (k,))
    return own, k


def saelens_place(folder: Path, fields: Fields, name: str) -> About:
    """Model and hook point that cfg.json, or its metadata, says under a name; `NAME_out`'s is what a transcoder makes.

    Raises CheckpointError where the two, or the layer beside them, say otherwise.
    """
    metadata = fields.inner("metadata") if fields.data.get("metadata") else fields
    head = name.replace("hook_name", "hook_head_index")
    refuse_unless(folder, head, metadata.data.get(head), (None,))
    for one in ("model_name", name):
        said = [value for value in (metadata.data.get(one), fields.data.get(one)) if value is not None]
        refuse_unless(
            folder, f"{one} (beside its metadata's)", said[-1] if said else None, (said[0] if said else None,)
        )
    hook, model = (metadata.text(one, "") or fields.text(one, "") for one in (name, "model_name"))
    if name == "hook_name" and hook and "hook_layer" in fields.data:
        refuse_unless(folder, f"hook_layer (of {hook})", fields.data["hook_layer"], (layer_in(hook), None))
    return model_options({"model": model or None} | (hook_point(folder, hook) if hook else {}), metadata)


def model_options(about: About, metadata: Fields) -> About:
    """The same with what SAELens's options for loading the model make of it: a revision, rows that lack their mean, and whatever
    else may make other rows beside the model's name."""
    if not metadata.data.get("model_from_pretrained_kwargs"):
        return about
    options = metadata.inner("model_from_pretrained_kwargs").data
    others = {
        name: value
        for name, value in options.items()
        if name not in MODEL_HARMLESS.split() and value not in (None, False)
    }
    if (revision := others.pop("revision", "main")) != "main":
        about = about | {"revision": str(revision)}
    if others.pop("center_writing_weights", False) and "hook" in about:
        about = about | {"hook": f"centred {about['hook']}"}
    if others:
        about = about | {
            "model": f"{about['model'] or 'a model'} with {', '.join(f'{n} {v}' for n, v in sorted(others.items()))}"
        }
    return about


def from_saelens_transcoder(
    folder: Path, data: Mapping[str, Any], tensors: Tensors, architecture: str
) -> tuple[NestedSAE, About]:
    """transcoder, jumprelu_transcoder and their skip kinds: act(x W_enc + b_enc), decode z W_dec + b_dec (+ W_skip x, [d_out,
    d_in])."""
    fields, activation = Fields(folder / "cfg.json", data), SAELENS_TRANSCODERS[architecture]
    refuse_unknown(folder, "cfg.json", data, SAELENS_FIELDS, SAELENS_NEUTRAL)
    for name in ("activation_fn", "activation_fn_str"):
        refuse_unless(folder, f"{name} (of a transcoder)", data.get(name), (None, "relu", activation))
    refuse_unless(folder, "apply_b_dec_to_input (of a transcoder)", data.get("apply_b_dec_to_input", False), (False,))
    refuse_unless(folder, "rescale_acts_by_decoder_norm", data.get("rescale_acts_by_decoder_norm", False), (False,))
    skips, jumps = "skip" in architecture, activation == "jumprelu"
    only(folder, tensors, "W_enc W_dec b_enc b_dec" + " threshold" * jumps + " W_skip" * skips)
    require_size(folder, tensors, fields.some_whole("d_in"), fields.some_whole("d_sae"))
    refuse_unless(folder, "d_out", tensors["W_dec"].shape[-1], (fields.whole("d_out", tensors["W_dec"].shape[-1]),))
    sae = assemble_transcoder(activation, 0, tensors | ({"W_skip": tensors["W_skip"].T} if skips else {}))
    made = {name: one for name, one in saelens_place(folder, fields, "hook_name_out").items() if name != "model"}
    return sae, saelens_place(folder, fields, "hook_name") | {"target": made}

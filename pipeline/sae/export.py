"""Exports an SAE to the folders that SAELens and dictionary_learning load, with centre and scale folded in.

An exported SAE takes raw residuals and its latents are in residual units: z_exported = z / scale, with decoder rows of
unit norm. With s the scale and c the centre,

    b_dec' = b_dec / s + c,   b_enc' = b_enc / s,   threshold' = threshold / s,   W_enc and W_dec as they are,

since ((x − c) s − b_dec) W_enc + b_enc = s · ((x − b_dec') W_enc + b_enc'). A transcoder, whose target has scale t and centre u,
is divided by t likewise and does not subtract b_dec from what it reads:

    W_enc' = (s/t) W_enc,   b_enc' = (b_enc − s c W_enc) / t,   threshold' = threshold / t,
    W_skip' = (s/t) W_skip,   b_dec' = b_dec / t + u − c W_skip'

LayerNorm does not fold into a linear
encoder: it travels to SAELens as the class in `pipeline.sae.saelens`, and to dictionary_learning not at all.
Formats: SAELens 6 (cfg.json, sae_weights.safetensors), dictionary_learning 0.1 (config.json, ae.pt).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from pipeline.base.digests import DIGESTS, write_digests
from pipeline.base.errors import DiskError, UsageError
from pipeline.base.files import PARTIAL, atomic, hash_file, lock_folder, sweep_partials, write_bytes, write_json
from pipeline.sae.checkpoint import Header
from pipeline.sae.foreign.hooks import OWN_OUTPUTS
from pipeline.sae.foreign.reader import load_sae
from pipeline.sae.nested import NestedSAE

Format = Literal["saelens", "dictionary-learning"]
FORMATS: tuple[Format, ...] = ("saelens", "dictionary-learning")
SAELENS_NESTED = "nested_layernorm"
"""Architecture name under which `pipeline.sae.saelens` registers the LayerNorm SAE."""


def export(checkpoint: Path, kind: Format, out: Path, level: int | None = None) -> list[Path]:
    """Export a checkpoint, or an SAE made elsewhere: the whole dictionary to `out`, each level l to `out/level_l`, or one.

    `level`: None for the whole dictionary, −1 for every level, else one. Returns the folders written. Raises UsageError
    for what the format cannot express (a level of topk; LayerNorm in dictionary_learning), DiskError when a folder
    holds something else.
    """
    sae, header = load_sae(checkpoint)
    if level is None:
        return [export_one(sae, header, kind, out)]
    n_levels = sae.config.n_levels
    if not -1 <= level < n_levels:
        raise UsageError(f"{checkpoint}: has levels 0 to {n_levels - 1}, asked for {level}")
    chosen = range(n_levels) if level == -1 else [level]
    return [export_one(sae.prefix(one), header, kind, out / f"level_{one}") for one in chosen]


def export_one(sae: NestedSAE, header: Header, kind: Format, folder: Path) -> Path:
    """Write one SAE as one folder of a format, its digests last; what a killed export left is swept."""
    if sae.config.row_norm:
        raise UsageError(
            "an SAE that normalises each row by itself is not exported; its own files are in its library's format"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder, "exporting into this folder")
    try:
        if other := sorted(path.name for path in folder.iterdir() if not is_ours(path.name)):
            raise DiskError(f"{folder}: holds something else ({', '.join(other[:3])}); choose an empty folder")
        (folder / DIGESTS).unlink(missing_ok=True)
        sweep_partials(folder)
        (write_saelens if kind == "saelens" else write_dictionary_learning)(sae, header, folder)
        written = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
        write_digests(folder / DIGESTS, f"{kind} of {header.provenance.get('member')}, step {header.step}", written)
    finally:
        os.close(lock)
    return folder


def is_ours(name: str) -> bool:
    """Whether a name is one that an export writes, or what a killed one left of it."""
    return any(
        name == own or (name.startswith(f"{own}.") and name.endswith(PARTIAL))
        for own in ("cfg.json", "sae_weights.safetensors", "config.json", "ae.pt", DIGESTS)
    )


def folded(sae: NestedSAE) -> dict[str, Tensor]:
    """Weights of the same SAE for raw residuals, latents divided by the scale (see the top of this file), float32."""
    if sae.config.is_transcoder:
        return folded_transcoder(sae)
    s, c = sae.scale.float(), sae.center.float()
    tensors = {
        "W_enc": sae.W_enc.float(),
        "b_enc": sae.b_enc.float() / s,
        "W_dec": sae.W_dec.float(),
        "b_dec": sae.b_dec.float() / s + c,
    }
    if sae.config.activation in ("jumprelu", "batchtopk"):
        tensors["threshold"] = sae.threshold.float() / s
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def folded_transcoder(sae: NestedSAE) -> dict[str, Tensor]:
    """The same of a transcoder; sums in float64."""
    own = {name: tensor.detach().double() for name, tensor in sae.state_dict().items()}
    s, c, t = own["scale"], own["center"], own["target_scale"]
    tensors = {
        "W_enc": own["W_enc"] * (s / t),
        "b_enc": (own["b_enc"] - s * (c @ own["W_enc"])) / t,
        "W_dec": own["W_dec"],
        "b_dec": own["b_dec"] / t + own["target_center"],
    }
    if sae.config.has_threshold:
        tensors["threshold"] = own["threshold"] / t
    if sae.config.skip:
        tensors["W_skip"] = own["W_skip"] * (s / t)
        tensors["b_dec"] -= c @ tensors["W_skip"]
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def write_saelens_transcoder(sae: NestedSAE, header: Header, folder: Path) -> None:
    """The same of SAELens's transcoder, which has relu or a threshold, and W_skip [d_out, d_in]. Raises UsageError for
    topk and LayerNorm, which it has not."""
    config = sae.config
    if config.activation == "topk" or config.layernorm != "none":
        what = "topk" if config.activation == "topk" else "LayerNorm"
        raise UsageError(f"SAELens has no transcoder with {what}; use batchtopk, jumprelu, or relu without LayerNorm")
    tensors = folded(sae)
    if config.skip:
        tensors["W_skip"] = tensors["W_skip"].T.contiguous()
    kind = ("jumprelu_" if config.has_threshold else "") + ("skip_" if config.skip else "") + "transcoder"
    store = header.provenance.get("store") or {}
    metadata = saelens_metadata(header) | {"hook_name_out": transformer_lens_name(store.get("target") or {})}
    cfg = {
        "architecture": kind,
        "d_in": config.d_model,
        "d_out": config.d_out,
        "d_sae": config.width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    write_bytes(folder / "sae_weights.safetensors", safetensors_bytes(tensors))
    write_json(folder / "cfg.json", cfg)


def write_saelens(sae: NestedSAE, header: Header, folder: Path) -> None:
    """cfg.json and sae_weights.safetensors of SAELens 6; batchtopk travels as jumprelu with its inference threshold."""
    config = sae.config
    if config.is_transcoder:
        write_saelens_transcoder(sae, header, folder)
        return
    tensors = folded(sae)
    architecture = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "jumprelu"}[
        config.activation
    ]
    settings: dict[str, Any] = {"k": config.k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}
    if config.layernorm != "none":
        architecture, settings = SAELENS_NESTED, layernorm_settings(sae)
        tensors |= {
            "ln_gain": sae.ln_gain.detach().float(),
            "ln_bias": sae.ln_bias.detach().float(),
            "center": sae.center,
        }
        if config.activation == "jumprelu":  # compared after LayerNorm, which has no units
            tensors["threshold"] = sae.threshold.detach().float()
    cfg = {
        "architecture": architecture,
        "d_in": config.d_model,
        "d_sae": config.width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": saelens_metadata(header),
        **settings,
    }
    write_bytes(folder / "sae_weights.safetensors", safetensors_bytes(tensors))
    write_json(folder / "cfg.json", cfg)


def layernorm_settings(sae: NestedSAE) -> dict[str, Any]:
    """Further fields of cfg.json for `pipeline.sae.saelens`. Dividing the pre-activations by s divides LayerNorm's eps by s²."""
    scale, config = float(sae.scale), sae.config
    return {
        "levels": list(config.levels),
        "activation": config.activation,
        "layernorm": config.layernorm,
        "layernorm_eps": config.layernorm_eps / scale**2,
        "latent_scale": 1.0 if config.layernorm_rescale else 1 / scale,
        "layernorm_rescale": config.layernorm_rescale,
        "k": config.k,
    }


def transformer_lens_name(store: Mapping[str, Any]) -> str | None:
    """TransformerLens's name of a store's hook point, of a module's output the name it came with. What an MLP reads is behind the
    gain of its norm, which it folds away."""
    if store.get("called"):
        return str(store["called"])
    forms = {"embed": "blocks.0.hook_resid_pre", "mlp_in": "blocks.{layer}.mlp.hook_in"}
    return place_name(store, forms.get(store.get("hook") or "", "blocks.{layer}.hook_{hook}"))


def saelens_metadata(header: Header) -> dict[str, Any]:
    """What SAELens and SAEBench look for; `sae_lens_version` keeps SAELens from rebuilding it as an old one's."""
    store = header.provenance.get("store") or {}
    return {
        "sae_lens_version": "6.0.0",
        "sae_lens_training_version": None,
        "model_name": str(store.get("model", "")).split("/")[-1],
        "hook_name": transformer_lens_name(store),
        "hook_head_index": None,
        "context_size": store.get("context"),
        "prepend_bos": True,
        "dataset_path": store.get("corpus"),
        "levels": list(header.sae.levels),
    }


def place_name(store: Mapping[str, Any], form: str) -> str | None:
    """Hook and layer as another library writes them; None for rows of a place that nobody named, whole or in part."""
    hook = store.get("hook", "resid_post")
    return None if hook is None or store.get("layer") is None else form.format(hook=hook, layer=store.get("layer"))


def dictionary_name(store: Mapping[str, Any]) -> str | None:
    """dictionary_learning's name of a hook point. Where that would be a module's own output, TransformerLens's, which is what is
    added to the stream."""
    if store.get("hook") in OWN_OUTPUTS:
        return transformer_lens_name(store)
    return place_name(store, "{hook}_layer_{layer}")


def write_dictionary_learning(sae: NestedSAE, header: Header, folder: Path) -> None:
    """ae.pt (plain tensors) and config.json of dictionary_learning. Raises UsageError for LayerNorm."""
    config = sae.config
    if config.is_transcoder:
        raise UsageError("dictionary_learning has no transcoder; export to saelens")
    if config.layernorm != "none":
        raise UsageError("dictionary_learning has no class with LayerNorm; export to saelens, or train without it")
    tensors = folded(sae)
    name, state = dictionary_state(sae, tensors)
    store = header.provenance.get("store") or {}
    trainer = {
        "trainer_class": f"{name}Trainer",
        "dict_class": name,
        "activation_dim": config.d_model,
        "dict_size": config.width,
        "layer": store.get("layer"),
        "lm_name": store.get("model"),
        "submodule_name": dictionary_name(store),
        "k": config.k,
        "group_sizes": [block.stop - block.start for block in config.blocks],
    }
    with atomic(folder / "ae.pt") as file:
        torch.save(state, file)
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": store.get("context")}})


def dictionary_state(sae: NestedSAE, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Class name and state dict of dictionary_learning for folded tensors."""
    config = sae.config
    linear = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T.contiguous(),
    }
    k = torch.tensor(config.k, dtype=torch.int)
    if config.activation == "relu":
        return "AutoEncoder", linear | {"bias": tensors["b_dec"]}
    if config.activation == "topk":
        return "AutoEncoderTopK", linear | {"b_dec": tensors["b_dec"], "k": k, "threshold": torch.tensor(-1.0)}
    if config.activation == "batchtopk" and bool((tensors["threshold"] == tensors["threshold"][0]).all()):
        sizes = torch.tensor([block.stop - block.start for block in config.blocks])
        extra = {"threshold": tensors["threshold"][0], "k": k, "group_sizes": sizes}
        return "MatryoshkaBatchTopKSAE", {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | extra
    shifted = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]  # this class does not subtract b_dec
    return "JumpReluAutoEncoder", tensors | {"b_enc": shifted}

"""SAEs made elsewhere, read as checkpoints. What decides what they compute is read exactly or refused by name.

    SAELens               cfg.json, sae_weights.safetensors
    dictionary_learning   config.json with a trainer, ae.pt
    matryoshka_sae        config.json, sae.pt (bartbussmann's; BatchTopK's too)
    sparsify              cfg.json, sae.safetensors
    Gemma Scope           params.npz
    Gemma Scope 2         params.safetensors, with or without config.json
    OpenAI                autoencoder.pt

A .pt is a pickle: it is read with weights_only, which runs nothing.

All become a NestedSAE that computes the same latents up to float32 rounding. Rows are raw: center 0, scale 1. Rows that
OpenAI's TopK, SAELens (layer_norm) and matryoshka_sae (input_unit_norm) normalise each by itself are `row_norm`. Transcoders of
SAELens (its four), sparsify and Gemma Scope 1 and 2 likewise: what they make is the `target` beside what they read.
`load_sae` and `read_sae` take these folders and our own checkpoints alike.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.base.digests import DIGESTS, require_digests
from pipeline.base.errors import CheckpointError, DamagedError, PipelineError, UsageError
from pipeline.base.fields import Fields, require_plain
from pipeline.base.files import hash_file, read_json, regular, sha256
from pipeline.sae.checkpoint import Header, load_checkpoint, read_header
from pipeline.sae.foreign_fields import (
    DICTIONARY_ACTIVATIONS,
    DICTIONARY_EXTRAS,
    DICTIONARY_FIELDS,
    DICTIONARY_GATED,
    DICTIONARY_STYLES,
    GEMMA_SCOPE_2_FIELDS,
    MATRYOSHKA_ACTIVATIONS,
    MATRYOSHKA_FIELDS,
    MATRYOSHKA_NEUTRAL,
    MODEL_HARMLESS,
    OPENAI_SETTINGS,
    SAELENS_ACTIVATIONS,
    SAELENS_FIELDS,
    SAELENS_NEUTRAL,
    SAELENS_TENSORS,
    SAELENS_TRANSCODERS,
    SPARSIFY_FIELDS,
    SPARSIFY_NEUTRAL,
)
from pipeline.sae.nested import NestedSAE, SAEConfig

Tensors = dict[str, Tensor]
About = dict[str, Any]
"""What a config says of where its SAE sits: hook, layer, model; what it does not say is not there."""


@dataclass(frozen=True)
class Format:
    """A folder of another trainer: its config (or "") and its weights, and how to read them."""

    source: str
    config: str
    weights: str
    read: Callable[[Path, Mapping[str, Any], Tensors], tuple[NestedSAE, About]]

    @property
    def files(self) -> tuple[str, ...]:
        """Names in the folder."""
        return (self.config, self.weights) if self.config else (self.weights,)


def format_of(folder: Path) -> Format | None:
    """The format that a folder holds, None for none of these."""
    return next(iter(formats_of(folder)), None)


def formats_of(folder: Path) -> list[Format]:
    """All formats whose files a folder holds."""
    return [f for f in FORMATS if all((folder / name).is_file() for name in f.files)] if folder.is_dir() else []


def folder_of(path: Path) -> Path:
    """For the weights of an SAE made elsewhere its folder, which names them with their config; any other path as it is."""
    return path.parent if any(path.name == known.weights for known in formats_of(path.parent)) else path


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds an SAE made elsewhere."""
    return format_of(folder) is not None


def sha256_of(path: Path) -> str:
    """What tells an SAE from others: the hash of a checkpoint's bytes, or over the files of a folder made elsewhere."""
    if not path.is_dir():
        return hash_file(path)
    return sha256("".join(f"{name} {hash_file(path / name)}\n" for name in require_format(path).files))


def require_format(folder: Path) -> Format:
    """The format of a folder. Raises CheckpointError when it holds none, or the weights of two."""
    found = formats_of(folder)
    if not found:
        raise CheckpointError(f"{folder}: expected {', '.join(f.source for f in FORMATS)}, found none of their files")
    if other := next((f for f in found if f.weights != found[0].weights), None):
        raise CheckpointError(
            f"{folder}: holds {found[0].weights} ({found[0].source}) and {other.weights} ({other.source}); move one away"
        )
    return found[0]


def load_sae(path: Path, device: torch.device | str = "cpu") -> tuple[NestedSAE, Header]:
    """An SAE of a checkpoint file or of a folder made elsewhere, ready to encode. Raises CheckpointError, DamagedError."""
    if path.is_dir():
        sae, provenance = load_foreign(path)
        sae, header = sae.to(device), Header(sae.config, 0, provenance)
    else:
        sae, header = load_checkpoint(path, device)
    sae.made_for = header.provenance.get("store") or {}
    return sae, header


def read_sae(path: Path) -> Header:
    """What a checkpoint, or a folder made elsewhere, says about itself."""
    return load_sae(path)[1] if path.is_dir() else read_header(path)


def load_foreign(folder: Path, place: Path | None = None) -> tuple[NestedSAE, dict[str, Any]]:
    """The SAE, and a provenance {member, source, config, store: what it says of hook, layer and model}.

    place: what its files would say there, since some formats leave it to their path. Raises CheckpointError for
    what cannot be expressed or tensors that do not agree, DamagedError for a file that cannot be read, or of an export of ours
    is not what its digests say.
    """
    kind = require_format(folder)
    require_digests(folder / DIGESTS, folder)
    data: Mapping[str, Any] = {}
    if kind.config:
        data = Fields(folder / kind.config, read_json(folder / kind.config)).data
        require_plain(folder / kind.config, data)
    tensors, settings = read_weights(folder / kind.weights)
    if settings and kind.config:
        raise DamagedError(f"{folder / kind.weights}: not a table of tensors; get it again")
    require_finite(folder / kind.weights, tensors)
    try:
        sae, about = kind.read(place or folder, data or settings, tensors)
    except UsageError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except PipelineError:
        raise
    except (KeyError, RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else ""
        raise CheckpointError(
            f"{folder}: config and tensors do not agree ({type(error).__name__}: {reason})"
        ) from error
    known = {name: value for name, value in about.items() if value is not None}
    provenance = {"member": member_name(folder), "source": kind.source, "config": data, "store": known}
    return sae.eval().requires_grad_(False), provenance


def stays_itself(folder: Path, place: Path) -> bool:
    """Whether the files of a folder made elsewhere would be the same SAE of the same hook, layer and model in another place."""
    sae, provenance = load_foreign(folder)
    try:
        moved, there = load_foreign(folder, place)
    except CheckpointError:
        return False
    return (moved.config, there["store"]) == (sae.config, provenance["store"])


def require_finite(path: Path, tensors: Tensors) -> None:
    """Raise DamagedError for a number that is none, or infinite; but for a threshold, which may be one that nothing passes."""
    for name, tensor in tensors.items():
        wrong = tensor.isnan() if name == "threshold" else ~tensor.isfinite()
        if bool(wrong.any()):
            raise DamagedError(f"{path}: {name} holds numbers that are not finite; get it again")


def member_name(folder: Path) -> str:
    """The folder's name, behind its parent's where suites name all of theirs alike (trainer_0, layers.3)."""
    folder = folder.resolve()
    alike = re.fullmatch(r"(trainer|layer|layers|average_l0|canonical)([._]\d+)?(\..*)?", folder.name)
    return f"{folder.parent.name}-{folder.name}" if alike else folder.name


def read_weights(path: Path) -> tuple[Tensors, About]:
    """Named tensors of a .safetensors, .npz or .pt, in float32 where they are floats, and what else a .pt holds by name:
    plain text, numbers and tables of them. Nothing is unpickled but that."""
    try:
        with open(path, "rb", opener=regular) as file:
            if path.suffix == ".safetensors":
                state: object = load_file(path)
            elif path.suffix == ".npz":
                with np.load(file, allow_pickle=False) as arrays:
                    state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
            else:
                state = torch.load(file, "cpu", weights_only=True)
        if not isinstance(state, dict):
            raise DamagedError(f"{path}: not a table of tensors; get it again")
        tensors = {str(name): one for name, one in state.items() if isinstance(one, Tensor)}
        settings = {str(name): one for name, one in state.items() if not isinstance(one, Tensor)}
        require_plain(path, settings)
        return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, settings
    except PipelineError:
        raise
    except Exception as error:  # what a damaged zip, npy or pickle makes their readers raise is of any kind
        first = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DamagedError(f"{path}: cannot be read ({first}); get it again") from error


MODULES = {
    "mlp": "mlp_out",
    "post_feedforward_layernorm": "mlp_out",
    "self_attn": "attn_out",
    "attn": "attn_out",
    "attention": "attn_out",
    "post_attention_layernorm": "attn_out",
}
"""Modules of a layer whose output may be what is added to the stream, and what that is called. In some models it is (Llama's
`mlp`), in some a norm comes between (Gemma-2's `mlp`), in some the norm comes before: which is seen in the model, not here."""
OWN_OUTPUTS = {"mlp_out": "mlp", "attn_out": "self_attn|attn|attention"}
"""What dictionary_learning calls so: the output of the model's own module, under one of these names, whatever comes behind it."""
OTHER_POINTS = {
    r"blocks\.\d+\.hook_mlp_in": "the MLP's own copy of resid_mid, before its norm",
    r"blocks\.\d+\.ln[12](_post)?\.hook_\w+": "inside a norm, before its gain",
    r"blocks\.\d+\.attn\.hook_\w+": "inside attention, before its output matrix",
    r"blocks\.\d+\.(hook_\w+_input|hook_attn_in)": "attention's own copies of the stream, one a head",
    r"blocks\.\d+\.mlp\.hook_(pre|post|mid|pre_linear)": "inside the MLP",
    r"(hook_embed|hook_pos_embed)": "a part of the embedding; the stream before the first layer is blocks.0.hook_resid_pre",
}
"""Points of TransformerLens that are none of ours, and what they are."""


def hook_point(folder: Path, name: str) -> About:
    """Layer and hook of a name of TransformerLens, transformers or dictionary_learning; where it is the output of a module, the
    `module` (or those it may be, with | between) and the name itself as `called`. Raises CheckpointError for others.

    The stream before layer n is that after layer n − 1. TransformerLens's attn_out and mlp_out are what is added to the stream,
    behind Gemma-2's second norms, as ours are; its bridge's `mlp.hook_in` is what the MLP's module reads.
    """
    patterns = (
        r"blocks\.(?P<layer>\d+)\.hook_(?P<hook>resid_post|resid_pre|resid_mid|mlp_out|attn_out)",
        r"blocks\.(?P<layer>\d+)\.mlp\.hook_(?P<hook>in)",
        r"(?P<hook>resid_post|resid_pre|resid_mid|mlp_in|mlp_out|attn_out|attention_out)_layer_(?P<layer>\d+)",
        r"(?:(?:model|transformer|gpt_neox|language_model)\.)*(?:layers|h)\.(?P<layer>\d+)"
        rf"(?:\.(?P<module>{'|'.join(MODULES)}))?(?:\.output)?",
    )
    match = next((m for pattern in patterns if (m := re.fullmatch(pattern, name))), None)
    if match is None:
        what = next((what for pattern, what in OTHER_POINTS.items() if re.fullmatch(pattern, name)), "not known here")
        raise CheckpointError(f"{folder}: made for {name!r}, a hook that is {what}; it cannot be placed")
    found = {key: value for key, value in match.groupdict().items() if value is not None}
    layer, module = int(found["layer"]), found.get("module")
    if module is not None:
        return {"hook": MODULES[module], "layer": layer, "module": module, "called": name}
    hook = found.get("hook", "resid_post")
    hook = {"in": "mlp_in", "attention_out": "attn_out"}.get(hook, hook)
    if hook in OWN_OUTPUTS and not name.startswith("blocks."):
        return {"hook": hook, "layer": layer, "module": OWN_OUTPUTS[hook], "called": name}
    if hook == "resid_pre":
        return {"hook": "resid_post", "layer": layer - 1} if layer else {"hook": "embed"}
    return {"hook": hook, "layer": layer}


def is_module(made_for: Mapping[str, Any], found: str) -> bool:
    """Whether an SAE is of the output of the module called `found`, or does not say of which."""
    return made_for.get("module") is None or found in str(made_for["module"]).split("|")


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


def layer_in(name: str) -> int | None:
    """The layer that the name of a hook or module says, in its library's own count."""
    found = re.search(r"(?:blocks|layers|layer|h)[._](\d+)", name)
    return int(found[1]) if found else None


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


def refuse_unknown(
    folder: Path,
    where: str,
    data: Mapping[str, Any],
    known: str,
    neutral: Mapping[str, tuple[object, ...]] | None = None,
) -> None:
    """Raise CheckpointError for a field that may change what is computed: one that is not known, or is one of `neutral` with
    another value than those, which change nothing."""
    for name, values in (neutral or {}).items():
        refuse_unless(folder, name, data.get(name, values[0]), values)
    if unknown := sorted(data.keys() - set(known.split()) - (neutral or {}).keys()):
        raise CheckpointError(
            f"{folder}: {where} says {unknown[0]!r}, of which is not known whether it changes latents"
        )


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


def from_sparsify(folder: Path, data: Mapping[str, Any], tensors: Tensors) -> tuple[NestedSAE, About]:
    """topk of relu((x − b_dec) W_enc + b_enc); the hook point is the folder's name. A transcoder, which subtracts no b_dec, goes
    from the input of the module of that name to its output, with W_skip x, [d_out, d_in], where it has a skip connection."""
    refuse_unknown(folder, "cfg.json", data, SPARSIFY_FIELDS, SPARSIFY_NEUTRAL)
    fields = Fields(folder / "cfg.json", data)
    transcodes, skips = (name in data and fields.flag(name) for name in ("transcode", "skip_connection"))
    refuse_unless(folder, "skip_connection (of an SAE)", skips, (False, True) if transcodes else (False,))
    only(folder, tensors, "encoder.weight encoder.bias W_dec b_dec" + " W_skip" * skips)
    tensors = tensors | {"W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"]}
    width = fields.whole("num_latents", 0) or fields.whole("expansion_factor", 0) * len(tensors["W_enc"])
    require_size(folder, tensors, fields.some_whole("d_in"), width or None)
    k, name = fields.whole("k", least=1), folder.resolve().name
    placed = hook_point(folder, name) if re.search(r"(^|\.)(layers|blocks|h)\.\d|embed|wte", name) else {}
    if not transcodes:
        return assemble("topk", k, [len(tensors["W_dec"])], tensors), placed
    if placed and placed["hook"] != "mlp_out":
        raise CheckpointError(
            f"{folder}: a transcoder of {name!r}, whose input is no point known here; it cannot be placed"
        )
    sae = assemble_transcoder("topk", k, tensors | ({"W_skip": tensors["W_skip"].T} if skips else {}))
    return sae, {"hook": "mlp_in", "layer": placed["layer"], "target": placed} if placed else {}


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


def from_openai(folder: Path, data: Mapping[str, Any], tensors: Tensors) -> tuple[NestedSAE, About]:
    """relu or topk of (x − b_dec) W_enc + b_enc; those with TopK normalise each row by itself. Where the folder is below one of
    OpenAI's names (`resid_post_mlp_v5_32k/autoencoders/8`), that is a location in GPT-2 and its layer."""
    refuse_unknown(folder, "autoencoder.pt", data, OPENAI_SETTINGS)
    kind, settings = (
        data.get("activation", "ReLU"),
        Fields(folder / "autoencoder.pt", data).inner("activation_state_dict"),
    )
    refuse_unless(folder, "activation", kind, ("ReLU", "TopK"))
    selects = kind == "TopK"
    refuse_unknown(folder, "autoencoder.pt's activation_state_dict", settings.data, "k postact_fn" * selects)
    refuse_unless(folder, "postact_fn", settings.data.get("postact_fn", "ReLU"), ("ReLU",))
    only(folder, tensors, "pre_bias latent_bias encoder.weight decoder.weight", OPENAI_STATISTICS)
    names = {"b_dec": "pre_bias", "b_enc": "latent_bias"}
    turned = {"W_enc": tensors["encoder.weight"].T, "W_dec": tensors["decoder.weight"].T}
    turned |= {name: tensors[theirs] for name, theirs in names.items()}
    require_size(folder, turned, None, None)
    k = settings.whole("k", least=1) if selects else 0
    sae = assemble("topk" if selects else "relu", k, [turned["W_enc"].shape[1]], turned, row_norm=selects)
    place = re.search(rf"/({'|'.join(OPENAI_LOCATIONS)})(?:_v\w+)?/autoencoders/(\d+)$", str(folder.resolve()))
    if place is None:
        return sae, {}
    return sae, {"model": "gpt2", "hook": OPENAI_LOCATIONS[place[1]], "layer": int(place[2])}


OPENAI_STATISTICS = "stats_last_nonzero latents_activation_frequency latents_mean_square"
OPENAI_LOCATIONS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "attn_out",
    "resid_post_attn": "resid_mid",
    "resid_delta_mlp": "mlp_out",
    "resid_post_mlp": "resid_post",
}
"""OpenAI's names of a layer's points, and ours; the first is none of ours, so its SAEs are scored nowhere."""


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


FORMATS = (
    Format("SAELens", "cfg.json", "sae_weights.safetensors", from_saelens),
    Format("dictionary_learning", "config.json", "ae.pt", from_dictionary_learning),
    Format("sparsify", "cfg.json", "sae.safetensors", from_sparsify),
    Format("matryoshka_sae", "config.json", "sae.pt", from_matryoshka_sae),
    Format("Gemma Scope", "", "params.npz", from_gemma_scope),
    Format("Gemma Scope 2", "config.json", "params.safetensors", from_gemma_scope_2),
    Format("Gemma Scope 2", "", "params.safetensors", from_gemma_scope_2),
    Format("OpenAI", "", "autoencoder.pt", from_openai),
)


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


def set_threshold(folder: Path, threshold: Tensor) -> Tensor:
    """A batchtopk's threshold. Raises CheckpointError when training never set it."""
    if not float(threshold) > 0:
        raise CheckpointError(
            f"{folder}: its threshold was never set (it is {float(threshold):g}), so inference would differ from training"
        )
    return threshold


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


def only(folder: Path, tensors: Tensors, names: str, optional: str = "") -> None:
    """Raise CheckpointError unless the tensors are exactly those named, and of the optional ones any."""
    needed = set(names.split())
    if unknown := sorted(tensors.keys() - needed - set(optional.split())):
        raise CheckpointError(f"{folder}: tensors {unknown} are not known here, so what they compute is not either")
    if missing := sorted(needed - tensors.keys()):
        raise CheckpointError(f"{folder}: has no tensor {missing[0]!r}; get it again")


def require_size(folder: Path, tensors: Tensors, d_model: object, width: object) -> None:
    """Raise CheckpointError unless W_enc is a matrix of the size that the config says, where it says one, and W_dec has as many
    rows as that columns; both of floats."""
    found = list(tensors["W_enc"].shape)
    said = [d_model if d_model is not None else found[0], width if width is not None else found[-1]]
    if len(found) != 2 or not tensors["W_enc"].is_floating_point() or found != said:
        kind = tensors["W_enc"].dtype
        raise CheckpointError(
            f"{folder}: its W_enc should be floats of shape {said}, found {found} of {kind}; get it again"
        )
    rows = list(tensors["W_dec"].shape)
    if len(rows) != 2 or not tensors["W_dec"].is_floating_point() or rows[0] != found[1]:
        raise CheckpointError(f"{folder}: its W_dec should be floats with {found[1]} rows, found {rows}; get it again")


def refuse_unless(folder: Path, name: str, value: object, known: tuple[object, ...]) -> None:
    """Raise CheckpointError naming the field, its value and what can be expressed."""
    if not any(value is one or (type(value) is type(one) and value == one) for one in known):
        shown = str(value)[:60]
        raise CheckpointError(f"{folder}: {name} {shown!r} cannot be read; known are {', '.join(map(repr, known))}")

"""SAEs made elsewhere, read as checkpoints: SAELens folders and dictionary_learning folders (EVALUATION.md, section 4).

    SAELens               cfg.json, sae_weights.safetensors
    dictionary_learning   config.json with a trainer, ae.pt: the one pickle we read, with weights_only

Both become a NestedSAE that computes the same latents up to float32 rounding. What cannot be expressed is refused, never
approximated. Rows are raw: center 0, scale 1.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.base.errors import CheckpointError, DamagedError
from pipeline.base.files import hash_file, read_json, sha256
from pipeline.sae.nested import NestedSAE, SAEConfig

Tensors = dict[str, Tensor]
SAELENS_FILES = ("cfg.json", "sae_weights.safetensors")
DICTIONARY_FILES = ("config.json", "ae.pt")
SAELENS_ACTIVATIONS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
DICTIONARY_ACTIVATIONS = {
    "AutoEncoder": "relu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
    "JumpReluAutoEncoder": "jumprelu",
}


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds an SAE of one of the two formats."""
    return folder.is_dir() and any(
        all((folder / f).is_file() for f in files) for files in (SAELENS_FILES, DICTIONARY_FILES)
    )


def foreign_files(folder: Path) -> tuple[str, str]:
    """The config and weights of a foreign folder."""
    return SAELENS_FILES if (folder / SAELENS_FILES[0]).is_file() else DICTIONARY_FILES


def foreign_sha256(folder: Path) -> str:
    """Hash over both files."""
    return sha256("".join(f"{name} {hash_file(folder / name)}\n" for name in foreign_files(folder)))


def load_foreign(folder: Path) -> tuple[NestedSAE, dict[str, Any]]:
    """The SAE, and a provenance {member, source, config, store: what it says of layer}.

    Raises CheckpointError for an architecture that cannot be expressed or tensors that do not agree, DamagedError for a
    file that cannot be read.
    """
    names = foreign_files(folder)
    data, tensors = read_json(folder / names[0]), read_tensors(folder / names[1])
    saelens = names == SAELENS_FILES
    try:
        sae = from_saelens(folder, data, tensors) if saelens else from_dictionary_learning(folder, data, tensors)
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: config and tensors do not agree ({type(error).__name__}: {error})") from error
    trained = saelens_source(folder, data) if saelens else {"layer": data["trainer"].get("layer")}
    known = {name: value for name, value in trained.items() if value is not None}
    source = "SAELens" if saelens else "dictionary_learning"
    provenance = {"member": folder.resolve().name, "source": source, "config": data, "store": known}
    return sae.eval().requires_grad_(False), provenance


def read_tensors(path: Path) -> Tensors:
    """Named tensors of a safetensors file or of an ae.pt, in float32 where they are floats; nothing else is unpickled."""
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedError(f"{path}: cannot be read ({first}); get it again") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise DamagedError(f"{path}: not a table of tensors")
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def saelens_source(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """The layer whose output a SAELens config names. Raises CheckpointError for a hook that is not a layer's output."""
    metadata = data.get("metadata") or data
    hook = metadata.get("hook_name")
    if hook is None:
        return {}
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", hook):
        return {"layer": int(match[1]) - (match[2] == "pre")}
    raise CheckpointError(
        f"{folder}: made for {hook!r}; only residual streams (hook_resid_post or _pre) can be evaluated"
    )


def from_saelens(folder: Path, data: dict[str, Any], tensors: Tensors) -> NestedSAE:
    """standard, topk or jumprelu: relu((x − b_dec · apply) W_enc + b_enc), decode z W_dec + b_dec."""
    architecture = data["architecture"]
    refuse_unless(folder, "architecture", architecture, tuple(SAELENS_ACTIVATIONS))
    for name in ("normalize_activations", "reshape_activations"):  # others must be folded into the weights first
        refuse_unless(folder, name, data.get(name, "none"), ("none",))
    refuse_unless(folder, "rescale_acts_by_decoder_norm", data.get("rescale_acts_by_decoder_norm", False), (False,))
    refuse_unless(folder, "activation_fn", data.get("activation_fn", "relu"), ("relu", "topk", "jumprelu"))
    known = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
    if unknown := sorted(tensors.keys() - known):
        raise CheckpointError(f"{folder}: tensors {unknown} are not known for {architecture}")
    if not data.get("apply_b_dec_to_input", True):
        tensors = tensors | {"b_enc": tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]}
    return assemble(SAELENS_ACTIVATIONS[architecture], int(data.get("k") or 0), [len(tensors["W_dec"])], tensors)


def from_dictionary_learning(folder: Path, data: dict[str, Any], tensors: Tensors) -> NestedSAE:
    """AutoEncoder, TopK, BatchTopK, Matryoshka (its groups become levels) or JumpRelu, in either style of names."""
    trainer = data["trainer"]
    kind = trainer["dict_class"]
    refuse_unless(folder, "dict_class", kind, tuple(DICTIONARY_ACTIVATIONS))
    activation = DICTIONARY_ACTIVATIONS[kind]
    if "encoder.weight" in tensors:
        bias = "bias" if "bias" in tensors else "b_dec"
        same = {"W_enc": tensors["encoder.weight"].T, "W_dec": tensors["decoder.weight"].T, "b_dec": tensors[bias]}
        tensors = tensors | same | {"b_enc": tensors["encoder.bias"]}
    width = len(tensors["W_dec"])
    if activation == "jumprelu":  # does not subtract b_dec
        tensors = tensors | {"b_enc": tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]}
    if activation == "batchtopk" and float(tensors["threshold"]) < 0:
        raise CheckpointError(
            f"{folder}: its threshold was never set (it is negative), so inference would differ from training"
        )
    sizes = tensors["group_sizes"].tolist() if "group_sizes" in tensors else [width]
    levels = torch.tensor(sizes).cumsum(0).tolist()
    return assemble(activation, int(tensors.get("k", trainer.get("k")) or 0), levels, tensors)


def assemble(activation: Any, k: int, levels: list[int], tensors: Tensors) -> NestedSAE:
    """A NestedSAE of raw rows from tensors of our names; a single threshold goes to every latent."""
    d_model, width = tensors["W_enc"].shape
    select = k if activation in ("topk", "batchtopk") else 0
    sae = NestedSAE(SAEConfig(d_model, width, tuple(int(m) for m in levels), activation, select))
    state = {name: tensors[name].contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if sae.config.has_threshold:
        state["threshold"] = tensors["threshold"].expand(width).contiguous()
    sae.load_state_dict(state | {"center": torch.zeros(d_model), "scale": torch.ones(())})
    return sae


def refuse_unless(folder: Path, name: str, value: object, known: tuple[object, ...]) -> None:
    """Raise CheckpointError naming the field, its value and what can be expressed."""
    if value not in known:
        raise CheckpointError(f"{folder}: {name} {value!r} cannot be read; known are {', '.join(map(repr, known))}")

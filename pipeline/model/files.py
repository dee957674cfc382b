"""Where a language model's files are: a local folder, or a Hub id resolved once to the folder of its snapshot."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from torch import Tensor

from pipeline.base import network
from pipeline.base.errors import ModelError, first_line, is_failure, lacks_memory
from pipeline.base.fields import Fields
from pipeline.base.files import hash_file, read_any_json, read_json, sha256
from pipeline.base.kept import kept_hash

WANTED = ("*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors")
"""What is fetched of a Hub repository: config, tokenizer, safetensors weights; never pickles."""

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "added_tokens*", "special_tokens*", "spiece*")


def model_folder(model: str, revision: str | None, *, trust_remote_code: bool = False) -> tuple[Path, str]:
    """The folder with the model's files, and the commit it is at (`local` for a folder).

    Raises ModelError when there is neither, or the Hub refuses it, saying what to do.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(f"{local}: not a Hugging Face model folder, it has no config.json")
        require_plain(local)
        return local, "local"
    if model.startswith((".", "/", "~")) or "/" in model.partition("/")[2]:
        raise ModelError(
            f"{local}: no such folder; give a Hugging Face model folder or a Hub id such as google/gemma-2-2b"
        )
    patterns = [*WANTED, "*.py"] if trust_remote_code else list(WANTED)
    with hub_errors(model):
        folder = Path(
            network.retried(lambda: snapshot_download(model, revision=revision, allow_patterns=patterns), model)
        )
    require_plain(folder)
    return folder, folder.name


UNAPPLIED = {
    "adapter_config.json": "an adapter (LoRA and the like), which is not applied here; merge it into the weights first",
    "adapter_model.safetensors": "an adapter's weights, which are not applied here; merge them into the others first",
    "adapter_model.bin": "an adapter's weights, which are not applied here; merge them into the others first",
    "quantize_config.json": "quantised weights, which are not read here; give the model that was quantised",
    "quant_config.json": "quantised weights, which are not read here; give the model that was quantised",
    "hf_quant_config.json": "quantised weights, which are not read here; give the model that was quantised",
}
"""Files of a model folder that say that its weights alone are not the model."""


def require_plain(folder: Path) -> None:
    """Raise ModelError where a model folder holds more than is read: adapters, quantised weights, weights twice."""
    for name, what in UNAPPLIED.items():
        if (folder / name).exists():
            raise ModelError(f"{folder}: has {name}: {what}")
    config = read_any_json(folder / "config.json")
    parts = (
        [config, *(value for value in config.values() if isinstance(value, dict))] if isinstance(config, dict) else []
    )
    if found := next((part["quantization_config"] for part in parts if part.get("quantization_config")), None):
        method = found.get("quant_method", "") if isinstance(found, dict) else found
        raise ModelError(f"{folder}: {UNAPPLIED['quantize_config.json']} (quantization_config {method} in config.json)")
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() and index.exists():
        raise ModelError(f"{folder}: has both {whole.name} and {index.name}; which are the weights? Keep one")
    if index.exists():
        named = set(Fields(index, read_json(index)).texts("weight_map").values())
        there = {path.name for path in folder.glob("model*.safetensors")}
        if missing := sorted(named - there):
            raise ModelError(f"{folder}: {missing[0]} is missing, which {index.name} names; get it again")
        if left := sorted(there - named):
            raise ModelError(f"{folder}: {left[0]} is not among the files that {index.name} names; take it away")


def weights_sha256(folder: Path) -> str:
    """Hash over the names and contents of the safetensors files in a model folder; reads them all, once (`kept.py`)."""
    files = sorted(folder.glob("model*.safetensors"))
    return sha256("".join(f"{path.name} {kept_hash(path)}\n" for path in files))


def mlp_norm_weight(folder: Path, layer: int) -> Tensor:
    """Weight [d_model] of the norm before the MLP of a layer, from a Gemma-2's files; no model is loaded. Raises ModelError
    where they hold none."""
    name = f"layers.{layer}.pre_feedforward_layernorm.weight"
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names: list[str] = list(file.keys())
            if found := [key for key in names if key.endswith(name)]:
                weight: Tensor = file.get_tensor(found[0])
                return weight
    raise ModelError(f"{folder}: no file of it holds {name}; the transcoder reads Gemma-2's norm, so give a Gemma-2")


NO_NUMBERS = {"_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "use_cache"}
"""Fields of a model's config.json that no activation depends on; the dtype is an option of what runs it."""


def architecture_sha256(folder: Path) -> str | None:
    """Hash of a model's config.json, which softcaps, windows and rotary angles hang on as much as on weights; not of what changes
    no number: where it came from, and who saved it. None where there is none. Raises DamagedError."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    known = Fields(path, read_any_json(path)).data
    numbers = {name: known[name] for name in known.keys() - NO_NUMBERS}
    text = json.dumps(
        numbers, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )  # with Infinity, which some have
    return sha256(text.encode("utf-8", "surrogatepass"))


def require_architecture(folder: Path, recorded: str | None, made: str) -> None:
    """Raise ModelError where a model's config.json is not that of the model which made what is called `made`, by the hash that
    was recorded of it (None: none was)."""
    found = architecture_sha256(folder)
    if recorded not in (None, found):
        raise ModelError(
            f"{folder}/config.json: not that of the model which made {made} (hash {str(found)[:10]}, there "
            f"{recorded[:10]}): a softcap, a window or angles are others, so it is another model; put that file back"
        )


def loaded_from(model: Any) -> Path | None:
    """The folder whose config.json a live model was loaded with, of a Hub's snapshot too; None where that is not known here."""
    name = str(getattr(model.config, "_name_or_path", ""))
    if Path(name).is_dir():
        return Path(name) if name else None
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=getattr(model.config, "_commit_hash", None))
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def tokenizer_sha256(folder: Path) -> str:
    """Hash over the names and contents of the tokenizer's files in a model folder."""
    files = sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
    return sha256("".join(f"{path.name} {hash_file(path)}\n" for path in files))


@contextlib.contextmanager
def hub_errors(model: str) -> Iterator[None]:
    """Turn what the Hub and transformers say into one ModelError line with the next step."""
    try:
        with network.hub_errors(model, ModelError, f"https://huggingface.co/{model}"):
            yield
    except ModelError:
        raise
    except torch.OutOfMemoryError:
        raise
    except BaseException as error:  # whatever an architecture's own code raises
        if not is_failure(error) or lacks_memory(error):
            raise
        hint = "; pass --trust-remote-code to run the model's own code" if "trust_remote_code" in str(error) else ""
        raise ModelError(f"{model}: cannot be loaded ({first_line(error)}){hint}") from error

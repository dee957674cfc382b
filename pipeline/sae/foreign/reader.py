"""Finds the format of a folder, reads its files and hands them to who knows it. `load_sae` and `read_sae` take our own
checkpoints alike."""

from __future__ import annotations

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
from pipeline.sae.foreign.assembly import Tensors
from pipeline.sae.foreign.dictionary_learning import from_dictionary_learning
from pipeline.sae.foreign.gemma_scope import from_gemma_scope, from_gemma_scope_2
from pipeline.sae.foreign.hooks import About
from pipeline.sae.foreign.matryoshka_sae import from_matryoshka_sae
from pipeline.sae.foreign.openai import from_openai
from pipeline.sae.foreign.saelens import from_saelens
from pipeline.sae.foreign.sparsify import from_sparsify
from pipeline.sae.member import require_own
from pipeline.sae.nested import NestedSAE


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


def names_for(path: Path) -> list[str]:
    """What a file of weights of another trainer, by its ending, would have to be called; [] for a checkpoint, and a folder."""
    ending = path.suffix if path.suffix != ".safetensors" and path.is_file() else None
    return [f"{known.weights} ({known.source})" for known in FORMATS if Path(known.weights).suffix == ending]


def require_named(path: Path) -> None:
    """Raise CheckpointError for a file of another trainer's weights under a name that no format has."""
    if names := names_for(path):
        raise CheckpointError(
            f"{path}: SAEs of other trainers are read by their folder, where such a file is called {' or '.join(names)}; "
            f"give it that name, in a folder of its own"
        )


def load_sae(path: Path, device: torch.device | str = "cpu") -> tuple[NestedSAE, Header]:
    """An SAE of a checkpoint file or of a folder made elsewhere, ready to encode. Raises CheckpointError, DamagedError."""
    require_named(path)
    if path.is_dir():
        sae, provenance = load_foreign(path)
        sae, header = sae.to(device), Header(sae.config, 0, provenance)
    else:
        sae, header = load_checkpoint(path, device)
        require_own(path, header.provenance)
    sae.made_for = header.provenance.get("store") or {}
    return sae, header


def read_sae(path: Path) -> Header:
    """What a checkpoint, or a folder made elsewhere, says about itself. Raises as `load_sae` does."""
    require_named(path)
    if path.is_dir():
        return load_sae(path)[1]
    require_own(path, (header := read_header(path)).provenance)
    return header


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
        if odd := [name for name, one in tensors.items() if one.layout != torch.strided or one.is_quantized]:
            raise DamagedError(
                f"{path}: {odd[0][:80]!a} is sparse or quantised, expected plain numbers; save it as those"
            )
        settings = {str(name): one for name, one in state.items() if not isinstance(one, Tensor)}
        require_plain(path, settings)
        return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, settings
    except PipelineError:
        raise
    except Exception as error:  # what a damaged zip, npy or pickle makes their readers raise is of any kind
        first = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DamagedError(f"{path}: cannot be read ({first}); get it again") from error

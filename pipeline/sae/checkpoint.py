"""A checkpoint: one safetensors file with everything in its header. Layout: FORMAT.md, "Checkpoint".

Loading needs nothing else: the SAE's config, step, store, training config and versions are in the header, and a crc32c
of header and tensors, so that a flipped byte is an error and not a slightly different SAE.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from pipeline.base.errors import CheckpointError, DamagedError
from pipeline.base.files import atomic, canonical_json, crc32c
from pipeline.sae.nested import NestedSAE, SAEConfig

FORMAT, VERSION = "nested-sae-checkpoint", 1
NAME = re.compile(r"step_(\d+)\.safetensors")
"""Of a checkpoint in a member's folder."""

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32"}
"""Names that safetensors has for the dtypes that are written."""


@dataclass(frozen=True)
class Header:
    """What a checkpoint says about itself. `provenance` is plain JSON: FORMAT.md lists its fields."""

    sae: SAEConfig
    step: int
    provenance: dict[str, Any]


def content_crc32c(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """crc32c of the header's canonical JSON, `crc32c` left out, then of each tensor's name, shape and bytes by name."""
    crc = crc32c(canonical_json({name: value for name, value in header.items() if name != "crc32c"}).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        crc = crc32c(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = crc32c(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header atomically as safetensors; the crc32c of both is added to the header.

    The file is laid out here, not by the library: that builds it whole in memory, one or two copies of the tensors, and
    orders its header differently from call to call, so that equal contents are other bytes.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sealed = {**header, "crc32c": content_crc32c(header, held)}
    layout: dict[str, Any] = {"__metadata__": {name: canonical_json(value) for name, value in sealed.items()}}
    order = sorted(held, key=lambda name: (-held[name].itemsize, name))  # every tensor at a multiple of its item's size
    end = 0
    for name in order:
        start, end = end, end + held[name].nbytes
        shape = list(held[name].shape)
        layout[name] = {"dtype": DTYPES[held[name].dtype], "shape": shape, "data_offsets": [start, end]}
    head = canonical_json(layout).encode()
    head = head.ljust(-(-len(head) // 8) * 8)
    with atomic(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            file.write(held[name].reshape(-1).view(torch.uint8).numpy().data)


def load_tensors(path: Path, format_name: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON header of a file that `save_tensors` wrote; checks format, version and crc32c.

    Raises CheckpointError when it is missing, of another format or version; DamagedError when bytes changed.
    """
    try:
        header = read_metadata(path, format_name, version)
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise DamagedError(f"{path}: not a whole safetensors file ({error}); use an earlier checkpoint") from error
    found, written = content_crc32c(header, tensors), header.get("crc32c")
    if found != written:
        raise DamagedError(f"{path}: bytes changed since it was written (crc32c {found}, in the header {written})")
    return tensors, header


def read_metadata(path: Path, format_name: str, version: int) -> dict[str, Any]:
    """The JSON header alone, without reading tensors. Raises as `load_tensors`, crc apart."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    except (safetensors.SafetensorError, ValueError) as error:
        raise DamagedError(f"{path}: not a whole safetensors file ({error}); use an earlier checkpoint") from error
    if header.get("format") != format_name:
        raise CheckpointError(f"{path}: expected a {format_name}, found {header.get('format', 'no header of ours')!r}")
    if header.get("version") != version:
        raise CheckpointError(f"{path}: version {header.get('version')!r} is not known here, which reads {version}")
    return header


def save_checkpoint(path: Path, sae: NestedSAE, step: int, provenance: Mapping[str, Any]) -> None:
    """Write one SAE atomically; `provenance` is JSON data as FORMAT.md lists it."""
    header = {"format": FORMAT, "version": VERSION, "sae": sae.config.to_dict(), "step": step, "provenance": provenance}
    save_tensors(path, sae.state_dict(), header)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[NestedSAE, Header]:
    """An SAE ready to encode, and what its header says. Raises CheckpointError or DamagedError."""
    tensors, header = load_tensors(path, FORMAT, VERSION)
    try:
        sae = NestedSAE(SAEConfig.from_dict(header["sae"]))
        sae.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: tensors and header do not agree ({error})") from error
    return sae.to(device).eval(), to_header(path, header)


def read_header(path: Path) -> Header:
    """What a checkpoint says about itself, without loading its tensors."""
    return to_header(path, read_metadata(path, FORMAT, VERSION))


def to_header(path: Path, header: Mapping[str, Any]) -> Header:
    """The typed header of a parsed one. Raises CheckpointError for a file under the name of another step."""
    named = NAME.fullmatch(path.name)
    if named and int(named[1]) != header["step"]:
        raise CheckpointError(
            f"{path}: its name says step {int(named[1])}, it holds step {header['step']}; rename it, or train that step again"
        )
    return Header(SAEConfig.from_dict(header["sae"]), header["step"], header["provenance"])

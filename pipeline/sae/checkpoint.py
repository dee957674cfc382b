"""A checkpoint: one safetensors file with everything in its header. Layout: FORMAT.md, "Checkpoint".

Loading needs nothing else: the SAE's config, step, store, training config and versions are in the header, and a crc32c
of header and tensors, so that a flipped byte is an error and not a slightly different SAE.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.base.errors import CheckpointError, DamagedError, UsageError, first_line
from pipeline.base.fields import Fields, require_plain
from pipeline.base.files import atomic, canonical_json, crc32c, regular
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE

FORMAT, VERSION = "nested-sae-checkpoint", 1
NAME = re.compile(r"step_(\d+)\.safetensors")
"""Of a checkpoint in a member's folder."""

LARGEST_HEADER = 1 << 24
"""Bytes that no header of ours comes near."""
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32"}
"""Names that safetensors has for the dtypes that are written."""
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


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


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in a file: bytes `start` to `stop` of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Contents:
    """A file's header and where its tensors lie; nothing of them is read yet. Made by `read_contents`, which checks both."""

    header: Fields
    places: dict[str, Place]


def read_contents(path: Path, format_name: str, version: int) -> Contents:
    """What a file that `save_tensors` wrote says it holds, its places checked against the file's own length.

    Raises CheckpointError when it is missing, of another format or version; DamagedError when it is anything else than it
    should be. What is allocated is at most a few times the header's own bytes.
    """
    try:
        with open(path, "rb", opener=regular) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, LARGEST_HEADER):
                raise DamagedError(
                    f"{path}: not a whole safetensors file (its header of {length} bytes is none, the file has {size}); use an "
                    "earlier checkpoint"
                )
            layout = Fields(path, json.loads(file.read(length)))
        metadata = layout.inner("__metadata__")
        header = Fields(path, {name: json.loads(metadata.text(name)) for name in metadata.data})
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise DamagedError(f"{path}: not a whole safetensors file ({reason}); use an earlier checkpoint") from error
    if header.data.get("format") != format_name:
        found = str(header.data.get("format", "no header of ours"))[:40]
        raise CheckpointError(f"{path}: expected a {format_name}, found {found!a}")
    if header.data.get("version") != version or isinstance(header.data["version"], bool):
        found = ascii(header.data.get("version"))[:40]
        raise CheckpointError(f"{path}: version {found} is not known here, which reads {version}")
    require_plain(path, dict(header.data))
    require_plain(path, dict(layout.data))
    return Contents(header, read_places(layout, 8 + length, size))


def read_places(layout: Fields, start: int, size: int) -> dict[str, Place]:
    """The tensors of a layout, one after the other from byte `start` to the file's end, each as long as its shape says."""
    places = {}
    for name in layout.data:
        if name == "__metadata__":
            continue
        entry = layout.inner(name)
        entry.only("dtype", "shape", "data_offsets")
        dtype = TORCH_DTYPES[entry.one_of("dtype", tuple(TORCH_DTYPES))]
        shape, offsets = tuple(entry.list_of_wholes("shape")), entry.list_of_wholes("data_offsets")
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
            raise entry.wrong("data_offsets", f"the bytes of {list(shape)} {dtype}", offsets)
        places[name] = Place(dtype, shape, start + offsets[0], start + offsets[1])
    end = start
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].stop)):
        if place.start != end:
            raise DamagedError(f"{layout.path}: tensor {name[:40]!a} does not begin where the one before it ends")
        end = place.stop
    if end != size:
        raise DamagedError(
            f"{layout.path}: its tensors end at byte {end}, the file at {size}; use an earlier checkpoint"
        )
    return places


def load_tensors(path: Path, format_name: str, version: int) -> tuple[dict[str, Tensor], Fields]:
    """Tensors and header of a file that `save_tensors` wrote; checks format, version and crc32c. Raises as `read_contents`."""
    contents = read_contents(path, format_name, version)
    return read_tensors(contents), contents.header


def read_tensors(contents: Contents) -> dict[str, Tensor]:
    """The tensors of a file. Raises DamagedError when its crc32c says that bytes changed."""
    header, tensors = contents.header, {}
    with open(header.path, "rb", opener=regular) as file:
        for name, place in contents.places.items():
            file.seek(place.start)
            data = np.fromfile(file, np.uint8, place.stop - place.start)
            if len(data) < place.stop - place.start:
                raise DamagedError(f"{header.path}: became shorter while it was read; use an earlier checkpoint")
            tensors[name] = torch.from_numpy(data).view(place.dtype).reshape(place.shape)
    found, written = content_crc32c(header.data, tensors), header.whole("crc32c")
    if found != written:
        raise DamagedError(
            f"{header.path}: bytes changed since it was written (crc32c {found}, in the header {written})"
        )
    return tensors


def verify_tensors(path: Path, known: Mapping[str, int]) -> str:
    """The format of a file of tensors, one of those known with their versions, every byte of it checked. Raises as
    `read_contents`."""
    for name, version in known.items():
        try:
            contents = read_contents(path, name, version)
        except CheckpointError:
            if name == tuple(known)[-1]:
                raise
            continue
        if name == FORMAT:
            to_header(contents)
        read_tensors(contents)
        return name
    raise AssertionError("no format is known")


def save_checkpoint(path: Path, sae: NestedSAE, step: int, provenance: Mapping[str, Any]) -> None:
    """Write one SAE atomically; `provenance` is JSON data as FORMAT.md lists it."""
    header = {"format": FORMAT, "version": VERSION, "sae": sae.config.to_dict(), "step": step, "provenance": provenance}
    save_tensors(path, sae.state_dict(), header)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[NestedSAE, Header]:
    """An SAE ready to encode, and what its header says. Raises CheckpointError or DamagedError."""
    contents = read_contents(path, FORMAT, VERSION)
    header = to_header(contents)
    tensors = read_tensors(contents)
    sae = NestedSAE(header.sae)
    sae.load_state_dict(tensors)
    return sae.to(device).eval(), header


def read_header(path: Path) -> Header:
    """What a checkpoint says about itself, without loading its tensors. Raises as `load_checkpoint`, crc32c apart."""
    return to_header(read_contents(path, FORMAT, VERSION))


def to_header(contents: Contents) -> Header:
    """The typed header of a file's. Raises DamagedError for fields that are not what they should be, CheckpointError for a
    file under the name of another step, or tensors that are not those of the SAE that the header describes."""
    fields = contents.header
    fields.only("format", "version", "sae", "step", "provenance", "crc32c")
    step, provenance = fields.whole("step"), require_provenance(fields.inner("provenance"))
    try:
        sae = SAEConfig.from_fields(fields.inner("sae"))
    except UsageError as error:
        raise CheckpointError(f"{fields.path}: {str(error)[:200]}") from error
    named = NAME.fullmatch(fields.path.name)
    if named and int(named[1]) != step:
        raise CheckpointError(
            f"{fields.path}: its name says step {int(named[1])}, it holds step {step}; rename it, or train that step again"
        )
    found = {name: place.shape for name, place in contents.places.items()}
    if found != sae.shapes or not all(place.dtype.is_floating_point for place in contents.places.values()):
        wrong = next((name for name in sae.shapes if found.get(name) != sae.shapes[name]), "another one")
        raise CheckpointError(
            f"{fields.path}: tensors and header do not agree (tensor {wrong}: expected {sae.shapes.get(wrong)}, found "
            f"{found.get(wrong)}, or one too many, or one of whole numbers); use an earlier checkpoint"
        )
    return Header(sae, step, provenance)


def require_provenance(fields: Fields) -> dict[str, Any]:
    """A header's provenance, whose parts that anything reads have the types that FORMAT.md gives them. Raises DamagedError."""
    store, train = fields.inner("store"), fields.inner("train")
    of_store = ("id", "model", "revision", "hook", "weights_sha256", "architecture_sha256", "tokenizer_sha256")
    numbers = ("layer", "d_model", "context")
    stores = (store, store.inner("target"))
    texts: dict[Fields, tuple[str, ...]] = {fields: ("member", "git", "source"), **dict.fromkeys(stores, of_store)}
    wholes: dict[Fields, tuple[str, ...]] = {fields: ("rows_seen", "fired_rows"), **dict.fromkeys(stores, numbers)}
    for part, names in texts.items():
        for name in names:
            part.some_text(name)
    for part, names in wholes.items():
        for name in names:
            part.some_whole(name)
    fields.some_number("dead")
    fields.texts("versions")
    train.some_text("recipe")
    train.some_whole("seed")
    return dict(fields.data)

"""Checkpoints made by an enemy end in one line that names the file before anything is allocated; never in a traceback."""

from __future__ import annotations

import contextlib
import json
import math
import random
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from evaluate.checkpoints.find import open_checkpoint
from pipeline.base.errors import CheckpointError, DamagedError
from pipeline.sae.checkpoint import content_crc32c, load_checkpoint, save_checkpoint
from pipeline.sae.foreign.reader import read_sae
from pipeline.sae.hub import model_card
from support.fuzzing import as_bytes, mutated, one_line_or_none
from test_sae import KINDS, random_sae

PROVENANCE: dict[str, Any] = {
    "member": "alpha0.2-seed0-0123456789",
    "train": {"recipe": "paper", "alpha": 0.2, "seed": 0, "levels": [16, 64]},
    "store": {"id": "a" * 64, "model": "google/gemma-2-2b", "revision": None, "layer": 19, "context": 128},
    "versions": {"torch": "2"},
    "git": "0123456",
    "rows_seen": 10_000,
    "fired_rows": 1000,
    "dead": 0.25,
}


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """A checkpoint's layout, its metadata as data, and the bytes of its tensors."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    layout = json.loads(raw[8 : 8 + n])
    layout["__metadata__"] = {name: json.loads(value) for name, value in layout["__metadata__"].items()}
    return layout, raw[8 + n :]


def assembled(layout: Any, tensors: dict[str, Tensor], rng: random.Random | None = None) -> bytes:
    """A safetensors header of a layout; metadata are JSON text again, sealed by an enemy who knows how, where they are still
    an object."""
    if isinstance(layout, dict) and isinstance(header := layout.get("__metadata__"), dict):
        with contextlib.suppress(ValueError):
            header["crc32c"] = content_crc32c(header, tensors)
        layout = layout | {"__metadata__": {name: json.dumps(value) for name, value in header.items()}}
    head = as_bytes(layout, rng) if rng is not None else json.dumps(layout).encode()
    return len(head).to_bytes(8, "little") + head


def read_everything(path: Path) -> None:
    """All that reads a checkpoint: its header alone, the model card made of it, and the SAE."""
    open_checkpoint(path)
    model_card(read_sae(path), None, "owner/name")
    load_checkpoint(path)


def fuzz_checkpoint(folder: Path, n: int, seed: int) -> int:
    """Read n mutated checkpoints; how many were refused."""
    path, rng, refused = folder / "a.safetensors", random.Random(seed), 0
    sae = random_sae(KINDS["batchtopk"])
    save_checkpoint(path, sae, 5, PROVENANCE)
    layout, body = parts(path)
    for _ in range(n):
        path.write_bytes(assembled(mutated(layout, rng), sae.state_dict(), rng) + body)
        refused += one_line_or_none(lambda: read_everything(path), path)
    return refused


def test_hostile_checkpoints_end_in_one_line(tmp_path: Path) -> None:
    """Mutated checkpoints are refused in one line that names them."""
    assert 450 < fuzz_checkpoint(tmp_path, 500, seed=1) <= 500


def test_small_file_claims_no_memory(tmp_path: Path) -> None:
    """A file of a few hundred bytes whose header speaks of gigabytes is refused before a byte of them is allocated."""
    sae = {"d_model": 16384, "width": 16384, "levels": [16384], "activation": "relu", "k": 0, "layernorm": "none"}
    sae |= {"layernorm_rescale": True, "layernorm_eps": 1e-8}
    header = {"format": "nested-sae-checkpoint", "version": 1, "sae": sae, "step": 0, "provenance": {}}
    empty = {"dtype": "F32", "shape": [16384, 16384], "data_offsets": [0, 1 << 30]}
    for layout in ({"__metadata__": header}, {"__metadata__": header, "W_enc": empty}):
        path = tmp_path / "small.safetensors"
        path.write_bytes(assembled(layout, {}))
        with (
            unittest.mock.patch("pipeline.sae.checkpoint.NestedSAE", side_effect=AssertionError("allocated")),
            unittest.mock.patch("numpy.fromfile", side_effect=AssertionError("read")),
            pytest.raises(
                (CheckpointError, DamagedError), match=r"small\.safetensors: (its tensors end|tensors and header)"
            ),
        ):
            load_checkpoint(path)


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**63])
def test_headers_longer_than_file_refused(tmp_path: Path, length: int) -> None:
    """A header whose length is not that of one is refused before it is read."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" * 20)
    with pytest.raises(DamagedError, match=rf"its header of {length} bytes is none, the file has 48"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"colour": 1}, "has a field 'colour'"),
        ({"k": True}, "'sae.k' should be a whole number"),
        ({"activation": "gelu"}, "'sae.activation' should be one of relu"),
        ({"layernorm_eps": math.nan}, "'sae.layernorm_eps' is no number that can be"),
        ({"levels": [64, 16]}, "must increase strictly"),
    ],
)
def test_config_of_a_checkpoint_is_typed(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """An unknown field, a wrong type, an unknown word, NaN and a contradiction are each named."""
    path, sae = tmp_path / "a.safetensors", random_sae(KINDS["relu"])
    save_checkpoint(path, sae, 5, PROVENANCE)
    layout, body = parts(path)
    layout["__metadata__"]["sae"] |= change
    path.write_bytes(assembled(layout, sae.state_dict()) + body)
    with pytest.raises((CheckpointError, DamagedError), match=says):
        load_checkpoint(path)


@pytest.mark.slow
def test_hostile_checkpoints_end_in_line(tmp_path: Path) -> None:
    """Likewise, ten thousand."""
    assert fuzz_checkpoint(tmp_path, 10_000, seed=2) > 9000

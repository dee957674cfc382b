"""Small folders of activations as others save them: rows of D, returned in order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D = 6


def rows_of(*shape: int, seed: int = 0) -> Tensor:
    """Random float32 rows."""
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def npy_folder(place: Path) -> Tensor:
    """Three files, of which the names' natural order is not the alphabet's."""
    place.mkdir()
    rows = rows_of(300)
    for k, part in enumerate(rows.split([100, 90, 110])):
        np.save(place / f"acts_{[1, 2, 10][k]}.npy", part.numpy())
    return rows


def safetensors_folder(place: Path) -> Tensor:
    """bf16, [sequence, position, d_model]."""
    place.mkdir()
    rows = rows_of(12, 8).bfloat16()
    for k, part in enumerate(rows.split([5, 7])):
        save_file({"acts": part.contiguous()}, place / f"{k}.safetensors")
    return rows.flatten(0, 1)


def saelens_folder(place: Path) -> Tensor:
    """As CacheActivationsRunner saves it: a column of [position, d_model] a hook, and token ids."""
    from datasets import Array2D, Dataset, Features, Sequence, Value

    rows = rows_of(12, 8)
    kinds = {
        "blocks.3.hook_mlp_out": Array2D(shape=(8, D), dtype="float32"),
        "token_ids": Sequence(Value("int32"), length=8),
    }
    tokens = np.arange(96, dtype=np.int32).reshape(12, 8)
    tokens[:, 0] = 1000
    data = {"blocks.3.hook_mlp_out": rows.numpy(), "token_ids": tokens}
    Dataset.from_dict(data, features=Features(kinds)).save_to_disk(str(place))
    return rows.flatten(0, 1)


def saev_folder(place: Path) -> Tensor:
    """Two layers, a CLS token, a last file that is longer than it says, as saev leaves it; layer 23 is returned."""
    place.mkdir()
    acts = rows_of(10, 2, 5)
    padded = torch.cat([acts, torch.zeros(2, 2, 5, D)])
    for k, part in enumerate(padded.split(6)):
        (place / f"acts{k:06d}.bin").write_bytes(part.numpy().tobytes())
    metadata = {"family": "clip", "ckpt": "ViT-B/16", "layers": [21, 23], "patches_per_ex": 4, "cls_token": True}
    metadata |= {"d_model": D, "n_ex": 10, "patches_per_shard": 60, "data": {}, "dtype": "float32", "protocol": "2.0"}
    (place / "metadata.json").write_text(json.dumps(metadata))
    shards = [{"name": "acts000000.bin", "n_ex": 6}, {"name": "acts000001.bin", "n_ex": 4}]
    (place / "shards.json").write_text(json.dumps(shards))
    return acts[:, 1].flatten(0, 1)


def torch_folder(place: Path) -> Tensor:
    """float16 states with their token ids."""
    place.mkdir()
    rows = rows_of(12, 8).half()
    torch.save({"states": rows[:4].clone(), "input_ids": torch.zeros(4, 8, dtype=torch.int64)}, place / "a.pt")
    torch.save({"states": rows[4:].clone(), "input_ids": torch.zeros(8, 8, dtype=torch.int64)}, place / "b.pt")
    return rows.flatten(0, 1)

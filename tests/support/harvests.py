"""Tiny harvests for tests: options, what a store should hold by the slow and plain way, a process that can be killed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harvest.config import HarvestConfig
from pipeline.store.reader import Store
from support import tiny_models

CONTEXT, SHARD_ROWS, BATCH = 16, 256, 6
"""A shard is 16 sequences in batches of 6, 6 and 4; 100 training sequences make 7 shards, the last one ragged."""


def harvest_config(model: Path, corpus: Path, store: Path, **changes: Any) -> HarvestConfig:
    """A harvest of 1600 training tokens and 320 evaluation tokens."""
    options: dict[str, Any] = {
        "layers": (1,),
        "tokens": 1600,
        "eval_tokens": 320,
        "context": CONTEXT,
        "device": "cpu",
        "dtype": "bf16",
        "batch_size": BATCH,
        "shard_rows": SHARD_ROWS,
        "chunk_rows": 64,
    }
    return HarvestConfig(model=str(model), corpus=str(corpus), store=str(store), **(options | changes))


def plain_rows(folder: Path, store: Store, split: str, layer: int) -> Tensor:
    """What the untouched Hugging Face model computes for a split: whole forward passes on the same batches."""
    tokens = torch.from_numpy(store.__dict__[split].tokens.astype("int64"))
    model = tiny_models.whole_model(folder, store.dtype)
    seen: list[Tensor] = []
    blocks = (
        model.transformer.h if hasattr(model, "transformer") else getattr(model, "gpt_neox", model.base_model).layers
    )
    blocks[layer].register_forward_hook(lambda _m, _a, out: seen.append(out if isinstance(out, Tensor) else out[0]))
    per_shard = SHARD_ROWS // CONTEXT
    for start in range(0, len(tokens), per_shard):
        for batch in tokens[start : start + per_shard].split(BATCH):
            with torch.no_grad():
                model(batch)
    return torch.cat([rows.flatten(0, 1) for rows in seen])


def store_bytes(path: Path) -> dict[str, str]:
    """Every file of a store and the hash of its bytes."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def harvest_process(config: HarvestConfig, environment: dict[str, str], repair: bool = False) -> None:
    """A harvest in a process of its own, as a worker of the given environment. Without fsync: nobody cuts the power."""
    os.environ |= environment
    os.fsync = lambda descriptor: None
    torch.set_num_threads(1)
    from harvest.run import run

    run(config, quiet=True, repair=repair)

"""Tiny harvests for tests: options, what a store should hold by the slow and plain way, a process that can be killed."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
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


def harvest_process(
    config: HarvestConfig, environment: dict[str, str], repair: bool = False, slow: Slow | None = None
) -> None:
    """A harvest in a process of its own, as a worker of the given environment. Without fsync: nobody cuts the power."""
    os.environ |= environment
    os.fsync = lambda descriptor: None
    torch.set_num_threads(1)
    from harvest.run import run

    if slow is not None:
        slow.begin(config)
    run(config, quiet=True, repair=repair)


@dataclass(frozen=True)
class Slow:
    """A process that notes beside the store which shards it began, and while it makes one waits until `n` others were committed,
    or all of its `others` have nothing more to make; once `last` are committed it makes none and waits to be killed. It waits for
    states, so that no outcome hangs on a machine's speed."""

    name: str
    others: int
    n: int = 0
    last: int = 1 << 30

    def begin(self, config: HarvestConfig) -> None:
        """From now on, in this process."""
        import harvest.forward
        import harvest.run

        make, batches = harvest.forward.harvest_shards, harvest.forward.batches

        def noting(*args: Any) -> None:
            make(*args)
            note(config, "end", self.name)

        def waiting(writer: Any, shard: Any, batch_size: int) -> Any:
            note(config, f"{shard.split}-{shard.k}", self.name)
            wanted = n_committed(config) + self.n
            while n_committed(config) < wanted and len(noted(config, "end")) < self.others:
                time.sleep(0.002)
            while n_committed(config) >= self.last:
                time.sleep(0.002)
            return batches(writer, shard, batch_size)

        harvest.run.harvest_shards, harvest.forward.batches = noting, waiting


def note(config: HarvestConfig, what: str, who: str) -> None:
    """For `noted`."""
    place = Path(f"{config.store}.noted") / what
    place.mkdir(parents=True, exist_ok=True)
    (place / who).touch()


def noted(config: HarvestConfig, what: str) -> list[str]:
    """Who noted a shard, as train-0, or its end."""
    return sorted(path.name for path in (Path(f"{config.store}.noted")).glob(f"{what}/*"))


def n_committed(config: HarvestConfig) -> int:
    """Shards of an unfinished store with a record."""
    return sum(path.name.isdigit() for path in Path(config.store).glob("*/resid/record/*"))

"""What a training reads: a store, and for transcoders a second one that holds the rows to be made."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.base.errors import CheckpointError, UsageError
from pipeline.store.cache import Cache
from pipeline.store.kept import KeptRows
from pipeline.store.layout import SplitLayout
from pipeline.store.objects import RemoteFiles
from pipeline.store.pair import require_same_rows
from pipeline.store.reader import Store
from pipeline.store.requests import Traffic
from pipeline.store.split import Split
from pipeline.store.staging import open_cached
from train.config import TrainConfig
from train.folder import FOR_LIVE
from train.step.member import Target


def multiple_of(store: Store, max_norm: float | None) -> float | None:
    """Which multiple of the median norm rows are left out beyond, of the option alone: None is the store's own, 0 (and a
    result of None) leaves none out."""
    return store.statistics.massive_multiple if max_norm is None else max_norm or None


@dataclass(frozen=True)
class Stores:
    """The rows that members read, and those that transcoders make; of SAEs both are one. Made by `open`."""

    read: Store
    target: Store | None = None
    cache: Cache | None = None

    @staticmethod
    def open(store: Path | str, target: Path | str | None = None, cache: Cache | None = None) -> Stores:
        """`cache`: where chunks of stores at a URL are kept. Raises what `Store.open` does, and MismatchError where the rows of
        the two are not of the same tokens."""
        found = Stores(open_cached(store, cache), None if target is None else open_cached(target, cache), cache)
        if found.target is not None:
            require_same_rows(found.read, found.target)
        return found

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """`Store.steady` of them all."""
        with contextlib.ExitStack() as stack:
            for store in self.all:
                stack.enter_context(store.steady())
            yield

    @property
    def traffic(self) -> Traffic | None:
        """What was asked of object storage so far; None where all rows are local."""
        remote = [store.files.traffic.copy() for store in self.all if isinstance(store.files, RemoteFiles)]
        return sum(remote[1:], remote[0]) if remote else None

    @property
    def all(self) -> tuple[Store, ...]:
        """One store, or two: that of the rows that are read first."""
        return (self.read,) if self.target is None else (self.read, self.target)

    @property
    def train(self) -> Split:
        """The training rows that are read."""
        return self.read.train

    @property
    def target_layout(self) -> SplitLayout | None:
        """The training rows that transcoders make."""
        return None if self.target is None else self.target.train.shape

    def kept(self, name: str, max_norm: float | None) -> KeptRows:
        """Rows of a split ("train" or "eval") that count in every store. max_norm: the option."""
        first, *others = (getattr(store, name).kept_rows(multiple_of(store, max_norm)) for store in self.all)
        kept: KeptRows = functools.reduce(KeptRows.__and__, others, first)
        return kept

    def space(self, config: TrainConfig, device: torch.device) -> tuple[Tensor, float]:
        """Centre, on the device, and scale of the training space of the rows that are read."""
        return space_of(self.read, config, device)

    def target_space(self, config: TrainConfig, device: torch.device) -> Target | None:
        """The same of the rows that transcoders make."""
        return None if self.target is None else Target(*space_of(self.target, config, device))

    def identity(self, config: TrainConfig) -> dict[str, Any]:
        """What checkpoints say of the store they were trained on: FORMAT.md, `provenance.store`. Raises UsageError for a skip
        connection without a target."""
        if config.skip and self.target is None:
            raise UsageError("--skip is of transcoders; give --target, the store of the rows that they are to make")
        found = identity_of(self.read, config)
        return found if self.target is None else found | {"target": identity_of(self.target, config)}


def identity_of(store: Store, config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint says of one store."""
    names = ("model", "revision", "weights_sha256", "layer", "d_model", "context")
    own = {name: store.config[name] for name in names}
    own |= {name: store.config[name] for name in ("hook", *FOR_LIVE) if name in store.config}
    measured = {"massive_multiple": store.statistics.massive_multiple, "mean_share": store.statistics.mean_share}
    return {"id": store.id, **own, **measured, "max_norm": multiple_of(store, config.max_norm)}


def require_hook(made_for: Mapping[str, Any], store: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless an SAE to start from is of the same hook as the store; another layer may be meant. What an SAE
    made elsewhere does not say is not compared."""
    own = {"hook": "resid_post"} if "id" in made_for else {}
    start, here = (own | dict(made_for)).get("hook"), store.get("hook", "resid_post")
    if None not in (start, here) and start != here:
        raise CheckpointError(f"init_from holds an SAE of {start}, the store is of {here}; choose another one")


def space_of(store: Store, config: TrainConfig, device: torch.device) -> tuple[Tensor, float]:
    """Centre and scale of the training space of a store's rows."""
    center, scale = store.mean_and_scale(multiple_of(store, config.max_norm))
    return center.to(device, torch.float64 if config.dtype == "float64" else torch.float32), scale

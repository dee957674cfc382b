"""Operations and bytes of a training step, by part, counted on tensors without values: a clock where there is no device.

An operation reads every tensor that it is given, and writes every one that it returns or changes, once each. A product's
operands count as one read. Views are no operation, and one operation is one launch, which flatters plain PyTorch (a sort or a
top-k is several). What our own kernels move is what their launches say (`train/step/traffic.py`), which a test compares with
the addresses that they touch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.config import TrainConfig
from train.step import traffic
from train.step.fused.batch import FusedBatches
from train.step.fused.step import FusedMember
from train.step.member import Member, normalise_batch
from train.step.scratch import Scratch

META = torch.device("meta")
STEP = str(Path(traffic.__file__).parent)
PRODUCTS = ("mm", "addmm", "mv")


@dataclass
class Moved:
    """What one part of a step comes to."""

    launches: int = 0
    n_bytes: int = 0

    def add(self, n_bytes: int) -> None:
        self.launches += 1
        self.n_bytes += n_bytes


class Counter(TorchDispatchMode):
    """Counts what is run under it, by the module of `train/step` that asks for it; large products apart."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Moved] = {}

    def add(self, part: str, n_bytes: int) -> None:
        self.parts.setdefault(part, Moved()).add(n_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        out = None if name == "_fused_adam_" else func(*args, **kwargs)
        returns = func._schema.returns
        if name.startswith("empty") or any(r.alias_info and not r.alias_info.is_write for r in returns):
            return out
        n_bytes = sum(nbytes(tensor) for tensor in tensors([args, kwargs]))
        changed = [
            value
            for argument, value in zip(func._schema.arguments, (*args, *kwargs.values()))
            if argument.alias_info and argument.alias_info.is_write and argument.name != "out"
        ]
        n_bytes += sum(nbytes(tensor) for tensor in tensors(changed))
        if not changed and "out" not in kwargs:
            n_bytes += sum(nbytes(tensor) for tensor in tensors(out))
        self.add("products" if name in PRODUCTS else asked_by(), n_bytes)
        return out

    def see(self, launch: traffic.Launch) -> None:
        """A launch of one of our kernels."""
        self.add(launch.kernel.__name__.removesuffix("_kernel"), launch.n_bytes)


def tensors(of: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(of) if isinstance(leaf, Tensor)]


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def asked_by() -> str:
    """The module of train/step whose code is running."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(STEP):
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere" if frame is None else Path(frame.f_code.co_filename).stem


@contextmanager
def counting() -> Iterator[Counter]:
    """Count operations and launches of kernels."""
    counter = Counter()
    traffic.observers.append(counter.see)
    try:
        with counter:
            yield counter
    finally:
        traffic.observers.remove(counter.see)


def count_step(config: TrainConfig, d_model: int, rows: int, fused: bool, sparse: bool = False) -> dict[str, Moved]:
    """A step in the middle of a training, batch included, in which latents may be dead and none is."""
    kind = FusedMember if fused else Member
    center = torch.zeros(d_model, device=META)
    member = kind(config, d_model, center, 1.0, META, Scratch(META), is_sparse=sparse)
    member.before_first.clear()
    raw = torch.zeros(rows, d_model, dtype=torch.bfloat16, device=META)
    normalise = FusedBatches(member.scratch).normalise if fused else normalise_batch
    batch = None
    for _ in range(2):  # the first makes buffers
        member.n_rows, member.n_steps = config.dead_after_rows, config.steps // 2
        with counting() as counter:
            batch = normalise(raw, member.center, 1.0, out=batch)
            member.step(batch)
    return counter.parts

"""Every launch of a kernel of ours, and what it moves: on a device it runs, on tensors without values it is only noted.

So the bytes and the launches of a step are counted where there is no device (`tests/bench/bench_train.py --count-bytes`), and
what a launch says of itself is compared with the addresses that it touches in Triton's interpreter (`tests/test_kernels.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Launch:
    """One launch. `reads` and `writes` are what it must move, each tensor once; `touched`, by the reason, what it moves parts
    of where there is one: slots of dead latents, bins of a histogram. `gathered`: bytes at places that only a
    list on the device tells, each time that they are read, as many as are expected."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Sequence[Any]
    options: Mapping[str, Any]
    reads: Sequence[Tensor]
    writes: Sequence[Tensor]
    touched: Mapping[str, Tensor]
    gathered: int = 0

    @property
    def n_bytes(self) -> int:
        """Bytes read and written."""
        return self.gathered + sum(tensor.numel() * tensor.element_size() for tensor in (*self.reads, *self.writes))


observers: list[Callable[[Launch], None]] = []
"""Told of every launch, before it runs."""


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    *,
    reads: Sequence[Tensor],
    writes: Sequence[Tensor],
    touched: Mapping[str, Tensor] | None = None,
    gathered: int = 0,
    **options: Any,
) -> None:
    """Run a kernel over a grid; on meta tensors only its observers are told."""
    for observe in observers:
        observe(Launch(kernel, grid, arguments, options, reads, writes, touched or {}, gathered))
    if not any(isinstance(argument, Tensor) and argument.is_meta for argument in tree_leaves(arguments)):
        kernel[grid](*arguments, **options, enable_fp_fusion=True)

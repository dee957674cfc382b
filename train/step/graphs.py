"""A step as one CUDA graph: a small SAE's step is a hundred kernels that take longer to launch than to run.

A graph repeats the same kernels on the same memory, so whatever changes from step to step must be in tensors; what is
in Python, shapes above all, makes another *kind* of step. The first step of a kind runs as ever, the second is recorded and
runs as ever, the third is replayed and run from the same beginning, and only if both end with the same bits are all further
ones replayed. Without a `Capture` every step runs as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor

from pipeline.base.progress import say

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records the operations of a function, which need not run them, and returns what replays them."""


class Recorded:
    """Runs steps, by kind. An accelerator that cannot record one, or does not repeat it, says so once, and goes on without.

    changed: all tensors that a step changes and a later one reads, by name.
    """

    def __init__(self, capture: Capture | None, changed: Callable[[], Mapping[str, Tensor]]) -> None:
        self.capture = capture
        self.changed = changed
        self.kind: Hashable | None = None
        self.replay: Callable[[], None] | None = None
        self.is_trusted = False

    def run(self, kind: Hashable | None, step: Callable[[], None]) -> None:
        """Run or replay one step. `kind`: all that it depends on beside the contents of tensors; None: never record it."""
        if self.capture is None or kind is None or kind != self.kind:
            self._forget(kind)
            step()
        elif self.replay is None:
            self._record(self.capture, step)
            step()
        elif not self.is_trusted:
            self._compare(self.replay, step)
        else:
            self.replay()

    def _forget(self, kind: Hashable | None) -> None:
        self.kind, self.replay, self.is_trusted = kind, None, False

    def _give_up(self, why: str) -> None:
        say(f"CUDA graphs: {why}; going on without")
        self.capture = None
        self._forget(None)

    def _record(self, capture: Capture, step: Callable[[], None]) -> None:
        try:
            self.replay = capture(step)
        except RuntimeError as error:
            self._give_up(f"a step could not be recorded ({error})")

    def _compare(self, replay: Callable[[], None], step: Callable[[], None]) -> None:
        """Replay the step, run it from the same beginning, and trust the record when what they leave is equal bit for bit
        (syncs, once a kind; the copies lie on the host)."""
        before = {name: tensor.to("cpu", copy=True) for name, tensor in self.changed().items()}
        replay()
        replayed = {name: tensor.to("cpu", copy=True) for name, tensor in self.changed().items()}
        for name, tensor in self.changed().items():
            tensor.copy_(before[name])
        step()
        differ = [name for name, tensor in self.changed().items() if not same_bits(tensor.cpu(), replayed[name])]
        if differ:
            self._give_up(f"a recorded step differs from the step itself in {', '.join(differ)}")
        else:
            self.is_trusted = True


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on the CPU of one shape and dtype hold the same bits, NaN included."""
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def cuda_capture(device: torch.device) -> Capture:
    """Captures CUDA graphs on a device that share one pool of memory: they are replayed one after another, never two at once."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()  # the feed's threads go on meanwhile
        return graph.replay

    return capture

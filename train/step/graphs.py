"""A step as one CUDA graph: a small SAE's step is a hundred kernels that take longer to launch than to run.

A graph repeats the same kernels on the same memory, so whatever changes from step to step must be in tensors; what is
in Python, shapes above all, makes another *kind* of step. The first step of a kind runs as ever, the second is recorded,
all further ones are replayed. Without a `Capture` every step runs as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from pipeline.base.progress import say

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records the operations of a function, which need not run them, and returns what replays them."""


class Recorded:
    """Runs steps, by kind. An accelerator that cannot record one says so once, and goes on without."""

    def __init__(self, capture: Capture | None) -> None:
        self.capture = capture
        self.kind: Hashable | None = None
        self.replay: Callable[[], None] | None = None

    def run(self, kind: Hashable | None, step: Callable[[], None]) -> None:
        """Run or replay one step. `kind`: all that it depends on beside the contents of tensors; None: never record it."""
        if self.capture is None or kind is None or kind != self.kind:
            self.kind, self.replay = kind, None
            step()
            return
        if self.replay is None:
            try:
                self.replay = self.capture(step)
            except RuntimeError as error:
                say(f"CUDA graphs: a step could not be recorded ({error}); going on without")
                self.capture = None
                step()
                return
        self.replay()


def cuda_capture(device: torch.device) -> Capture:
    """Captures CUDA graphs on a device that share one pool of memory: they are replayed one after another, never two at once."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()  # the feed's threads go on meanwhile
        return graph.replay

    return capture

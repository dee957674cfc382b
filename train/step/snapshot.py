"""A member's tensors as they are at one moment, on the host: on CUDA they get there while training goes on."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor


class Snapshot:
    """Copies of some tensors of one device.

    On CUDA they are first copied within the device, which takes a step or less, and from there to pinned memory on a stream of
    their own; one snapshot a device is on its way at a time, so that is what it takes of device memory.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.n_bytes = sum(tensor.nbytes for tensor in tensors.values())
        on_cuda = [tensor for tensor in tensors.values() if tensor.is_cuda]
        self.copied: torch.cuda.Event | None = None
        if not on_cuda:
            self.host = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            return
        device = on_cuda[0].device
        stream = copying_stream(device)
        stream.synchronize()
        held = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            self.host = {}
            for name, tensor in held.items():
                if tensor.is_cuda:
                    self.host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    self.host[name].copy_(tensor, non_blocking=True)
                    tensor.record_stream(stream)
                else:
                    self.host[name] = tensor
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record(stream)

    def tensors(self) -> dict[str, Tensor]:
        """The copies, when they are there; any thread may ask."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.host


@functools.cache
def copying_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's snapshots are copied."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

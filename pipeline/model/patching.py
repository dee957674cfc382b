"""Borrowing a module for a while: its hooks, its forward. Everything is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn


@contextlib.contextmanager
def removed(handle: Any) -> Iterator[None]:
    """Remove a hook at the end, whatever happens."""
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def overridden(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let each module's forward be another function for a while; their attributes stay as the model expects them."""
    own = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            del module.forward
            if before is not None:
                module.forward = before

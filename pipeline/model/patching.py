"""Borrowing a module for a while: its hooks, its forward, the arguments of a layer. Everything is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn


def with_hidden_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], residual: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with the hidden states, its first argument, replaced."""
    return ((residual, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": residual})


@contextlib.contextmanager
def removed(handle: Any) -> Iterator[None]:
    """Remove a hook at the end, whatever happens."""
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def overridden(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let the modules' forward be another function for a while; their attributes stay as the model expects them."""
    own = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = forward
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            del module.forward
            if before is not None:
                module.forward = before

"""Where things are in a causal language model, seen on a forward pass of two tokens: what its layers return, its head."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from pipeline.base.errors import ModelError, kind_and_line
from pipeline.model.patching import removed


class Reached(Exception):
    """Raised out of a forward pass that has come as far as it was wanted."""


@dataclass(frozen=True)
class Returned:
    """What a layer returns: the residual stream alone (`length` None), or first in a tuple of that length."""

    length: int | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Anatomy:
    """What each layer returns, and the module that makes logits, of rows one by one; None where there is no such module."""

    layers: tuple[Returned, ...]
    head: Any

    @staticmethod
    def of(model: Any, name: str, blocks: Sequence[nn.Module], device: torch.device, d_model: int) -> Anatomy:
        """Run two tokens through a model that is whole and takes them on `device`. Raises ModelError unless its layers run in
        order, once each."""
        order: list[int] = []
        returned: dict[int, Returned] = {}
        headed: list[tuple[nn.Module, Any, Tensor]] = []
        tokens = torch.ones(1, 2, dtype=torch.long, device=device)

        def see_layer(n: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                order.append(n)
                residual = residual_of(output, (1, 2, d_model), name)
                returned[n] = Returned(None if isinstance(output, Tensor) else len(output), residual.dtype)

            return hook

        def see_leaf(module: nn.Module, args: Any, output: Any) -> None:
            if len(order) == len(blocks) and isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
                headed.append((module, args[0], output))

        with contextlib.ExitStack() as hooks, torch.no_grad():
            for n, block in enumerate(blocks):
                hooks.enter_context(removed(block.register_forward_hook(see_layer(n))))
            for module in model.modules():
                if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 2:
                    hooks.enter_context(removed(module.register_forward_hook(see_leaf)))
            try:
                logits = logits_of(forward(model, tokens))
            except ModelError:
                raise
            except Exception as error:  # whatever an architecture's own code raises
                raise ModelError(
                    f"{name}: cannot be cut, its forward pass on tokens alone fails ({kind_and_line(error)})"
                ) from error
        if order != list(range(len(blocks))):
            raise ModelError(f"{name}: cannot be cut, its {len(blocks)} layers do not run once each in their order")
        shape = (1, 2, logits.shape[-1])
        heads = [m for m, given, made in headed if made.shape == shape and given.shape[:2] == (1, 2)]
        return Anatomy(tuple(returned[n] for n in range(len(blocks))), heads[0] if len(heads) == 1 else None)

    def returning(self, layer: int, residual: Tensor) -> Callable[..., Any]:
        """A forward for that layer which computes nothing and returns this residual stream, in the form that is expected."""
        form = self.layers[layer]
        residual = residual.to(form.dtype)
        output = residual if form.length is None else (residual, *[None] * (form.length - 1))
        return lambda *_args, **_kwargs: output


def forward(model: Any, tokens: Int[Tensor, "seq pos"]) -> Any:
    """The model's own forward on these tokens and nothing else; without a cache, where it can have one."""
    return model(input_ids=tokens, **({"use_cache": False} if takes_use_cache(type(model).forward) else {}))


def logits_of(output: Any) -> Tensor:
    """The logits among a forward pass's outputs: by name, or first."""
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


@functools.cache
def takes_use_cache(forward: Callable[..., Any]) -> bool:
    """Whether a model's forward can be told to keep no cache."""
    return "use_cache" in inspect.signature(forward).parameters


def residual_of(output: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """The residual stream in what a layer returns. Raises ModelError unless it is of that shape, alone or first."""
    residual = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(residual, Tensor) or tuple(residual.shape) != shape:
        found = list(residual.shape) if isinstance(residual, Tensor) else type(residual).__name__
        raise ModelError(
            f"{name}: cannot be cut, a layer returns {found} where a residual stream {list(shape)} is expected"
        )
    return residual


def own_parameters(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """(module, name) of the parameters of some modules that the rest of the model does not hold too."""
    left_out = set(modules)
    shared: set[int] = set()
    waiting, seen = [model], {model}
    while waiting:
        module = waiting.pop()
        shared |= {id(p) for p in module._parameters.values()}
        fresh = [m for m in module.children() if m not in left_out and m not in seen]
        seen |= set(fresh)
        waiting += fresh
    for module in {inner for outer in left_out for inner in outer.modules()}:
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) not in shared:
                yield module, name

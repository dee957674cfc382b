"""Hook points inside a decoder layer, found by what its parts add up to on three tokens, not by name of architecture."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.base.errors import ModelError, kind_and_line
from pipeline.model.anatomy import Reached, forward, residual_of
from pipeline.model.patching import removed
from pipeline.model.points import Point
from pipeline.model.specials import plain_token


@dataclass(frozen=True)
class Place:
    """A module, and whether the rows are what it returns or what it is given; `in_place`: others hold them too."""

    module: nn.Module
    is_output: bool
    in_place: bool = False


@dataclass(frozen=True)
class Call:
    """One call of a direct part of a layer: what it was given and what it returned, [seq, pos, d_model] or None."""

    module: nn.Module
    given: Tensor | None
    made: Tensor | None

    @property
    def multiplies(self) -> bool:
        """Whether the part has matrices; norms and dropouts have none."""
        return any(p.ndim > 1 for p in self.module.parameters())


class Layer:
    """A decoder layer with the arguments it was called with, to be called again."""

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, ...]) -> None:
        self.block, self.args, self.kwargs, self.shape = block, args, kwargs, shape

    def run(self, x: Tensor, *, doubled: nn.Module | None = None) -> tuple[Tensor, list[Call]]:
        """Its output and the calls of its direct parts, from a stream x; `doubled`: what this part is given is doubled."""
        calls: list[Call] = []

        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = next((v for v in (*args, *kwargs.values()) if is_stream(v, self.shape)), None)
            (made,) = first_of(output)
            made = made if is_stream(made, self.shape) else None
            calls.append(Call(module, *(None if v is None else v.clone().reshape(self.shape) for v in (given, made))))

        args, kwargs = with_stream(self.args, self.kwargs, self.shape, x.clone())
        with contextlib.ExitStack() as hooks, torch.no_grad():
            if doubled is not None:
                hooks.enter_context(removed(doubled.register_forward_pre_hook(double(self.shape), with_kwargs=True)))
            for part in parts_of(self.block):
                hooks.enter_context(removed(part.register_forward_hook(see, with_kwargs=True)))
            return residual_of(self.block(*args, **kwargs), self.shape, "layer").clone(), calls


def parts_of(block: nn.Module) -> Iterator[nn.Module]:
    """The direct parts of a layer; of a list of them, its members."""
    for child in block.children():
        yield from child.children() if isinstance(child, nn.ModuleList) else (child,)


def is_stream(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether a value is a tensor of this shape, or with its sequences and positions in one, as some MLPs have it."""
    return (
        isinstance(value, Tensor)
        and tuple(value.shape) in (shape, (shape[0] * shape[1], shape[2]))
        and value.is_floating_point()
    )


def with_stream(
    args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, ...], x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the first stream among them replaced. Raises ModelError where there is none."""
    for n, value in enumerate(args):
        if is_stream(value, shape):
            return (*args[:n], x.to(value.dtype).reshape(value.shape), *args[n + 1 :]), kwargs
    for name, value in kwargs.items():
        if is_stream(value, shape):
            return args, kwargs | {name: x.to(value.dtype).reshape(value.shape)}
    raise ModelError(f"a part of a layer is given no residual stream {list(shape)}")


def first_of(output: Any) -> tuple[Any]:
    """What a module returns, or the first of several."""
    return (output[0] if isinstance(output, tuple | list) and output else output,)


def stream_of(args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, ...], name: str) -> Tensor:
    """The first stream among arguments. Raises ModelError where there is none."""
    for value in (*args, *kwargs.values()):
        if is_stream(value, shape):
            found: Tensor = value
            return found
    raise ModelError(f"{name}: a part of a layer is given no residual stream {list(shape)}")


def double(shape: tuple[int, ...]) -> Any:
    """A hook that doubles, in place, the stream that a module is given."""

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        stream_of(args, kwargs, shape, "layer").mul_(2)

    return hook


def find_place(model: Any, name: str, block: nn.Module, point: Point, device: torch.device, d_model: int) -> Place:
    """The place of a point inside a layer, `block`. Raises ModelError where the layer has none that could be found."""
    vocab = int(model.config.get_text_config().vocab_size)
    tokens = torch.arange(3, device=device)[None] + plain_token(model.config, vocab)
    places = find_places(model, name, block, tokens % vocab, d_model)
    if point.hook not in places:
        found = ", ".join(places) or "none inside the layer"
        raise ModelError(
            f"{name}: {point.hook} was not found in layer {point.layer} (found: {found}): its parts do not add up to that; "
            "take another hook"
        )
    return places[point.hook]


def module_name(block: nn.Module, place: Place) -> str:
    """What a place's module is called in its layer."""
    return str(next(name for name, module in block.named_modules() if module is place.module))


@torch.no_grad()
def find_places(model: Any, name: str, block: nn.Module, tokens: Tensor, d_model: int) -> dict[str, Place]:
    """The hook points inside a layer that could be found, by name; the model must hold all layers up to this one.

    attn_out and mlp_out are the two parts whose outputs, added to the layer's input x, give its output bit for bit, in any
    order of addition; the first of them to mix positions is attention.
    """
    shape = (*tokens.shape, d_model)
    caught: list[Layer] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(Layer(block, args, kwargs, shape))
        raise Reached

    with removed(block.register_forward_pre_hook(catch, with_kwargs=True)), contextlib.suppress(Reached):
        forward(model, tokens)
    layer = caught[0]
    try:
        x = stream_of(layer.args, layer.kwargs, shape, name).clone()
        y, calls = layer.run(x)
        at_start = (torch.arange(shape[1], device=x.device) == 0)[None, :, None]
        others = layer.run(torch.where(at_start, x + x.roll(1, -1), x))[1]
    except ModelError:
        raise
    except Exception as error:  # whatever an architecture's own code raises
        raise ModelError(f"{name}: nothing inside its layers can be hooked ({kind_and_line(error)})") from error
    found = find_parts(x, y, calls)
    if found is None or len(others) != len(calls):
        return {}
    first, second = found
    if not mixes(calls[first], others[first]):  # the MLP is called first, beside attention
        attention, mlp = second, first
        if not mixes(calls[attention], others[attention]):
            return {}
        reads = range(mlp + 1)
    else:
        attention, mlp = first, second
        reads = range(attention + 1, mlp + 1)
    places = {"attn_out": Place(calls[attention].module, True), "mlp_out": Place(calls[mlp].module, True)}
    if (
        reader := next((calls[n] for n in reads if calls[n].multiplies), None)
    ) is not None and reader.given is not None:
        places["mlp_in"] = Place(reader.module, False)
    if attention < mlp and (taker := between(x, calls, attention, mlp, layer)) is not None:
        places["resid_mid"] = Place(taker, False, in_place=True)
    return places


def find_parts(x: Tensor, y: Tensor, calls: list[Call]) -> tuple[int, int] | None:
    """The first two calls whose outputs a and b make y of x, in any order of addition, bit for bit."""
    for n, k in itertools.combinations(range(len(calls)), 2):
        a, b = calls[n].made, calls[k].made
        if a is None or b is None:
            continue
        if any(torch.equal(y, total) for total in ((x + a) + b, x + (a + b), (x + b) + a)):
            return n, k
    return None


def mixes(call: Call, other: Call) -> bool:
    """Whether a change at the first position alone changed what a part makes at the last."""
    assert call.made is not None
    return other.made is not None and not torch.equal(call.made[:, -1], other.made[:, -1])


def between(x: Tensor, calls: list[Call], attention: int, mlp: int, layer: Layer) -> nn.Module | None:
    """The part that is given x + attn_out, where doubling that in place doubles the whole stream; None in parallel layers."""
    a = calls[attention].made
    assert a is not None
    middle = x + a
    for call in calls[attention + 1 : mlp + 1]:
        if call.given is not None and torch.equal(call.given, middle):
            y, again = layer.run(x, doubled=call.module)
            b = again[mlp].made
            return call.module if b is not None and torch.equal(y, 2 * middle + b) else None
    return None

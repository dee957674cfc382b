"""A GPU that is none: tensors that say they lie on cuda:0 and hold their numbers on the CPU.

What runs is what would run on a GPU: every branch that asks for the device, streams and events (which do nothing here), kernels
in Triton's interpreter. An operation or a kernel that mixes devices is an error, as it would be there, and what would make the
host wait for the device is noted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
VIEWS_OF_HOST = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
"""Take indices from the host too."""
SIZED_BY_VALUES = (aten.nonzero.default, aten.masked_select.default, aten.bincount.default, aten._unique2.default)
SIZED_BY_VALUES += (aten.equal.default, aten._local_scalar_dense.default)
"""Whose outcome, or its length, the host needs to go on."""

waits: list[str] = []
"""What made the main thread wait for the device, in order."""


def note(what: str) -> None:
    """That the host waits; other threads may."""
    if threading.current_thread() is threading.main_thread():
        waits.append(what)


class OnGpu(Tensor):
    """A tensor of the pretended GPU. `inner`: its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )  # type: ignore[assignment]
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.inner})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return METHODS.get(func, func)(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def record_stream(self, stream: Any) -> None:
        assert isinstance(stream, Stream), stream


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on what tensors hold."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [leaf for leaf in leaves if isinstance(leaf, OnGpu)]
    device = kwargs.get("device")
    to_gpu = device is not None and torch.device(device).type == "cuda"
    if not ours and not to_gpu:
        return func(*args, **kwargs | ({"pin_memory": None} if kwargs.get("pin_memory") else {}))
    if ours and func not in COPIES:
        require_one_device(func, leaves)
    note_waits(func, args, kwargs, ours, to_gpu)
    is_on_gpu = to_gpu or (bool(ours) and device is None)
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    inner_args, inner_kwargs = tree_map(unwrapped, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if func is aten._to_copy.default and any(out is leaf for leaf in map(unwrapped, leaves)):
        out = out.clone()
    if func is aten.copy_.default:
        return args[0]
    held = {id(leaf.inner): leaf for leaf in ours}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_on_gpu or isinstance(value, OnGpu):
            return value
        return held.get(id(value)) if id(value) in held else OnGpu(value)

    return tree_map(wrapped, out)


def get_item(tensor: Tensor, index: Any) -> Tensor:
    """tensor[index]: a view, but for indices that are tensors."""
    indices = tree_leaves(index)
    if not isinstance(tensor, OnGpu):
        raise RuntimeError("a tensor on the CPU is indexed by one on cuda:0")
    note_mask(indices)
    return OnGpu(tensor.inner[tree_map(unwrapped, index)])


def set_item(tensor: Tensor, index: Any, value: Any) -> None:
    """tensor[index] = value."""
    note_mask(tree_leaves(index))
    if isinstance(value, Tensor) and isinstance(value, OnGpu) != isinstance(tensor, OnGpu):
        note(f"set_item of {list(value.shape)}")
    unwrapped(tensor)[tree_map(unwrapped, index)] = unwrapped(value)


def note_mask(indices: list[Any]) -> None:
    """A mask's length is not known before the device has counted it."""
    if any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices):
        note("index by a mask")


METHODS: dict[Any, Callable[..., Any]] = {
    Tensor.copy_: lambda to, source, non_blocking=False: aten.copy_.default(to, source, non_blocking),
    Tensor.contiguous: lambda tensor: (
        tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)
    ),
    Tensor.nonzero: aten.nonzero.default,
    Tensor.__invert__: aten.bitwise_not.default,
    Tensor.__getitem__: get_item,
    Tensor.__setitem__: set_item,
    Tensor.item: aten._local_scalar_dense.default,
    Tensor.__float__: lambda tensor: float(aten._local_scalar_dense.default(tensor)),
    Tensor.__int__: lambda tensor: int(aten._local_scalar_dense.default(tensor)),
    Tensor.__index__: lambda tensor: int(aten._local_scalar_dense.default(tensor)),
    Tensor.__bool__: lambda tensor: bool(aten._local_scalar_dense.default(tensor)),
}
"""Methods that ask the device for a guard before they are dispatched."""


def unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, OnGpu) else value


def require_one_device(func: Any, tensors: list[Tensor]) -> None:
    """As torch does: numbers of no dimension may come from the host, in operations of a number each; so may indices."""
    pointwise = torch.Tag.pointwise in func.tags
    for tensor in tensors:
        host = not isinstance(tensor, OnGpu)
        if host and not (pointwise and tensor.dim() == 0) and func not in VIEWS_OF_HOST:
            raise RuntimeError(
                f"{func}: expected all tensors to be on cuda:0, found one {list(tensor.shape)} on the CPU"
            )


def note_waits(func: Any, args: Any, kwargs: dict[str, Any], ours: list[OnGpu], to_gpu: bool) -> None:
    """Copies that the host waits for, and outcomes that it needs to go on."""
    if ours and (func in SIZED_BY_VALUES or (func is aten.repeat_interleave.Tensor and not kwargs.get("output_size"))):
        note(str(func))
    if func is aten.index.Tensor:
        note_mask(args[1])
    if func in COPIES:
        target_on_gpu = isinstance(args[0], OnGpu) if func is aten.copy_.default else to_gpu or "device" not in kwargs
        source = args[1] if func is aten.copy_.default else args[0]
        waiting = not kwargs.get("non_blocking", len(args) > 2 and args[2])
        if waiting and target_on_gpu != isinstance(source, OnGpu) and source.numel():
            note(f"{func} {'up' if target_on_gpu else 'down'} {list(source.shape)}")


class Mode(TorchDispatchMode):
    """What is made on the GPU, or brought there, is of it; pinned memory is memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._pin_memory.default:
            return args[0].clone()
        if func is aten.is_pinned.default:
            return False
        return dispatch(func, args, kwargs or {})


class Stream(torch.cuda.Stream):
    """A stream on which nothing is waited for, since everything is done when it is asked for."""

    def __new__(cls, device: Any = None) -> Stream:
        return object.__new__(cls)

    def __init__(self, device: Any = None) -> None:
        """Of any device."""

    def wait_stream(self, stream: Any) -> None:
        assert isinstance(stream, Stream)

    def wait_event(self, event: Any) -> None:
        assert isinstance(event, Event)

    def synchronize(self) -> None:
        """Nothing."""


class Event(torch.cuda.Event):
    """An event that has happened."""

    def __new__(cls) -> Event:
        return object.__new__(cls)

    def __init__(self) -> None:
        """Of no options."""

    def record(self, stream: Any) -> None:
        assert isinstance(stream, Stream)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing."""


def checked(call: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel's launch, all of whose tensors are on the GPU."""

    def launched(self: Any, *arguments: Any, **options: Any) -> Any:
        for name, value in zip(self.arg_names, arguments):
            if any(isinstance(leaf, Tensor) and not isinstance(leaf, OnGpu) for leaf in tree_leaves(value)):
                raise RuntimeError(f"{self.fn.__name__}: {name} is on the CPU")
        return call(self, *tree_map(unwrapped, arguments), **options)

    return launched


def moved(module: torch.nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """What moves a module: parameters become tensors that are not trained."""
    for child in module.children():
        moved(child, change)
    for held in (module._parameters, module._buffers):
        held |= {name: change(tensor.detach()) for name, tensor in held.items() if tensor is not None}
    return module


@contextlib.contextmanager
def pretended(free: int = 80 << 30) -> Iterator[list[str]]:
    """Inside the block this machine has a GPU with so many free bytes; yields what makes the host wait for it."""
    from triton.runtime.interpreter import GridExecutor

    stream = Stream()
    cuda: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "set_device": lambda device: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (free, free),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "pretended GPU",
        "get_device_properties": lambda device=None: SimpleNamespace(total_memory=free, name="pretended GPU"),
    }
    with pytest.MonkeyPatch.context() as patch, Mode():
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        for name in ("__enter__", "__exit__"):
            patch.setattr(
                torch.inference_mode, name, getattr(torch.no_grad, name)
            )  # in which tensors of ours can be viewed
        patch.setattr(torch.nn.Module, "_apply", moved)
        patch.setattr(GridExecutor, "__call__", checked(GridExecutor.__call__))
        waits.clear()
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(numbers, device=…) then goes through `Mode`
        try:
            yield waits
        finally:
            torch._C._set_only_lift_cpu_tensors(before)

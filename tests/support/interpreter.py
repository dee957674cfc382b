"""Triton's interpreter, which runs kernels on CPU tensors, with two things put right (3.9): it cuts float32 down to bf16 where a
device rounds to the nearest, and it multiplies matrices of bf16 by their bits."""

from __future__ import annotations

import inspect
import os
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
DEVICE = torch.device("cuda" if os.environ["TRITON_INTERPRET"] == "0" else "cpu")
"""Where kernels run: on a GPU where there is one."""


def rounded_to_bf16(numbers: Any) -> Any:
    """The bits of the nearest bf16, ties to even, as numpy's uint16."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers)).to(torch.bfloat16)
    return tensor.view(torch.int16).numpy().view(np.uint16).reshape(numbers.shape)


def from_bf16(bits: Any) -> Any:
    """float32 of the bits of bf16s."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def put_right(patch: pytest.MonkeyPatch) -> None:
    """Make the interpreter round and multiply as a device does."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return handle(rounded_to_bf16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle(from_bf16(part.data), tl.float32) for part in (a, b))
        return dot(self, a, b, d, *how)

    patch.setattr(builder, "cast_impl", cast_impl)
    patch.setattr(builder, "create_dot", create_dot)
    patch.setattr(builder, "create_fp_trunc", cast_impl)
    patch.setattr(interpreter, "_patch_lang", PatchOnce(interpreter._patch_lang))


class PatchOnce:
    """The interpreter puts its own functions into `triton.language` at every call of a function, which takes most of the time;
    once is enough."""

    def __init__(self, patch_lang: Any) -> None:
        self.patch_lang = patch_lang
        self.done: set[tuple[int, ...]] = set()

    def __call__(self, fn: Any) -> PatchOnce:
        modules = tuple(sorted(id(value) for value in fn.__globals__.values() if inspect.ismodule(value)))
        if modules not in self.done:
            self.patch_lang(fn)
            self.done.add(modules)
        return self

    def restore(self) -> None:
        """Nothing: what runs in this process is interpreted."""

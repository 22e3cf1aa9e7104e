"""Run Triton's kernels on the CPU, under its interpreter, in a process that may also compile.

It stands on internals of the version that constraints.txt names.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

from sft.kernels import library

HALVES = (tl.bfloat16, tl.float16)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Interpret what is launched; ops take their Triton launchers for tensors of the CPU.

    What the interpreter does wrong is mended (casts to bfloat16 round to nearest; products of
    16-bit matrices are summed in float32) or refused (arithmetic on bfloat16 values, which it would
    do on their bits).
    """

    @functools.cache
    def twin(function: Any) -> Any:
        return interpreter.InterpretedFunction(function)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return twin(self.fn).run(*args, grid=grid, warmup=warmup, **options)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        # as `InterpretedFunction.__call__`, which never takes back its patches of triton.language
        scope = interpreter._patch_lang(self.fn)
        try:
            return twin(self.fn).rewrite()(*args, **options)
        finally:
            scope.restore()

    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (JITFunction, "run", run),
            (JITFunction, "__call__", call),
            (InterpreterBuilder, "create_fp_to_fp", _convert),
            (InterpreterBuilder, "cast_impl", _cast),
            (InterpreterBuilder, "create_dot", _dot),
            (InterpreterBuilder, "binary_op", _binary),
            (InterpreterBuilder, "unary_op", _unary),
            (library, "TRITON_DEVICES", {"cuda", "cpu"}),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        yield


_shipped = {
    name: getattr(InterpreterBuilder, name)
    for name in ("create_fp_to_fp", "cast_impl", "create_dot", "binary_op", "unary_op")
}


def _cast(self: Any, source: Any, target: Any) -> Any:
    if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
        return _to_bfloat16(source)
    return _shipped["cast_impl"](self, source, target)


def _convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
        return _to_bfloat16(source)
    return _shipped["create_fp_to_fp"](self, source, target, rounding)


def _to_bfloat16(source: Any) -> Any:
    """To nearest, as hardware rounds; the interpreter truncates."""
    rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.int16)
    return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """Multiply 16-bit matrices as hardware does: exact products, summed in float32."""
    return _shipped["create_dot"](self, _wide(a), _wide(b), *rest)


def _wide(matrix: Any) -> Any:
    if matrix.dtype.scalar not in HALVES:
        return matrix
    if matrix.dtype.scalar == tl.float16:
        return TensorHandle(matrix.data.astype(np.float32), tl.float32)
    bits = np.ascontiguousarray(matrix.data).astype(np.uint32) << np.uint32(16)
    return TensorHandle(bits.view(np.float32), tl.float32)


def _binary(self: Any, left: Any, right: Any, op: Any) -> Any:
    _refuse(left, op)
    return _shipped["binary_op"](self, left, right, op)


def _unary(self: Any, value: Any, op: Any) -> Any:
    _refuse(value, op)
    return _shipped["unary_op"](self, value, op)


def _refuse(value: Any, op: Any) -> None:
    if value.dtype.scalar == tl.bfloat16:
        raise TypeError(f"{op.__name__} of bfloat16 values; cast to float32 first")

"""Triton's kernels on the CPU: run under its interpreter, or compiled for GPUs that are not here.

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
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction, KernelInterface

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Run what is launched under the interpreter, in a process that may also compile."""

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

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(JITFunction, "__call__", call),
        mock.patch.object(interpreter.InterpreterBuilder, "create_fp_to_fp", _convert),
        mock.patch.object(interpreter.InterpreterBuilder, "cast_impl", _cast),
    ):
        yield


_cast_as_shipped = interpreter.InterpreterBuilder.cast_impl
_convert_as_shipped = interpreter.InterpreterBuilder.create_fp_to_fp


def _cast(self: Any, source: Any, target: Any) -> Any:
    if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
        return _to_bfloat16(source)
    return _cast_as_shipped(self, source, target)


def _convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
        return _to_bfloat16(source)
    return _convert_as_shipped(self, source, target, rounding)


def _to_bfloat16(source: Any) -> Any:
    """To nearest, as hardware rounds; the interpreter truncates."""
    rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.int16)
    return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)


class _Absent(DriverBase):
    """Answers what is asked while compiling, and never launches."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)  # what was compiled is kept by number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiled_for(target: GPUTarget) -> Iterator[list[Any]]:
    """Compile what is launched instead of running it; the list gains each compiled kernel."""
    kernels: list[Any] = []

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            kernels.append(kernel.warmup(*args, grid=grid, **options))

        return launch

    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Absent(target))
    try:
        with mock.patch.object(KernelInterface, "__getitem__", launcher):
            yield kernels
    finally:
        triton.runtime.driver._active = active

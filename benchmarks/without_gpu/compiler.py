"""Compile Triton's kernels for GPUs that are not here, exactly as a launch would.

It stands on internals of the version that constraints.txt names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import KernelInterface

from sft.kernels import library

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@contextlib.contextmanager
def compiled_for(target: str) -> Iterator[list[Any]]:
    """Compile what is launched instead of running it; the list gains each compiled kernel.

    Args:
        target: one of `TARGETS`. Tensors may lie on the CPU or be meta tensors.
    """
    kernels: list[Any] = []

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            kernels.append(kernel.warmup(*args, grid=grid, **options))

        return launch

    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Absent(TARGETS[target]))
    try:
        with (
            mock.patch.object(KernelInterface, "__getitem__", launcher),
            mock.patch.object(library, "TRITON_DEVICES", {"cuda", "cpu", "meta"}),
        ):
            yield kernels
    finally:
        triton.runtime.driver._active = active


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

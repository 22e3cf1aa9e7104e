"""The compiled twin of `displace_on_cpu`: the same bits in a quarter of the time, on request."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sft.kernels.noise import TILE, normal_table, rounded

if TYPE_CHECKING:
    from sft.kernels.cpu.displace import Item

VARIABLE = "SFT_NATIVE"
SOURCE = Path(__file__).with_suffix("").with_name("displace.cpp")
_KINDS = {"rademacher": 0, "gaussian_table": 1, "gaussian": 2}
_DTYPES = (torch.float32, torch.bfloat16)
# from so many tiles on the work is shared among torch's threads
_SHARED = 64


def wanted() -> bool:
    """Return whether the variable SFT_NATIVE asks for compiled code.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE}: got {value!r}, allowed is 0 or 1")
    return value == "1"


def serves(item: Item, kind: str) -> bool:
    """Return whether there is compiled code for a contiguous tensor of the CPU."""
    return kind in _KINDS and item.weight.dtype in _DTYPES


def move(item: Item, draws: Sequence[tuple[int, float]], kind: str) -> None:
    """Move one tensor that is served."""
    first, numel = item.start // TILE, item.weight.numel()
    last = -(-(item.start + numel) // TILE)
    used = [(key % 2**64, rounded(c, kind)) for key, c in draws]
    keys = np.array([key for key, c in used if c], np.uint64)
    coefficients = np.array([c for _, c in used if c], np.float32)
    hide, mask_key, edge, limit = (0, 0, 0.0, 0) if item.mask is None else item.mask.plainly()
    call = functools.partial(
        built().sft_displace,
        item.weight.data_ptr(), item.out.data_ptr(), item.weight.element_size(), numel, item.start,
        item.parameter, keys.ctypes.data, coefficients.ctypes.data, len(keys), _KINDS[kind],
        normal_table().data_ptr(), item.decay, hide, mask_key, edge, limit,
    )  # fmt: skip
    threads = torch.get_num_threads()
    if threads == 1 or last - first < _SHARED:
        call(first, last)
        return
    cuts = [first + (last - first) * turn // threads for turn in range(threads + 1)]
    list(_pool(threads).map(call, cuts[:-1], cuts[1:]))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # the calls let go of the interpreter's lock; a second OpenMP beside torch's would not do
    return ThreadPoolExecutor(threads, "sft_displace")


@functools.cache
def built() -> Any:
    """Compile, once on a machine, and load.

    Raises:
        RuntimeError: there is no compiler, or it failed.
    """
    from torch.utils import cpp_extension

    # what is kept may be met by another processor of the same home
    name = f"sft_displace_{torch.backends.cpu.get_cpu_capability().lower()}"
    flags = ["-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    try:
        path = cpp_extension.load(name, [str(SOURCE)], extra_cflags=flags, is_python_module=False)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"{VARIABLE}: got 1, which compiles {SOURCE.name}: {error}; install g++ and ninja, or "
            "unset it"
        ) from error
    library = ctypes.CDLL(path)
    i32, i64, f32, at = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    library.sft_displace.argtypes = [
        at, at, i32, i64, i64, ctypes.c_uint32, at, at, i32, i32, at, f32, i32, ctypes.c_uint64,
        f32, ctypes.c_uint32, i64, i64,
    ]  # fmt: skip
    library.sft_displace.restype = None
    return library

"""Cases of `kernels/triton/sm3.py`."""

from __future__ import annotations

from typing import Any

import torch
from device_cases.base import FLOATS, Build, Case
from device_cases.positions import SIZES, numbers, shifted, supports
from torch import Tensor

from sft.kernels.sm3 import one_by_one_
from sft.kernels.triton.sm3 import sm3_

LR, EPS, DECAY = 1e-2, 1e-8, 0.1


def accumulators(axis: int) -> list[Tensor]:
    """As after some updates; some are 0 still."""
    generator = torch.Generator().manual_seed(axis)
    sizes = [shape[axis] for shape in SIZES]
    return [torch.randn(size, generator=generator).clamp_(min=0) for size in sizes]


def _make(
    dtype: torch.dtype,
    momentum: float = 0.0,
    index: torch.dtype = torch.int64,
    values: torch.dtype = torch.float32,
    place: Any = list,
) -> tuple[Any, ...]:
    flat = supports(index)
    widths = [columns for _, columns, _ in SIZES]
    rows_at = [at // width for at, width in zip(flat, widths, strict=True)]
    columns_at = [at % width for at, width in zip(flat, widths, strict=True)]
    return (
        place(numbers(values, 11)),
        numbers(dtype, 12),
        accumulators(0),
        accumulators(1),
        numbers(torch.float32, 13) if momentum else [],
        rows_at,
        columns_at,
        LR,
        momentum,
        EPS,
        DECAY,
    )


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    return {torch.bfloat16: (8e-3, 1e-5), torch.float16: (1e-3, 1e-5)}.get(dtype, (2e-6, 1e-6))


def _case(dtypes: tuple[torch.dtype, ...] = FLOATS, **options: Any) -> Case:
    return Case(
        make=lambda dtype: _make(dtype, **options),
        run=sm3_,
        expected=one_by_one_,  # itself held against the oracle in test_sm3.py
        dtypes=dtypes,
        tolerance=_tolerance,
        mutates=(0, 2, 3, 4),
    )


CASES = {
    "update": _case(),
    "update, 32-bit": _case((torch.float32,), index=torch.int32),
    "update, momentum": _case((torch.float32,), momentum=0.9),
    "update, little momentum": _case((torch.float32,), momentum=0.2),
    "update, values as the weights": _case((torch.bfloat16,), values=torch.bfloat16),
    "update, unaligned": _case((torch.float32,), place=shifted),
    "left to torch": _case((torch.float32,), values=torch.float64),
}


def _large() -> tuple[Any, ...]:
    """Two supports of 1% of 4096 x 4096, of lengths that 16 does not divide."""
    sizes = (167_773, 167_771)
    made = [[torch.empty(k) for k in sizes] for _ in range(2)]
    covers = [[torch.empty(4096) for _ in sizes] for _ in range(2)]
    at = [[torch.empty(k, dtype=torch.int64) for k in sizes] for _ in range(2)]
    return (*made, *covers, [], *at, LR, 0.0, EPS, DECAY)


BUILDS = {
    "update": Build(
        launch=lambda: sm3_(*_large()), registers={"sm_80": 62, "sm_90": 66, "sm_100": 66}
    ),
}

SAMPLES = {"sm3_": lambda: _make(torch.float32, momentum=0.9)}

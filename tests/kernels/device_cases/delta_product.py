"""Cases of `kernels/triton/delta_product.py`."""

from __future__ import annotations

from typing import Any

import torch
from device_cases.base import FLOATS, Build, Case
from torch import Tensor

from sft.kernels.delta_product import _view, delta_product_reference
from sft.kernels.pattern import Pattern
from sft.kernels.triton.delta_product import delta_product


def made(
    tokens: int, rows: int, cols: int, k: int, *, to_rows: bool, view: bool = True
) -> tuple[Any, ...]:
    """Small whole numbers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(rows + k)
    at = torch.randperm(rows * cols, generator=generator)[:k].sort().values.int()
    x = torch.randint(-4, 5, (tokens, cols if to_rows else rows), generator=generator)
    values = torch.randint(-4, 5, (k,), generator=generator).float()
    pattern = Pattern(at, (rows, cols))
    parts = _view(pattern, to_rows) if view else (at[:0],) * 3
    return x, values, at, *parts, rows, cols, to_rows


def expected(
    x: Tensor, values: Tensor, at: Tensor, _: Any, __: Any, ___: Any,
    rows: int, cols: int, to_rows: bool,
) -> Tensor:  # fmt: skip
    return delta_product_reference(x, values, Pattern(at, (rows, cols)), to_rows=to_rows)


def _case(dtypes: Any, *sizes: int, **options: Any) -> Case:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        x, *rest = made(*sizes, **options)
        return x.to(dtype), *rest

    return Case(make=make, run=delta_product, expected=expected, dtypes=dtypes)


ALL = (*FLOATS, torch.float64)
CASES = {
    f"{name}, to {'rows' if to_rows else 'columns'}": _case(dtypes, *sizes, to_rows=to_rows, **more)
    for to_rows in (True, False)
    for name, sizes, dtypes, more in (
        ("one of each", (1, 1, 1, 1), FLOATS, {}),
        ("no entry", (5, 3, 4, 0), FLOATS[:1], {}),
        ("no token", (0, 3, 4, 5), FLOATS[:1], {}),
        ("rests on all sides", (300, 7, 9, 30), ALL, {}),
        ("whole runs", (256, 5, 8, 20), FLOATS, {}),
        ("every entry", (20, 4, 21, 84), FLOATS[:1], {}),
        ("no view yet", (20, 5, 6, 11), FLOATS[:1], {"view": False}),
    )
}


def _turned(dtype: torch.dtype) -> tuple[Any, ...]:
    x, *rest = made(19, 5, 33, 40, to_rows=True)
    return x.to(dtype).t().contiguous().t(), *rest


CASES["tokens side by side already"] = Case(make=_turned, run=delta_product, expected=expected)

# 1 % of 4096 x 4096, for a number of tokens that nothing divides
_K = 4096 * 4096 // 100


def _launch(tokens: int, to_rows: bool) -> Tensor:
    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, values = empty(tokens, 4096, dtype=torch.bfloat16), empty(_K, dtype=torch.float32)
    slots = empty(0 if to_rows else _K)
    return delta_product(x, values, empty(_K), empty(4097), empty(_K), slots, 4096, 4096, to_rows)


_BUDGET = {"sm_80": 46, "sm_90": 46, "sm_100": 46}
BUILDS = {
    "to rows": Build(launch=lambda: _launch(2048, True), registers=_BUDGET),
    "to columns, any number of tokens": Build(
        launch=lambda: _launch(2047, False), registers=_BUDGET
    ),
}

_SAMPLE = made(9, 5, 6, 11, to_rows=True)
SAMPLES = {"delta_product": (_SAMPLE[0].float(), *_SAMPLE[1:])}

"""Cases of `kernels/triton/positions.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from device_cases.base import FLOATS, Build, Case
from torch import Tensor

from sft.kernels.add import add_reference
from sft.kernels.compose import compose_reference
from sft.kernels.gather import gather_reference
from sft.kernels.triton.positions import add_many_, gather_many, write_many_
from sft.kernels.write import write_reference

# rows, columns and positions of each weight: one entry, none, all, more than a block, and not a
# multiple of what moves at once
SIZES = [(1, 1, 1), (3, 5, 0), (7, 9, 63), (60, 90, 2500), (33, 65, 1024), (40, 40, 17)]


def supports(index: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randperm(rows * cols, generator=generator)[:k].sort().values.to(index)
        for rows, cols, k in SIZES
    ]


def weights(dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(r, c, generator=generator).to(dtype) for r, c, _ in SIZES]


def numbers(dtype: torch.dtype, seed: int) -> list[Tensor]:
    """A number for each position."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(k, generator=generator).to(dtype) for _, _, k in SIZES]


def shifted(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers at addresses that 16 does not divide."""
    return [torch.cat([tensor[:1], tensor])[1:] for tensor in tensors]


def strided(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers, each followed by another."""
    return [torch.stack([tensor, tensor.flip(0)], 1)[:, 0] for tensor in tensors]


def _each(oracle: Callable[..., None]) -> Callable[..., None]:
    """Apply an oracle of weight, positions and values to one of many after another."""

    def expected(ws: list[Tensor], at: list[Tensor], values: list[Tensor], *_: Any) -> None:
        for row in zip(ws, at, values, strict=True):
            oracle(*row)

    return expected


def _gather(index: torch.dtype, place: Any = list) -> Case:
    return Case(
        make=lambda dtype: (weights(dtype), place(supports(index))),
        run=gather_many,
        expected=lambda ws, at: list(map(gather_reference, ws, at)),
        dtypes=(*FLOATS, torch.float64),
    )


def _write(index: torch.dtype, place: Any = list) -> Case:
    return Case(
        make=lambda dtype: (weights(dtype), supports(index), place(numbers(dtype, 2)), [], False),
        run=write_many_,
        expected=_each(write_reference),
        dtypes=(*FLOATS, torch.float64),
        mutates=(0,),
    )


def _home(reference: bool, place: Any = list) -> Case:
    def expected(
        ws: list[Tensor], at: list[Tensor], values: list[Tensor], originals: list[Tensor], _: bool
    ) -> None:
        for weight, where, new, old in zip(ws, at, values, originals, strict=True):
            write_reference(weight, where, compose_reference(old, new, reference=reference))

    return Case(
        make=lambda dtype: (
            weights(dtype),
            place(supports(torch.int32)),
            place(numbers(torch.float32, 2)),
            place(numbers(dtype, 3)),
            reference,
        ),
        run=write_many_,
        expected=expected,
        dtypes=(*FLOATS, torch.float64),
        mutates=(0,),
    )


def _add(wide: bool, place: Any = list) -> Case:
    return Case(
        make=lambda dtype: (
            weights(dtype),
            supports(torch.int64),
            place(numbers(torch.float32 if wide else dtype, 2)),
        ),
        run=add_many_,
        expected=_each(add_reference),
        mutates=(0,),
    )


CASES = {
    "gather": _gather(torch.int32),
    "gather, 64-bit": _gather(torch.int64),
    "gather, unaligned": _gather(torch.int32, shifted),
    "gather, strided": _gather(torch.int32, strided),
    "write": _write(torch.int32),
    "write, 64-bit": _write(torch.int64),
    "write, unaligned": _write(torch.int32, shifted),
    "write, strided": _write(torch.int32, strided),
    "write a sum": _home(reference=False),
    "write a sum, reference": _home(reference=True),
    "write a sum, strided": _home(reference=False, place=strided),
    "add": _add(wide=False),
    "add, wide": _add(wide=True),
    "add, strided": _add(wide=False, place=strided),
}


def _large(*dtypes: torch.dtype) -> list[list[Tensor]]:
    """Two supports of 1% of 4096 x 4096, of lengths that 16 does not divide."""
    return [[torch.empty(k, dtype=dtype) for k in (167_773, 167_771)] for dtype in dtypes]


def _matrices(dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(1, dtype=dtype)] * 2


BF16, FP32, INT32 = torch.bfloat16, torch.float32, torch.int32

BUILDS = {
    "gather": Build(
        launch=lambda: gather_many(_matrices(BF16), *_large(INT32)),
        registers={"sm_80": 36, "sm_90": 36, "sm_100": 36},
    ),
    "write": Build(
        launch=lambda: write_many_(_matrices(BF16), *_large(INT32, BF16), [], False),
        registers={"sm_80": 46, "sm_90": 46, "sm_100": 46},
    ),
    "write a sum": Build(
        launch=lambda: write_many_(_matrices(BF16), *_large(INT32, FP32, BF16), False),
        registers={"sm_80": 55, "sm_90": 64, "sm_100": 55},
    ),
    "add": Build(
        launch=lambda: add_many_(_matrices(BF16), *_large(INT32, FP32)),
        registers={"sm_80": 46, "sm_90": 48, "sm_100": 48},
    ),
}

SAMPLES = {
    "gather_many": lambda: (weights(FP32), supports(INT32)),
    "write_many_": lambda: (
        weights(FP32),
        supports(INT32),
        numbers(FP32, 2),
        numbers(FP32, 3),
        False,
    ),
    "add_many_": lambda: (weights(FP32), supports(INT32), numbers(FP32, 2)),
}

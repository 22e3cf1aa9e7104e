"""Cases of `kernels/triton/compose_weight.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from device_cases.base import FLOATS, Build, Case
from torch import Tensor

from sft.kernels.pattern import Pattern
from sft.kernels.triton.compose_weight import compose_

# rows, columns, rank, entries
SIZES = {
    "one of each": (1, 1, 1, 1),
    "no entry": (5, 7, 3, 0),
    "rests on all sides": (70, 90, 5, 300),
    "every entry": (20, 33, 2, 660),
    "empty tiles": (130, 140, 20, 2),
    "more ranks than a turn": (40, 50, 70, 60),
    "one tile": (64, 64, 16, 40),
}


def made(
    rows: int, cols: int, rank: int, k: int, *, side: int = 64, view: bool = True
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows + k)
    at = torch.randperm(rows * cols, generator=generator)[:k].sort().values.int()
    left = torch.randn(rows, rank, generator=generator)
    # the factors of a Conv1D are transposed
    right = torch.randn(cols, rank, generator=generator).t()
    values = torch.randn(k, generator=generator)
    tiles = Pattern(at, (rows, cols)).tiles(side) if view else (at[:0],) * 2
    return torch.full((rows, cols), torch.nan), left, right, values, at, *tiles, side


def expected(out: Tensor, left: Tensor, right: Tensor, values: Tensor, at: Tensor, *_: Any) -> None:
    """The sum in float64, rounded once."""
    dense = left.double() @ right.double()
    dense.view(-1).index_add_(0, at.long(), values.double())
    out.copy_(dense)


def _case(dtypes: Any, *sizes: int, **options: Any) -> Case:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        out, left, right, *rest = made(*sizes, **options)
        return out.to(dtype), left.to(dtype), right.to(dtype), *rest

    return Case(
        make=make,
        run=compose_,
        expected=expected,
        dtypes=dtypes,
        mutates=(0,),
        # sums are of float32: where they cancel, not a last bit of the result but of its terms
        tolerance=lambda dtype: (torch.finfo(dtype).eps, 1e-5),
    )


def _slices() -> Case:
    """Factors that are columns of wider matrices, of lengths that need no padding."""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        out, left, right, *rest = made(64, 48, 16, 40)
        wide = torch.cat([left, left.new_full((64, 16), torch.nan)], 1).to(dtype)
        broad = torch.cat([right, right.new_full((16, 32), torch.nan)], 1).to(dtype)
        return out.to(dtype), wide[:, :16], broad[:, :48], *rest

    return dataclasses.replace(_case(FLOATS[:1], 1, 1, 1, 1), make=make)


CASES = {
    "slices": _slices(),
    **{name: _case(FLOATS, *sizes) for name, sizes in SIZES.items()},
    "large tiles": _case(FLOATS, 130, 200, 8, 500, side=128),
    "tiles not sorted yet": _case(FLOATS[:1], 70, 80, 5, 60, view=False),
    "in float64": _case((torch.float64,), 70, 80, 5, 60),
}


def _launch(dtype: torch.dtype, side: int = 64) -> None:
    rows, cols, rank, k = 2048, 5460, 128, 2048 * 5460 // 33
    tiles = -(-rows // side) * -(-cols // side)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    out, left = empty(rows, cols, dtype=dtype), empty(rows, rank, dtype=dtype)
    right, values = empty(rank, cols, dtype=dtype), empty(k, dtype=torch.float32)
    compose_(out, left, right, values, empty(k), empty(k), empty(tiles + 1), side)


# the last loop reads entries one by one; test_compose_weight.py looks at that over the ranks
BUILDS = {
    "bfloat16": Build(
        launch=lambda: _launch(torch.bfloat16),
        registers={"sm_80": 190, "sm_90": 146, "sm_100": 144},
        wide=False,
        tensor_cores=True,
    ),
    "float32": Build(
        launch=lambda: _launch(torch.float32),
        registers={"sm_80": 190, "sm_90": 146, "sm_100": 144},
        wide=False,
    ),
}

SAMPLES = {"compose_": made(5, 7, 3, 9)}

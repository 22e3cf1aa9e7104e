"""`outer_at` and `outer_above` by dense tiles."""

from __future__ import annotations

from typing import Any

import torch
from device_cases.base import FLOATS, HALVES, Build, Case
from torch import Tensor

from sft.kernels.outer_above import SIDE, num_tiles, outer_above_reference
from sft.kernels.outer_at import outer_at_reference
from sft.kernels.pattern import Pattern, index_dtype


def operands(tokens: int, rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Odd numbers, whose sums are exact in any order; one is a slice of something wider."""
    generator = torch.Generator().manual_seed(rows)
    left = torch.randint(-2, 3, (tokens, rows), generator=generator).mul(2).add(1).to(dtype)
    right = torch.randint(-2, 3, (tokens, 2 * cols), generator=generator).mul(2).add(1).to(dtype)
    return left, right[:, ::2] if cols > 1 else right[:, :1].clone()


def picked(
    tokens: int, rows: int, cols: int, k: int, side: int, index: torch.dtype = torch.int32
) -> Any:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(k)
        at = torch.randperm(rows * cols, generator=generator)[:k].sort().values.to(index)
        pattern = Pattern(at, (rows, cols))
        return *operands(tokens, rows, cols, dtype), at, *pattern.tiles(side), side

    return make


def unsorted(tokens: int, rows: int, cols: int, k: int, side: int) -> Any:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        left, right, at, *_ = picked(tokens, rows, cols, k, side)(dtype)
        return left, right, at, at[:0], at[:0], side

    return make


def run_picked(*arguments: Any) -> Tensor:
    from sft.kernels.triton.tiles import tiled_outer

    return tiled_outer(*arguments)


def expected_picked(left: Tensor, right: Tensor, at: Tensor, *_: Any) -> Tensor:
    return outer_at_reference(left, right, Pattern(at, (left.shape[1], right.shape[1])))


def listed(tokens: int, rows: int, cols: int, threshold: float, fair: int) -> Any:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        starts = torch.arange(num_tiles((rows, cols)) + 1, dtype=torch.int32) * fair
        edge = torch.tensor(threshold)
        return *operands(tokens, rows, cols, dtype), edge, starts, int(starts[-1]), SIDE

    return make


def run_listed(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from sft.kernels.triton.tiles import outer_above

    return outer_above(*arguments)


def expected_listed(
    left: Tensor, right: Tensor, edge: Tensor, starts: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    found = outer_above_reference(left, right, float(edge), starts.tolist())
    positions, values, counts = found
    dtype = index_dtype(left.shape[1] * right.shape[1])
    return (
        torch.tensor(positions, dtype=dtype),
        torch.tensor(values, dtype=torch.float32),
        torch.tensor(counts, dtype=torch.int32),
    )


CASES = {
    f"{what}, {name}": Case(make, run, expected, dtypes=dtypes, stores_once=what == "picked")
    for what, run, expected, entries in (
        (
            "picked",
            run_picked,
            expected_picked,
            (
                ("one of each", picked(1, 1, 1, 1, 64), FLOATS),
                ("no position", picked(3, 5, 6, 0, 64), FLOATS[:1]),
                ("no token", picked(0, 5, 6, 4, 64), FLOATS),
                ("rests on all sides", picked(70, 67, 90, 300, 64), FLOATS),
                ("every position", picked(33, 40, 48, 40 * 48, 64), FLOATS),
                ("empty tiles", picked(16, 256, 256, 3, 64), FLOATS),
                ("large tiles", picked(65, 130, 260, 500, 128), FLOATS),
                ("tiles not sorted yet", unsorted(9, 70, 80, 60, 64), FLOATS[:1]),
                ("of 64 bits", picked(9, 70, 80, 60, 64, torch.int64), FLOATS[:1]),
                ("in float64", picked(9, 70, 80, 60, 64), (torch.float64,)),
                ("a band of tiles and more", picked(2, 640, 70, 50, 64), FLOATS[:1]),
            ),
        ),
        (
            "listed",
            run_listed,
            expected_listed,
            (
                ("one of each", listed(1, 1, 1, 0.0, 2), FLOATS),
                ("no token", listed(0, 5, 6, 0.0, 4), FLOATS[:1]),
                ("rests on all sides", listed(70, 67, 90, 60.0, 200), FLOATS),
                ("no room for some", listed(70, 67, 90, 40.0, 99), FLOATS),
                ("all of them", listed(33, 40, 48, 0.0, 40 * 48), FLOATS),
                ("of float64", listed(9, 70, 70, 40.0, 99), (torch.float64,)),
                ("none of them", listed(9, 70, 70, 1e9, 7), FLOATS[:1]),
            ),
        ),
    )
    for name, make, dtypes in entries
}


def _large(dtype: torch.dtype, tokens: int, cols: int) -> tuple[Tensor, Tensor]:
    shapes = (tokens, 4096), (tokens, cols)
    left, right = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    return left, right


def _pick(dtype: torch.dtype, side: int, tokens: int = 2048, cols: int = 4096) -> Any:
    def launch() -> None:
        at = torch.empty(4096 * cols // 100, dtype=torch.int32, device="meta")
        pointers = torch.empty(4097, dtype=torch.int32, device="meta")
        run_picked(*_large(dtype, tokens, cols), at, at, pointers, side)

    return launch


def _list(dtype: torch.dtype) -> Any:
    def launch() -> None:
        starts = torch.empty(4097, dtype=torch.int32, device="meta")
        edge = torch.empty((), device="meta")
        run_listed(*_large(dtype, 2048, 4096), edge, starts, 2**18, SIDE)

    return launch


BUILDS = {
    **{
        f"picked, {str(dtype).removeprefix('torch.')}": Build(
            _pick(dtype, 128),
            {"sm_80": 146, "sm_90": 110, "sm_100": 94},
            only_wide=True,
            tensor_cores=True,
        )
        for dtype in HALVES
    },
    "picked, small tiles": Build(
        _pick(torch.bfloat16, 64),
        {"sm_80": 92, "sm_90": 71, "sm_100": 60},
        only_wide=True,
        tensor_cores=True,
    ),
    "picked, odd lengths": Build(
        _pick(torch.bfloat16, 128, 1003, 4001),
        {"sm_80": 146, "sm_90": 110, "sm_100": 94},
        only_wide=True,
        tensor_cores=True,
    ),
    "picked, float32": Build(
        _pick(torch.float32, 64),
        {"sm_80": 82, "sm_90": 82, "sm_100": 76},
        only_wide=True,
    ),
    "listed, bfloat16": Build(
        _list(torch.bfloat16),
        {"sm_80": 113, "sm_90": 124, "sm_100": 117},
        tensor_cores=True,
    ),
    "listed, float32": Build(_list(torch.float32), {"sm_80": 146, "sm_90": 142, "sm_100": 142}),
}
SAMPLES = {
    "tiled_outer": picked(9, 5, 6, 11, 64)(torch.float32),
    "outer_above": listed(9, 5, 6, 3.0, 20)(torch.float32),
}

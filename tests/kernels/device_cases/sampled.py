"""`outer_at` by one dot product for each position."""

from __future__ import annotations

from typing import Any

import torch
from device_cases.base import FLOATS, Build, Case
from torch import Tensor

from sft.kernels.outer_at import outer_at_reference
from sft.kernels.pattern import Pattern


def arguments(
    tokens: int, rows: int, cols: int, k: int, index: torch.dtype = torch.int32, turned: bool = True
) -> Any:
    """Return what makes the arguments of a launcher, of random positions."""

    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(tokens)
        left = torch.randn(tokens, rows, generator=generator).to(dtype)
        right = torch.randn(tokens, cols, generator=generator).to(dtype)
        if turned:
            # tokens side by side, at strides that no vector of 128 bits starts at
            left, right = left.t().contiguous().t(), right[:, : cols // 2].repeat(1, 2)
        at = torch.randperm(rows * cols, generator=generator)[:k].sort().values.to(index)
        pattern = Pattern(at, (rows, cols))
        return left, right, at, pattern.row_pointers, pattern.columns

    return make


def run(*operands: Tensor) -> Tensor:
    from sft.kernels.triton.sampled import sampled_outer

    return sampled_outer(*operands)


def expected(left: Tensor, right: Tensor, at: Tensor, *_: Tensor) -> Tensor:
    return outer_at_reference(left, right, Pattern(at, (left.shape[1], right.shape[1])))


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    # halves are multiplied and summed in float32 as well
    return (1e-12, 1e-12) if dtype == torch.float64 else (1e-5, 1e-4)


CASES = {
    name: Case(make, run, expected, dtypes=dtypes, tolerance=tolerance)
    for name, make, dtypes in (
        ("one of each", arguments(1, 1, 1, 1, turned=False), FLOATS),
        ("no position", arguments(5, 4, 6, 0, turned=False), FLOATS[:1]),
        ("no token", arguments(0, 4, 6, 5, turned=False), FLOATS),
        ("blocks and a rest", arguments(300, 14, 6, 20), (*FLOATS, torch.float64)),
        ("whole blocks", arguments(256, 12, 6, 17, torch.int64), FLOATS),
        ("every position", arguments(130, 6, 8, 48), FLOATS),
        ("too few tokens for a block", arguments(3, 9, 7, 16, turned=False), FLOATS),
    )
}


def _build(dtype: torch.dtype, tokens: int, index: torch.dtype = torch.int32) -> Any:
    def launch() -> None:
        at = torch.empty(41943, dtype=index, device="meta")
        operands = [torch.empty(tokens, 4096, dtype=dtype, device="meta") for _ in range(2)]
        run(*operands, at, at, at)

    return launch


BUILDS = {
    "bfloat16": Build(
        _build(torch.bfloat16, 2048),
        {"sm_80": 66, "sm_90": 66, "sm_100": 70},
        only_wide=True,
    ),
    "bfloat16, an odd number of tokens": Build(
        _build(torch.bfloat16, 1003, torch.int64),
        {"sm_80": 72, "sm_90": 72, "sm_100": 72},
        only_wide=True,
    ),
    "float32": Build(
        _build(torch.float32, 2048),
        {"sm_80": 120, "sm_90": 100, "sm_100": 82},
        only_wide=True,
    ),
}
SAMPLES = {"sampled_outer": arguments(9, 5, 6, 11, turned=False)(torch.float32)}

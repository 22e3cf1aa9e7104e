"""Cases of `kernels/triton/kept.py`: the CPU gives the bits, and its oracle is in fractions."""

from __future__ import annotations

import torch
from device_cases.base import FLOATS, Build, Case
from torch import Tensor

from sft.kernels.kept import BLOCK, TILE, _keep_bfloat16, _keep_int8, _restore_int8
from sft.kernels.triton.kept import keep_bfloat16, keep_int8, restore_int8

KEY = 2**62 + 2**33 + 5
SHAPES = {
    "many tiles, not whole": (3, 5 * TILE - 1000),
    "one value": (1,),
    "empty": (0, 3),
    "whole tiles": (2, TILE),
}


def made(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)
    flat = x.view(-1)
    # zeros of both signs, and a block of nothing else
    flat[3:5] = torch.tensor([0.0, -0.0])[: len(flat[3:5])]
    flat[5 * BLOCK : 6 * BLOCK] = 0
    return x.to(dtype), torch.tensor(KEY)


def _turned(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, key = made((70, 66), dtype)
    return x.t(), key


def _not_finite(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, key = made((BLOCK, 3), dtype)
    x.view(-1)[[3, BLOCK + 1]] = torch.tensor([torch.nan, -torch.inf], dtype=dtype)
    return x, key


def _codes(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return _keep_int8(*made(shape, torch.float32))


CASES = {
    **{
        f"int8, {name}": Case(
            make=lambda dtype, shape=shape: made(shape, dtype),
            run=keep_int8,
            expected=_keep_int8,
            dtypes=(*FLOATS, torch.float64),
        )
        for name, shape in SHAPES.items()
    },
    "int8, transposed": Case(make=_turned, run=keep_int8, expected=_keep_int8),
    "bfloat16, many tiles": Case(
        make=lambda dtype: made(SHAPES["many tiles, not whole"], dtype),
        run=keep_bfloat16,
        expected=_keep_bfloat16,
        dtypes=(torch.float32, torch.float64),
    ),
    "bfloat16, not finite": Case(
        make=_not_finite,
        run=keep_bfloat16,
        expected=_keep_bfloat16,
        dtypes=(torch.float32,),
    ),
    "int8, not finite": Case(make=_not_finite, run=keep_int8, expected=_keep_int8),
    **{
        f"restored, {name}": Case(
            make=lambda dtype, shape=shape: (*_codes(shape), dtype),
            run=restore_int8,
            expected=_restore_int8,
            dtypes=(*FLOATS, torch.float64),
        )
        for name, shape in SHAPES.items()
    },
}

# 2048 tokens of 4096 features, and one more
_X = torch.empty(2048 * 4096 + 1, dtype=torch.bfloat16, device="meta")
_PEAKS = torch.empty(2048 * 64 + 1, dtype=torch.bfloat16, device="meta")
_KEY = torch.tensor(KEY)

BUILDS = {
    "int8": Build(
        launch=lambda: keep_int8(_X, _KEY),
        registers={"sm_80": 70, "sm_90": 54, "sm_100": 55},
    ),
    "bfloat16": Build(
        launch=lambda: keep_bfloat16(_X.float(), _KEY),
        registers={"sm_80": 70, "sm_90": 72, "sm_100": 72},
    ),
    "restored": Build(
        launch=lambda: restore_int8(_X.char(), _PEAKS, torch.bfloat16),
        registers={"sm_80": 46, "sm_90": 36, "sm_100": 36},
    ),
}

SAMPLES = {
    "keep_int8": made((3, 70), torch.float32),
    "keep_bfloat16": made((3, 70), torch.float32),
    "restore_int8": (*_codes((3, 70)), torch.bfloat16),
}

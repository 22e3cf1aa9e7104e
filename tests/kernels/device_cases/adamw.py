"""Cases of `kernels/triton/adamw.py`."""

from __future__ import annotations

from typing import Any

import torch
from device_cases.base import FLOATS, Build, Case
from device_cases.positions import SIZES, numbers, shifted, supports, weights
from torch import Tensor

from sft.kernels.sparse_adamw import in_buckets_
from sft.kernels.triton.adamw import sparse_adamw_

LR, BETA1, BETA2, EPS, DECAY = 1e-2, 0.9, 0.99, 1e-8, 0.1


def columns(dtype: torch.dtype, seed: int = 5) -> list[list[Tensor]]:
    """Values, gradients, moments and ages: as one gets after some updates, young and old."""
    generator = torch.Generator().manual_seed(seed)
    ages = [torch.randint(0, 5000, (k,), generator=generator) for *_, k in SIZES]
    m, v = numbers(torch.float32, 13), [root.square() for root in numbers(torch.float32, 14)]
    values = numbers(torch.float32, 11)  # trained in float32 whatever the model's dtype
    return [values, numbers(dtype, 12), m, v, [age.int() for age in ages]]


def _make(
    dtype: torch.dtype,
    *,
    betas: tuple[float, float] = (BETA1, BETA2),
    reference: bool = False,
    taus: list[float] | None = None,
    housed: bool = False,
    values: torch.dtype = torch.float32,
    place: Any = list,
) -> tuple[Any, ...]:
    made = columns(dtype)
    made[0] = place([value.to(values) for value in made[0]])
    homes: list[list[Tensor]] = [[], [], []]
    if housed:
        homes = [weights(dtype), supports(torch.int32), numbers(dtype, 15)]
    return (*made, LR, *betas, EPS, DECAY, reference, taus or [], *homes, reference)


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    return {torch.bfloat16: (8e-3, 1e-5), torch.float16: (1e-3, 1e-5)}.get(dtype, (2e-6, 1e-6))


def _case(dtypes: tuple[torch.dtype, ...] = FLOATS, **options: Any) -> Case:
    return Case(
        make=lambda dtype: _make(dtype, **options),
        run=sparse_adamw_,
        expected=in_buckets_,  # itself held against the oracle in test_sparse_adamw.py
        dtypes=dtypes,
        tolerance=_tolerance,
        mutates=(0, 2, 3, 4, 12),
    )


def _strided() -> Case:
    """Of a transposed value and of float64 torch takes care; each keeps its threshold."""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        made = [[torch.rand(3, 4, generator=generator) for _ in range(3)] for _ in range(4)]
        made[0][:2] = [made[0][0].t().contiguous().t(), made[0][1].double()]
        ages = [torch.zeros(3, 4, dtype=torch.int32) for _ in range(3)]
        taus = [0.1, 0.2, 0.4]
        return (*made, ages, LR, BETA1, BETA2, EPS, DECAY, False, taus, [], [], [], False)

    return Case(
        make,
        sparse_adamw_,
        in_buckets_,
        dtypes=(torch.float32,),
        tolerance=_tolerance,
        mutates=(0, 2, 3, 4),
    )


TAUS = [0.0, 0.1, 0.2, 0.3, 0.4, 5.0]

CASES = {
    "update": _case(),
    "update, reference": _case((torch.float32,), reference=True),
    "update, values as the weights": _case((torch.bfloat16,), values=torch.bfloat16),
    "update, far betas": _case((torch.float32,), betas=(0.0, 0.4)),
    "update, unaligned": _case((torch.float32,), place=shifted),
    "update and write": _case(housed=True),
    "update and write, reference": _case((torch.bfloat16,), housed=True, reference=True),
    "update and shrink": _case((torch.float32,), taus=TAUS),
    "update, shrink and write": _case(housed=True, taus=TAUS),
    "betas left to torch": _case((torch.float32,), betas=(0.9, 0.999999)),
    "tensors left to torch": _strided(),
}


def _large(housed: bool, values: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Two supports of 1% of 4096 x 4096, of lengths that 16 does not divide."""
    sizes = (167_773, 167_771)
    dtypes = (values, values, torch.float32, torch.float32, torch.int32)
    made = [[torch.empty(k, dtype=dtype) for k in sizes] for dtype in dtypes]
    at = [torch.empty(k, dtype=torch.int32) for k in sizes]
    originals = [torch.empty(k, dtype=torch.bfloat16) for k in sizes]
    homes = [[torch.empty(1, dtype=torch.bfloat16)] * 2, at, originals] if housed else [[], [], []]
    return (*made, LR, BETA1, BETA2, EPS, DECAY, False, [], *homes, False)


BUILDS = {
    "update": Build(
        launch=lambda: sparse_adamw_(*_large(housed=False)),
        registers={"sm_80": 46, "sm_90": 55, "sm_100": 55},
    ),
    "update and write": Build(
        launch=lambda: sparse_adamw_(*_large(housed=True)),
        registers={"sm_80": 92, "sm_90": 92, "sm_100": 92},
    ),
}

SAMPLES = {
    "sparse_adamw_": lambda: _make(torch.float32, housed=True, taus=TAUS),
}

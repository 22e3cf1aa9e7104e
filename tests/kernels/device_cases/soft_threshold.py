"""Cases of `kernels/triton/soft_threshold.py`."""

from __future__ import annotations

import torch
from device_cases.base import FLOATS, Build, Case
from torch import Tensor

from sft.kernels.soft_threshold import soft_threshold_reference
from sft.kernels.triton.soft_threshold import soft_threshold_many_


def values(dtype: torch.dtype) -> list[Tensor]:
    """Gates of sizes 1, 0, a few, one block and more; transposed ones; zeros, infinity, NaN."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (16,), (1024,), (3, 700), (5, 4)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made[2][:6] = torch.tensor([0.0, -0.0, 0.3, -0.3, torch.inf, -torch.inf])
    made[-1] = made[-1].t()
    return made


def _expected(some: list[Tensor], tau: float, factor: Tensor | None) -> None:
    bound = tau if factor is None else (factor * tau).item()
    for value in some:
        value.copy_(soft_threshold_reference(value, bound))


def _case(factor: Tensor | None) -> Case:
    return Case(
        make=lambda dtype: (values(dtype), 0.3, factor),
        run=soft_threshold_many_,
        expected=_expected,
        dtypes=(*FLOATS, torch.float64) if factor is None else FLOATS,
        mutates=(0,),
    )


CASES = {
    "gates": _case(None),
    "gates, a factor": _case(torch.tensor(0.7)),
    "gates, skipped": _case(torch.tensor(0.0)),
}

BUILDS = {
    "gates": Build(
        launch=lambda: soft_threshold_many_([torch.empty(4096), torch.empty(4093)], 0.1, None),
        registers={"sm_80": 23, "sm_90": 29, "sm_100": 29},
    ),
}

SAMPLES = {"soft_threshold_many_": lambda: (values(torch.float32)[2:], 0.3, torch.tensor(0.5))}

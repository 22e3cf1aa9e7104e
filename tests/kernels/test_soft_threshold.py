from __future__ import annotations

from typing import Any

import pytest
import torch

from sft.kernels.soft_threshold import (
    soft_threshold,
    soft_threshold_many_,
    soft_threshold_reference,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0, torch.tensor(0.3)])
def test_s1_soft_threshold_is_the_operator(dtype: torch.dtype, tau: Any) -> None:
    value = torch.cat([torch.randn(200), torch.tensor([0.0, -0.0, 1.0, -1.0, 0.3, -0.3])]).to(dtype)
    found = soft_threshold(value, tau)
    # the scalar as the operator sees it: rounded to the dtype of the values
    bound = torch.as_tensor(tau, dtype=dtype)
    expected = value.sign() * (value.abs() - bound).clamp(min=0)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    dead = found[value.abs() <= bound]
    assert (dead == 0).all() and not (float(bound) > 0 and dead.signbit().any())


def some(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7,), (3, 4), (), (0,), (300,)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("factor", [None, 0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_many_equal_the_oracle(dtype: torch.dtype, factor: float | None) -> None:
    values, before = some(dtype), some(dtype)
    soft_threshold_many_(values, 0.6, None if factor is None else torch.tensor(factor))
    tau = 0.6 if factor is None else (torch.tensor(factor) * 0.6).item()
    for found, value in zip(values, before, strict=True):
        assert torch.equal(found, soft_threshold_reference(value, tau))
        assert factor != 0 or torch.equal(found, value)


def test_a_tensor_alone_is_the_same() -> None:
    (value, *_), (expected, *_) = some(torch.float32), some(torch.float32)
    soft_threshold_many_([value], 0.3)
    assert torch.equal(value, soft_threshold(expected, 0.3))

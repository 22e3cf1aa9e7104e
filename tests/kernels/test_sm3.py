"""Facts of SM3, of one vector and of many, against loops over the published equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sft.kernels.sm3 import Positions, sm3_, sm3_reference, sm3_step_

OPTIONS: dict[str, Any] = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.5}
SHAPES = [(6, 9, 20), (1, 5, 5), (5, 1, 3), (4, 4, 0), (3, 3, 9)]


def support(o: int, i: int, k: int) -> Positions:
    flat = torch.randperm(o * i, generator=torch.manual_seed(0))[:k].sort().values
    return Positions(flat // i, flat % i, (o, i))


def draw(k: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(k, generator=torch.manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("o", "i", "k"), SHAPES)
def test_step_equals_the_oracle(o: int, i: int, k: int) -> None:
    at, value, grads = support(o, i, k), draw(k, 1), [draw(k, seed) for seed in range(2, 8)]
    expected = sm3_reference(value, grads, at, **OPTIONS)
    covers = [torch.zeros(o), torch.zeros(i)]
    for grad in grads:
        sm3_step_(value, grad, covers, None, positions=at, **OPTIONS)
    for found, wanted in zip((value, *covers), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_equal_one_after_another(dtype: torch.dtype, momentum: float) -> None:
    def made() -> tuple[list[Any], ...]:
        values = [draw(k, seed, dtype) for seed, (*_, k) in enumerate(SHAPES)]
        grads = [draw(k, seed + 9, dtype) for seed, (*_, k) in enumerate(SHAPES)]
        covers = [(draw(o, 1).abs(), draw(i, 2).abs()) for o, i, _ in SHAPES]
        buffers = [draw(k, seed + 20) for seed, (*_, k) in enumerate(SHAPES)]
        return values, grads, covers, buffers, [support(*shape) for shape in SHAPES]

    together, alone = made(), made()
    sm3_(*together, momentum=momentum, **OPTIONS)
    for value, grad, covers, buffer, at in zip(*alone, strict=True):
        sm3_step_(value, grad, covers, buffer, positions=at, momentum=momentum, **OPTIONS)
    for column in (0, 3):
        assert all(map(torch.equal, together[column], alone[column]))
    for found, wanted in zip(together[2], alone[2], strict=True):
        assert all(map(torch.equal, found, wanted))


def test_no_tensors_are_no_update() -> None:
    sm3_([], [], [], [], [], **OPTIONS)

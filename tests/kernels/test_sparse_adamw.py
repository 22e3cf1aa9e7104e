"""Facts of the update, of one tensor and of many, against loops over the published equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sft.kernels.compose import compose
from sft.kernels.gather import gather
from sft.kernels.soft_threshold import soft_threshold
from sft.kernels.sparse_adamw import adamw_reference, sparse_adamw_, sparse_adamw_step_
from sft.kernels.write import Home

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("reference", [False, True])
def test_step_equals_loop_with_mixed_ages(reference: bool) -> None:
    ages = torch.tensor([0, 1, 5, 300, 100_000], dtype=torch.int32)
    value = torch.tensor([0.5, -0.25, 0.0, 2.0, -1.0])
    grads = torch.randn(4, 5, generator=torch.manual_seed(1))
    expected = adamw_reference(value, grads, ages, **OPTIONS, reference=reference)
    m, v, age = torch.zeros(5), torch.zeros(5), ages.clone()
    for grad in grads:
        sparse_adamw_step_(value, grad, m, v, age, **OPTIONS, reference=reference)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(age, ages + 4)


def test_reference_differs_where_eps_matters() -> None:
    tiny = torch.full((1,), 1e-8)
    results = []
    for reference in (False, True):
        value, state = torch.zeros(1), [torch.zeros(1), torch.zeros(1)]
        age = torch.zeros(1, dtype=torch.int32)
        sparse_adamw_step_(value, tiny, *state, age, **OPTIONS, reference=reference)
        results.append(value.item())
    # First update: lr g/(|g| + eps) against lr g/(|g| + eps/sqrt(1 - b2)) and decay; g = eps.
    assert results[0] == pytest.approx(-1e-2 / 2, rel=1e-5)
    assert results[1] == pytest.approx(-1e-2 / 11 * (1 - 1e-3), rel=1e-5)


def state(*sizes: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Columns of values, gradients, moments and ages."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for k in sizes:
        value, grad, m, v = torch.randn(4, k, generator=generator)
        ages = torch.randint(0, 50, (k,), generator=generator, dtype=torch.int32)
        rows.append([value.to(dtype), grad.to(dtype), m, v.square(), ages])
    return [list(column) for column in zip(*rows, strict=True)]


def homes(weight_dtype: torch.dtype, *sizes: int) -> list[Home]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for i, k in enumerate(sizes):
        weight = torch.randn(3 * k + 1, generator=generator).to(weight_dtype)
        at = torch.randperm(3 * k + 1, generator=generator)[:k].sort().values.to(torch.int32)
        found.append(Home(weight, at, gather(weight, at), reference=i == 2))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_equal_one_after_another(dtype: torch.dtype) -> None:
    sizes = (5, 0, 40_000, 3)
    together, alone = state(*sizes, dtype=dtype), state(*sizes, dtype=dtype)
    sparse_adamw_(*together, **OPTIONS)
    for row in zip(*alone, strict=True):
        sparse_adamw_step_(*row, **OPTIONS)
    for left, right in zip(together, alone, strict=True):
        assert all(map(torch.equal, left, right))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_new_values_are_shrunk_and_then_written_home(weight_dtype: torch.dtype) -> None:
    sizes, taus = (5, 33, 70), [2.0, 0.0, 0.1]
    found, alone = state(*sizes), state(*sizes)
    places: list[Home | None] = [*homes(weight_dtype, *sizes)]
    places[1], before = None, homes(weight_dtype, *sizes)
    sparse_adamw_(*found, **OPTIONS, taus=taus, homes=places)
    sparse_adamw_(*alone, **OPTIONS)
    for value, home, old, new, tau in zip(found[0], places, before, alone[0], taus, strict=True):
        assert torch.equal(value, soft_threshold(new, tau))
        if home is not None:
            expected = old.weight.clone()
            expected[old.indices.long()] = compose(old.originals, value, reference=old.reference)
            assert torch.equal(home.weight, expected)
            assert home.weight._version == 0


def test_no_tensors_are_no_update() -> None:
    sparse_adamw_([], [], [], [], [], **OPTIONS)

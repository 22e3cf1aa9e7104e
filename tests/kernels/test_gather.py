from __future__ import annotations

import pytest
import torch

from sft.kernels.gather import gather, gather_many, gather_reference


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("k", [0, 1, 5, 35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equals_the_oracle(make_pattern, dtype, k, index_dtype) -> None:
    weight, indices = torch.randn(5, 7).to(dtype), make_pattern(5, 7, k, index_dtype).indices
    got = gather(weight, indices)
    assert got.dtype == dtype
    assert torch.equal(got, gather_reference(weight, indices))


def test_is_a_copy_outside_the_graph() -> None:
    weight = torch.zeros(2, 3, requires_grad=True)
    got = gather(weight, torch.tensor([0, 5]))
    got += 1
    assert not got.requires_grad
    assert not weight.any()


def test_many_equal_one_after_another(make_pattern) -> None:
    weights = [torch.randn(5, 7), torch.randn(4, 4).bfloat16(), torch.randn(2, 2)]
    indices = [make_pattern(5, 7, 9).indices, make_pattern(4, 4, 3).indices, torch.tensor([])]
    indices[2] = indices[2].to(torch.int64)
    got = gather_many(weights, indices)
    for found, weight, at in zip(got, weights, indices, strict=True):
        assert found.dtype == weight.dtype
        assert torch.equal(found, gather_reference(weight, at))
    assert gather_many([], []) == []


def test_indices_for_every_weight_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"^indices: got 1 for 2 weights, allowed is one a weight"):
        gather_many([torch.zeros(2)] * 2, [torch.tensor([0])])

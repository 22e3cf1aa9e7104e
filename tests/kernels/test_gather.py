from __future__ import annotations

import pytest
import torch

from sft.kernels.gather import gather, gather_reference


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

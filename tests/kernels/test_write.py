from __future__ import annotations

import pytest
import torch

from sft.kernels.gather import gather
from sft.kernels.write import write_, write_reference


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("k", [0, 1, 5, 35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equals_the_oracle(make_pattern, dtype, k, index_dtype) -> None:
    weight, indices = torch.randn(5, 7).to(dtype), make_pattern(5, 7, k, index_dtype).indices
    values, expected = torch.randn(k).to(dtype), weight.clone()
    write_(weight, indices, values)
    write_reference(expected, indices, values)
    assert torch.equal(weight, expected)


def test_writing_back_restores_every_bit(make_pattern) -> None:
    weight, indices = torch.randn(64, 48).bfloat16(), make_pattern(64, 48, 500).indices
    before, originals = weight.clone(), gather(weight, indices)
    write_(weight, indices, torch.randn(500).bfloat16())
    assert not torch.equal(weight, before)
    write_(weight, indices, originals)
    assert torch.equal(weight, before)


def test_autograd_does_not_notice() -> None:
    weight = torch.ones(2, 3, requires_grad=True)
    write_(weight, torch.tensor([1]), torch.tensor([5.0], requires_grad=True))
    assert (weight._version, weight.is_leaf, weight.grad_fn) == (0, True, None)


def test_a_cast_is_refused() -> None:
    with pytest.raises(ValueError, match=r"values: got torch.float32, the weight is torch.bfloat1"):
        write_(torch.zeros(2, 3).bfloat16(), torch.tensor([1]), torch.ones(1))

from __future__ import annotations

import pytest
import torch

from sft.kernels.add import add_, add_many_, add_reference


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("k", [0, 1, 5, 35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("values_dtype", [None, torch.float32], ids=["", "fp32 values"])
def test_equals_the_oracle(make_pattern, dtype, k, index_dtype, values_dtype) -> None:
    weight, indices = torch.randn(5, 7).to(dtype), make_pattern(5, 7, k, index_dtype).indices
    values, expected = torch.randn(k).to(values_dtype or dtype), weight.clone()
    add_(weight, indices, values)
    add_reference(expected, indices, values)
    assert torch.equal(weight, expected)


def test_many_equal_one_after_another(make_pattern) -> None:
    weights = [torch.randn(5, 7), torch.randn(6, 4).bfloat16()]
    indices = [make_pattern(5, 7, 9).indices, make_pattern(6, 4, 24).indices]
    values = [torch.randn(9), torch.randn(24)]
    expected = [w.clone() for w in weights]
    add_many_(weights, indices, values)
    for one in zip(expected, indices, values, strict=True):
        add_reference(*one)
    assert all(map(torch.equal, weights, expected))


def test_autograd_does_not_notice() -> None:
    weight = torch.ones(2, 3, requires_grad=True)
    add_(weight, torch.tensor([1]), torch.tensor([5.0], requires_grad=True))
    assert (weight._version, weight.is_leaf, weight.grad_fn) == (0, True, None)


@pytest.mark.parametrize("indices", [[1, 1], [2, 1]], ids=["twice", "out of order"])
def test_positions_out_of_order_or_twice_are_refused(indices) -> None:
    weight = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^indices: got positions out of order or twice"):
        add_(weight, torch.tensor(indices), torch.ones(2))
    assert not weight.any()


def test_the_check_can_be_left_out() -> None:
    weight = torch.zeros(3)
    add_many_([weight], [torch.tensor([2, 1])], [torch.ones(2)], checked=True)
    assert weight.tolist() == [0, 1, 1]

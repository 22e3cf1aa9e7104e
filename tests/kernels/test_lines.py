from __future__ import annotations

import pytest
import torch

from sft.kernels.lines import lines_reference, read_lines, write_lines_


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64])
def weight(request) -> torch.Tensor:
    return torch.randn(5, 7).to(request.param)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_oracle(weight, axis, transposed, index_dtype) -> None:
    weight = weight.t() if transposed else weight
    indices = torch.tensor([3, 0, 4], dtype=index_dtype)
    found = read_lines(weight, indices, axis)
    assert torch.equal(found, lines_reference(weight, indices, axis))
    values, expected = torch.randn_like(found), weight.clone()
    write_lines_(weight, indices, axis, values)
    for line, value in zip(indices.tolist(), values, strict=True):
        expected.select(axis, line).copy_(value)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_copy_lies_as_the_weight_does(axis, transposed) -> None:
    """So that it is read, composed and written back without jumping from row to row."""
    weight = torch.randn(50, 70).t() if transposed else torch.randn(50, 70)
    found = read_lines(weight, torch.tensor([2, 7]), axis)
    assert (found if axis == transposed else found.t()).is_contiguous()
    values = torch.randn(found.shape)
    assert (found + values).stride() == found.stride()


@pytest.mark.parametrize("axis", [0, 1])
def test_writing_back_restores_every_bit(weight, axis) -> None:
    before, indices = weight.clone(), torch.tensor([1, 4])
    originals = read_lines(weight, indices, axis)
    write_lines_(weight, indices, axis, torch.randn_like(originals))
    assert not torch.equal(weight, before)
    write_lines_(weight, indices, axis, originals)
    assert torch.equal(weight, before)


def test_autograd_does_not_notice() -> None:
    weight = torch.ones(2, 3, requires_grad=True)
    write_lines_(weight, torch.tensor([1]), 1, torch.ones(1, 2, requires_grad=True))
    assert (weight._version, weight.is_leaf, weight.grad_fn) == (0, True, None)


def test_a_cast_is_refused() -> None:
    with pytest.raises(ValueError, match=r"values: got torch.float32, the weight is torch.bfloat1"):
        write_lines_(torch.zeros(2, 3).bfloat16(), torch.tensor([1]), 0, torch.ones(1, 3))

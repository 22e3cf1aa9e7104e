from __future__ import annotations

import pytest
import torch

from sft.kernels.expert_lines import (
    expert_lines_reference,
    read_expert_lines,
    write_expert_lines_,
)

EXPERTS, INDICES = torch.tensor([0, 2, 2, 1]), torch.tensor([3, 0, 3, 4])


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_oracle_and_writes_back_bit_for_bit(axis, dtype) -> None:
    weight = torch.randn(3, 5, 6).to(dtype)
    before = weight.clone()
    found = read_expert_lines(weight, EXPERTS, INDICES, axis)
    assert torch.equal(found, expert_lines_reference(weight, EXPERTS, INDICES, axis))
    values = torch.randn_like(found)
    write_expert_lines_(weight, EXPERTS, INDICES, axis, values)
    assert torch.equal(expert_lines_reference(weight, EXPERTS, INDICES, axis), values)
    assert (weight != before).sum() == (values != found).sum()
    write_expert_lines_(weight, EXPERTS, INDICES, axis, found)
    assert torch.equal(weight, before)


def test_autograd_does_not_notice() -> None:
    weight = torch.ones(2, 2, 3, requires_grad=True)
    write_expert_lines_(weight, torch.tensor([1]), torch.tensor([0]), 1, torch.zeros(1, 3))
    assert (weight._version, weight.is_leaf, weight.grad_fn) == (0, True, None)


def test_a_cast_is_refused() -> None:
    one = torch.tensor([0])
    with pytest.raises(ValueError, match=r"values: got torch.float32, the weight is torch.bfloat1"):
        write_expert_lines_(torch.zeros(1, 2, 3).bfloat16(), one, one, 1, torch.ones(1, 3))

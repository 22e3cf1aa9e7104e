from __future__ import annotations

import pytest
import torch

from sft.kernels.compose import compose_reference
from sft.kernels.gather import gather
from sft.kernels.write import Home, write_, write_homes_, write_many_, write_reference


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


def places(make_pattern) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights of several dtypes and positions in them, none in the last."""
    weights = [torch.randn(5, 7), torch.randn(6, 4).bfloat16(), torch.randn(3, 3).half()]
    shapes = [(5, 7, 9), (6, 4, 24), (3, 3, 0)]
    return weights, [make_pattern(*shape).indices for shape in shapes]


def test_many_equal_one_after_another(make_pattern) -> None:
    weights, indices = places(make_pattern)
    values = [torch.randn(len(at)).to(w.dtype) for w, at in zip(weights, indices, strict=True)]
    expected = [w.clone() for w in weights]
    write_many_(weights, indices, values)
    for weight, at, new, wanted in zip(weights, indices, values, expected, strict=True):
        write_reference(wanted, at, new)
        assert torch.equal(weight, wanted)


@pytest.mark.parametrize("mixed", [False, True])
def test_values_come_home_rounded_once(make_pattern, mixed) -> None:
    weights, indices = places(make_pattern)
    expected = [w.clone() for w in weights]
    homes = [
        Home(w, at, gather(w, at), reference=mixed and i == 1)
        for i, (w, at) in enumerate(zip(weights, indices, strict=True))
    ]
    values = [torch.randn(len(at), requires_grad=True) for at in indices]
    write_homes_(homes, values)
    for home, new, wanted in zip(homes, values, expected, strict=True):
        sums = compose_reference(home.originals, new.detach(), reference=home.reference)
        write_reference(wanted, home.indices, sums)
        assert torch.equal(home.weight, wanted)


def test_autograd_does_not_notice_many() -> None:
    weight = torch.ones(2, 3, requires_grad=True)
    at = torch.tensor([1])
    write_many_([weight], [at], [torch.tensor([5.0], requires_grad=True)])
    write_homes_([Home(weight, at, torch.ones(1))], [torch.ones(1, requires_grad=True)])
    assert (weight._version, weight.is_leaf, weight[0, 1].item()) == (0, True, 2.0)


def test_a_cast_of_one_of_many_is_refused() -> None:
    weights = [torch.zeros(2), torch.zeros(2).bfloat16()]
    with pytest.raises(ValueError, match=r"^values: got torch.float32, the weight is torch.bfloat"):
        write_many_(weights, [torch.tensor([1])] * 2, [torch.ones(1)] * 2)
    assert not weights[0].any()

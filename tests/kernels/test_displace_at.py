"""Weights of a displaced tensor: those of the whole, and no others made."""

from __future__ import annotations

import pytest
import torch

from sft.kernels.displace_at import displace_at, displace_at_reference
from sft.kernels.mask import Magnitude, Random
from sft.kernels.noise import KINDS

DRAWS = ((2**63 + 5, -1e-2), (3, 0.0), (7, 0.25))
MASKS = {"all": None, "small": Magnitude(0.5), "random": Random(2**63 + 9, 0.3)}


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def positions(count: int, below: int) -> torch.Tensor:
    return torch.randint(below, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_they_are_those_of_the_whole(kind, mask, dtype) -> None:
    given, at = weight(70, 90, dtype=dtype).t(), positions(500, 6300).view(50, 10)
    found = displace_at(given, at, 2**32 - 7, DRAWS, kind=kind, mask=mask)
    expected = displace_at_reference(given, at, 2**32 - 7, DRAWS, kind=kind, mask=mask)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_any_integer_will_do(index) -> None:
    at = positions(9, 60)
    found = displace_at(weight(60), at.to(index), 1, DRAWS)
    assert torch.equal(found, displace_at_reference(weight(60), at, 1, DRAWS))


def test_nothing_chosen_and_nothing_drawn() -> None:
    assert displace_at(weight(6), torch.empty(0, dtype=torch.int64), 1, DRAWS).shape == (0,)
    assert torch.equal(displace_at(weight(6), torch.tensor([4]), 1, ()), weight(6)[4:5])


def test_the_weight_is_left_alone_and_not_copied(largest_tensor) -> None:
    given = weight(2000, 1000)
    before, at = given.clone(), positions(100, given.numel())
    size = largest_tensor(lambda: displace_at(given, at, 1, DRAWS))
    assert torch.equal(given, before)
    assert size <= 2**17 < given.numel() * 4


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="noise: got 'uniform', allowed is one of"):
        displace_at(weight(3), torch.tensor([0]), 1, DRAWS, kind="uniform")

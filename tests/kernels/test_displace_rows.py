"""Rows of a displaced table: those of the whole, and no others made."""

from __future__ import annotations

import pytest
import torch

from sft.kernels.displace import displace
from sft.kernels.displace_rows import displace_rows, displace_rows_reference
from sft.kernels.mask import Magnitude, Random

DRAWS = ((2**63 + 5, -1e-2), (7, 0.25))


def table(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul(0.1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "gaussian_table", "gaussian"])
@pytest.mark.parametrize("mask", [None, Magnitude(0.05), Random(3, 0.5)], ids=str)
def test_rows_are_those_of_the_whole(dtype, kind, mask) -> None:
    weight = table(50, 300, dtype=dtype)  # rows that lie in one tile and across two
    rows = torch.tensor([49, 0, 13, 14, 27])
    found = displace_rows(weight, rows, 9, DRAWS, kind=kind, mask=mask)
    whole = displace([weight], [9], DRAWS, kind=kind, masks=[mask])[0]
    assert torch.equal(found, whole[rows])
    assert torch.equal(found, displace_rows_reference(weight, rows, 9, DRAWS, kind=kind, mask=mask))


@pytest.mark.parametrize("width", [1, 31, 4096, 5000])
def test_any_width_will_do(width) -> None:
    weight = table(6, width)
    rows = torch.tensor([5, 2], dtype=torch.int32)
    assert torch.equal(
        displace_rows(weight, rows, 1, DRAWS), displace_rows_reference(weight, rows, 1, DRAWS)
    )


def test_no_rows_and_strided_tables() -> None:
    weight = table(8, 12)
    assert displace_rows(weight, torch.empty(0, dtype=torch.int64), 1, DRAWS).shape == (0, 12)
    rows = torch.tensor([3, 3, 11])
    expected = displace_rows(weight.t().contiguous(), rows, 1, DRAWS)
    assert torch.equal(displace_rows(weight.t(), rows, 1, DRAWS), expected)


def test_the_table_is_left_alone_and_not_copied(largest_tensor) -> None:
    weight = table(20_000, 64)
    before = weight.clone()
    size = largest_tensor(lambda: displace_rows(weight, torch.tensor([1, 19_999]), 1, DRAWS))
    assert torch.equal(weight, before)
    assert size <= 2**20 < weight.numel() * 4

"""Flat positions past 2^31: a matrix of 4 GiB of which a few pages are touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sft.kernels.gather import gather_many
from sft.kernels.outer_at import SAMPLED_OUTER
from sft.kernels.write import write_many_

pytest.importorskip("triton")

from without_gpu.interpreter import interpreted

FAR = torch.tensor([3, 2**31 - 1, 2**31, 2**31 + 4000])


@pytest.fixture
def huge() -> Tensor:
    # memory that is never touched is never given
    return torch.empty(2**31 + 4096, dtype=torch.bfloat16)


def test_written_and_read_where_32_bits_end(huge: Tensor) -> None:
    values = torch.arange(1.0, 5.0).to(torch.bfloat16)
    with interpreted():
        write_many_([huge], [FAR], [values])
        (found,) = gather_many([huge], [FAR])
    assert torch.equal(found, values)
    assert torch.equal(huge[FAR], values)


def test_products_of_a_matrix_of_more_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    side = 46_400
    left, right = (torch.randn(17, side, generator=generator) for _ in "ab")
    rows, cols = torch.tensor([0, 46_300, side - 1]), torch.tensor([side - 1, 7, side - 1])
    indices = rows * side + cols
    assert indices[1] > 2**31
    nothing = indices[:0]
    with interpreted():
        found = SAMPLED_OUTER(left, right, indices, nothing, nothing)
    expected = (left[:, rows].double() * right[:, cols].double()).sum(0)
    torch.testing.assert_close(found.double(), expected)


def test_noise_of_more_positions() -> None:
    """By arithmetic: the first of so many programs that 32 bits do not count their positions."""
    from sft.kernels.noise import noise
    from sft.kernels.triton import displace_at as launchers

    positions, out = torch.arange(launchers.BLOCK), torch.zeros(launchers.BLOCK)
    mask = 0, 0, 0.0
    given, options = launchers._options(out, 3, mask, [5], [-1.0], "rademacher")
    with interpreted():
        launchers.positions_kernel[(1,)](out, None, positions, 2**31 + 7, *given, **options)
    assert torch.equal(out, noise(5, 3, launchers.BLOCK, kind="rademacher"))

"""Flat positions past 2^31: a matrix of 4 GiB of which a few pages are touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sft.kernels.delta_product import delta_product
from sft.kernels.displace_at import displace_at
from sft.kernels.displace_rows import displace_rows
from sft.kernels.gather import gather_many
from sft.kernels.mask import Random
from sft.kernels.outer_at import SAMPLED_OUTER, TILED_OUTER
from sft.kernels.pattern import Pattern
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


STEP = 2**26  # of 33 lines of a matrix of which the last one begins at 2^31


def _lines(generator: torch.Generator, turned: bool) -> Tensor:
    """33 lines of 64 entries, far from one another; as (tokens, n), or its transpose."""
    whole = torch.empty(32 * STEP + 64, dtype=torch.bfloat16).as_strided((33, 64), (STEP, 1))
    whole.copy_(torch.randn(33, 64, generator=generator))
    return whole.t() if turned else whole


def test_operands_of_more_entries() -> None:
    """Of a vocabulary by the tokens of a long batch."""
    generator = torch.Generator().manual_seed(0)
    nothing = torch.empty(0, dtype=torch.int32)
    for turned, op in ((True, SAMPLED_OUTER), (False, TILED_OUTER)):
        left, right = (_lines(generator, turned) for _ in "ab")
        numel = left.shape[1] * right.shape[1]
        indices = torch.tensor([0, 40, numel // 2, numel - 1], dtype=torch.int32)
        rest = (nothing, nothing) if op is SAMPLED_OUTER else (nothing, nothing, 64)
        with interpreted():
            found = op(left, right, indices, *rest)
        expected = (left.double().t() @ right.double()).flatten()[indices.long()]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_product_with_inputs_of_more_entries() -> None:
    x = _lines(torch.Generator().manual_seed(0), turned=True)
    pattern = Pattern(torch.tensor([3, 30, 32], dtype=torch.int32), (1, 33))
    values = torch.tensor([1.0, -2.0, 0.5])
    plain = delta_product(x.contiguous(), values, pattern, to_rows=True)
    with interpreted():
        found = delta_product(x, values, pattern, to_rows=True)
    torch.testing.assert_close(found, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mask", [None, Random(3, 0.5)], ids=["all", "random"])
def test_rows_and_positions_of_a_larger_table(huge: Tensor, mask: Random | None) -> None:
    huge[2**31 - 4096 :] = 1.0
    table, rows = huge.view(-1, 4096), torch.tensor([1, 2**19 - 1, 2**19])
    plain = displace_rows(table, rows, 3, [(5, 0.5)], mask=mask)
    single = displace_at(table, FAR, 3, [(5, 0.5)], mask=mask)
    assert plain.std(1).all()
    with interpreted():
        assert torch.equal(displace_rows(table, rows, 3, [(5, 0.5)], mask=mask), plain)
        assert torch.equal(displace_at(table, FAR, 3, [(5, 0.5)], mask=mask), single)

from __future__ import annotations

import pytest
import torch

from sft.kernels.delta_product import delta_product, delta_product_reference
from sft.kernels.pattern import Pattern

SIZES = [(1, 1, 1, 1), (4, 3, 5, 0), (0, 3, 5, 4), (7, 40, 30, 200), (7, 3, 5, 15)]


@pytest.mark.parametrize("to_rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize(("tokens", "rows", "cols", "k"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_dense_product(make_pattern, dtype, tokens, rows, cols, k, to_rows) -> None:
    torch.manual_seed(0)
    pattern = make_pattern(rows, cols, k)
    x, values = torch.randn(tokens, cols if to_rows else rows).to(dtype), torch.randn(k)
    found = delta_product(x, values, pattern, to_rows=to_rows)
    assert found.dtype == dtype
    torch.testing.assert_close(found, delta_product_reference(x, values, pattern, to_rows=to_rows))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_inputs_of_more_dimensions_and_strides(make_pattern, dtype) -> None:
    pattern, values = make_pattern(6, 8, 20, dtype), torch.randn(20)
    x = torch.randn(8, 3, 5).permute(2, 1, 0)
    found = delta_product(x, values, pattern, to_rows=True)
    assert found.shape == (5, 3, 6)
    torch.testing.assert_close(found, delta_product_reference(x, values, pattern, to_rows=True))


def test_halves_are_summed_in_float32(make_pattern) -> None:
    """4096 times 1 + 1/128: a bfloat16 sum would stop at 256."""
    pattern = Pattern(torch.arange(4096, dtype=torch.int32), (1, 4096))
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    found = delta_product(x, torch.full((4096,), 1 + 1 / 128), pattern, to_rows=True)
    assert found.item() == 4128
    with torch.autocast("cpu", torch.bfloat16):
        assert delta_product(x, torch.ones(4096), pattern, to_rows=True).item() == 4096


def test_the_view_by_columns(make_pattern) -> None:
    pattern = make_pattern(9, 7, 30)
    pointers, rows, slots = pattern.by_columns()
    where = pattern.indices[slots.long()]
    assert torch.equal(where % 7, where.sort().values.remainder(7).sort().values)
    assert torch.equal(rows, where // 7)
    counts = torch.bincount(pattern.columns.long(), minlength=7)
    assert torch.equal(pointers.long().diff(), counts)
    for column in range(7):
        inside = rows[pointers[column] : pointers[column + 1]]
        assert torch.equal(inside, inside.sort().values)
    assert pattern.by_columns()[2] is slots

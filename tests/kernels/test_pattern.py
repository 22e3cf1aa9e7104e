from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from sft.kernels.pattern import Pattern, index_dtype

CASES = [(1, 1, 0), (1, 1, 1), (1, 9, 4), (9, 1, 4), (5, 7, 0), (5, 7, 11), (5, 7, 35)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rows, cols, k", CASES)
def test_views_agree_with_divmod(make_pattern, rows, cols, k, dtype) -> None:
    pattern = make_pattern(rows, cols, k, dtype)
    places = [divmod(j, cols) for j in pattern.indices.tolist()]
    assert len(pattern) == k
    assert pattern.density == k / (rows * cols)
    assert pattern.rows().tolist() == [r for r, _ in places]
    assert pattern.columns.tolist() == [c for _, c in places]
    above = [sum(r < row for r, _ in places) for row in range(rows + 1)]
    assert pattern.row_pointers.tolist() == above
    assert pattern.row_pointers.dtype == pattern.columns.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_between_counts_from_the_first_row(make_pattern, dtype) -> None:
    pattern = make_pattern(6, 5, 13, dtype)
    for first in range(6):
        for last in range(first, 7):
            inside = [j - first * 5 for j in pattern.indices.tolist() if first <= j // 5 < last]
            assert pattern.between(first, last).tolist() == inside
    assert pattern.between(0, 6).dtype == torch.int64


def test_positions_beyond_int32() -> None:
    rows, cols = 2**16, 2**16
    assert index_dtype(rows * cols) == torch.int64
    assert index_dtype(2**31 - 1) == torch.int32
    assert index_dtype(2**31) == torch.int64
    pattern = Pattern(torch.tensor([3, 2**31 + 5, 2**32 - 1]), (rows, cols))
    assert pattern.rows().tolist() == [0, 2**15, 2**16 - 1]
    assert pattern.columns.tolist() == [3, 5, 2**16 - 1]
    assert pattern.between(2**15, 2**16).tolist() == [5, 2**31 - 1]


@pytest.mark.parametrize("side", [1, 4, 64])
@pytest.mark.parametrize("rows, cols, k", [(1, 1, 1), (9, 10, 40), (9, 10, 0), (9, 10, 90)])
def test_tiles_hold_each_position_once(make_pattern, rows, cols, k, side) -> None:
    pattern = make_pattern(rows, cols, k)
    order, pointers = pattern.tiles(side)
    across = -(-cols // side)
    expected = [[] for _ in range(-(-rows // side) * across)]
    for slot, at in enumerate(pattern.indices.tolist()):
        expected[at // cols // side * across + at % cols // side].append(slot)
    begin = pointers.tolist()
    assert [order[a:b].tolist() for a, b in pairwise(begin)] == expected
    assert pattern.tiles(side)[0] is order
    assert pattern.tiles(side)[1] is pointers

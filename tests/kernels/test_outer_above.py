from __future__ import annotations

import pytest
import torch

from sft.kernels.outer_above import SIDE, num_tiles, outer_above, outer_above_reference

SHAPES = [(1, 1, 1), (0, 5, 7), (6, 70, 3), (5, 64, 64), (7, 100, 130), (4, 1, 200)]


def operands(tokens: int, rows: int, cols: int) -> list[torch.Tensor]:
    """Whole numbers: the same sums in any order, and many ties."""
    generator = torch.Generator().manual_seed(rows)
    shapes = (tokens, rows), (tokens, cols)
    return [torch.randint(-3, 4, shape, generator=generator).float() for shape in shapes]


@pytest.mark.parametrize("room", [0, 1, 37, SIDE * SIDE])
@pytest.mark.parametrize("threshold", [0.0, 5.0, 1e9])
@pytest.mark.parametrize("tokens, rows, cols", SHAPES)
def test_equals_the_oracle(tokens, rows, cols, threshold, room) -> None:
    left, right = operands(tokens, rows, cols)
    starts = torch.arange(num_tiles((rows, cols)) + 1, dtype=torch.int32) * room
    found = outer_above(left, right, torch.tensor(threshold), starts)
    expected = outer_above_reference(left, right, threshold, starts.tolist())
    assert [part.tolist() for part in found] == list(expected)


def test_tiles_of_unequal_room() -> None:
    left, right = operands(7, 100, 130)
    counts = outer_above(left, right, torch.tensor(5.0), torch.zeros(7, dtype=torch.int32))[2]
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0).int()])
    positions, values, again = outer_above(left, right, torch.tensor(5.0), starts)
    assert torch.equal(again, counts)
    dense = (left.t() @ right).flatten()
    assert torch.equal(positions.sort().values, (dense.abs() >= 5).nonzero().flatten().int())
    assert torch.equal(values, dense[positions.long()])


def test_no_more_than_a_row_of_tiles_is_held(largest_tensor) -> None:
    left, right = torch.randn(4, 1024), torch.randn(4, 96)
    starts = torch.arange(num_tiles((1024, 96)) + 1, dtype=torch.int32)
    edge = torch.tensor(8.0)
    assert largest_tensor(lambda: outer_above(left, right, edge, starts)) <= SIDE * 96 * 4

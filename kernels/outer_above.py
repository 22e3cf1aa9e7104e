"""The entries of a gradient that reach a threshold, found tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from sft.kernels.library import define
from sft.kernels.outer_at import wide_product
from sft.kernels.pattern import index_dtype

# The side of a tile. The ranks of its entries take registers, so it is half of the largest.
SIDE = 64


def outer_above(
    left: Tensor, right: Tensor, threshold: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """List the entries of left^T right with |entry| >= threshold; the product is never stored.

    Tile t, of SIDE x SIDE entries, row by row, writes to the slots [starts[t], starts[t + 1]), in
    the order of its rows. What does not fit is left out, but counted.

    Args:
        left: (tokens, rows), any float dtype; sums are taken in float32.
        right: (tokens, cols), the same dtype.
        threshold: () float32, on the device of the operands.
        starts: (tiles + 1,) int32, ascending, from 0.

    Returns:
        positions: (starts[-1],) int32 or int64, -1 in slots that stay free.
        values: (starts[-1],) float32.
        counts: (tiles,) int32, entries of each tile that reach the threshold.
    """
    found: tuple[Tensor, Tensor, Tensor] = OUTER_ABOVE(
        left, right, threshold, starts, int(starts[-1]), SIDE
    )
    return found


def num_tiles(shape: tuple[int, int]) -> int:
    """Return how many tiles cover a matrix."""
    return -(-shape[0] // SIDE) * -(-shape[1] // SIDE)


def _row_by_row(
    left: Tensor, right: Tensor, threshold: Tensor, starts: Tensor, room: int, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense product of one row of tiles after another."""
    rows, cols = left.shape[1], right.shape[1]
    positions, values, counts = free_slots(left, right, starts, room)
    across, begin = -(-cols // side), starts.tolist()
    for top in range(0, rows, side):
        block = wide_product(left[:, top : top + side], right)
        line, column = (block.abs() >= threshold).nonzero(as_tuple=True)
        tile = top // side * across + column // side
        tile, order = tile.sort(stable=True)
        line, column = line[order], column[order]
        for place in range(top // side * across, (top // side + 1) * across):
            first, last = torch.searchsorted(tile, tile.new_tensor([place, place + 1])).tolist()
            counts[place] = last - first
            kept = slice(first, min(last, first + begin[place + 1] - begin[place]))
            slots = slice(begin[place], begin[place] + kept.stop - first)
            positions[slots] = ((top + line[kept]) * cols + column[kept]).to(positions.dtype)
            values[slots] = block[line[kept], column[kept]].to(values.dtype)
    return positions, values, counts


def free_slots(
    left: Tensor, right: Tensor, starts: Tensor, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return positions, values and counts as they are before anything was found."""
    dtype = index_dtype(left.shape[1] * right.shape[1])
    return (
        torch.full((room,), -1, dtype=dtype, device=left.device),
        torch.zeros(room, device=left.device),
        torch.zeros(starts.numel() - 1, dtype=torch.int32, device=left.device),
    )


OUTER_ABOVE = define(
    "outer_above(Tensor left, Tensor right, Tensor threshold, Tensor starts, int room, int side) "
    "-> (Tensor, Tensor, Tensor)",
    plain=_row_by_row,
    triton="tiles:outer_above",
    fake=lambda left, right, threshold, starts, room, side: free_slots(left, right, starts, room),
)


def outer_above_reference(
    left: Tensor, right: Tensor, threshold: float, starts: list[int]
) -> tuple[list[int], list[float], list[int]]:
    """Oracle of `outer_above`: one entry of the dense product after another."""
    dense = left.double().t() @ right.double()
    cols = dense.shape[1]
    across = -(-cols // SIDE)
    positions, values = [-1] * starts[-1], [0.0] * starts[-1]
    counts = [0] * (len(starts) - 1)
    for place, value in enumerate(dense.flatten().tolist()):
        tile = place // cols // SIDE * across + place % cols // SIDE
        if abs(value) >= threshold:
            slot = starts[tile] + counts[tile]
            if slot < starts[tile + 1]:
                positions[slot], values[slot] = place, value
            counts[tile] += 1
    return positions, values, counts

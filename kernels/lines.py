"""Read and assign whole rows or columns of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def read_lines(weight: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Return rows (axis 0) or columns (axis 1): out[j] = weight.select(axis, indices[j]).

    Args:
        weight: (rows, cols), any dtype and strides.
        indices: (s,) int32 or int64, each in [0, weight.shape[axis]).
        axis: 0 or 1.

    Returns:
        (s, cols) or (s, rows): a copy, a line for each index. It lies as the weight does: what is
        next to one another there is so here, and neither reading nor writing back jumps.
    """
    across = _across(weight.detach(), axis)
    if across is None:
        return weight.detach().movedim(axis, 0).index_select(0, indices)
    return across.index_select(1, indices).t()


def write_lines_(weight: Tensor, indices: Tensor, axis: int, values: Tensor) -> None:
    """Assign rows or columns in place, past autograd's version counter.

    An assignment, never an increment: what is written can be written back bit for bit. A strided
    view of the columns is never made a parameter: fused optimizers take such a view for dense and
    overwrite its neighbours.

    Args:
        weight: (rows, cols), any strides.
        indices: (s,) int32 or int64, unique.
        axis: 0 for rows, 1 for columns.
        values: (s, cols) or (s, rows) in the dtype of `weight`.

    Raises:
        ValueError: `values` has another dtype than `weight`.
    """
    if values.dtype != weight.dtype:
        raise ValueError(f"values: got {values.dtype}, the weight is {weight.dtype}; cast first")
    across, values = _across(weight.data, axis), values.detach()
    if across is None:
        weight.data.movedim(axis, 0).index_copy_(0, indices.long(), values)
    else:
        # a pass along the weight's own rows costs half of one along its columns
        across.index_copy_(1, indices.long(), values.t().contiguous())


def _across(weight: Tensor, axis: int) -> Tensor | None:
    """Return the weight with its lines as columns of contiguous rows, where they lie so."""
    crossed = weight if axis == 1 else weight.t()
    return crossed if crossed.is_contiguous() else None


def lines_reference(weight: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Oracle of `read_lines`: one line after another."""
    return torch.stack([weight.detach().select(axis, j) for j in indices.tolist()])

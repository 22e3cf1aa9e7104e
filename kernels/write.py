"""Assign a matrix at flat positions."""

from __future__ import annotations

from torch import Tensor


def write_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Assign in place, past autograd's version counter: weight.flat[indices[j]] = values[j].

    An assignment, never an increment: what is written can be written back bit for bit. The caller
    guards graphs that are still alive (see `sparse_linear`).

    Args:
        weight: contiguous, any shape.
        indices: (k,) int32 or int64, unique, each in [0, weight.numel()).
        values: (k,) in the dtype of `weight`; a silent cast could hide a rounding, so none is made.

    Raises:
        ValueError: `values` has another dtype than `weight`.
    """
    if values.dtype != weight.dtype:
        raise ValueError(f"values: got {values.dtype}, the weight is {weight.dtype}; cast first")
    # .data: autograd's own counter would also refuse a graph whose values are back in place
    weight.data.view(-1).index_copy_(0, indices.long(), values.detach())


def write_reference(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Oracle of `write_`: one entry after another."""
    flat = weight.data.view(-1)
    for position, value in zip(indices.tolist(), values, strict=True):
        flat[position] = value

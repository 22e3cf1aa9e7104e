"""Read and assign lines of single experts in a 3-D parameter."""

from __future__ import annotations

import torch
from torch import Tensor


def read_expert_lines(weight: Tensor, experts: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Return out[j] = weight[experts[j]].select(axis - 1, indices[j]).

    Args:
        weight: (experts, rows, cols), any dtype and strides.
        experts: (s,) int64, the expert of each line.
        indices: (s,) int64, which line of it.
        axis: 1 if lines are rows of an expert's matrix, 2 if they are columns.

    Returns:
        (s, cols) or (s, rows): a contiguous copy.
    """
    matrices = weight.detach() if axis == 1 else weight.detach().transpose(1, 2)
    return matrices[experts, indices].contiguous()


def write_expert_lines_(
    weight: Tensor, experts: Tensor, indices: Tensor, axis: int, values: Tensor
) -> None:
    """Assign lines in place, past autograd's version counter, as `write_lines_` does.

    Args:
        weight: (experts, rows, cols).
        experts: (s,) int64.
        indices: (s,) int64; no line of an expert twice.
        axis: 1 or 2.
        values: (s, cols) or (s, rows) in the dtype of `weight`.

    Raises:
        ValueError: `values` has another dtype than `weight`.
    """
    if values.dtype != weight.dtype:
        raise ValueError(f"values: got {values.dtype}, the weight is {weight.dtype}; cast first")
    matrices = weight.data if axis == 1 else weight.data.transpose(1, 2)
    matrices[experts, indices] = values.detach()


def expert_lines_reference(weight: Tensor, experts: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Oracle of `read_expert_lines`: one line after another."""
    pairs = zip(experts.tolist(), indices.tolist(), strict=True)
    return torch.stack([weight.detach()[e].select(axis - 1, j) for e, j in pairs])

"""Multiply by a sparse matrix: what a delta adds beside a weight that cannot be written."""

from __future__ import annotations

import torch
from torch import Tensor

from sft.kernels.library import define
from sft.kernels.outer_at import widen
from sft.kernels.pattern import Pattern


def delta_product(x: Tensor, values: Tensor, pattern: Pattern, *, to_rows: bool) -> Tensor:
    """Return x Delta^T to reach the rows of the sparse matrix, x Delta for its columns.

        y[t, i] = sum_j values[j] x[t, c_j]  over the j of row i, or likewise with both exchanged

    Sums are taken in float32 or wider, in the order of positions.

    Args:
        x: (..., cols) to reach the rows, (..., rows) for the columns.
        values: (k,) the entries.
        pattern: their positions in the (rows, cols) matrix.
        to_rows: which of the two.

    Returns:
        (..., rows) or (..., cols) in the dtype of x, the tokens side by side.
    """
    flat = x.reshape(-1, x.shape[-1])
    view = _view(pattern, to_rows) if x.device.type != "cpu" else (pattern.indices[:0],) * 3
    y: Tensor = DELTA_PRODUCT(flat, values, pattern.indices, *view, *pattern.shape, to_rows)
    return y.reshape(*x.shape[:-1], y.shape[1])


def _view(pattern: Pattern, to_rows: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return what reaches each output: pointers, inputs, and slots unless they are in order."""
    if to_rows:
        return pattern.row_pointers, pattern.columns, pattern.indices[:0]
    return pattern.by_columns()


def _in_torch(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    pointers: Tensor,
    inputs: Tensor,
    slots: Tensor,
    rows: int,
    cols: int,
    to_rows: bool,
) -> Tensor:
    wide = widen(x)
    at = indices // cols, indices % cols
    where = torch.stack(at if to_rows else at[::-1]).long()
    size = (rows, cols) if to_rows else (cols, rows)
    # COO: CSR products need MKL, which not every build of torch has
    delta = torch.sparse_coo_tensor(where, values.to(wide.dtype), size, check_invariants=False)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = torch.sparse.mm(delta, wide.t().contiguous())
    return y.to(x.dtype).t()


def _fake(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    pointers: Tensor,
    inputs: Tensor,
    slots: Tensor,
    rows: int,
    cols: int,
    to_rows: bool,
) -> Tensor:
    return x.new_empty(rows if to_rows else cols, x.shape[0]).t()


DELTA_PRODUCT = define(
    "delta_product(Tensor x, Tensor values, Tensor indices, Tensor pointers, Tensor inputs, "
    "Tensor slots, SymInt rows, SymInt cols, bool to_rows) -> Tensor",
    plain=_in_torch,
    triton="delta_product:delta_product",
    fake=_fake,
)


def delta_product_reference(
    x: Tensor, values: Tensor, pattern: Pattern, *, to_rows: bool
) -> Tensor:
    """Oracle: the dense product in float64 (SpIEL, arXiv 2401.16405, y = x (W + delta)^T)."""
    delta = torch.zeros(pattern.shape, dtype=torch.float64)
    delta.view(-1)[pattern.indices.long()] = values.double()
    return (x.double() @ (delta.t() if to_rows else delta)).to(x.dtype)

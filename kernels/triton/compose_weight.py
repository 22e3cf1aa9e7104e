"""`compose_weight` on a GPU: one tile a program, the sparse part added before its one store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.compose_weight import in_two_passes
from sft.kernels.pattern import Pattern
from sft.kernels.triton.tiles import aligned

# Ranks of a turn of the first loop, and entries of a turn of the second.
RANKS, ENTRIES = 32, 32


def compose_(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    values: Tensor,
    indices: Tensor,
    order: Tensor,
    pointers: Tensor,
    side: int,
) -> None:
    """Launch one program a tile."""
    if out.dtype == torch.float64:
        # no tensor cores: what is computed in float64 is checked, not trained
        in_two_passes(out, left, right, values, indices, order, pointers, side)
        return
    rows, cols = out.shape
    if pointers.numel() == 0:
        order, pointers = Pattern(indices, (rows, cols)).tiles(side)
    if out.numel() == 0:
        return
    # rows one after another: the kernel takes their length for their distance
    left, right = aligned(left.contiguous()), aligned(right.contiguous())
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        compose_kernel[(triton.cdiv(rows, side), triton.cdiv(cols, side))](
            out,
            left,
            right,
            values,
            indices,
            order,
            pointers,
            rows,
            cols,
            left.shape[1],
            right.shape[1],
            right.shape[0],
            SIDE=side,
            RANKS=RANKS,
            ENTRIES=ENTRIES,
            # torch's own products of float32 are not rounded to tf32 either
            PRECISION="ieee" if out.dtype == torch.float32 else "tf32",
            num_warps=8 if side == 128 else 4,
        )


@triton.jit
def compose_kernel(
    out_ptr: tl.tensor,
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    values_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    order_ptr: tl.tensor,
    pointers_ptr: tl.tensor,
    rows: tl.int32,
    cols: tl.int32,
    left_stride: tl.int32,
    right_stride: tl.int32,
    rank: tl.int32,
    SIDE: tl.constexpr,
    RANKS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Store left right + S, summed in float32 and rounded once.

    S of a tile is a product too, of one-hot rows times the values and one-hot columns: its sums
    have one term each, so that it is exact, and entries need no place in memory.
    """
    TYPE: tl.constexpr = out_ptr.dtype.element_ty
    top, first = tl.program_id(0) * SIDE, tl.program_id(1) * SIDE
    row, col = top + tl.arange(0, SIDE)[:, None], first + tl.arange(0, SIDE)[None, :]
    down, across = tl.arange(0, RANKS)[:, None], tl.arange(0, RANKS)[None, :]
    left_ptr += row.to(tl.int64) * left_stride
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, rank, RANKS):
        # both operands are padded with zeros, whole sixteens at a time
        a = tl.load(
            left_ptr + start + across,
            mask=(start + across < left_stride) & (row < rows),
            other=0.0,
        )
        b = tl.load(
            right_ptr + (start + down).to(tl.int64) * right_stride + col,
            mask=(start + down < rank) & (col < right_stride),
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    begin, end = tl.load(pointers_ptr + tile), tl.load(pointers_ptr + tile + 1)
    for start in range(begin, end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        inside = entry < end
        slot = tl.load(order_ptr + entry, mask=inside, other=0)
        at = tl.load(indices_ptr + slot, mask=inside, other=0)
        value = tl.load(values_ptr + slot, mask=inside, other=0.0).to(tl.float32)
        here_row, here_col = (at // cols).to(tl.int32), (at % cols).to(tl.int32)
        columns = tl.where(here_col[:, None] == col, 1.0, 0.0).to(TYPE)
        upper = value.to(TYPE)
        total = _add(total, here_row, upper, row, columns, TYPE, PRECISION)
        if tl.float32 != TYPE:
            # what rounding the value left over, so that the sum alone is rounded
            rest = (value - upper.to(tl.float32)).to(TYPE)
            total = _add(total, here_row, rest, row, columns, TYPE, PRECISION)
    out_ptr += row.to(tl.int64) * cols + col
    # only tiles at the edge take a mask, which would break 128-bit stores
    if (top + SIDE <= rows) & (first + SIDE <= cols):
        tl.store(out_ptr, total.to(TYPE))
    else:
        tl.store(out_ptr, total.to(TYPE), mask=(row < rows) & (col < cols))


@triton.jit
def _add(
    total: tl.tensor,
    here: tl.tensor,
    value: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    zero = tl.zeros((1, 1), TYPE)
    rows = tl.where(row == here[None, :], value[None, :], zero)
    return tl.dot(rows, columns, total, input_precision=PRECISION)

"""`outer_at` and `outer_above` on a GPU: dense tiles on tensor cores, never written as a whole."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.outer_above import free_slots
from sft.kernels.outer_at import row_blocks
from sft.kernels.pattern import Pattern

# Tokens of a turn of the loop, and neighbouring tile rows that programs share a column of.
TOKENS, GROUP = 64, 8
# Rows start at multiples of so many entries and are padded to them: 128-bit loads for any length.
ALIGNMENT = 16


def tiled_outer(
    left: Tensor, right: Tensor, indices: Tensor, order: Tensor, pointers: Tensor, side: int
) -> Tensor:
    """Launch one program a tile; each picks the positions that lie in it."""
    if left.dtype == torch.float64:
        # no tensor cores: what is computed in float64 is checked, not trained
        return row_blocks(left, right, indices, order, pointers, side)
    rows, cols = left.shape[1], right.shape[1]
    out = torch.empty(indices.numel(), dtype=torch.float32, device=left.device)
    if indices.numel() == 0 or left.shape[0] == 0:
        return out.zero_()
    if order.numel() == 0:
        order, pointers = Pattern(indices, (rows, cols)).tiles(side)
    tiles = pointers.numel() - 1
    with torch.cuda.device_of(left):  # type: ignore[no-untyped-call]
        pick_kernel[(tiles,)](
            out,
            indices,
            order,
            pointers,
            cols,
            *_operands(left, right, side),
            ENTRIES=_entries(indices.numel(), tiles),
            **_options(left.dtype, side),
        )
    return out


def outer_above(
    left: Tensor, right: Tensor, threshold: Tensor, starts: Tensor, room: int, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch one program a tile; each lists its entries that reach the threshold."""
    left, right = (t.float() if t.dtype == torch.float64 else t for t in (left, right))
    rows, cols = left.shape[1], right.shape[1]
    positions, values, counts = free_slots(left, right, starts, room)
    if counts.numel() == 0:
        return positions, values, counts
    with torch.cuda.device_of(left):  # type: ignore[no-untyped-call]
        above_kernel[(counts.numel(),)](
            positions,
            values,
            counts,
            threshold,
            starts,
            rows,
            cols,
            *_operands(left, right, side),
            # ranks take as many registers as the tile
            **(_options(left.dtype, side) | {"num_warps": 8}),
        )
    return positions, values, counts


def _operands(left: Tensor, right: Tensor, side: int) -> tuple[Any, ...]:
    """Return what both kernels take of the operands: tensors, sizes, strides, tiles."""
    down, across = triton.cdiv(left.shape[1], side), triton.cdiv(right.shape[1], side)
    left, right = aligned(left), aligned(right)
    sizes = left.shape[0], left.shape[1], right.shape[1]
    return left, right, *sizes, left.stride(0), right.stride(0), down, across


def aligned(tensor: Tensor) -> Tensor:
    """Return a (tokens, n) tensor whose rows start at 128-bit boundaries and are padded to them."""
    tokens, n = tensor.shape
    strides = tensor.stride(1) == 1 and tensor.stride(0) % ALIGNMENT == 0
    if strides and n % ALIGNMENT == 0 and tensor.data_ptr() % 16 == 0:
        return tensor
    held = tensor.new_zeros(tokens, triton.cdiv(n, ALIGNMENT) * ALIGNMENT)
    held[:, :n] = tensor
    return held


def _entries(k: int, tiles: int) -> int:
    """Return how many positions a tile picks at a time: twice its fair share, a power of 2."""
    return min(1024, max(64, 1 << (2 * k // tiles).bit_length()))


def _options(dtype: torch.dtype, side: int) -> dict[str, object]:
    half = dtype in (torch.float16, torch.bfloat16)
    return {
        "SIDE": side,
        "TOKENS": TOKENS if half else TOKENS // 2,
        "GROUP": GROUP,
        # torch's own products of float32 are not rounded to tf32 either
        "PRECISION": "tf32" if half else "ieee",
        "num_warps": 8 if side == 128 else 4,
        "num_stages": 3 if half else 2,
    }


@triton.jit
def _tile(down: tl.int32, across: tl.int32, GROUP: tl.constexpr) -> tl.tensor:
    """Row and column of this program's tile: neighbours in time are neighbours in both."""
    program = tl.program_id(0)
    band = program // (GROUP * across)
    height = tl.minimum(down - band * GROUP, GROUP)
    inside = program - band * GROUP * across
    return band * GROUP + inside % height, inside // height


@triton.jit
def _product(
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    tokens: tl.int32,
    left_width: tl.int32,
    right_width: tl.int32,
    left_stride: tl.int32,
    right_stride: tl.int32,
    SIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """(SIDE, SIDE) float32: one tile of left^T right."""
    rows = row * SIDE + tl.arange(0, SIDE)[:, None]
    cols = col * SIDE + tl.arange(0, SIDE)[None, :]
    left, right = left_ptr + rows, right_ptr + cols
    down, across = tl.arange(0, TOKENS)[None, :], tl.arange(0, TOKENS)[:, None]
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for first in range(0, tokens, TOKENS):
        a = tl.load(
            left + (first + down).to(tl.int64) * left_stride,
            mask=(first + down < tokens) & (rows < left_width),
            other=0.0,
        )
        b = tl.load(
            right + (first + across).to(tl.int64) * right_stride,
            mask=(first + across < tokens) & (cols < right_width),
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["tokens", "cols"])
def pick_kernel(
    out_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    order_ptr: tl.tensor,
    pointers_ptr: tl.tensor,
    cols: tl.int32,
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    tokens: tl.int32,
    left_width: tl.int32,
    right_width: tl.int32,
    left_stride: tl.int32,
    right_stride: tl.int32,
    down: tl.int32,
    across: tl.int32,
    SIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    """Store the product at positions[order[e]] for the e of this tile; empty tiles cost nothing."""
    row, col = _tile(down, across, GROUP)
    begin = tl.load(pointers_ptr + row * across + col)
    end = tl.load(pointers_ptr + row * across + col + 1)
    if begin < end:
        tile = _product(
            left_ptr,
            right_ptr,
            row,
            col,
            tokens,
            left_width,
            right_width,
            left_stride,
            right_stride,
            SIDE,
            TOKENS,
            PRECISION,
        )
        flat = tl.reshape(tile, (SIDE * SIDE,))
        for first in range(begin, end, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            inside = entry < end
            slot = tl.load(order_ptr + entry, mask=inside, other=0)
            at = tl.load(indices_ptr + slot, mask=inside, other=0)
            line = at // cols
            place = (line % SIDE) * SIDE + (at - line * cols) % SIDE
            picked = tl.gather(flat, place.to(tl.int32), 0)
            tl.store(out_ptr + slot, picked, mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows", "cols"])
def above_kernel(
    positions_ptr: tl.tensor,
    values_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    rows: tl.int32,
    cols: tl.int32,
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    tokens: tl.int32,
    left_width: tl.int32,
    right_width: tl.int32,
    left_stride: tl.int32,
    right_stride: tl.int32,
    down: tl.int32,
    across: tl.int32,
    SIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """List the entries of a tile with |entry| >= threshold, row by row, as far as room is left.

    The count is that of all of them, so that a caller sees which tiles need more room.
    """
    row, col = _tile(down, across, GROUP)
    tile = _product(
        left_ptr,
        right_ptr,
        row,
        col,
        tokens,
        left_width,
        right_width,
        left_stride,
        right_stride,
        SIDE,
        TOKENS,
        PRECISION,
    )
    line = row * SIDE + tl.arange(0, SIDE)
    column = (col * SIDE + tl.arange(0, SIDE))[None, :]
    edge = tl.load(threshold_ptr)
    kept = (tl.abs(tile) >= edge) & (line < rows)[:, None] & (column < cols)
    ones = kept.to(tl.int32)
    in_line = tl.sum(ones, 1)
    until = tl.cumsum(in_line, 0)
    rank = tl.cumsum(ones, 1) + (until - in_line - 1)[:, None]
    start = tl.load(starts_ptr + row * across + col)
    room = tl.load(starts_ptr + row * across + col + 1) - start
    stored = kept & (rank < room)
    first = (line.to(positions_ptr.dtype.element_ty) * cols)[:, None]
    tl.store(positions_ptr + start + rank, first + column, mask=stored)
    tl.store(values_ptr + start + rank, tile, mask=stored)
    # the last of the running sums: a sum over them does not compile for sm_100
    last = tl.arange(0, SIDE) == SIDE - 1
    tl.store(counts_ptr + row * across + col + 0 * until, until, mask=last)

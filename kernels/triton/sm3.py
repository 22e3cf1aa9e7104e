"""`sm3_` on a GPU: all vectors of values in one launch, after a copy of their accumulators."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.sm3 import one_by_one_
from sft.kernels.triton.table import BLOCK, TYPES, address, alike, place, table


def sm3_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    rows_at: Sequence[Tensor],
    columns_at: Sequence[Tensor],
    lr: float,
    momentum: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Launch `sft.kernels.sm3.sm3_`. Of float64 and strides torch takes care."""
    given = (values, grads, momentum_buffers, rows_at, columns_at, rows, columns)
    parts: dict[bool, list[int]] = {}
    for i, row in enumerate(zip(*(column for column in given if column), strict=True)):
        fit = row[0].dtype != torch.float64 and all(tensor.is_contiguous() for tensor in row)
        parts.setdefault(fit, []).append(i)
    for fit, chosen in parts.items():
        some = [[column[i] for i in chosen] if column else [] for column in given]
        if fit:
            for group in alike(*some):
                _launch(group, lr, momentum, eps, weight_decay)
        else:
            streams, covers = some[:5], some[5:]
            lists = (*streams[:2], *covers, *streams[2:])
            left: Callable[..., None] = one_by_one_
            left(*lists, lr, momentum, eps, weight_decay)


def _launch(
    group: list[list[Tensor]], lr: float, momentum: float, eps: float, weight_decay: float
) -> None:
    *streams, rows, columns = group
    both = [*rows, *columns]
    # what is read is the state before the update, whichever program comes first
    before = torch.cat(both)
    starts = [0, *itertools.accumulate(map(len, both))]
    built = table(
        [column for column in streams if column],
        rows,
        columns,
        starts[: len(rows)],
        starts[len(rows) : len(both)],
    )
    first = streams[0][0]
    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        sm3_kernel[(len(built.blocks),)](
            built.rows,
            built.blocks,
            before,
            -lr,
            1 - lr * weight_decay,
            # differences are taken here, in double precision
            1 - momentum,
            momentum,
            eps,
            VALUE=TYPES[first.dtype],
            GRAD=TYPES[streams[1][0].dtype],
            ROW=TYPES[streams[3][0].dtype],
            COLUMN=TYPES[streams[4][0].dtype],
            MOVES=bool(streams[2]),
            # as torch.lerp: from the nearer end
            NEAR=1 - momentum < 0.5,
            ALIGNED=built.aligned,
            BLOCK=BLOCK,
            num_warps=8,
        )


@triton.jit
def sm3_kernel(
    table_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    before_ptr: tl.tensor,
    minus_lr: tl.float32,
    shrink: tl.float32,
    mix: tl.float32,
    momentum: tl.float32,
    eps: tl.float32,
    VALUE: tl.constexpr,
    GRAD: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    MOVES: tl.constexpr,
    NEAR: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Update one block of one tensor a program, and raise the accumulators that cover it.

    A row of the table: entries, values, gradients, with momentum its buffer, rows and columns of
    the entries, both accumulators, and where they begin in the copy of all accumulators.
    """
    COLUMNS: tl.constexpr = 10 if MOVES else 9
    row, start, size = place(table_ptr, blocks_ptr, COLUMNS, BLOCK)
    at = start + tl.arange(0, BLOCK)
    # only the last block takes a mask, which would break 128-bit loads
    if start + BLOCK <= size:
        _update(
            row,
            at,
            None,
            before_ptr,
            minus_lr,
            shrink,
            mix,
            momentum,
            eps,
            VALUE,
            GRAD,
            ROW,
            COLUMN,
            MOVES,
            NEAR,
            ALIGNED,
        )
    else:
        _update(
            row,
            at,
            at < size,
            before_ptr,
            minus_lr,
            shrink,
            mix,
            momentum,
            eps,
            VALUE,
            GRAD,
            ROW,
            COLUMN,
            MOVES,
            NEAR,
            ALIGNED,
        )


@triton.jit
def _update(
    row: tl.tensor,
    at: tl.tensor,
    here: tl.tensor,
    before_ptr: tl.tensor,
    minus_lr: tl.float32,
    shrink: tl.float32,
    mix: tl.float32,
    momentum: tl.float32,
    eps: tl.float32,
    VALUE: tl.constexpr,
    GRAD: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    MOVES: tl.constexpr,
    NEAR: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    NEXT: tl.constexpr = 4 if MOVES else 3
    value_ptr = address(row, 1, VALUE, ALIGNED) + at
    r = tl.load(address(row, NEXT, ROW, ALIGNED) + at, mask=here)
    c = tl.load(address(row, NEXT + 1, COLUMN, ALIGNED) + at, mask=here)
    g = tl.load(address(row, 2, GRAD, ALIGNED) + at, mask=here).to(tl.float32)
    x = tl.load(value_ptr, mask=here).to(tl.float32)
    over_row = tl.load(before_ptr + tl.load(row + NEXT + 4) + r, mask=here)
    over_column = tl.load(before_ptr + tl.load(row + NEXT + 5) + c, mask=here)
    covered = tl.minimum(over_row, over_column, propagate_nan=tl.PropagateNan.ALL) + g * g
    # numbers that are not negative are in the order of their bits
    bits = covered.to(tl.int32, bitcast=True)
    rows_ptr = address(row, NEXT + 2, tl.int32, False)
    columns_ptr = address(row, NEXT + 3, tl.int32, False)
    tl.atomic_max(rows_ptr + r, bits, mask=here, sem="relaxed")
    tl.atomic_max(columns_ptr + c, bits, mask=here, sem="relaxed")
    update = g * tl.rsqrt(covered + eps)
    if MOVES:
        buffer_ptr = address(row, 3, tl.float32, ALIGNED) + at
        mean = tl.load(buffer_ptr, mask=here)
        update = mean + mix * (update - mean) if NEAR else update - (update - mean) * momentum
        tl.store(buffer_ptr, update, mask=here)
    tl.store(value_ptr, ((x + minus_lr * update) * shrink).to(VALUE), mask=here)

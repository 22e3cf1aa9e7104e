"""Reading, assigning and adding at flat positions on a GPU: one launch for all tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.triton.table import BLOCK, TYPES, address, alike, place, table

# what is only copied keeps its bits, whatever they mean
_BITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


def gather_many(weights: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """Launch `sft.kernels.gather.gather_many`."""
    found = [w.new_empty(at.shape) for w, at in zip(weights, indices, strict=True)]
    for at, out, of in alike(_dense(indices), found, weights):
        rows = table([at, out], of)
        with torch.cuda.device_of(of[0]):  # type: ignore[no-untyped-call]
            gather_kernel[(len(rows.blocks),)](
                rows.rows,
                rows.blocks,
                INDEX=TYPES[at[0].dtype],
                WEIGHT=_BITS[of[0].element_size()],
                ALIGNED=rows.aligned,
                BLOCK=BLOCK,
            )
    return found


def write_many_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    originals: Sequence[Tensor],
    reference: bool,
) -> None:
    """Launch `sft.kernels.write.write_many_`."""
    mode = "assign" if not originals else "reference" if reference else "sum"
    _scatter(mode, weights, indices, values, originals)


def add_many_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """Launch `sft.kernels.add.add_many_`."""
    _scatter("add", weights, indices, values, ())


def _scatter(
    mode: str,
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    originals: Sequence[Tensor],
) -> None:
    for at, given, before, of in alike(*map(_dense, (indices, values, originals)), weights):
        rows = table([at, given, before or given], of)
        kept = mode == "assign"
        wide = torch.promote_types(of[0].dtype, torch.float32)
        with torch.cuda.device_of(of[0]):  # type: ignore[no-untyped-call]
            scatter_kernel[(len(rows.blocks),)](
                rows.rows,
                rows.blocks,
                INDEX=TYPES[at[0].dtype],
                VALUE=_BITS[of[0].element_size()] if kept else TYPES[given[0].dtype],
                WEIGHT=_BITS[of[0].element_size()] if kept else TYPES[of[0].dtype],
                WIDE=TYPES[torch.promote_types(wide, given[0].dtype)],
                MODE=mode,
                ALIGNED=rows.aligned,
                BLOCK=BLOCK,
            )


def _dense(column: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in column]


@triton.jit
def gather_kernel(
    rows_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    INDEX: tl.constexpr,
    WEIGHT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store out[j] = weight[index[j]], one block of one tensor a program.

    A row of the table: entries, indices, out, weight.
    """
    row, start, size = place(rows_ptr, blocks_ptr, 4, BLOCK)
    index_ptr = address(row, 1, INDEX, ALIGNED) + start
    out_ptr = address(row, 2, WEIGHT, ALIGNED) + start
    weight_ptr = address(row, 3, WEIGHT, False)
    inside = tl.arange(0, BLOCK)
    # only the last block takes a mask, which would break 128-bit loads
    if start + BLOCK <= size:
        at = tl.load(index_ptr + inside)
        tl.store(out_ptr + inside, tl.load(weight_ptr + at))
    else:
        here = inside < size - start
        at = tl.load(index_ptr + inside, mask=here, other=0)
        tl.store(out_ptr + inside, tl.load(weight_ptr + at, mask=here), mask=here)


@triton.jit
def scatter_kernel(
    rows_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    INDEX: tl.constexpr,
    VALUE: tl.constexpr,
    WEIGHT: tl.constexpr,
    WIDE: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store weight[index[j]] = value, rounded once; one block of one tensor a program.

    Positions are unique, so that a plain store will do: adding needs no atomics. A row of the
    table: entries, indices, values, originals, weight.
    """
    row, start, size = place(rows_ptr, blocks_ptr, 5, BLOCK)
    index_ptr = address(row, 1, INDEX, ALIGNED) + start
    value_ptr = address(row, 2, VALUE, ALIGNED) + start
    original_ptr = address(row, 3, WEIGHT, ALIGNED) + start
    weight_ptr = address(row, 4, WEIGHT, False)
    inside = tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _put(index_ptr, value_ptr, original_ptr, weight_ptr, inside, None, WIDE, MODE)
    else:
        here = inside < size - start
        _put(index_ptr, value_ptr, original_ptr, weight_ptr, inside, here, WIDE, MODE)


@triton.jit
def _put(
    index_ptr: tl.tensor,
    value_ptr: tl.tensor,
    original_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    inside: tl.tensor,
    here: tl.tensor,
    WIDE: tl.constexpr,
    MODE: tl.constexpr,
) -> None:
    at = tl.load(index_ptr + inside, mask=here)
    value = tl.load(value_ptr + inside, mask=here)
    if MODE == "add":
        value = tl.load(weight_ptr + at, mask=here).to(WIDE) + value.to(WIDE)
    elif MODE != "assign":
        if MODE == "reference":
            value = value.to(weight_ptr.dtype.element_ty)
        value = tl.load(original_ptr + inside, mask=here).to(WIDE) + value.to(WIDE)
    tl.store(weight_ptr + at, value.to(weight_ptr.dtype.element_ty), mask=here)

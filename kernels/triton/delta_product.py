"""`delta_product` on a GPU: one output feature and a run of tokens a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.pattern import Pattern
from sft.kernels.triton.sampled import ALIGNMENT, turned

# Entries of a turn of the loop, and tokens of a program: 16 bytes of each of 8 rows a warp or two.
ENTRIES, TOKENS = 8, 256


def delta_product(
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
    """Launch; the tokens of the result lie side by side, as it reads those of x."""
    if pointers.numel() == 0:
        pattern = Pattern(indices, (rows, cols))
        pointers, inputs = pattern.row_pointers, pattern.columns
        if not to_rows:
            pointers, inputs, slots = pattern.by_columns()
    size, tokens = rows if to_rows else cols, x.shape[0]
    out = torch.empty(size, tokens, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out.t()
    x = turned(x)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        delta_kernel[(size, triton.cdiv(tokens, TOKENS))](
            out,
            x,
            values,
            pointers,
            inputs,
            slots if slots.numel() else None,
            tokens,
            x.stride(1),
            DOUBLE=x.dtype == torch.float64,
            ALIGNMENT=ALIGNMENT,
            ENTRIES=ENTRIES,
            TOKENS=TOKENS,
            num_warps=4,
        )
    return out.t()


@triton.jit
def delta_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    values_ptr: tl.tensor,
    pointers_ptr: tl.tensor,
    inputs_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    tokens: tl.int32,
    stride: tl.int32,
    DOUBLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Store out[i, t] = sum_j values[j] x[t, input_j] over the entries j of output i.

    Entries of one place in a turn of the loop are summed first, then the places.
    """
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    output = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(pointers_ptr + output), tl.load(pointers_ptr + output + 1)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    # rows of x are held in whole sixteens: a mask that changes between them alone splits no load
    held = (token // ALIGNMENT < tl.cdiv(tokens, ALIGNMENT))[None, :]
    total = tl.zeros((ENTRIES, TOKENS), WIDE)
    for start in range(begin, end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        inside = entry < end
        source = tl.load(inputs_ptr + entry, mask=inside, other=0).to(tl.int64) * stride
        slot = entry
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + entry, mask=inside, other=0)
        value = tl.load(values_ptr + slot, mask=inside, other=0.0).to(WIDE)
        at = x_ptr + source[:, None] + token[None, :]
        tile = tl.load(at, mask=inside[:, None] & held, other=0.0)
        total += value[:, None] * tile.to(WIDE)
    found = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + output * tokens + token, found, mask=token < tokens)

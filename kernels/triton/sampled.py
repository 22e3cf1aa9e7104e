"""`outer_at` on a GPU, one dot product for each position: for few positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.outer import aligned_tokens

# Positions of a program, and tokens of a turn of its loop: 16 bytes of each of 16 rows a warp.
ENTRIES, TOKENS = 16, 128
# What `aligned_tokens` makes rows start at multiples of.
ALIGNMENT = 16


def sampled_outer(
    left: Tensor, right: Tensor, indices: Tensor, row_pointers: Tensor, columns: Tensor
) -> Tensor:
    """Launch; the CSR view is for the implementation in torch alone."""
    wide = torch.promote_types(left.dtype, torch.float32)
    out = torch.empty(indices.numel(), dtype=wide, device=left.device)
    tokens, k = left.shape[0], indices.numel()
    if k == 0 or tokens == 0:
        return out.zero_()
    left, right = turned(left), turned(right)
    with torch.cuda.device_of(left):  # type: ignore[no-untyped-call]
        sampled_kernel[(triton.cdiv(k, ENTRIES),)](
            out,
            left,
            right,
            indices,
            k,
            right.shape[1],
            tokens,
            left.stride(1),
            right.stride(1),
            DOUBLE=wide == torch.float64,
            ENTRIES=ENTRIES,
            TOKENS=TOKENS,
            num_warps=4,
        )
    return out


def turned(tensor: Tensor) -> Tensor:
    """Return a (tokens, n) tensor whose tokens lie side by side, each row of them aligned."""
    aligned = tensor.stride(1) % ALIGNMENT == 0 and tensor.data_ptr() % 16 == 0
    return tensor if tensor.stride(0) == 1 and aligned else aligned_tokens(tensor)


@triton.jit(do_not_specialize=["k", "cols", "tokens"])
def sampled_kernel(
    out_ptr: tl.tensor,
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    k: tl.int64,
    cols: tl.int32,
    tokens: tl.int32,
    left_stride: tl.int32,
    right_stride: tl.int32,
    DOUBLE: tl.constexpr,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Store out[j] = sum_t left[t, r_j] right[t, c_j], with t side by side in both."""
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < k
    # programs past the end read at position 0
    at = tl.load(indices_ptr + entry, mask=inside, other=0)
    row = at // cols
    left = (left_ptr + row.to(tl.int64) * left_stride)[:, None]
    right = (right_ptr + (at - row * cols).to(tl.int64) * right_stride)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    total = tl.zeros((ENTRIES, TOKENS), WIDE)
    # no mask within whole blocks: it would split their loads
    whole = tokens // TOKENS * TOKENS
    for first in range(0, whole, TOKENS):
        a = tl.load(left + first + token).to(WIDE)
        total += a * tl.load(right + first + token).to(WIDE)
    if whole < tokens:
        rest = whole + token < tokens
        a = tl.load(left + whole + token, mask=rest, other=0.0).to(WIDE)
        total += a * tl.load(right + whole + token, mask=rest, other=0.0).to(WIDE)
    tl.store(out_ptr + entry, tl.sum(total, 1), mask=inside)

"""`soft_threshold` of many tensors on a GPU: one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.soft_threshold import shrink_many_
from sft.kernels.triton.table import BLOCK, TYPES, address, alike, place, table


def soft_threshold_many_(values: Sequence[Tensor], tau: float, factor: Tensor | None) -> None:
    """Launch `sft.kernels.soft_threshold.soft_threshold_many_`.

    Of float64 and strides torch takes care.
    """
    fit = [value.is_contiguous() and value.dtype != torch.float64 for value in values]
    others = [value for value, fits in zip(values, fit, strict=True) if not fits]
    if others:
        shrink_many_(others, tau, factor)
    for (some,) in alike([value for value, fits in zip(values, fit, strict=True) if fits]):
        rows = table([some])
        with torch.cuda.device_of(some[0]):  # type: ignore[no-untyped-call]
            soft_threshold_kernel[(len(rows.blocks),)](
                rows.rows,
                rows.blocks,
                tau,
                None if factor is None else factor.to(some[0].device, torch.float32),
                VALUE=TYPES[some[0].dtype],
                ALIGNED=rows.aligned,
                BLOCK=BLOCK,
            )


@triton.jit
def soft_threshold_kernel(
    rows_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    tau: tl.float32,
    factor_ptr: tl.tensor,
    VALUE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store v - clamp(v, -tau, tau), one block of one tensor a program; a row: entries, values."""
    row, start, size = place(rows_ptr, blocks_ptr, 2, BLOCK)
    value_ptr = address(row, 1, VALUE, ALIGNED) + start
    if factor_ptr is not None:
        tau = tl.load(factor_ptr) * tau
    inside = tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        value = tl.load(value_ptr + inside)
        tl.store(value_ptr + inside, shrunk(value, tau))
    else:
        here = inside < size - start
        value = tl.load(value_ptr + inside, mask=here)
        tl.store(value_ptr + inside, shrunk(value, tau), mask=here)


@triton.jit
def shrunk(value: tl.tensor, tau: tl.tensor) -> tl.tensor:
    """Return v - clamp(v, -tau, tau) in the dtype of v, to which tau is rounded first."""
    bound = tl.full((), tau, tl.float32).to(value.dtype).to(tl.float32)
    wide = value.to(tl.float32)
    # NaN stays: it is neither above nor below
    inside = tl.where(wide > bound, bound, tl.where(wide < -bound, -bound, wide))
    return (wide - inside).to(value.dtype)

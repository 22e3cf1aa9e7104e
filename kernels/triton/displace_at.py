"""Single weights and single rows of a displaced tensor on a GPU: no other ones are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.noise import LAYOUTS, MASK, NOISE, TILE, signed
from sft.kernels.triton.displace import draws_on, limit_bits, normals_on
from sft.kernels.triton.noise import anywhere, scaled, stretch
from sft.kernels.triton.table import TYPES

BLOCK = 512


def noise_at(positions: Tensor, key: int, parameter: int, kind: str) -> Tensor:
    """Launch `sft.kernels.noise.noise_at`: z is 0 - (-1 z)."""
    flat = positions.detach().contiguous().view(-1)
    out = torch.empty(flat.shape, device=flat.device)
    _at(None, flat, out, parameter, (0, 0, 0.0), [key], [-1.0], kind)
    return out.view(positions.shape)


def displace_at(
    weight: Tensor,
    positions: Tensor,
    parameter: int,
    mask: int,
    mask_key: int,
    limit: float,
    keys: Sequence[int],
    coefficients: Sequence[float],
    kind: str,
) -> Tensor:
    """Launch `sft.kernels.displace_at.displace_at`."""
    flat, dense = positions.detach().contiguous().view(-1), weight.detach().contiguous()
    out = torch.empty(flat.shape, dtype=dense.dtype, device=dense.device)
    _at(dense, flat, out, parameter, (mask, mask_key, limit), keys, coefficients, kind)
    return out.view(positions.shape)


def displace_rows(
    weight: Tensor,
    rows: Tensor,
    parameter: int,
    mask: int,
    mask_key: int,
    limit: float,
    keys: Sequence[int],
    coefficients: Sequence[float],
    kind: str,
) -> Tensor:
    """Launch `sft.kernels.displace_rows.displace_rows`."""
    dense, (count, width) = weight.detach().contiguous(), (len(rows), weight.shape[1])
    out = torch.empty(count, width, dtype=dense.dtype, device=dense.device)
    if not out.numel():
        return out
    given, options = _options(dense, parameter, (mask, mask_key, limit), keys, coefficients, kind)
    # a block starts at a multiple of 4 at or before the row
    blocks = triton.cdiv(width if width % 4 == 0 else width + 3, BLOCK)
    with torch.cuda.device_of(dense):  # type: ignore[no-untyped-call]
        rows_kernel[(count, blocks)](
            out,
            dense,
            rows.detach().contiguous(),
            width,
            *given,
            **options,
            EVEN=width % 16 == 0,
            num_warps=2,
            enable_fp_fusion=False,
        )
    return out


def _at(
    weight: Tensor | None,
    positions: Tensor,
    out: Tensor,
    parameter: int,
    mask: tuple[int, int, float],
    keys: Sequence[int],
    coefficients: Sequence[float],
    kind: str,
) -> None:
    if not out.numel():
        return
    given, options = _options(out, parameter, mask, keys, coefficients, kind)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        positions_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            out, weight, positions, out.numel(), *given, **options, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip


def _options(
    like: Tensor,
    parameter: int,
    mask: tuple[int, int, float],
    keys: Sequence[int],
    coefficients: Sequence[float],
    kind: str,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what both kernels take: arguments after their own, and constants."""
    wide = torch.promote_types(like.dtype, torch.float32)
    draws, (count,) = draws_on(like.device, [(keys, coefficients)], kind, wide)
    normals = normals_on(like.device) if kind == "gaussian_table" else None
    limit = limit_bits(mask[0], mask[2], wide)
    given = draws, normals, count, signed(parameter, 32), mask[1], limit
    return given, {
        "WIDE": TYPES[wide],
        "KIND": kind,
        "MASK": mask[0],
        "BITS": LAYOUTS[kind].bits,
        "TILE": TILE,
        "NOISE_STREAM": NOISE,
        "MASK_STREAM": MASK,
        "BLOCK": BLOCK,
    }


_RUNTIME = ["count", "parameter", "mask_key", "limit"]


@triton.jit(do_not_specialize=["numel", *_RUNTIME])
def positions_kernel(
    out_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    numel: tl.int64,
    draws_ptr: tl.tensor,
    normals_ptr: tl.tensor,
    count: tl.int32,
    parameter: tl.int32,
    mask_key: tl.int64,
    limit: tl.int64,
    WIDE: tl.constexpr,
    KIND: tl.constexpr,
    MASK: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    NOISE_STREAM: tl.constexpr,
    MASK_STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store out[j] = round(w - (c_1 z_1 + ... + c_n z_n)), w = weight[positions[j]], 0 if None."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    inside = tl.arange(0, BLOCK)
    left = tl.minimum(numel - first, BLOCK).to(tl.int32)
    here = inside < left
    # only the last block takes a mask, which would break 128-bit loads
    if left >= BLOCK:
        at = tl.load(positions_ptr + first + inside).to(tl.int64)
    else:
        at = tl.load(positions_ptr + first + inside, mask=here, other=0).to(tl.int64)
    if weight_ptr is None:
        stored = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
    else:
        stored = tl.load(weight_ptr + at, mask=here, other=0.0)
    moved = tl.zeros((BLOCK,), WIDE)
    for turn in range(count):
        c = tl.load(draws_ptr + 2 * turn + 1).to(tl.float64, bitcast=True).to(WIDE)
        key = tl.load(draws_ptr + 2 * turn)
        found = anywhere(key, parameter, NOISE_STREAM, at, KIND, BITS, TILE)
        moved += scaled(found, c, normals_ptr, KIND, WIDE)
    new = (stored.to(WIDE) - moved).to(stored.dtype)
    if MASK == 1:
        edge = limit.to(tl.int64).to(tl.float64, bitcast=True).to(WIDE)
        new = tl.where(tl.abs(stored.to(WIDE)) <= edge, new, stored)
    elif MASK == 2:
        drawn = anywhere(mask_key, parameter, MASK_STREAM, at, "fields", 16, TILE)
        new = tl.where(drawn < limit.to(tl.int32), new, stored)
    if left >= BLOCK:
        tl.store(out_ptr + first + inside, new)
    else:
        tl.store(out_ptr + first + inside, new, mask=here)


@triton.jit(do_not_specialize=_RUNTIME)
def rows_kernel(
    out_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    width: tl.int64,
    draws_ptr: tl.tensor,
    normals_ptr: tl.tensor,
    count: tl.int32,
    parameter: tl.int32,
    mask_key: tl.int64,
    limit: tl.int64,
    WIDE: tl.constexpr,
    KIND: tl.constexpr,
    MASK: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    NOISE_STREAM: tl.constexpr,
    MASK_STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """Store a block of out[j] = round(w - (c_1 z_1 + ... + c_n z_n)), w = weight[rows[j]]."""
    number = tl.program_id(0).to(tl.int64)
    start = tl.load(rows_ptr + number).to(tl.int64) * width
    # rows of 16 n entries start at multiples of 4, and load by 128 bits under a mask of whole 16
    lead = 0 if EVEN else start % 4
    first = start - lead + tl.program_id(1) * BLOCK
    inside = tl.program_id(1) * BLOCK - lead + tl.arange(0, BLOCK)
    here = inside < width if EVEN else (inside >= 0) & (inside < width)
    stored = tl.load(weight_ptr + start + inside, mask=here, other=0.0)
    moved = tl.zeros((BLOCK,), WIDE)
    for turn in range(count):
        c = tl.load(draws_ptr + 2 * turn + 1).to(tl.float64, bitcast=True).to(WIDE)
        key = tl.load(draws_ptr + 2 * turn)
        found = stretch(key, parameter, NOISE_STREAM, first, KIND, BITS, TILE, BLOCK)
        moved += scaled(found, c, normals_ptr, KIND, WIDE)
    new = (stored.to(WIDE) - moved).to(stored.dtype)
    if MASK == 1:
        edge = limit.to(tl.int64).to(tl.float64, bitcast=True).to(WIDE)
        new = tl.where(tl.abs(stored.to(WIDE)) <= edge, new, stored)
    elif MASK == 2:
        drawn = stretch(mask_key, parameter, MASK_STREAM, first, "fields", 16, TILE, BLOCK)
        new = tl.where(drawn < limit.to(tl.int32), new, stored)
    tl.store(out_ptr + number * width + inside, new, mask=here)

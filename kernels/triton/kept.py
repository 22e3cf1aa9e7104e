"""`keep` and `restore` on a GPU: one pass each, the noise drawn in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.kept import BLOCK, LEAST, STREAM, TILE


def keep_int8(x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Launch; the key lies on the CPU, so that nothing waits for the GPU."""
    x = x.detach().contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    peaks = torch.empty(triton.cdiv(x.numel(), BLOCK), dtype=torch.bfloat16, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            keep_int8_kernel[_grid(x)](
                codes, peaks, x, x.numel(), int(key), LEAST, BLOCK, TILE, STREAM,
                # what the CPU rounds twice is not contracted to one rounding
                enable_fp_fusion=False, num_warps=8,
            )  # fmt: skip
    return codes, peaks


def keep_bfloat16(x: Tensor, key: Tensor) -> Tensor:
    """Launch; see `keep_int8`."""
    x = x.detach().contiguous()
    codes = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            keep_bfloat16_kernel[_grid(x)](
                codes, x, x.numel(), int(key), BLOCK, TILE, STREAM, num_warps=8
            )
    return codes


def restore_int8(codes: Tensor, peaks: Tensor, dtype: torch.dtype) -> Tensor:
    """Launch."""
    codes = codes.contiguous()
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel():
        with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
            restore_int8_kernel[_grid(codes)](
                out, codes, peaks, codes.numel(), BLOCK, TILE, num_warps=8
            )
    return out


def _grid(tensor: Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), TILE),)


@triton.jit(do_not_specialize=["numel", "key"])
def keep_int8_kernel(
    codes_ptr: tl.tensor,
    peaks_ptr: tl.tensor,
    x_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STREAM: tl.constexpr,
) -> None:
    """Store floor(127 x / peak + u) and the peaks, one tile a program."""
    tile = tl.program_id(0).to(tl.int64)
    left = numel - tile * TILE
    inside, here = _places(left, BLOCK, TILE)
    x = _read(x_ptr + tile * TILE, inside, here, left, TILE).to(tl.float32)
    # as integers, magnitudes are in their order, and a NaN is the largest
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    most = tl.max(magnitude, 1)
    upwards = tl.where(most > 0x7F800000, 0x7FC0, (most + 0xFFFF) >> 16)
    rows = tl.arange(0, TILE // BLOCK)
    tl.store(
        peaks_ptr + tile * (TILE // BLOCK) + rows,
        upwards.to(tl.int16).to(tl.bfloat16, bitcast=True),
        mask=rows * BLOCK < left,
    )
    peak = (upwards << 16).to(tl.float32, bitcast=True)
    factor = tl.where(peak >= LEAST, tl.div_rn(127.0, tl.maximum(peak, LEAST)), 0.0)
    unit = noise(key, tile, BLOCK, TILE, STREAM).to(tl.float32) * 1.52587890625e-05
    # by codes of 0 and a peak that is not finite, such a block comes back as NaN
    x = tl.where(magnitude < 0x7F800000, x, 0.0)
    rounded = tl.minimum(tl.floor(x * factor[:, None] + unit), 127.0)
    _write(codes_ptr + tile * TILE, rounded.to(tl.int32).to(tl.int8), inside, here, left, TILE)


@triton.jit(do_not_specialize=["numel", "key"])
def keep_bfloat16_kernel(
    codes_ptr: tl.tensor,
    x_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STREAM: tl.constexpr,
) -> None:
    """Store the upper halves of the bits of x + 2^16 u, one tile a program."""
    tile = tl.program_id(0).to(tl.int64)
    left = numel - tile * TILE
    inside, here = _places(left, BLOCK, TILE)
    x = _read(x_ptr + tile * TILE, inside, here, left, TILE).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    moved = bits + noise(key, tile, BLOCK, TILE, STREAM)
    # an addition to the bits of a NaN could turn it to a number
    moved = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, moved)
    rounded = (moved >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    _write(codes_ptr + tile * TILE, rounded, inside, here, left, TILE)


@triton.jit(do_not_specialize=["numel"])
def restore_int8_kernel(
    out_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    peaks_ptr: tl.tensor,
    numel: tl.int64,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Store code * (peak / 127), one tile a program."""
    tile = tl.program_id(0).to(tl.int64)
    left = numel - tile * TILE
    inside, here = _places(left, BLOCK, TILE)
    codes = _read(codes_ptr + tile * TILE, inside, here, left, TILE)
    rows = tl.arange(0, TILE // BLOCK)
    peaks = tl.load(peaks_ptr + tile * (TILE // BLOCK) + rows, mask=rows * BLOCK < left, other=0.0)
    # float32 of 1 / 127
    scale = peaks.to(tl.float32) * 0.00787401571869850158691
    restored = codes.to(tl.float32) * scale[:, None]
    _write(out_ptr + tile * TILE, restored.to(out_ptr.dtype.element_ty), inside, here, left, TILE)


@triton.jit
def _places(left: tl.tensor, BLOCK: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """A tile as rows of blocks: offsets, and whether the tensor reaches them."""
    inside = tl.arange(0, TILE // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return inside, inside < left


@triton.jit
def _read(
    ptr: tl.tensor, inside: tl.tensor, here: tl.tensor, left: tl.tensor, TILE: tl.constexpr
) -> tl.tensor:
    # only the last tile takes a mask, which would break 128-bit loads
    if left >= TILE:  # noqa: SIM108 - a ternary would load both
        found = tl.load(ptr + inside)
    else:
        found = tl.load(ptr + inside, mask=here, other=0)
    return found


@triton.jit
def _write(
    ptr: tl.tensor,
    values: tl.tensor,
    inside: tl.tensor,
    here: tl.tensor,
    left: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    if left >= TILE:
        tl.store(ptr + inside, values)
    else:
        tl.store(ptr + inside, values, mask=here)


@triton.jit
def noise(
    key: tl.tensor, tile: tl.tensor, BLOCK: tl.constexpr, TILE: tl.constexpr, STREAM: tl.constexpr
) -> tl.tensor:
    """(TILE / BLOCK, BLOCK) int32 in [0, 65536), as `sft.kernels.kept` lays it out."""
    a, b, c, d = tl.philox(key, tl.arange(0, TILE // 8).to(tl.uint32), 0, 0, STREAM)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    shorts = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (TILE // BLOCK, BLOCK))
    first = (TILE // 8 + tile // 8).to(tl.uint32)
    a, b, c, d = tl.philox(key, first, 0, 0, STREAM)
    lane = tile // 2 % 4
    word = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
    turn = (word >> (16 * (tile % 2)).to(tl.uint32)) & 0xFFFF
    return (shorts ^ turn ^ 0x8000).to(tl.int32)

"""One pass over a tensor that moves it along noise drawn in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from sft.kernels.triton.noise import fields, normals


@triton.jit(do_not_specialize=["parameter", "count", "decay", "mask_key", "limit"])
def displace_kernel(
    out_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    draws_ptr: tl.tensor,
    table_ptr: tl.tensor,
    numel: tl.int64,
    start: tl.int64,
    parameter: tl.int32,
    count: tl.int32,
    decay: tl.int64,
    mask_key: tl.int64,
    limit: tl.int64,
    KIND: tl.constexpr,
    MASK: tl.constexpr,
    DECAYS: tl.constexpr,
    DOUBLE: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    NOISE_STREAM: tl.constexpr,
    MASK_STREAM: tl.constexpr,
) -> None:
    """Store round(w - (c_1 z_1 + ... + c_n z_n + decay w)), one tile a program.

    The draws are (count, 2) int64: a key, and the bits of a coefficient in float64. Numbers come as
    bits of float64 because launchers pass floats in float32. What is not moved keeps its bits.
    """
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    ROWS: tl.constexpr = 32 // BITS
    COLS: tl.constexpr = TILE // ROWS
    tile = start // TILE + tl.program_id(0).to(tl.int64)
    # the address of the tile's first weight, which may lie before the tensor's
    base = tile * TILE - start
    inside = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    here = (inside >= -base) & (inside < numel - base)
    stored = tl.load(weight_ptr + base + inside, mask=here, other=0.0)
    w = stored.to(WIDE)
    moved = tl.zeros((ROWS, COLS), WIDE)
    for turn in range(count):
        key = tl.load(draws_ptr + 2 * turn)
        c = tl.load(draws_ptr + 2 * turn + 1).to(tl.float64, bitcast=True).to(WIDE)
        if KIND == "rademacher":
            bits = fields(key, parameter, NOISE_STREAM, tile, BITS, TILE)
            moved += tl.where(bits != 0, c, -c)
        elif KIND == "gaussian_table":
            chosen = fields(key, parameter, NOISE_STREAM, tile, BITS, TILE).to(tl.int32)
            moved += tl.load(table_ptr + chosen).to(WIDE) * c
        else:
            moved += normals(key, parameter, NOISE_STREAM, tile, TILE).to(WIDE) * c
    if DECAYS:
        moved += w * decay.to(tl.int64).to(tl.float64, bitcast=True).to(WIDE)
    new = (w - moved).to(out_ptr.dtype.element_ty)
    if MASK == "magnitude":
        edge = limit.to(tl.int64).to(tl.float64, bitcast=True).to(WIDE)
        new = tl.where(tl.abs(w) <= edge, new, stored)
    elif MASK == "random":
        chosen = tl.reshape(fields(mask_key, parameter, MASK_STREAM, tile, 16, TILE), (ROWS, COLS))
        new = tl.where(chosen.to(tl.int32) < limit.to(tl.int32), new, stored)
    tl.store(out_ptr + base + inside, new, mask=here)

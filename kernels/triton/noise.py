"""Noise in registers, by the layout of `sft.kernels.noise`: one program draws for one tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fields(
    key: tl.tensor,
    parameter: tl.tensor,
    stream: tl.tensor,
    tile: tl.tensor,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """(32 / BITS, words) uint32: field b of word j; row after row these are the tile's weights."""
    a, b, c, d = _lanes(key, parameter, stream, tile, TILE * BITS // 128)
    words = tl.reshape(_interleave(a, b, c, d), (1, TILE * BITS // 32))
    shifts = (tl.arange(0, 32 // BITS) * BITS).to(tl.uint32)
    return (words >> shifts[:, None]) & ((1 << BITS) - 1)


@triton.jit
def normals(
    key: tl.tensor, parameter: tl.tensor, stream: tl.tensor, tile: tl.tensor, TILE: tl.constexpr
) -> tl.tensor:
    """(1, TILE) float32 by Box-Muller, of each pair of lanes."""
    a, b, c, d = _lanes(key, parameter, stream, tile, TILE // 4)
    first, second = _pair(a, b)
    third, fourth = _pair(c, d)
    return tl.reshape(_interleave(first, second, third, fourth), (1, TILE))


@triton.jit
def _lanes(
    key: tl.tensor, parameter: tl.tensor, stream: tl.tensor, tile: tl.tensor, COUNTERS: tl.constexpr
) -> tl.tensor:
    # a tile starts at a multiple of COUNTERS, a power of 2: its counters share their high word
    first = tile.to(tl.int64) * COUNTERS
    low = (first & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, COUNTERS).to(tl.uint32)
    return tl.philox(key, low, (first >> 32).to(tl.uint32), parameter, stream)


@triton.jit
def _interleave(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _pair(radius: tl.tensor, angle: tl.tensor) -> tl.tensor:
    uniform = ((radius >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    # a device's logarithm may have the wrong sign next to 1
    length = tl.sqrt(tl.abs(tl.log(uniform) * -2.0))
    cosine, sine = _turn(angle)
    return length * cosine, length * sine


@triton.jit
def _turn(angle: tl.tensor) -> tl.tensor:
    """Cosine and sine of angle / 2^32 turns.

    The nearest quarter is exact in integers; the rest, within an eighth of a turn, takes two short
    polynomials. The device's own functions reduce any argument, in loops that spill registers.
    """
    quarter = (angle + 0x20000000) >> 30
    rest = (angle - (quarter << 30)).to(tl.int32, bitcast=True)
    x = rest.to(tl.float32) * 1.4629180792671596e-09
    square = x * x
    sine = x + x * square * (
        -0.16666654611 + square * (0.0083321608736 + square * -0.00019515295891)
    )
    cosine = 1.0 + square * (
        -0.5 + square * (0.041666645683 + square * (-0.0013887316255 + square * 2.4433157118e-05))
    )
    odd = (quarter & 1) != 0
    along, across = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    along = tl.where(((quarter + 1) & 2) != 0, -along, along)
    return along, tl.where((quarter & 2) != 0, -across, across)

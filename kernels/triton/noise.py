"""Noise in registers, by the layout of `sft.kernels.noise`: of a tile, a stretch, or anywhere."""

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
def stretch(
    key: tl.tensor,
    parameter: tl.tensor,
    stream: tl.tensor,
    first: tl.tensor,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
) -> tl.tensor:
    """(COUNT,) fields in int32, or normals, of the weights from `first`, a multiple of 4, on.

    Four weights in a row share a counter, and are of one field.
    """
    start = first + tl.arange(0, COUNT // 4).to(tl.int64) * 4
    a, b, c, d, field, _ = _words(key, parameter, stream, start, BITS, TILE)
    if KIND == "gaussian":
        a, b = _pair(a, b)
        c, d = _pair(c, d)
    else:
        a, b = _field(a, field, BITS), _field(b, field, BITS)
        c, d = _field(c, field, BITS), _field(d, field, BITS)
    return tl.reshape(_interleave(a, b, c, d), (COUNT,))


@triton.jit
def anywhere(
    key: tl.tensor,
    parameter: tl.tensor,
    stream: tl.tensor,
    positions: tl.tensor,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Fields in int32, or normals, of the weights at flat int64 positions: a counter for each."""
    a, b, c, d, field, lane = _words(key, parameter, stream, positions, BITS, TILE)
    first = lane < 2
    even, odd = tl.where(first, a, c), tl.where(first, b, d)
    if KIND == "gaussian":
        cosine, sine = _pair(even, odd)
        found = tl.where(lane % 2 == 0, cosine, sine)
    else:
        found = _field(tl.where(lane % 2 == 0, even, odd), field, BITS)
    return found


@triton.jit
def scaled(
    found: tl.tensor, c: tl.tensor, normals_ptr: tl.tensor, KIND: tl.constexpr, WIDE: tl.constexpr
) -> tl.tensor:
    """Return c z of fields or normals."""
    if KIND == "rademacher":
        z = tl.where(found != 0, c, -c)
    elif KIND == "gaussian_table":
        z = tl.load(normals_ptr + found).to(WIDE) * c
    else:
        z = found.to(WIDE) * c
    return z


@triton.jit
def _words(
    key: tl.tensor,
    parameter: tl.tensor,
    stream: tl.tensor,
    positions: tl.tensor,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Four words of the counter of each position, its field in them, and its own of the four."""
    WORDS: tl.constexpr = TILE * BITS // 32
    inside = (positions % TILE).to(tl.int32)
    word = inside % WORDS
    counter = positions // TILE * (WORDS // 4) + word // 4
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, low, high, parameter, stream)
    return a, b, c, d, inside // WORDS, word % 4


@triton.jit
def _field(word: tl.tensor, field: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    return ((word >> (field * BITS).to(tl.uint32)) & ((1 << BITS) - 1)).to(tl.int32)


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

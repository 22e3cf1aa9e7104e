"""Counter-based noise: z of a weight depends on (key, parameter, index) and on nothing else.

Layout. A tile is 4096 consecutive weights of a parameter. Of its words, word j is lane j % 4 of the
Philox counter (index low, index high, parameter, stream), index = tile * counters + j // 4. With W
words a tile, weight b * W + j of the tile takes field b, counted from the low end, of word j:

    rademacher       W = 128    fields of 1 bit        z = +1 where the bit is 1, else -1
    gaussian_table   W = 2048   fields of 16 bits      z = table[field]
    gaussian         W = 4096   the whole word         z by Box-Muller, of words 2i and 2i + 1

Hence the noise of any part of a tensor is found alone, on any device, in any order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft.kernels.library import define
from sft.kernels.philox import BLOCK, Part, philox, philox_reference

TILE = 4096
NOISE, MASK = 0, 1  # streams: what directions, and what random masks are made of


@dataclass(frozen=True)
class Layout:
    """How the words of a tile serve its weights.

    Args:
        bits: of a weight's field.
    """

    bits: int

    @property
    def words(self) -> int:
        """Words a tile."""
        return TILE * self.bits // 32

    @property
    def counters(self) -> int:
        """Philox counters a tile."""
        return self.words // 4


LAYOUTS = {"rademacher": Layout(1), "gaussian_table": Layout(16), "gaussian": Layout(32)}
KINDS = tuple(LAYOUTS)


def noise(
    key: int,
    parameter: int,
    numel: int,
    *,
    kind: str,
    start: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the noise of the weights `start` to `start + numel` of a parameter, as a vector.

    Args:
        key: of the draw, 64 bits.
        parameter: number of the parameter, 32 bits.
        numel: how many weights.
        kind: one of `KINDS`. Only "gaussian" may differ in last bits from device to device.
        start: flat index of the first.
        device: where to.

    Returns:
        (numel,) float32, of mean 0 and variance 1.

    Papers: MeZO, arXiv 2305.17333, draws normals; +-1 has the second moment d |g|^2 instead of
    (d + 2) |g|^2. Unlike the authors' code, no generator is seeded and no order matters.
    """
    check_kind(kind)
    if torch.device(device).type == "cpu":
        return _drawn(key, parameter, numel, kind, start)
    out = torch.empty(numel, device=device)
    NOISE_INTO(out, signed(key), parameter, start, kind)
    return out


def _drawn(key: int, parameter: int, numel: int, kind: str, start: int) -> Tensor:
    first, last = start // TILE, -(-(start + numel) // TILE)
    out = torch.empty(last - first, TILE)
    step = BLOCK // LAYOUTS[kind].counters
    for tile in range(first, last, step):
        run = Run(parameter, tile, min(step, last - tile))
        fill(kind, tile_words(key, [run], kind), 1.0, out[tile - first : tile - first + run.tiles])
    return out.view(-1)[start - first * TILE :][:numel]


def _noise_into(out: Tensor, key: int, parameter: int, start: int, kind: str) -> None:
    out.copy_(_drawn(key, parameter, out.numel(), kind, start))


NOISE_INTO = define(
    "noise_(Tensor(a!) out, int key, int parameter, int start, str kind) -> ()",
    plain=_noise_into,
    triton="displace:noise_",
    fake=lambda out, key, parameter, start, kind: None,
)


def noise_at(key: int, parameter: int, positions: Tensor, *, kind: str) -> Tensor:
    """Return the noise of single weights: `noise(...)[positions]`, at the cost of those alone.

    Args:
        key: of the draw.
        parameter: number of the parameter.
        positions: flat indices, any shape, any integer dtype.
        kind: one of `KINDS`.

    Returns:
        float32 of the shape of `positions`, on their device.
    """
    check_kind(kind)
    found: Tensor = NOISE_AT(positions, signed(key), parameter, kind)
    return found


def _noise_at(positions: Tensor, key: int, parameter: int, kind: str) -> Tensor:
    if kind == "gaussian":
        words, lane = _words_at(key, parameter, positions, kind, NOISE)
        wide = box_muller(torch.from_numpy(words.view(np.int32)))
        z = wide[torch.arange(len(lane)), torch.from_numpy(lane)]
    else:
        found = fields_at(key, parameter, positions, kind, NOISE).view(-1)
        z = 2.0 * found - 1.0 if kind == "rademacher" else normal_table()[found]
    return z.float().view(positions.shape).to(positions.device)


NOISE_AT = define(
    "noise_at(Tensor positions, int key, int parameter, str kind) -> Tensor",
    plain=_noise_at,
    triton="displace_at:noise_at",
    fake=lambda positions, key, parameter, kind: torch.empty(
        positions.shape, device=positions.device
    ),
)


def fields_at(key: int, parameter: int, positions: Tensor, kind: str, stream: int) -> Tensor:
    """Return the fields of single weights: int64 of the shape of `positions`, on the CPU."""
    layout = LAYOUTS[kind]
    words, lane = _words_at(key, parameter, positions, kind, stream)
    field = _flat(positions) % TILE // layout.words
    bits = words[np.arange(len(lane)), lane] >> (field * layout.bits).astype(np.uint32)
    found = (bits & np.uint32(2**layout.bits - 1)).astype(np.int64)
    return torch.from_numpy(found).view(positions.shape)


def _words_at(
    key: int, parameter: int, positions: Tensor, kind: str, stream: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return the four words of each weight's counter, (n, 4), and which of them is its own."""
    layout = LAYOUTS[kind]
    tile, inside = np.divmod(_flat(positions), TILE)
    word = inside % layout.words
    index = tile * layout.counters + word // 4
    return philox(_halves(key), _counters(index, parameter, stream)), word % 4


def _flat(positions: Tensor) -> NDArray[np.int64]:
    flat: NDArray[np.int64] = positions.reshape(-1).to("cpu", torch.int64).numpy()
    return flat


def check_kind(kind: str) -> None:
    """Refuse a kind of noise that does not exist."""
    if kind not in LAYOUTS:
        raise ValueError(f"noise: got {kind!r}, allowed is one of {', '.join(KINDS)}")


class Run(NamedTuple):
    """Consecutive tiles of one parameter; `owner` tells whose they are, and travels along."""

    parameter: int
    first: int
    tiles: int
    owner: int = 0


def tile_words(key: int, runs: Sequence[Run], kind: str, stream: int = NOISE) -> Tensor:
    """Return the words of whole tiles of one or many parameters, by one vectorised Philox.

    Args:
        key: of the draw.
        runs: which tiles.
        kind: the layout.
        stream: `NOISE` or `MASK`.

    Returns:
        (tiles, words) int32, the tiles of the runs one after another.
    """
    layout = LAYOUTS[kind]
    count = sum(run.tiles for run in runs)
    words = np.empty((count * layout.counters, 4), np.uint32)
    done = 0
    for block in blocks(runs, max(1, BLOCK // layout.counters)):
        index = np.concatenate(
            [np.arange(run.tiles * layout.counters) + run.first * layout.counters for run in block]
        )
        sizes = [run.tiles * layout.counters for run in block]
        parameter = (
            block[0].parameter
            if len(block) == 1
            else np.repeat(np.array([run.parameter for run in block]), sizes)
        )
        philox(_halves(key), _counters(index, parameter, stream), words[done : done + len(index)])
        done += len(index)
    return torch.from_numpy(words.view(np.int32)).view(count, layout.words)


def blocks(runs: Sequence[Run], tiles: int) -> Iterator[list[Run]]:
    """Cut runs into lists of at most so many tiles, in order; none but the last is shorter."""
    block: list[Run] = []
    free = tiles
    for run in runs:
        first, left = run.first, run.tiles
        while left:
            part = min(left, free)
            block.append(run._replace(first=first, tiles=part))
            first, left, free = first + part, left - part, free - part
            if not free:
                yield block
                block, free = [], tiles
    if block:
        yield block


def signed(number: int, bits: int = 64) -> int:
    """Return the integer of the same bits that ops and kernels take."""
    half = 1 << bits - 1
    return (number + half) % (2 * half) - half


def _halves(key: int) -> tuple[int, int]:
    return key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF


def _counters(index: NDArray[np.int64], parameter: Part, stream: int) -> tuple[Part, ...]:
    return index & 0xFFFFFFFF, index >> 32, parameter, stream


_SIGN = -(2**31)
_SHIFTS = torch.arange(31, -1, -1, dtype=torch.int32)[:, None]


def fill(kind: str, words: Tensor, coefficient: float, out: Tensor) -> None:
    """Write `coefficient` * z of whole tiles.

    Args:
        kind: of the noise.
        words: (tiles, words) int32.
        coefficient: as `rounded` returns it.
        out: (tiles, 4096) float32, contiguous.
    """
    if kind == "rademacher":
        # the field is moved to the sign bit of -c, which a one turns to +c: no multiplication
        bits = out.view(torch.int32).view(-1, 32, 128)
        torch.bitwise_left_shift(words.unsqueeze(1), _SHIFTS, out=bits)
        bits.bitwise_and_(_SIGN).bitwise_xor_(int(np.float32(-coefficient).view(np.int32)))
    elif kind == "gaussian_table":
        scaled = normal_table() * coefficient
        torch.index_select(scaled, 0, fields(words).view(-1), out=out.view(-1))
    else:
        torch.mul(box_muller(words.view(-1, 4)).view(out.shape), coefficient, out=out)


def fields(words: Tensor) -> Tensor:
    """Return the 16-bit fields of (tiles, 2048) words: (tiles, 4096) int32 in [0, 65536)."""
    return torch.cat([words & 0xFFFF, words >> 16 & 0xFFFF], 1)


def box_muller(words: Tensor) -> Tensor:
    """Return standard normals: r cos(t), r sin(t), r^2 = -2 ln(u), of each pair of words.

    Args:
        words: (counters, 4) int32; u takes the upper 24 bits of an even word, t all of an odd one.

    Returns:
        (counters, 4) float32.
    """
    radius, angle = words.view(-1, 2, 2).unbind(-1)
    uniform = ((radius >> 8 & 0xFFFFFF).float() + 0.5) * 2**-24
    radius = (uniform.log() * -2.0).sqrt()
    angle = angle.float() * (math.pi * 2**-31)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).view(-1, 4)


@functools.cache
def normal_table() -> Tensor:
    """Return (65536,) float32: quantiles of the normal distribution, of 8 significant bits.

    Their products with a coefficient of 16 significant bits are exact in float32, so that fused
    and separate arithmetic agree.
    """
    middles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    mantissa, exponent = torch.frexp(torch.special.ndtri(middles))
    return torch.ldexp((mantissa * 256).round() / 256, exponent).float()


def rounded(coefficient: float, kind: str) -> float:
    """Return the coefficient as it is used: float32, of 16 significant bits for the table."""
    if kind == "gaussian_table":
        mantissa, exponent = math.frexp(coefficient)
        coefficient = math.ldexp(round(mantissa * 2**16), exponent - 16)
    return float(np.float32(coefficient))


def noise_reference(key: int, parameter: int, index: int, *, kind: str) -> float:
    """Oracle of `noise`: one weight in Python's integers, by the layout that this file states."""
    width = {"rademacher": 128, "gaussian_table": 2048, "gaussian": 4096}[kind]
    tile, inside = divmod(index, 4096)
    field, word = divmod(inside, width)
    counter = tile * (width // 4) + word // 4
    words = philox_reference(
        (key % 2**32, key >> 32), (counter % 2**32, counter >> 32, parameter, NOISE)
    )
    if kind == "rademacher":
        return 1.0 if words[word % 4] >> field & 1 else -1.0
    if kind == "gaussian_table":
        return normal_table()[words[word % 4] >> 16 * field & 0xFFFF].item()
    radius, angle = words[word % 4 // 2 * 2], words[word % 4 // 2 * 2 + 1]
    length = math.sqrt(-2.0 * math.log(((radius >> 8) + 0.5) * 2.0**-24))
    turn = 2.0 * math.pi * angle / 2**32
    return length * (math.sin(turn) if word % 2 else math.cos(turn))

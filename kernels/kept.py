"""Inputs that backward needs, kept in fewer bits and rounded without bias."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from sft.kernels.library import define
from sft.kernels.philox import philox, philox_reference

FORMS = ("full", "bfloat16", "int8")
TILE = 4096  # values that share one draw of noise
BLOCK = 64  # values that share one scale
STREAM = 2  # of Philox: 0 and 1 are directions and masks
# The absolute maximum from which on a block has codes: the reciprocal of less would overflow.
LEAST = 2.0**-100
_CHUNK = 32 * TILE  # half a MiB in float32: passes over it stay in a core's cache


class Kept(NamedTuple):
    """What is left of an input.

    Args:
        codes: the input itself, or of its shape in bfloat16 or int8.
        peaks: (blocks,) bfloat16 for int8, at least the largest magnitude of each block.
    """

    codes: Tensor
    peaks: Tensor | None


def keep(x: Tensor, form: str) -> Kept:
    """Return the input in fewer bits, so that its expectation is the input.

        int8       code = floor(127 x / peak + u)       restored as code * peak / 127
        bfloat16   the upper half of (bits of x + 2^16 u)

    u in [0, 1) has 16 bits, by Philox: of any two values independent. The variance of a gradient,
    a sum over values, is hence that of noise all independent, at 1/8 of a word a tile.

    The key comes from torch's global generator of the CPU, one number a call, as dropout's does:
    who resumes or recomputes with its state, as transformers and gradient checkpointing do, gets
    the same bits.

    Args:
        x: any shape and float dtype. Half precision is kept as it is by "bfloat16".
        form: one of `FORMS`.

    Raises:
        ValueError: another form.

    Nearest relatives: ActNN, arXiv 2104.14129, which rounds by independent noise per group.
    """
    if form not in FORMS:
        raise ValueError(f"saved_inputs: got {form!r}, allowed is one of {', '.join(FORMS)}")
    if form == "full" or (form == "bfloat16" and x.element_size() <= 2):
        return Kept(x, None)
    key = _draw_key()
    if form == "bfloat16":
        return Kept(keep_bfloat16(x, key), None)
    return Kept(*keep_int8(x, key))


def _draw_key() -> Tensor:
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


def restore(kept: Kept, dtype: torch.dtype) -> Tensor:
    """Return a kept input in a float dtype; one that was kept in full as it is."""
    codes, peaks = kept
    if peaks is not None:
        restored: Tensor = restore_int8(codes, peaks, dtype)
        return restored
    return codes.to(dtype) if codes.dtype == torch.bfloat16 else codes


def pass_over() -> None:
    """Move the generator by the number that an input would be kept with, where it is not kept.

    A layer draws one number a call in training, whatever becomes of it. Checkpointing runs a layer
    twice from one state of the generator, and keeps its input in one of the two alone: if dropout
    came upon another state there, forward and backward would be of different functions.
    """
    _draw_key()


def form_in(form: str, trained: Tensor, *, training: bool) -> str:
    """Return the form that a layer asks for.

    Args:
        form: one of `FORMS`.
        trained: what has a gradient by the input.
        training: the layer's mode.
    """
    if form == "full" or not trained.requires_grad:
        return "full"
    if torch.is_grad_enabled():
        return form
    if training:
        pass_over()
    return "full"


def form_of(x: Tensor, trained: Tensor, wanted: str, *, copied: bool = False) -> str:
    """Return in which form backward's input is kept; a custom function can't tell in its forward.

    In full where no backward comes, where x has no more bits, and where what made x keeps it: to
    keep it in fewer bits as well would be to keep more. Attention keeps its output, which the next
    projection reads through views; so do relu and tanh.

    Args:
        x: the input, as the function takes it.
        trained: what has a gradient by it.
        wanted: one of `FORMS`.
        copied: backward needs a copy of a part, which nobody else keeps.
    """
    if wanted == "full" or not (torch.is_grad_enabled() and trained.requires_grad):
        return "full"
    if wanted == "bfloat16" and x.element_size() <= 2:
        pass_over()
        return "full"
    # a tracer has no graph of gradients yet
    if copied or torch.compiler.is_compiling():
        return wanted
    owner = x if x._base is None else x._base
    kept = owner.grad_fn is not None and _keeps_its_result(type(owner.grad_fn))
    if kept:
        pass_over()
        return "full"
    return wanted


@functools.cache
def _keeps_its_result(node: type) -> bool:
    # the node's kind alone is asked: to read what it saved would unpack it
    return bool({"_raw_saved_result", "_raw_saved_output"} & set(dir(node)))


def _keep_int8(x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.detach().reshape(-1)
    codes = torch.empty(flat.numel(), dtype=torch.int8, device=x.device)
    peaks = torch.empty(-(-flat.numel() // BLOCK), dtype=torch.bfloat16, device=x.device)
    draws, wide = _Draws(key, flat), _scratch(flat)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].float()
        size = part.numel()
        blocks = (pad(part, (0, -size % BLOCK)) if size % BLOCK else part).view(-1, BLOCK)
        scaled = wide[: blocks.numel()].view(-1, BLOCK)
        peak = _upwards(torch.abs(blocks, out=scaled).amax(1))
        peaks[start // BLOCK :][: len(peak)] = peak
        torch.mul(blocks, _reciprocal(peak.float()).unsqueeze(1), out=scaled)
        rounded = scaled.view(-1)[:size].add_(draws.units(start, size)).floor_()
        codes[start : start + size] = rounded.clamp_(max=127)
    return codes.view(x.shape), peaks


def _keep_bfloat16(x: Tensor, key: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    codes = torch.empty(flat.numel(), dtype=torch.int16, device=x.device)
    draws = _Draws(key, flat)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].float()
        bits = draws.words(start, part.numel()).add_(part.view(torch.int32))
        if part.sum().isnan():
            # an addition to the bits of a NaN could turn it to a number
            bits.masked_fill_(part.isnan(), 0x7FC00000)
        codes[start : start + part.numel()] = bits.bitwise_right_shift_(16)
    return codes.view(torch.bfloat16).view(x.shape)


def _scratch(flat: Tensor) -> Tensor:
    """Memory for a chunk: to ask for it anew each time costs more than a pass over it."""
    return flat.new_empty(min(flat.numel() + BLOCK, _CHUNK), dtype=torch.float32)


def _restore_int8(codes: Tensor, peaks: Tensor, dtype: torch.dtype) -> Tensor:
    wide = codes.reshape(-1).to(torch.float32)
    size = wide.numel()
    scales = (peaks.float() * _STEP).unsqueeze(1)
    whole = size - size % BLOCK
    wide[:whole].view(-1, BLOCK).mul_(scales[: whole // BLOCK])
    if whole < size:
        wide[whole:] *= scales[-1]
    return wide.to(dtype).view(codes.shape)


_STEP = float(np.float32(1 / 127))


def _upwards(peak: Tensor) -> Tensor:
    """Round magnitudes up to bfloat16."""
    bits = peak.view(torch.int32)
    return (
        torch.where(peak.isnan(), 0x7FC0, (bits + 0xFFFF) >> 16)
        .to(torch.int16)
        .view(torch.bfloat16)
    )


def _reciprocal(peak: Tensor) -> Tensor:
    """127 / peak, or 0 for a block that is all but 0."""
    return torch.where(peak >= LEAST, 127.0 / peak, 0.0)


class _Draws:
    """The noise of a tensor: a pattern of one tile, and 16 bits for each tile to turn it by.

    Short i of the stream is lane i // 2 % 4, half i % 2 of counter i // 8. Value i of tile j has
    noise (short[i] ^ short[4096 + j]) + 2^15: two of them differ in one of the two, so they are
    independent.
    """

    def __init__(self, key: Tensor, flat: Tensor) -> None:
        tiles = -(-flat.numel() // TILE)
        shorts = draw(int(key), tiles).to(flat.device)
        self._pattern, self._turns = shorts[:TILE], shorts[TILE : TILE + tiles, None]
        held = min(tiles, _CHUNK // TILE)
        self._shorts = shorts.new_empty(held, TILE)
        self._floats = flat.new_empty(held * TILE, dtype=torch.float32)

    def words(self, start: int, count: int) -> Tensor:
        """Noise of values [start, start + count) in [0, 65536): (count,) int32, till next asked."""
        words = self._floats.view(torch.int32)[:count]
        return words.copy_(self._turned(start, count)).add_(2**15)

    def units(self, start: int, count: int) -> Tensor:
        """The same in [0, 1): (count,) float32."""
        return self._floats[:count].copy_(self._turned(start, count)).add_(2**15).mul_(2**-16)

    def _turned(self, start: int, count: int) -> Tensor:
        first, tiles = start // TILE, -(-count // TILE)
        turns, out = self._turns[first : first + tiles], self._shorts[:tiles]
        return torch.bitwise_xor(self._pattern, turns, out=out).view(-1)[:count]


def draw(key: int, tiles: int) -> Tensor:
    """Return the stream of a key, of at least TILE + tiles shorts: (n,) int16."""
    index = np.arange((TILE + tiles + 7) // 8)
    words = philox((key & 0xFFFFFFFF, key >> 32), (index, 0, 0, STREAM))
    return torch.from_numpy(words.reshape(-1).view("<i2"))


def _int8_fake(x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    peaks = x.new_empty((x.numel() + BLOCK - 1) // BLOCK, dtype=torch.bfloat16)
    return x.new_empty(x.shape, dtype=torch.int8), peaks


keep_int8 = define(
    "keep_int8(Tensor x, Tensor key) -> (Tensor, Tensor)",
    plain=_keep_int8,
    triton="kept:keep_int8",
    fake=_int8_fake,
)
keep_bfloat16 = define(
    "keep_bfloat16(Tensor x, Tensor key) -> Tensor",
    plain=_keep_bfloat16,
    triton="kept:keep_bfloat16",
    fake=lambda x, key: x.new_empty(x.shape, dtype=torch.bfloat16),
)
restore_int8 = define(
    "restore_int8(Tensor codes, Tensor peaks, ScalarType dtype) -> Tensor",
    plain=_restore_int8,
    triton="kept:restore_int8",
    fake=lambda codes, peaks, dtype: codes.new_empty(codes.shape, dtype=dtype),
)


def kept_reference(x: Tensor, form: str, key: int) -> list[Fraction]:
    """Oracle of `keep` and `restore`: value after value in exact fractions, row-major.

    Stochastic rounding to a grid g: x falls to floor(x / g + u) g.
    """
    values = [Fraction(v) for v in x.flatten().float().tolist()]
    kept = []
    for i, value in enumerate(values):
        u = Fraction(_short(key, i % TILE) ^ _short(key, TILE + i // TILE) ^ 2**15, 2**16)
        if form == "int8":
            block = values[i - i % BLOCK :][:BLOCK]
            grid = _ceil_bfloat16(max(map(abs, block))) / 127
        else:
            # towards zero and from it: magnitudes are rounded
            grid = _spacing(value)
        sign = -1 if form == "bfloat16" and value < 0 else 1
        kept.append(sign * (sign * value / grid + u).__floor__() * grid if grid else Fraction(0))
    return kept


def _short(key: int, i: int) -> int:
    words = philox_reference((key % 2**32, key >> 32), (i // 8, 0, 0, STREAM))
    return (words[i // 2 % 4] >> 16 * (i % 2)) & 0xFFFF


def _spacing(value: Fraction) -> Fraction:
    """The distance of bfloat16 numbers around a normal number, 8 significant bits."""
    if not value:
        return Fraction(0)
    exponent = int(np.frexp(np.float64(float(value)))[1])
    return Fraction(2) ** (exponent - 8)


def _ceil_bfloat16(peak: Fraction) -> Fraction:
    grid = _spacing(peak)
    return -((-peak / grid).__floor__()) * grid if grid else peak

"""Weights moved along counter-based noise: the one operation of zeroth-order training."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sft.kernels.noise import (
    LAYOUTS,
    MASK,
    TILE,
    Run,
    blocks,
    check_kind,
    fields,
    fill,
    noise,
    rounded,
    tile_words,
)
from sft.kernels.philox import BLOCK


@dataclass(frozen=True)
class Magnitude:
    """Move the weights of small magnitude: |w| <= threshold, of the value that is read."""

    threshold: float

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold: got {self.threshold!r}, allowed is a finite number >= 0")


@dataclass(frozen=True)
class Random:
    """Move a random part of the weights, the same for the same key.

    Args:
        key: 64 bits.
        share: how much is moved, in (0, 1], as a multiple of 2^-16.
    """

    key: int
    share: float

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and self.limit):
            raise ValueError(f"share: got {self.share!r}, allowed is [2**-16, 1]")

    @property
    def limit(self) -> int:
        """A weight moves if its 16 random bits are below this."""
        return round(self.share * 2**16)


Mask: TypeAlias = "Magnitude | Random"


@dataclass(frozen=True)
class Drawn:
    """Words drawn ahead: (key, parameter) -> (tiles, words) int32."""

    kind: str
    words: dict[tuple[int, int], Tensor]


@torch.no_grad()
def displace(
    weights: Sequence[Tensor],
    parameters: Sequence[int],
    draws: Sequence[tuple[int, float]],
    *,
    kind: str = "rademacher",
    decays: Sequence[float] | None = None,
    masks: Sequence[Mask | None] | None = None,
    out: Sequence[Tensor] | None = None,
    drawn: Drawn | None = None,
) -> list[Tensor]:
    """Return the weights moved along draws of noise; where a mask is 0 the stored bits are kept.

        out = round(w - (c_1 z_1 + ... + c_n z_n + decay w))

    in float32 (float64 for float64 weights), summed in this order, rounded once to the dtype of w.
    The same arguments give the same bits: whole or in parts, in place or not, alone or among
    other tensors, on every device (kind "gaussian": on every device of one kind).

    Args:
        weights: tensors of any float dtype and layout, all on one device.
        parameters: the number of each, 32 bits.
        draws: (key, c) of each direction; w + eps z is c = -eps. c is rounded to float32, to 16
            significant bits for "gaussian_table"; draws of c = 0 are left out.
        kind: of the noise, one of `KINDS`.
        decays: what is subtracted of each weight itself.
        masks: which part of each tensor moves; None moves all.
        out: where to; the weights themselves for in place. None allocates.
        drawn: words from `draw_ahead`; those it lacks are drawn here.

    Returns:
        The tensors written to.

    Raises:
        ValueError: lengths, shapes, dtypes or devices do not fit.

    Papers: MeZO, arXiv 2305.17333, Algorithm 1; Sparse MeZO, arXiv 2402.15751, for the mask.
    Buffers: at most 1 MiB each, and a bit a weight for each of many draws.
    """
    out = [torch.empty_like(w) for w in weights] if out is None else list(out)
    decays = [0.0] * len(weights) if decays is None else decays
    masks = [None] * len(weights) if masks is None else masks
    _check(weights, parameters, kind, decays, masks, out, drawn)
    items = list(map(Item, weights, out, parameters, decays, masks))
    if weights and weights[0].device.type != "cpu":
        from sft.kernels.triton.displace import displace_on_device

        displace_on_device(items, draws, kind)
        return out
    _displace_all(items, draws, kind, {} if drawn is None else drawn.words)
    return out


def draw_ahead(
    keys: Sequence[int],
    parameters: Sequence[int],
    numels: Sequence[int],
    kind: str,
    device: torch.device | str = "cpu",
) -> Drawn:
    """Draw the words of many tensors at once, for several calls of `displace`.

    A bit a weight for each key (16 or 32 for the normals). Empty for other devices than the CPU,
    which draw in registers.
    """
    check_kind(kind)
    if torch.device(device).type != "cpu":
        return Drawn(kind, {})
    tiles = [-(-numel // TILE) for numel in numels]
    runs = [Run(parameter, 0, count) for parameter, count in zip(parameters, tiles, strict=True)]
    words = {}
    for key in keys:
        drawn, done = tile_words(key, runs, kind), 0
        for run in runs:
            words[key, run.parameter] = drawn[done : done + run.tiles]
            done += run.tiles
    return Drawn(kind, words)


class Item(NamedTuple):
    """A tensor to move, or the part of one that starts at the flat index `start`."""

    weight: Tensor
    out: Tensor
    parameter: int
    decay: float
    mask: Mask | None
    start: int = 0


def _check(
    weights: Sequence[Tensor],
    parameters: Sequence[int],
    kind: str,
    decays: Sequence[float],
    masks: Sequence[Mask | None],
    out: Sequence[Tensor],
    drawn: Drawn | None,
) -> None:
    check_kind(kind)
    if drawn is not None and drawn.kind != kind:
        raise ValueError(f"drawn: got words for {drawn.kind!r}, allowed is noise {kind!r}")
    for name, given in (("parameters", parameters), ("decays", decays), ("masks", masks)):
        _require(len(given) == len(weights), name, len(given), f"one for each of {len(weights)}")
    _require(len(out) == len(weights), "out", len(out), f"one for each of {len(weights)}")
    for w, o in zip(weights, out, strict=True):
        _require(w.is_floating_point(), "weights", w.dtype, "a float dtype")
        fits = (o.shape, o.dtype, o.device) == (w.shape, w.dtype, w.device)
        _require(fits, "out", (tuple(o.shape), o.dtype, str(o.device)), "shaped like its weight")
        _require(w.device == weights[0].device, "weights", str(w.device), "one device a call")


def _require(fits: bool, name: str, given: object, allowed: str) -> None:
    if not fits:
        raise ValueError(f"{name}: got {given}, allowed is {allowed}")


def _displace_all(
    items: list[Item],
    draws: Sequence[tuple[int, float]],
    kind: str,
    drawn: dict[tuple[int, int], Tensor],
) -> None:
    """Take the contiguous tensors together, the others in small pieces that are copied."""
    flat: dict[torch.dtype, list[Item]] = {torch.float32: [], torch.float64: []}
    for item in items:
        wide = torch.promote_types(item.weight.dtype, torch.float32)
        if item.weight.is_contiguous() and item.out.is_contiguous():
            weight, out = item.weight.detach().view(-1), item.out.detach().view(-1)
            flat[wide].append(item._replace(weight=weight, out=out))
            continue
        for piece in _pieces(item):
            weight = piece.weight.reshape(-1)
            moved = torch.empty_like(weight)
            _displace_flat([piece._replace(weight=weight, out=moved)], draws, kind, drawn, wide)
            piece.out.copy_(moved.view(piece.out.shape))
    for wide, some in flat.items():
        _displace_flat(some, draws, kind, drawn, wide)


def _pieces(item: Item) -> Iterator[Item]:
    """Cut along the first dimension until a piece is small."""
    if item.weight.numel() <= _TILES * TILE:
        yield item
        return
    row = item.weight[0].numel()
    step = max(1, _TILES * TILE // row)
    for first in range(0, len(item.weight), step):
        piece = item._replace(
            weight=item.weight[first : first + step],
            out=item.out[first : first + step],
            start=item.start + first * row,
        )
        if row > _TILES * TILE:
            yield from _pieces(piece._replace(weight=piece.weight[0], out=piece.out[0]))
        else:
            yield piece


# Tiles expanded at once: a float32 buffer of them is 1 MiB.
_TILES = 64
_kept = threading.local()


def _buffers(count: int, dtype: torch.dtype) -> list[Tensor]:
    """Buffers that a thread keeps, (count, tiles, 4096); those of float64 are not kept."""
    if dtype == torch.float64:
        return list(torch.empty(count, _TILES, TILE, dtype=dtype))
    kept: list[Tensor] = _kept.__dict__.setdefault("buffers", [])
    while len(kept) < count:
        kept.append(torch.empty(_TILES, TILE))
    return kept


def _displace_flat(
    items: list[Item],
    draws: Sequence[tuple[int, float]],
    kind: str,
    drawn: dict[tuple[int, int], Tensor],
    wide: torch.dtype,
) -> None:
    """Move contiguous vectors whose arithmetic is of one dtype."""
    draws = [(key, coefficient(c, kind, wide)) for key, c in draws]
    draws = [(key, c) for key, c in draws if c]
    runs = [
        Run(item.parameter, first := item.start // TILE, _last(item) - first, owner)
        for owner, item in enumerate(items)
    ]
    # Philox is fast on many counters, but the words of all draws are held at once
    many = max(_TILES, BLOCK // LAYOUTS[kind].counters // max(1, len(draws)))
    for block in blocks(runs, many):
        words = [_words(key, block, kind, drawn) for key, _ in draws]
        done = 0
        for part in blocks(block, _TILES):
            tiles = sum(run.tiles for run in part)
            moved, spare = (buffer[:tiles] for buffer in _buffers(3, wide)[:2])
            chosen = [w[done : done + tiles] for w in words]
            _sum(moved, spare, chosen, [c for _, c in draws], kind)
            _finish(items, part, moved.view(-1), wide)
            done += tiles


def _last(item: Item) -> int:
    return -(-(item.start + item.weight.numel()) // TILE)


def coefficient(c: float, kind: str, wide: torch.dtype) -> float:
    """Return c as it is used: float64 weights take all of it, but for the table's 16 bits."""
    if wide == torch.float64 and kind != "gaussian_table":
        return c
    return rounded(c, kind)


def _words(key: int, block: list[Run], kind: str, drawn: dict[tuple[int, int], Tensor]) -> Tensor:
    found = [drawn.get((key, run.parameter)) for run in block]
    parts = [
        words[run.first : run.first + run.tiles]
        for run, words in zip(block, found, strict=True)
        if words is not None
    ]
    if len(parts) < len(block) or sum(map(len, parts)) < sum(run.tiles for run in block):
        return tile_words(key, block, kind)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sum(
    moved: Tensor, spare: Tensor, words: list[Tensor], coefficients: list[float], kind: str
) -> None:
    """Write c_1 z_1 + ... + c_n z_n, (tiles, 4096)."""
    if not words:
        moved.zero_()
    for turn, (some, c) in enumerate(zip(words, coefficients, strict=True)):
        target = spare if turn else moved
        if target.dtype == torch.float64:
            z = torch.empty(target.shape)
            fill(kind, some, 1.0, z)
            target.copy_(z).mul_(c)
        else:
            fill(kind, some, c, target)
        if turn:
            moved.add_(spare)


def _finish(items: list[Item], part: list[Run], moved: Tensor, wide: torch.dtype) -> None:
    """Subtract what was summed from the weights of some runs, and store."""
    base = 0
    for run in part:
        item = items[run.owner]
        first = max(item.start, run.first * TILE)
        last = min(item.start + item.weight.numel(), (run.first + run.tiles) * TILE)
        inside = first - run.first * TILE
        by = moved[base + inside :][: last - first]
        base += run.tiles * TILE
        weight, out = (t[first - item.start : last - item.start] for t in item[:2])
        spare, store = (b.view(-1)[: last - first] for b in _buffers(3, wide)[1:3])
        if weight.dtype != wide:
            weight = store.copy_(weight)
        if item.decay:
            decay = item.decay if wide == torch.float64 else float(np.float32(item.decay))
            by.add_(torch.mul(weight, decay, out=spare))
        if item.mask is not None:
            _hide(by, weight, item.mask, run, inside)
        if out.dtype == wide:
            torch.sub(weight, by, out=out)
        else:
            out.copy_(torch.sub(weight, by, out=by))


def _hide(by: Tensor, weight: Tensor, mask: Mask, run: Run, first: int) -> None:
    """Zero what is subtracted where the mask is 0; `first` is where the part starts in its run."""
    if isinstance(mask, Magnitude):
        # passes `by` where -edge < w < edge, in one pass
        edge = _above(mask.threshold, weight.dtype)
        torch.ops.aten.hardtanh_backward.grad_input(by, weight, -edge, edge, grad_input=by)
    else:
        words = tile_words(mask.key, [run], "gaussian_table", MASK)
        chosen = fields(words).view(-1)[first : first + len(by)]
        by.masked_fill_(chosen >= mask.limit, 0.0)


def _above(threshold: float, dtype: torch.dtype) -> float:
    """Return the smallest number of the dtype above a threshold."""
    number = np.float64 if dtype == torch.float64 else np.float32
    below = number(threshold)
    if below > threshold:
        below = np.nextafter(below, number(-math.inf))
    return float(np.nextafter(below, number(math.inf)))


def displace_reference(
    weight: Tensor,
    parameter: int,
    draws: Sequence[tuple[int, float]],
    *,
    kind: str = "rademacher",
    decay: float = 0.0,
    mask: Mask | None = None,
) -> Tensor:
    """Oracle of `displace`: one dense tensor after another (MeZO's `PerturbParameters`)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    w = weight.to(wide).contiguous().view(-1)
    total = torch.zeros_like(w)
    for key, c in draws:
        z = noise(key, parameter, w.numel(), kind=kind).to(wide)
        total += torch.tensor(coefficient(c, kind, wide), dtype=wide) * z
    if decay:
        total += torch.tensor(decay, dtype=wide) * w
    moved = (w - total).to(weight.dtype).view(weight.shape)
    return moved if mask is None else torch.where(mask_of(weight, parameter, mask), moved, weight)


def mask_of(weight: Tensor, parameter: int, mask: Mask) -> Tensor:
    """Return a mask as booleans of the weight's shape: a byte a weight, for reports and tests."""
    if isinstance(mask, Magnitude):
        return weight.abs() <= mask.threshold
    tiles = -(-weight.numel() // TILE)
    words = tile_words(mask.key, [Run(parameter, 0, tiles)], "gaussian_table", MASK)
    chosen = fields(words).view(-1)[: weight.numel()].view(weight.shape)
    return (chosen < mask.limit).to(weight.device)

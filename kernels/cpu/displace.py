"""`displace` on the CPU: tiles of noise in buffers that stay in a core's second-level cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sft.kernels.cpu import native
from sft.kernels.noise import LAYOUTS, TILE, Run, blocks, fill, rounded, tile_words
from sft.kernels.philox import BLOCK

Words = dict[tuple[int, int], Tensor]


class Hides(Protocol):
    """A mask."""

    def hide(self, moved: Tensor, weight: Tensor, run: Run, first: int) -> None:
        """Zero what is subtracted from the weights that stay.

        Args:
            moved: (n,) what is subtracted, changed in place.
            weight: (n,) of the dtype of `moved`.
            run: tiles that hold the n weights.
            first: where they start in the run.
        """

    def plainly(self) -> tuple[int, int, float, int]:
        """Return what compiled code takes: the kind, a key, a bound in float32, one of 16 bits."""


class Item(NamedTuple):
    """A tensor to move, or the part of one that starts at the flat index `start`."""

    weight: Tensor
    out: Tensor
    parameter: int
    decay: float
    mask: Hides | None
    start: int = 0


def displace_on_cpu(
    items: list[Item], draws: Sequence[tuple[int, float]], kind: str, drawn: Words
) -> None:
    """Move the contiguous tensors together, the others in small pieces that are copied.

    So are those of another device, for which there may be no kernel.
    """
    compiled = native.wanted()
    flat: dict[torch.dtype, list[Item]] = {torch.float32: [], torch.float64: []}
    for item in items:
        wide = torch.promote_types(item.weight.dtype, torch.float32)
        if all(t.is_contiguous() and t.device.type == "cpu" for t in (item.weight, item.out)):
            weight, out = item.weight.detach().view(-1), item.out.detach().view(-1)
            item = item._replace(weight=weight, out=out)
            if compiled and native.serves(item, kind):
                native.move(item, draws, kind)
            else:
                flat[wide].append(item)
            continue
        for piece in _pieces(item):
            weight = piece.weight.cpu().reshape(-1)
            moved = torch.empty_like(weight)
            _Mover([piece._replace(weight=weight, out=moved)], draws, kind, drawn, wide).run()
            piece.out.copy_(moved.view(piece.out.shape))
    for wide, some in flat.items():
        if some:
            _Mover(some, draws, kind, drawn, wide).run()


# Tiles expanded at once: enough for an operation to be worth its call and torch's threads, few
# enough for a cache. A float32 buffer of them is 2 MiB.
_TILES = 128
# From so many tiles on the work is shared among torch's threads.
_SHARED = 1024
# Buffers: what is subtracted, one term of it, a 16-bit weight widened.
_MOVED, _SPARE, _COPY = range(3)


def _pieces(item: Item) -> Iterator[Item]:
    """Cut along the first dimension until a piece is small."""
    if item.weight.numel() <= _TILES * TILE:
        yield item
        return
    row = item.weight[0].numel()
    step = max(1, _TILES * TILE // row)
    for first in range(0, len(item.weight), step):
        weight, out = (t[first : first + step] for t in item[:2])
        start = item.start + first * row
        if row > _TILES * TILE:
            yield from _pieces(item._replace(weight=weight[0], out=out[0], start=start))
        else:
            yield item._replace(weight=weight, out=out, start=start)


class _Mover:
    """Moves contiguous vectors whose arithmetic is of one dtype."""

    def __init__(
        self,
        items: list[Item],
        draws: Sequence[tuple[int, float]],
        kind: str,
        drawn: Words,
        wide: torch.dtype,
    ) -> None:
        self.items = items
        self.kind = kind
        self.drawn = drawn
        self.wide = wide
        used = [(key, coefficient(c, kind, wide)) for key, c in draws]
        self.draws = [(key, c) for key, c in used if c]

    def run(self) -> None:
        """Move all, by one thread if there is little to do: the others sleep, and wake slowly."""
        runs = [
            Run(item.parameter, first := item.start // TILE, _end(item) - first, owner)
            for owner, item in enumerate(self.items)
        ]
        threads = torch.get_num_threads()
        if threads == 1 or sum(run.tiles for run in runs) >= _SHARED:
            self._move(runs)
            return
        torch.set_num_threads(1)
        try:
            self._move(runs)
        finally:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def _move(self, runs: list[Run]) -> None:
        # Philox is fast on many counters, but the words of all draws are held at once
        many = BLOCK // LAYOUTS[self.kind].counters // max(1, len(self.draws))
        for block in blocks(runs, max(_TILES, many)):
            words = [_words(key, block, self.kind, self.drawn) for key, _ in self.draws]
            done = 0
            for part in blocks(block, _TILES):
                tiles = sum(run.tiles for run in part)
                self._finish(part, self._sum([some[done : done + tiles] for some in words], tiles))
                done += tiles

    def _sum(self, words: list[Tensor], tiles: int) -> Tensor:
        """Return c_1 z_1 + ... + c_n z_n, flat."""
        moved = _buffer(_MOVED, self.wide)[:tiles]
        if not words:
            moved.zero_()
        for turn, (some, (_, c)) in enumerate(zip(words, self.draws, strict=True)):
            target = _buffer(_SPARE, self.wide)[:tiles] if turn else moved
            if self.wide == torch.float64:
                z = torch.empty(target.shape)
                fill(self.kind, some, 1.0, z)
                target.copy_(z).mul_(c)
            else:
                fill(self.kind, some, c, target)
            if turn:
                moved.add_(target)
        return moved.view(-1)

    def _finish(self, part: list[Run], moved: Tensor) -> None:
        """Subtract what was summed from the weights of some runs, and store."""
        base = 0
        for run in part:
            item = self.items[run.owner]
            first = max(item.start, run.first * TILE)
            count = min(_stop(item), (run.first + run.tiles) * TILE) - first
            inside = first - run.first * TILE
            by = moved[base + inside :][:count]
            base += run.tiles * TILE
            weight, out = (t[first - item.start :][:count] for t in item[:2])
            if weight.dtype != self.wide:
                weight = _buffer(_COPY, self.wide).view(-1)[:count].copy_(weight)
            if item.decay:
                spare = _buffer(_SPARE, self.wide).view(-1)[:count]
                by.add_(torch.mul(weight, self._decay(item), out=spare))
            if item.mask is not None:
                item.mask.hide(by, weight, run, inside)
            if out.dtype == self.wide:
                torch.sub(weight, by, out=out)
            else:
                out.copy_(torch.sub(weight, by, out=by))

    def _decay(self, item: Item) -> float:
        return item.decay if self.wide == torch.float64 else float(np.float32(item.decay))


def coefficient(c: float, kind: str, wide: torch.dtype) -> float:
    """Return c as it is used: float64 weights take all of it, but for the table's 16 bits."""
    if wide == torch.float64 and kind != "gaussian_table":
        return c
    return rounded(c, kind)


def _stop(item: Item) -> int:
    return item.start + item.weight.numel()


def _end(item: Item) -> int:
    return -(-_stop(item) // TILE)


def _words(key: int, block: list[Run], kind: str, drawn: Words) -> Tensor:
    """Words of the tiles of a block, those drawn ahead if all of them are there."""
    found = [drawn.get((key, run.parameter)) for run in block]
    parts = [
        words[run.first : run.first + run.tiles]
        for run, words in zip(block, found, strict=True)
        if words is not None
    ]
    if sum(map(len, parts)) < sum(run.tiles for run in block):
        return tile_words(key, block, kind)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_kept = threading.local()


def _buffer(which: int, dtype: torch.dtype) -> Tensor:
    """Return a buffer (tiles, 4096) that a thread keeps; those of float64 are not kept."""
    if dtype == torch.float64:
        return torch.empty(_TILES, TILE, dtype=dtype)
    kept: dict[int, Tensor] = _kept.__dict__.setdefault("buffers", {})
    if which not in kept:
        kept[which] = torch.empty(_TILES, TILE)
    return kept[which]

"""The positions of the largest gradient entries, without the dense gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from sft.kernels.library import implementation
from sft.kernels.outer import DenseOuter, Outer
from sft.kernels.outer_above import num_tiles, outer_above
from sft.kernels.outer_at import rows_per_block
from sft.kernels.pattern import Pattern, index_dtype
from sft.kernels.topk import StreamingTopK, top_k, top_k_reference

# Entries by which a threshold is guessed, and slots for each one that a tile should hold.
SAMPLE, SLACK = 2**14, 2


def topk_outer(outer: Outer, k: int, exclude: Pattern | None = None) -> Tensor:
    """Return the positions of the k entries of largest |gradient|.

    SpIEL-AG's candidates (arXiv 2401.16405, section 3.2). The authors build the dense gradient and
    sort all of it; here one row block lives at a time, and on a GPU one tile a program, which lists
    the entries above a threshold that a sample guesses.

    Args:
        outer: the (rows, cols) gradient.
        k: how many; fewer come back when fewer are left after `exclude`.
        exclude: positions that may not be chosen.

    Returns:
        (<= k,) int64 ascending; ties go to the lowest position.
    """
    chosen = _from_tiles(outer, k, exclude) if isinstance(outer, DenseOuter) else None
    return _from_blocks(outer, k, exclude) if chosen is None else chosen


def _from_blocks(outer: Outer, k: int, exclude: Pattern | None) -> Tensor:
    rows, cols = outer.shape
    best = StreamingTopK(k)
    step = rows_per_block(cols, 4)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        scores = outer.block(start, stop).abs_().view(-1)
        if exclude is not None:
            scores.index_fill_(0, exclude.between(start, stop), float("-inf"))
        best.push(scores, start * cols)
    return best.positions()


def _from_tiles(outer: DenseOuter, k: int, exclude: Pattern | None) -> Tensor | None:
    """Return the exact choice by a guessed threshold, or None.

    Where no tiles are to be had, or the guess is of no use.
    """
    if implementation(outer.left.device) != "triton" or outer.left.dtype == torch.float64:
        return None
    taken = 0 if exclude is None else len(exclude)
    guess = _threshold(outer, k + taken)
    if guess is None:
        return None
    threshold, share = guess
    tiles = num_tiles(outer.shape)
    fair = SLACK * int(share * outer.shape[0] * outer.shape[1] / tiles) + 32
    starts = torch.arange(tiles + 1, dtype=torch.int32, device=threshold.device) * fair
    positions, values, counts = outer_above(outer.left, outer.right, threshold, starts)
    if int(counts.max()) > fair:
        # large entries crowd in some tiles: now that they are counted, all of them fit
        starts[1:] = counts.cumsum(0)
        positions, values, counts = outer_above(outer.left, outer.right, threshold, starts)
    kept = positions >= 0
    positions, order = positions[kept].long().sort()
    values = values[kept][order]
    if exclude is not None:
        free = ~torch.isin(positions, exclude.indices.long(), assume_unique=True)
        positions, values = positions[free], values[free]
    # enough of them reach the threshold: then the k largest do, whatever the guess was
    return positions[top_k(values.abs(), k)] if len(positions) >= k else None


def _threshold(outer: DenseOuter, wanted: int) -> tuple[Tensor, float] | None:
    """Guess what at least `wanted` entries reach: a threshold and the share it should let pass.

    None where there are too few entries, or too many of them wanted, for a sample to save work.
    """
    rows, cols = outer.shape
    numel = rows * cols
    if wanted <= 0 or numel < 4 * SAMPLE or 8 * wanted > numel:
        return None
    # evenly spread, at an odd distance so that no column is favoured
    places = torch.arange(SAMPLE, device=outer.left.device) * (numel // SAMPLE)
    places += torch.arange(SAMPLE, device=outer.left.device) * 40503 % (numel // SAMPLE)
    sample = outer.at(Pattern(places.to(index_dtype(numel)), outer.shape)).abs()
    expected = wanted * SAMPLE / numel
    # four standard deviations more than are wanted
    rank = int(expected + 4 * expected**0.5 + 4)
    return torch.topk(sample, rank, sorted=False).values.min(), rank / SAMPLE


def topk_outer_reference(outer: Outer, k: int, exclude: Pattern | None = None) -> Tensor:
    """Oracle of `topk_outer`: the dense gradient and a stable sort."""
    scores = outer.block(0, outer.shape[0]).abs().flatten()
    if exclude is not None:
        scores[exclude.indices.long()] = float("-inf")
    chosen = top_k_reference(scores, k)
    return chosen[torch.isfinite(scores[chosen])]

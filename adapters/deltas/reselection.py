"""Drop and grow: the next support from the present one, as pure functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sft.adapters.selection.random import random_subset
from sft.kernels.pattern import Pattern
from sft.kernels.topk import top_k
from sft.kernels.topk_product import topk_product


class Reselection(NamedTuple):
    """The next support of one matrix; its size is that of the present one.

    Args:
        indices: (k,) int64, the new positions, ascending.
        source: (k,) int64, the present slot that each new slot keeps, or -1 where grown.
        candidate: (k,) int64, which candidate a grown slot was, or -1 where kept.
    """

    indices: Tensor
    source: Tensor
    candidate: Tensor


def drop_and_grow(
    indices: Tensor, values: Tensor, candidates: Tensor, scores: Tensor, num_replaced: int
) -> Reselection:
    """Replace the smallest deltas by the candidates of largest |accumulated gradient|.

    SpIEL-AG (arXiv 2401.16405, section 3.2). The drop set D are the `num_replaced` smallest
    |delta|. A candidate may win if it is not active or lies in D; the winners are the largest
    |score|, at most |D|. A position both dropped and won stays as it is, state included; the other
    winners replace the smallest |delta| that are left in D, one for one.

    Args:
        indices: (k,) the present support, ascending.
        values: (k,) its deltas.
        candidates: (c,) positions, ascending.
        scores: (c,) accumulated gradients, signed: a sum, so alternating gradients cancel.
        num_replaced: |D|, at most k.

    Returns:
        The next support. Ties are broken by position.
    """
    indices, candidates = indices.long(), candidates.long()
    dropped = values.abs().argsort(stable=True)[:num_replaced]
    is_dropped = torch.zeros_like(indices, dtype=torch.bool)
    is_dropped[dropped] = True
    valid = (~torch.isin(candidates, indices[~is_dropped])).nonzero().flatten()
    won = valid[top_k(scores[valid].abs(), num_replaced)]
    stays = torch.isin(indices, candidates[won])
    grown = won[~torch.isin(candidates[won], indices)]
    leaving = dropped[~stays[dropped]][: grown.numel()]
    return _exchange(indices, leaving, candidates[grown], grown)


def drop_and_grow_by_product(
    indices: Tensor,
    values: Tensor,
    row: Tensor,
    col: Tensor,
    num_replaced: int,
    generator: torch.Generator,
) -> Reselection:
    """Replace the smallest deltas by the inactive positions of largest row[r] * col[c].

    SpIEL-MA (arXiv 2401.16405, section 3.3): row and col are SM3's squared-gradient accumulators.
    Positions that are being dropped count as active. Where fewer than asked for have a positive
    score, the rest is drawn at random; the authors leave them to the order of a sort.

    Args:
        indices: (k,) the present support, ascending.
        values: (k,) its deltas.
        row: (rows,) accumulators.
        col: (cols,) accumulators.
        num_replaced: how many, at most k.
        generator: on the CPU, seeds the random fill.
    """
    indices = indices.long()
    shape = (row.numel(), col.numel())
    free = shape[0] * shape[1] - indices.numel()
    num_replaced = min(num_replaced, free)
    grown = topk_product(row, col, num_replaced, Pattern(indices, shape))
    if grown.numel() < num_replaced:
        taken = torch.cat([indices, grown]).sort().values
        missing = num_replaced - grown.numel()
        grown = torch.cat([grown, _random_outside(taken, shape, missing, generator)])
    leaving = values.abs().argsort(stable=True)[:num_replaced]
    return _exchange(indices, leaving, grown, torch.zeros_like(grown))


def _exchange(indices: Tensor, leaving: Tensor, grown: Tensor, candidate: Tensor) -> Reselection:
    keeps = torch.ones_like(indices, dtype=torch.bool)
    keeps[leaving] = False
    kept = keeps.nonzero().flatten()
    positions, order = torch.cat([indices[kept], grown]).sort()
    source = torch.cat([kept, torch.full_like(grown, -1)])[order]
    candidate = torch.cat([torch.full_like(kept, -1), candidate])[order]
    return Reselection(positions, source, candidate)


def _random_outside(
    taken: Tensor, shape: tuple[int, int], k: int, generator: torch.Generator
) -> Tensor:
    """Return k random positions that are not in `taken` (ascending)."""
    rank = random_subset(shape[0] * shape[1] - taken.numel(), k, generator).to(taken.device)
    # the j-th free position lies behind as many taken ones as precede it
    free_before = taken - torch.arange(taken.numel(), device=taken.device)
    return rank + torch.searchsorted(free_before, rank, right=True)

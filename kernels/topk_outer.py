"""The positions of the largest gradient entries, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from sft.kernels.outer import Outer
from sft.kernels.outer_at import rows_per_block
from sft.kernels.pattern import Pattern
from sft.kernels.topk import StreamingTopK, top_k_reference


def topk_outer(outer: Outer, k: int, exclude: Pattern | None = None) -> Tensor:
    """Return the positions of the k entries of largest |gradient|.

    SpIEL-AG's candidates (arXiv 2401.16405, section 3.2). The authors build the dense gradient and
    sort all of it; here one row block lives at a time.

    Args:
        outer: the (rows, cols) gradient.
        k: how many; fewer come back when fewer are left after `exclude`.
        exclude: positions that may not be chosen.

    Returns:
        (<= k,) int64 ascending; ties go to the lowest position.
    """
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


def topk_outer_reference(outer: Outer, k: int, exclude: Pattern | None = None) -> Tensor:
    """Oracle of `topk_outer`: the dense gradient and a stable sort."""
    scores = outer.block(0, outer.shape[0]).abs().flatten()
    if exclude is not None:
        scores[exclude.indices.long()] = float("-inf")
    chosen = top_k_reference(scores, k)
    return chosen[torch.isfinite(scores[chosen])]

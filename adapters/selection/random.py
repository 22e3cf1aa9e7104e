"""Uniform random positions."""

from __future__ import annotations

import torch
from torch import Tensor

from sft.adapters.select import Candidates

CALIBRATED = False


def select(candidates: Candidates, k: int) -> Tensor:
    """Return a uniform k-subset of the positions, ascending."""
    rows, cols = candidates.shape
    return random_subset(rows * cols, k, candidates.generator)


def random_subset(numel: int, k: int, generator: torch.Generator) -> Tensor:
    """Return a uniform k-subset of range(numel): (k,) int64 ascending, in O(k) memory.

    The first k distinct values of a uniform stream are a uniform k-subset.
    """
    if 4 * k >= numel:
        return torch.randperm(numel, generator=generator)[:k].sort().values
    stream = torch.empty(0, dtype=torch.int64)
    while True:
        draws = torch.randint(numel, (k + k // 8 + 16,), generator=generator)
        stream = torch.cat([stream, draws])
        ordered, arrival = stream.sort(stable=True)
        is_first = torch.ones_like(ordered, dtype=torch.bool)
        is_first[1:] = ordered[1:] != ordered[:-1]
        firsts = arrival[is_first].sort().values
        if firsts.numel() >= k:
            return stream[firsts[:k]].sort().values

"""Positions of the largest or smallest pre-trained weights."""

from __future__ import annotations

from torch import Tensor

from sft.adapters.select import Candidates

CALIBRATED = False


def select(candidates: Candidates, k: int) -> Tensor:
    """Return the k positions of largest (or smallest) |w|."""
    return candidates.best(candidates.read().abs(), k)
